"""``python -m rl_kernels train``, ``resume``, ``eval``, ``compare`` and ``report``: the papers' systems, trained."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rl_kernels._tables import as_text, simple_table

if TYPE_CHECKING:
    from rl_kernels.systems.comparing import Group

FOLDER = click.Path(file_okay=False, path_type=Path)
RUNS = click.Path(path_type=Path)
"""Folders of runs, or records of comparisons."""
JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time, a process each."
)


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """Inside, what is wrong with a request becomes a line and an exit status, not a traceback."""
    from rl_kernels.systems.runner.folder import RunError
    from rl_kernels.systems.runner.stopping import Stopped

    try:
        yield
    except Stopped as stopped:
        click.echo(str(stopped), err=True)
        sys.exit(stopped.code)
    except (RunError, ValueError, FileNotFoundError, ImportError) as error:
        raise click.ClickException(str(error)) from error


@click.command("train")
@click.argument("system")
@click.option("--preset", help="A named config of the system; see --list.")
@click.option(
    "--config",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A YAML file over the preset.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A field over both. Repeatable.")
@click.option("--data", metavar="NAME|PATH", help="As --set data.name=.")
@click.option("--seeds", type=click.IntRange(min=1), help="Train so many, from the config's seed on, a folder each.")
@click.option("--out", type=FOLDER, help="A new folder.  [default: runs/SYSTEM, or runs/SYSTEM-PRESET]")
@click.option("--list", "listed", is_flag=True, help="Show the presets and the fields with their defaults, and stop.")
@JOBS
def train_command(
    system: str,
    preset: str | None,
    path: Path | None,
    settings: tuple[str, ...],
    data: str | None,
    seeds: int | None,
    out: Path | None,
    listed: bool,
    jobs: int,
) -> None:
    """Train SYSTEM: replacement, local, modulation or detection.

    Writes run.json, log.jsonl, last.pt, best.pt and metrics.json. A run that is stopped or killed goes on with
    `resume`, and ends as if nothing had happened.
    """
    with errors_in_words():
        from rl_kernels.systems import config as configs
        from rl_kernels.systems.matrices import run_all
        from rl_kernels.systems.registry import system as system_of
        from rl_kernels.systems.runner.training import train

        chosen = system_of(system)
        if listed:
            click.echo("presets: " + ", ".join(chosen.presets))
            for name, value in configs.flat_dict(configs.resolve(chosen.config, chosen.presets, preset, path)).items():
                click.echo(f"{name} = {value}")
            return
        if data is not None:
            settings = (*settings, f"data.name={data}")
        config = configs.resolve(chosen.config, chosen.presets, preset, path, settings)
        folder = out or Path("runs") / (system if preset is None else f"{system}-{preset}")
        if seeds is None:
            metrics = train(chosen, config, folder)
            _print_metrics(metrics, folder)
            return
        if config.runtime.devices > 1:
            raise ValueError("seeds: several runs of several processes each: train them one by one")
        run_all(
            chosen,
            {
                folder / f"seed-{seed}": dataclasses.replace(config, seed=seed)
                for seed in range(config.seed, config.seed + seeds)
            },
            jobs,
        )
        _print_groups([folder])


@click.command("resume")
@click.argument("folder", type=FOLDER)
def resume_command(folder: Path) -> None:
    """Go on with the run in FOLDER, or with all runs in it that are not finished."""
    with errors_in_words():
        from rl_kernels.systems.runner import folder as files
        from rl_kernels.systems.runner.training import resume

        if (folder / files.RUN).exists():
            _print_metrics(resume(folder), folder)
            return
        inner = sorted(path.parent for path in folder.rglob(files.RUN)) if folder.is_dir() else []
        if not inner:
            raise files.RunError(f"{folder}: no run in it")
        for each in inner:
            click.echo(f"{each}", err=True)
            resume(each)
        _print_groups([folder])


@click.command("eval")
@click.argument("folder", type=FOLDER)
@click.option("--checkpoint", type=click.Choice(["last", "best"]), default="last", show_default=True)
@click.option("--data", metavar="NAME|PATH", help="Other images with as many classes.")
def eval_command(folder: Path, checkpoint: str, data: str | None) -> None:
    """Evaluate a checkpoint of the run in FOLDER on test images."""
    with errors_in_words():
        from rl_kernels.systems.runner.training import evaluate

        for name, value in evaluate(folder, checkpoint=checkpoint, data=data).items():
            click.echo(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")


@click.command("compare")
@click.argument("folders", nargs=-1, type=RUNS)
@click.option("--matrix", help="Train this experiment's runs first; see --list. Takes one folder, or --out.")
@click.option("--out", type=FOLDER, help="The folder of a matrix.  [default: runs/MATRIX]")
@click.option("--epochs", type=click.IntRange(min=1), help="Of every run of a matrix, instead of its own.")
@click.option("--seeds", type=click.IntRange(min=1), help="Of every variant of a matrix, instead of its own.")
@click.option("--json", "record", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here, too.")
@click.option("--to", "level", type=click.FloatRange(0, 1), help="Say when a run first scored this, as 0.95.")
@click.option("--list", "listed", is_flag=True, help="Show the experiments, and stop.")
@JOBS
def compare_command(
    folders: tuple[Path, ...],
    matrix: str | None,
    out: Path | None,
    epochs: int | None,
    seeds: int | None,
    record: Path | None,
    level: float | None,
    listed: bool,
    jobs: int,
) -> None:
    """Compare the runs in FOLDERS: mean, deviation, and the paired difference to the first with its interval.

    FOLDERS may be records, too, as --json writes them.
    """
    with errors_in_words():
        from rl_kernels.conversion.options import one_of
        from rl_kernels.systems.comparing import as_record
        from rl_kernels.systems.matrices import MATRICES, carry_out
        from rl_kernels.systems.runner.folder import write_json

        if listed:
            for name, each in MATRICES.items():
                click.echo(f"{name}: {each.question} {len(each.variants)} variants, {each.seeds} seeds.")
            return
        if matrix is not None:
            one_of("matrix", matrix, MATRICES)
            if folders:
                raise ValueError(f"folders: got {folders[0]} with --matrix, expected --out")
            folders = tuple(carry_out(MATRICES[matrix], out or Path("runs") / matrix, jobs, epochs=epochs, seeds=seeds))
        if not folders:
            raise ValueError("folders: got none, expected one or more folders of runs, or --matrix")
        groups = _print_groups(folders, level)
        if record is not None:
            write_json(record, as_record(groups))


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=RUNS)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="  [default: report.html in, or beside, the first]",
)
def report_command(folders: tuple[Path, ...], output: Path | None) -> None:
    """Write one HTML page about the runs in FOLDERS, or in records of `compare --json`, with tables and curves."""
    with errors_in_words():
        from rl_kernels.systems.report import NAME, write_report

        path = output or (folders[0].parent if folders[0].is_file() else folders[0]) / NAME
        write_report(folders, path)
        click.echo(f"wrote {path}")


def _print_metrics(metrics: dict[str, object], folder: Path) -> None:
    from rl_kernels.systems.runner.training import launched_by_another

    if launched_by_another():  # Of several processes the first one speaks.
        return
    for name, value in metrics.items():
        click.echo(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")
    click.echo(f"in {folder}")


def _print_groups(folders: Sequence[Path], level: float | None = None) -> list[Group]:
    from rl_kernels.systems.comparing import load_groups, table

    groups = load_groups(folders)
    headings, rows = table(groups, level)
    drawn = simple_table("", *headings, numbers=tuple(headings[1:]))
    drawn.columns[0].no_wrap = True
    for row in rows:
        drawn.add_row(*row)
    click.echo(as_text(drawn, width=240))  # No figure is cut short.
    return groups
