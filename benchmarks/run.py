"""``python -m benchmarks run``: measure cells, each with all its rivals in turns, and record each at once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import models, modulated
from benchmarks.cases import DTYPES, GROUPS, Case, ModelCase, ModulatedCase, select
from benchmarks.contenders import BOTH, FORWARD, STEP, Contender, Wrong, enter, true_results
from benchmarks.measure import Settings, extra_memory, ratios, summary, time_interleaved
from benchmarks.problems import build
from benchmarks.record import RESULTS, Record, reason
from benchmarks.report import console, table
from benchmarks.rivals import CEILING, RIVALS, chosen, name_of
from benchmarks.roofline import bound_seconds, measure_roofline
from rl_kernels.backends.selection import AUTO, registered


def modes_of(case: Case) -> tuple[str, ...]:
    """How a case is run."""
    return (STEP,) if isinstance(case, ModelCase) else (FORWARD, BOTH)


def benchmark(
    cases: Sequence[Case],
    rivals: list[str],
    backends: list[str],
    settings: Settings,
    arguments: Sequence[str],
    output: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure every case in each of its modes and write the record after each cell.

    Args:
        cases: what to measure.
        rivals: names among :data:`benchmarks.rivals.RIVALS`; the ceiling is always in.
        backends: of this package, each a rival of its own.
        settings: how.
        arguments: of the command line, for the record.
        output: the record's file; an interrupted run leaves a valid one, whose ``complete`` is false.
        progress: called before each cell with its name.
    """
    record = Record.begin(arguments, settings)
    record.save(output)
    record.roofline = measure_roofline(settings.device, sorted({case.dtype for case in cases}))
    for case in cases:
        for mode in modes_of(case):
            progress(f"{case.key}, {mode}")
            record.cells.append(measure_cell(case, mode, rivals, backends, settings, record.roofline))
            record.save(output)
    record.complete = True
    record.save(output)
    return record


def measure_cell(
    case: Case, mode: str, rivals: list[str], backends: list[str], settings: Settings, roofline: dict[str, Any]
) -> dict[str, Any]:
    """One case in one mode: every rival's results are compared first, and only who is right is timed.

    A rival that fails or is wrong is recorded with the reason, and the others go on.
    """
    baseline = models.WHOLE if isinstance(case, ModelCase) else CEILING
    found: dict[str, dict[str, Any]] = {}
    try:
        ready = _check(_entrants(case, mode, rivals, backends, settings.device), found, settings.device)
        _time(case, mode, baseline, ready, found, settings, roofline)
    except Exception as error:  # Whatever a cell breaks on, the others are measured.
        found = {name: {"failed": reason(error)} for name in (baseline, *found)}
    return {"case": case.as_record(), "mode": mode, "baseline": baseline, "rivals": found}


def _check(
    entrants: Iterable[tuple[str, Callable[[], Contender]]], found: dict[str, dict[str, Any]], device: str
) -> list[Contender]:
    """The contenders that work and are right; into ``found``, their errors and memory, or why they failed."""
    ready = []
    for name, make in entrants:
        try:
            contender = make()
            with contender.context():
                error = contender.check()
            contender.release()
            found[name] = {"error": error, **extra_memory(contender, device), **contender.facts()}
            ready.append(contender)
        except Wrong as wrong:
            found[name] = {"failed": f"wrong result, not timed: {reason(wrong)}"}
        except Exception as failure:  # Whatever a rival breaks on, the others are measured.
            found[name] = {"failed": reason(failure)}
    return ready


def _time(
    case: Case,
    mode: str,
    baseline: str,
    ready: list[Contender],
    found: dict[str, dict[str, Any]],
    settings: Settings,
    roofline: dict[str, Any],
) -> None:
    """Time what is ready, in turns, into ``found``."""
    flops = models.count_flops(case, settings.device) if isinstance(case, ModelCase) else None
    samples, calls = time_interleaved(ready, settings)
    relative = ratios(samples, baseline) if baseline in samples else {}
    for contender in ready:
        name, bound = contender.name, bound_seconds(case, mode, contender.sources, roofline, flops)
        seconds = summary(samples[name])
        found[name] |= {
            "seconds": seconds,
            "ratio": summary(relative[name]) if name in relative else None,
            "roofline": bound / seconds["median"],
            "calls": calls[name],
            "rounds": len(samples[name]),
        }
        if "held_bytes" in found[name]:
            found[name]["peak_bytes"] = found[name]["held_bytes"] + found[name]["peak_extra_bytes"]


def _entrants(
    case: Case, mode: str, rivals: list[str], backends: list[str], device: str
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Name and maker of each contender of a cell, the baseline first."""
    torch.compiler.reset()  # Else the compiled functions of earlier cells count against the limit on recompilations.
    if isinstance(case, ModelCase):
        yield models.WHOLE, partial(models.contender, case, device, None)
        for backend in backends:
            yield name_of(backend), partial(models.contender, case, device, backend)
        return
    if isinstance(case, ModulatedCase):
        yield from modulated.entrants(case, mode, rivals, backends, device)
        return
    problem = build(case, device)
    truth = true_results(problem, mode)
    for rival in chosen(rivals, backends):
        yield rival.name, partial(enter, rival, problem, mode, truth)


def _listed(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str | None], list[str] | None]:
    """A click callback for a comma-separated list of names among ``known``."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
        if value is None:
            return None
        names = [name.strip() for name in value.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise click.BadParameter(f"got {', '.join(unknown) or 'nothing'}, expected some of {', '.join(known)}")
        return names

    return parse


def _backends(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> list[str]:
    known = [AUTO, *(backend.name for backend in registered())]
    for name in value:
        if name not in known:
            raise click.BadParameter(f"got {name}, expected one of {', '.join(known)}")
    return list(dict.fromkeys(value))


def _regex(_context: click.Context, _parameter: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    try:
        return None if value is None else re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"got {value!r}, expected a regular expression ({error})") from error


@click.command("run")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--cases", "groups", default=",".join(GROUPS), show_default=True, callback=_listed(GROUPS))
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=[AUTO],
    show_default=True,
    callback=_backends,
    help="Of this package; repeat for several.",
)
@click.option(
    "--rivals",
    callback=_listed(list(RIVALS)),
    help=f"Some of {', '.join(RIVALS)}; the ceiling is always in.  [default: all, without compile if --quick]",
)
@click.option("--dtype", "dtypes", default="float32", show_default=True, callback=_listed(DTYPES))
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.  [default: as torch chooses]")
@click.option("--quick", is_flag=True, help="Some of the cases and few rounds: a first look.")
@click.option("--cold", is_flag=True, help="Evict the caches before every call.")
@click.option("--only", callback=_regex, metavar="REGEX", help="Of the cases, those whose name matches.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The record.  [default: {RESULTS}/DEVICE-DATE-TIME.json]",
)
def run_command(
    device: str,
    groups: list[str],
    backends: list[str],
    rivals: list[str] | None,
    dtypes: list[str],
    threads: int | None,
    quick: bool,
    cold: bool,
    only: re.Pattern[str] | None,
    output: Path | None,
) -> None:
    """Time every rival on every case, side by side, and write a record.

    Each cell is written as soon as it is measured.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("got cuda, expected cpu: torch finds no GPU here", param_hint="--device")
    if threads is not None:
        torch.set_num_threads(threads)
    cases = [case for case in select(groups, dtypes, quick, device) if only is None or only.search(case.key)]
    if not cases:
        pattern = "" if only is None else f" that match {only.pattern!r}"
        raise click.BadParameter(
            f"got no case among {', '.join(groups)}{pattern}, expected at least one", param_hint="--only"
        )
    if rivals is None:
        rivals = [name for name in RIVALS if not (quick and name == "compile")]
    settings = Settings.for_quick(device, cold) if quick else Settings(device, cold=cold)
    if output is None:
        output = RESULTS / f"{device}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
    errors = Console(stderr=True)
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    with bar:
        task = bar.add_task("roofline", total=sum(len(modes_of(case)) for case in cases))
        started = False

        def progress(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, advance=int(started))
            started = True

        try:
            record = benchmark(cases, rivals, backends, settings, sys.argv[1:], output, progress)
        except KeyboardInterrupt:
            bar.stop()
            click.echo(f"Interrupted; what was measured is in {output}.", err=True)
            sys.exit(130)
    terminal = console()
    terminal.print(table(record))
    terminal.print(f"record: {output}", highlight=False, soft_wrap=True)
