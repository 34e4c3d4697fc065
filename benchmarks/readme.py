"""``python -m benchmarks readme``: README's performance section, made from a record."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.contenders import BOTH, FORWARD, STEP
from benchmarks.plot import picture_path, pictures_of
from benchmarks.record import Record
from benchmarks.report import best_rival, duration, ratio
from benchmarks.rivals import is_ours

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
MEBI = 1 << 20
MODES = {FORWARD: "forward", BOTH: "forward + backward"}


def section(record: Record, record_path: Path, readme: Path) -> str:
    """The text between the markers: where and how it was measured, tables, and the pictures' paths.

    Args:
        record: the record.
        record_path: its file; the pictures lie beside it.
        readme: the file that the section stands in: links are relative to its folder.
    """

    def link(path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), readme.absolute().parent)).as_posix()

    machine, settings = record.machine, record.settings
    place = machine["processor"] if settings["device"] == "cpu" else ", ".join(machine["gpus"])
    commit = (record.git.get("commit") or "unknown")[:10] + (" with changes" if record.git.get("dirty") else "")
    threads = machine["threads"]
    parts = [
        f"{place} ({machine['system']}, {machine['instruction_set']}), {threads} thread{'s' if threads > 1 else ''}"
    ]
    parts += [", ".join(f"{name} {version}" for name, version in record.versions.items())]
    parts += [f"{record.created[:10]}, commit {commit}", "cold caches" if settings["cold"] else "warm caches"]
    lines = [f"Measured on {'; '.join(parts)}. Command:", "", "```", record.command, "```", ""]
    layers = [cell for cell in record.cells if cell["mode"] != STEP]
    if layers:
        lines += [
            "Time over that of torch's own layer on a weight that was mixed before (1.00 is as fast, lower is faster), "
            "medians of rounds in which all rivals take turns; extra memory at the peak of forward + backward, beyond "
            "outputs and gradients.",
            "",
            *_layers_table(layers),
            "",
        ]
    models = [cell for cell in record.cells if cell["mode"] == STEP]
    if models:
        lines += ["Whole training steps, end to end and with a block in four replaced:", "", *_models_table(models), ""]
    lines += [f"![{name}]({link(picture_path(record_path, name))})" for name in pictures_of(record)]
    lines += ["", f"Everything measured: [{record_path.name}]({link(record_path)})."]
    return "\n".join(lines)


def _layers_table(cells: list[dict[str, Any]]) -> list[str]:
    own = list(dict.fromkeys(name for cell in cells for name in cell["rivals"] if is_ours(name)))
    others = ["best rival", *(["naive"] if any("naive" in cell["rivals"] for cell in cells) else [])]
    modes = [mode for mode in MODES if any(cell["mode"] == mode for cell in cells)]
    heads = [f"{MODES[mode]}: {name}" for mode in modes for name in (*own, *others)]
    memory = [f"extra MiB: {name}" for name in own]
    lines = _header(["case", *heads, *memory])
    found = {(cell["case"]["key"], cell["mode"]): cell for cell in cells}
    for key in dict.fromkeys(cell["case"]["key"] for cell in cells):
        row = [key]
        for mode in modes:
            cell = found.get((key, mode), {"rivals": {}, "baseline": ""})
            row += [ratio(cell["rivals"].get(name)) for name in own]
            row.append(_best_of_others(cell))
            row += [ratio(cell["rivals"].get("naive"))] * (len(others) - 1)
        last = found.get((key, modes[-1]), {"rivals": {}})
        row += [_mebibytes(last["rivals"].get(name), "peak_extra_bytes") for name in own]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _best_of_others(cell: dict[str, Any]) -> str:
    rivals = {name: rival for name, rival in cell["rivals"].items() if not is_ours(name)}
    name = best_rival({**cell, "rivals": rivals})
    return "-" if name is None else f"{ratio(rivals[name])} ({name})"


def _models_table(cells: list[dict[str, Any]]) -> list[str]:
    lines = _header(["model", "variant", "step", "ratio", "peak MiB", "parameters", "optimizer state MiB"])
    for cell in cells:
        for name, rival in cell["rivals"].items():
            parameters = "-" if "failed" in rival else f"{rival['parameters']:,}"
            values = [duration(rival), ratio(rival), _mebibytes(rival, "peak_bytes"), parameters]
            row = [cell["case"]["key"], name, *values, _mebibytes(rival, "optimizer_bytes")]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def _header(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]


def _mebibytes(rival: dict[str, Any] | None, name: str) -> str:
    return "-" if rival is None or "failed" in rival else f"{rival[name] / MEBI:.1f}"


def replaced(text: str, content: str) -> str:
    """``text`` with ``content`` between the two markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    counts = text.count(START), text.count(END)
    if counts != (1, 1) or text.index(START) > text.index(END):
        raise ValueError(f"got {counts[0]} × {START} and {counts[1]} × {END}, expected one of each, in this order")
    before, rest = text.split(START)
    return f"{before}{START}\n{content}\n{END}{rest.split(END)[1]}"


@click.command("readme")
@click.argument("record", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--readme",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path("README.md"),
    show_default=True,
)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where README differs from the record.")
def readme_command(record: Path, readme: Path, check: bool) -> None:
    """Write README's performance section, between its two markers, from RECORD; its pictures must be drawn."""
    try:
        found = Record.load(record)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="RECORD") from error
    missing = [path.name for name in pictures_of(found) if not (path := picture_path(record, name)).exists()]
    if missing:
        raise click.BadParameter(
            f"got {record.name} without {', '.join(missing)}, expected the pictures beside it: run `plot` first",
            param_hint="RECORD",
        )
    text = readme.read_text()
    try:
        wanted = replaced(text, section(found, record, readme))
    except ValueError as error:
        raise click.BadParameter(f"{readme.name}: {error}", param_hint="--readme") from error
    if check:
        if wanted != text:
            click.echo(
                f"{readme.name} differs from what {record.name} gives: run `python -m benchmarks readme`.", err=True
            )
            sys.exit(1)
        click.echo(f"{readme.name} is what {record.name} gives.")
    elif wanted == text:
        click.echo(f"{readme.name} is up to date.")
    else:
        readme.write_text(wanted)
        click.echo(f"{readme.name}: performance section written.")
