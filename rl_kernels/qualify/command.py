"""The command: it checks, times, and writes what was found to a record in the user's cache folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rl_kernels._machine import machine, versions
from rl_kernels._tables import simple_table
from rl_kernels.backends import Backend, Case, registered
from rl_kernels.backends.record_store import cache_folder, file_name
from rl_kernels.backends.records import MATERIALISED, Point, Record, Verdict
from rl_kernels.backends.selection import refresh, why_not
from rl_kernels.ops.schema import OPS
from rl_kernels.qualify.correctness import failures, in_a_line, trials_of
from rl_kernels.qualify.problems import checks, grid, make_call
from rl_kernels.qualify.timing import FULL, QUICK, Stopwatch

DTYPES = ("float32", "bfloat16", "float16", "float64")
USUAL_DTYPES = DTYPES[:3]
MAX_DETAILS = 3
"""Of failures, and of lost points, that are spelt out."""

Step = TypeVar("Step")


# A record.


def qualify(
    backend: Backend, device: torch.device, dtypes: Sequence[str], quick: bool, progress: Progress
) -> Iterator[Record]:
    """Check and time one backend on one device; the record so far after each op and type.

    Args:
        backend: one with a record.
        device: where.
        dtypes: of the activation.
        quick: fewer layers, and fewer rounds.
        progress: to show where this is.
    """
    stopwatch = Stopwatch(device, QUICK if quick else FULL)
    verdicts: list[Verdict] = []
    points: list[Point] = []
    for case in cases_of(backend, device, dtypes):
        timed: list[Point | None] = []
        try:
            trials = _shown(progress, "checking", backend, case, trials_of(backend, case))
            found = list(failures(backend, trials, case, device))
            if not found:
                problems = _shown(progress, "timing", backend, case, grid(case.op, device.type, quick))
                timed += [stopwatch.measure(backend, problem, case) for problem in problems]
        except Exception as error:  # A kernel that raises has failed, and the next one's turn comes.
            found = [in_a_line(error)]
        detail = " | ".join(found[:MAX_DETAILS]) + f" | and {len(found) - MAX_DETAILS} more" * (
            len(found) > MAX_DETAILS
        )
        verdicts.append(Verdict(case.op, case.dtype_name, not found, detail))
        points += filter(None, timed)
        yield _record(backend, device, verdicts, points)


def _record(backend: Backend, device: torch.device, verdicts: Sequence[Verdict], points: Sequence[Point]) -> Record:
    assert backend.record is not None
    here = backend.record.here(device)
    return Record(
        backend=backend.name,
        architecture=here.architecture,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine()["processor"]),
        driver=here.driver,
        compiler=here.compiler,
        sources=here.sources,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(["python -m rl_kernels", *sys.argv[1:]]),
        versions=versions("triton"),
        verdicts=tuple(verdicts),
        points=tuple(points),
    )


def cases_of(backend: Backend, device: torch.device, dtypes: Sequence[str]) -> list[Case]:
    """What is to be qualified: the cases that the backend serves, and would be asked for."""
    cases = [Case(op, device.type, getattr(torch, dtype)) for op in OPS for dtype in dtypes]
    return [case for case in cases if _why_not(backend, case, device) is None]


def _why_not(backend: Backend, case: Case, device: torch.device) -> str | None:
    reason = why_not(backend, case) or backend.worse(case)
    if reason is not None:
        return reason
    return backend.why_not_call(make_call(checks(case.op)[0], case.op, case.dtype, device))


def _shown(progress: Progress, doing: str, backend: Backend, case: Case, steps: Sequence[Step]) -> Iterator[Step]:
    task = progress.add_task(f"{backend.name}: {doing} {case.op} {case.dtype_name}", total=len(steps))
    yield from progress.track(steps, task_id=task)
    progress.remove_task(task)


def write(record: Record, folder: Path) -> Path:
    """Write a record into ``folder``, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record.backend, record.architecture)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(record.as_json())
    unfinished.replace(path)
    return path


# For people.


def in_words(points: Sequence[Point]) -> str:
    """Where the kernel wins among what was timed of one op and dtype."""
    if not points:
        return "not timed"
    lost = sorted((point for point in points if not point.won), key=lambda point: -point.ratio)
    if not lost:
        return "wins everywhere"
    worst = ", ".join(
        f"{point.fastest} at {'x'.join(map(str, point.sizes))}"
        f"{f' {point.kind}' if point.kind != 'linear' else ''} (x{point.ratio:.2f})"
        for point in lost[:MAX_DETAILS]
    )
    more = f" and {len(lost) - MAX_DETAILS} more" if len(lost) > MAX_DETAILS else ""
    won = ""
    if points[0].kind == "linear":
        tokens = max((p.sizes[0] for p in points if p.sizes[0] < min(q.sizes[0] for q in lost)), default=None)
        won = f"wins up to {tokens} tokens; " if tokens is not None else ""
    return f"{won}faster: {worst}{more}"


def table_of(record: Record) -> Table:
    """One line an op and dtype."""
    title = f"{record.backend} on {record.device} ({record.architecture})"
    table = simple_table(title, "op", "dtype", "right", "wins", f"beats {MATERIALISED}", "where")
    for verdict in record.verdicts:
        points = record.points_of(verdict.op, verdict.dtype)
        won = f"{sum(point.won for point in points)} of {len(points)}"
        beaten = str(sum(point.seconds <= point.rivals[MATERIALISED] for point in points))
        right, where = ("yes", in_words(points)) if verdict.passed else ("no", escape(verdict.detail))
        style = None if verdict.passed else "bold red"
        table.add_row(verdict.op, verdict.dtype, right, won, beaten, where, style=style)
    return table


def _chosen(names: Sequence[str]) -> list[Backend]:
    backends = {backend.name: backend for backend in registered() if backend.record is not None}
    unknown = [name for name in names if name not in backends]
    if unknown:
        raise click.BadParameter(
            f"got {unknown[0]!r}, expected one of {', '.join(backends)}, which have records", param_hint="--backend"
        )
    return [backends[name] for name in names or backends]


@click.command("qualify")
@click.option("--backend", "names", multiple=True, help="Repeat for several.  [default: all with kernels of their own]")
@click.option(
    "--device",
    "devices",
    type=click.Choice(("cpu", "cuda")),
    multiple=True,
    help="Repeat for both.  [default: all that are there]",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(DTYPES),
    multiple=True,
    default=USUAL_DTYPES,
    show_default=True,
    help="Repeat for several. The record then says nothing of the others.",
)
@click.option("--quick", is_flag=True, help="Fewer layers and rounds, for a first look.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the records.  [default: the one that auto reads]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the records instead of tables.")
def qualify_command(
    names: tuple[str, ...],
    devices: tuple[str, ...],
    dtypes: tuple[str, ...],
    quick: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Check and time every kernel here, and enable those that win.

    Each kernel runs on odd shapes in every configuration, and is held against the float64 reference and against
    itself. Those that are right are timed beside their rivals. What is found is written to a record, which auto goes
    by from then on: it takes minutes a device.

    The exit status is 1 if a kernel is wrong.
    """
    if "cuda" in devices and not torch.cuda.is_available():
        raise click.BadParameter("got cuda, expected cpu: torch finds no GPU here", param_hint="--device")
    console, folder = Console(), output or cache_folder()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = Console(stderr=True)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > (os.cpu_count() or 1) / 2:
        stderr.print(
            f"Other work runs on this machine (load {busy:.1f}): what is timed now says little.", style="yellow"
        )
    present = devices or ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    records: dict[Path, Record] = {}
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress, torch.no_grad():
        for device in map(torch.device, present):
            for backend in _chosen(names):
                for record in qualify(backend, device, dtypes, quick, progress):
                    records[write(record, folder)] = record  # A run that is cut leaves what it had found.
    refresh()
    if not records:
        reasons = {
            f"{backend.name}: {_why_not(backend, Case('mixed_linear', device, torch.float32), torch.device(device))}"
            for backend in _chosen(names)
            for device in present
        }
        raise click.ClickException(f"no kernel to qualify on {', '.join(present)} ({'; '.join(sorted(reasons))})")
    if as_json:
        click.echo(json.dumps([json.loads(record.as_json()) for record in records.values()], indent=1))
    else:
        for path, record in records.items():
            console.print(table_of(record))
            effect = (
                "auto goes by it" if folder == cache_folder() else f"for auto to go by it, put it in {cache_folder()}"
            )
            console.print(f"Record: {path} ({effect})", markup=False, highlight=False, soft_wrap=True)
    if not all(verdict.passed for record in records.values() for verdict in record.verdicts):
        click.echo("Some kernels are wrong here, and auto does not use them.", err=True)
        sys.exit(1)
