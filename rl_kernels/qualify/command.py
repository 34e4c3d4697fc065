"""``python -m rl_kernels qualify``: which kernels are right on this machine, and where they win.

What it finds is a record (``backends/records.py``) in the user's cache folder, which ``auto`` goes by.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from rl_kernels._machine import machine, versions
from rl_kernels._tables import simple_table
from rl_kernels.backends import Backend, Case, registered
from rl_kernels.backends.record_store import cache_folder, file_name
from rl_kernels.backends.records import MATERIALISED, Point, Record, Verdict, describe
from rl_kernels.backends.selection import refresh
from rl_kernels.ops import schema
from rl_kernels.qualify.problems import Problem, arguments, checks, grid
from rl_kernels.testing import compare

DTYPES = ("float32", "bfloat16", "float16", "float64")
USUAL_DTYPES = DTYPES[:3]
MOST_DETAILS = 3
"""Of failures, and of lost points, that are spelt out."""
FORCED_PROBLEMS = 3
"""On how many of the odd shapes every further configuration is checked."""
RIVALS = {"streamed": "streamed", "reference": MATERIALISED}
"""The rivals' names in a record, by the backend that runs them."""
SAMPLE_SECONDS = 1e-3
"""On a CPU a sample is as many calls as take this long, at least one."""

Step = TypeVar("Step")


class Effort(NamedTuple):
    """How long a point is timed.

    Attributes:
        seconds: aimed at.
        least: rounds, however long they take.
        most: rounds.
    """

    seconds: float
    least: int
    most: int


FULL, QUICK = Effort(0.25, 5, 25), Effort(0.1, 3, 9)


class Test(NamedTuple):
    """One layer in one configuration of a kernel."""

    problem: Problem
    name: str
    context: Callable[[], AbstractContextManager[Any]]


# Right or wrong.


def tests_of(backend: Backend, case: Case) -> list[Test]:
    """All odd shapes and some that are timed as the kernel runs by itself, then a few in every other configuration."""
    (usual, *forced), problems = backend.variants(case.op, case.dtype), checks(case.op)
    half = case.dtype in (torch.bfloat16, torch.float16)
    large = grid(case.op, case.device, quick=True)  # A kernel may choose otherwise where there is much to do.
    found = [Test(problem, *usual) for problem in (*problems, *large) if half or not problem.halved]
    return found + [Test(problem, *variant) for variant in forced for problem in problems[:FORCED_PROBLEMS]]


def check(backend: Backend, test: Test, case: Case, device: torch.device) -> list[str]:
    """Hold one call against the float64 reference, and two runs against each other; what is wrong, in words."""
    op, _, dtype = case
    call = arguments(test.problem, op, dtype, device)
    if backend.refuses_call is not None and backend.refuses_call(op, call) is not None:
        return []
    with test.context(), poisoned():
        found, again = (_named(backend.kernels[op](*call)) for _ in range(2))
    reference = _kernel("reference", op)
    plain, truth = _named(reference(*call)), _named(reference(*_doubled(call)))
    # Every result is multilinear: on squared arguments it sums the squares of the products that it sums here.
    squares = _named(reference(*_doubled(call, squared=True)))
    spread = {name: value.sqrt() for name, value in squares.items()}
    wrong = [str(row) for row in compare(found, plain, truth, spread, dtype) if not row.passes]
    return wrong + [
        f"{name}: two runs differ in their bits"
        for name, value in found.items()
        if not torch.equal(value.nan_to_num(), again[name].nan_to_num())
    ]


def failures(backend: Backend, tests: Iterable[Test], case: Case, device: torch.device) -> Iterator[str]:
    """What is wrong, and where; one test that raises does not end the others."""
    for test in tests:
        try:
            wrong = check(backend, test, case, device)
        except Exception as error:  # Whatever breaks is what is looked for.
            wrong = [_said(error)]
        if wrong:
            yield f"{test.name or 'default configuration'}, {test.problem}: {'; '.join(wrong)}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch fills every fresh allocation with NaN: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"result": result}
    weights, coefficients, biases = result
    found = {f"dweights[{j}]": gradient for j, gradient in enumerate(weights)}
    return found | {"dcoefficients": coefficients} | {f"dbiases[{j}]": g for j, g in enumerate(biases)}


def _doubled(value: Any, squared: bool = False) -> Any:
    if isinstance(value, Tensor):
        return value.double().square() if squared else value.double()
    return type(value)(_doubled(entry, squared) for entry in value) if isinstance(value, list | tuple) else value


def _kernel(backend: str, op: str) -> Callable[..., Any]:
    return next(found.kernels[op] for found in registered() if found.name == backend)


# Fast or slow.


class Clock:
    """Times calls on one device; on a GPU with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = max(64 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
            self.evicting = torch.zeros(size // 4, device=device)

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        """Seconds that a call takes, as a mean."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start_event, end_event in events:
            self.evicting.zero_()
            start_event.record()
            call()
            end_event.record()
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls

    def medians(self, calls: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, float]:
        """The median time of each call, of rounds in which all take turns in an order that is shuffled each time."""
        counts, total = {}, 0.0
        for name, call in calls.items():
            once = self.seconds(call, 1)
            if once < effort.seconds or self.device.type == "cuda":  # The first call compiles, or fills caches.
                once = self.seconds(call, 1)
            count = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-6))) if self.device.type != "cuda" else 3
            counts[name], total = count, total + count * once
        rounds = max(effort.least, min(effort.most, int(effort.seconds / total)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order, shuffled = list(calls), random.Random(0)
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                samples[name].append(self.seconds(calls[name], counts[name]))
        return {name: statistics.median(values) for name, values in samples.items()}


def measure(
    backend: Backend, problem: Problem, case: Case, device: torch.device, clock: Clock, effort: Effort
) -> Point | None:
    """Time one call beside its rivals; None where ``auto`` would not ask this backend, or memory does not suffice.

    A loss has to be seen twice.
    """
    op, _, dtype = case
    try:
        call = arguments(problem, op, dtype, device)
        for rule in (backend.refuses_call, backend.automatic_call):
            if rule is not None and rule(op, call) is not None:
                return None
        kernels = {backend.name: backend.kernels[op]} | {RIVALS[name]: _kernel(name, op) for name in RIVALS}
        calls = {name: lambda kernel=kernel: kernel(*call) for name, kernel in kernels.items()}
        for _ in range(2):
            rivals = clock.medians(calls, effort)
            point = Point(op, _short(dtype), *describe(op, call), rivals.pop(backend.name), rivals)
            if point.won:
                break
    except torch.OutOfMemoryError:
        return None
    return point


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A record.


def qualify(backend: Backend, device: torch.device, dtypes: Sequence[str], quick: bool, progress: Progress) -> Record:
    """Check and time one backend on one device.

    Args:
        backend: one with a gate.
        device: where.
        dtypes: of the activation.
        quick: fewer layers, and fewer rounds.
        progress: to show where this is.
    """
    assert backend.gate is not None
    clock, effort = Clock(device), QUICK if quick else FULL
    verdicts: list[Verdict] = []
    points: list[Point] = []
    for case in cases_of(backend, device, dtypes):
        timed: list[Point | None] = []
        try:
            tests = _shown(progress, "checking", backend, case, tests_of(backend, case))
            found = list(failures(backend, tests, case, device))
            if not found:
                problems = _shown(progress, "timing", backend, case, grid(case.op, device.type, quick))
                timed += [measure(backend, problem, case, device, clock, effort) for problem in problems]
        except Exception as error:  # A kernel that raises has failed, and the next one's turn comes.
            found = [_said(error)]
        detail = " | ".join(found[:MOST_DETAILS]) + f" | and {len(found) - MOST_DETAILS} more" * (
            len(found) > MOST_DETAILS
        )
        verdicts.append(Verdict(case.op, _short(case.dtype), not found, detail))
        points += filter(None, timed)
    here = backend.gate.here(device)
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
    cases = [Case(op, device.type, getattr(torch, dtype)) for op in schema.SCHEMAS for dtype in dtypes]
    return [case for case in cases if _why_not(backend, case, device) is None]


def _why_not(backend: Backend, case: Case, device: torch.device) -> str | None:
    reason = backend.why_not(case) or backend.automatic(case)
    if reason is not None or backend.refuses_call is None:
        return reason
    return backend.refuses_call(case.op, arguments(checks(case.op)[0], case.op, case.dtype, device))


def _shown(progress: Progress, doing: str, backend: Backend, case: Case, steps: Sequence[Step]) -> Iterator[Step]:
    task = progress.add_task(f"{backend.name}: {doing} {case.op} {_short(case.dtype)}", total=len(steps))
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
        for point in lost[:MOST_DETAILS]
    )
    more = f" and {len(lost) - MOST_DETAILS} more" if len(lost) > MOST_DETAILS else ""
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
    backends = {backend.name: backend for backend in registered() if backend.gate is not None}
    unknown = [name for name in names if name not in backends]
    if unknown:
        raise click.BadParameter(f"got {unknown[0]!r}, expected one of {', '.join(backends)}", param_hint="--backend")
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
                if cases_of(backend, device, dtypes):
                    record = qualify(backend, device, dtypes, quick, progress)
                    records[write(record, folder)] = record
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
