"""``python -m benchmarks verify``: is B faster than A? Refused where tests fail, or inside the noise."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.markup import escape

from benchmarks.record import Record, timed
from benchmarks.report import console
from benchmarks.rivals import is_ours
from rl_kernels._tables import simple_table

FASTER, SLOWER, NOISE, BROKEN = "faster", "slower", "inside the noise", "failed"
DEFAULT_TESTS = "python -m pytest -q -x tests/ops"
DEFAULT_BENCHMARK = "--cases linear,conv --quick"


class Incomparable(ValueError):
    """Two records were not made alike; the message says in what they differ."""


@dataclass(frozen=True)
class Change:
    """One rival in one cell, before and after.

    Attributes:
        cell: the case's key and the mode.
        rival: this package on a backend.
        verdict: ``"faster"``, ``"slower"``, ``"inside the noise"``, or ``"failed"``: it ran before and no longer does.
        before: median seconds a call.
        after: the same, after.
        detail: why.
    """

    cell: str
    rival: str
    verdict: str
    before: float
    after: float | None
    detail: str = ""


def check_alike(before: Record, after: Record) -> None:
    """Refuse records of different machines, threads, versions (this package's apart) or settings.

    Raises:
        Incomparable: naming what differs, what came and what was expected.
    """

    def versions(record: Record) -> dict[str, str]:
        return {name: version for name, version in record.versions.items() if name != "rl_kernels"}

    pairs: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "machine": (before.machine, after.machine),
        "versions": (versions(before), versions(after)),
        "settings": (before.settings, after.settings),
    }
    for title, (first, second) in pairs.items():
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                raise Incomparable(f"{title}: {name}: got {second.get(name)!r}, expected {first.get(name)!r} as in A")


def compare(before: Record, after: Record) -> list[Change]:
    """Compare this package's times, cell by cell, among the cells that both records have.

    A change counts only where the intervals from p20 to p80 are apart, of the seconds and of the ratio to the baseline
    that was measured in turns with it: a machine that was slower the second time moves the one, not the other.

    Raises:
        Incomparable: the records were not made alike, or have nothing in common.
    """
    check_alike(before, after)
    old, new = before.by_key(), after.by_key()
    changes = []
    for key in (key for key in old if key in new):
        for name, first in timed(old[key]):
            second = new[key]["rivals"].get(name)
            if is_ours(name) and second is not None:
                changes.append(_change(", ".join(key), name, first, second))
    if not changes:
        raise Incomparable("cells: got none of this package that both records have, expected at least one")
    return changes


def _change(cell: str, rival: str, first: dict[str, Any], second: dict[str, Any]) -> Change:
    start = first["seconds"]["median"]
    if "failed" in second:
        return Change(cell, rival, BROKEN, start, None, second["failed"])
    measures = ["seconds", *(["ratio"] if first["ratio"] and second["ratio"] else [])]
    moves = {measure: move(first[measure], second[measure]) for measure in measures}
    verdict = next(iter(moves.values())) if len(set(moves.values())) == 1 else NOISE
    still = [measure for measure, found in moves.items() if found == NOISE]
    detail = ""
    if verdict == NOISE:
        detail = f"p20 to p80 of {' and '.join(still)} overlap" if still else "seconds and ratio disagree"
    return Change(cell, rival, verdict, start, second["seconds"]["median"], detail)


def move(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Where an interval from p20 to p80 went: faster or slower if it left the old one, else inside the noise."""
    if after["p80"] < before["p20"]:
        return FASTER
    if after["p20"] > before["p80"]:
        return SLOWER
    return NOISE


def refusal(changes: Sequence[Change]) -> str | None:
    """Why a speed-up is not accepted: nothing is faster beyond the noise, or something got slower or broke."""
    worse = [change for change in changes if change.verdict in (SLOWER, BROKEN)]
    if worse:
        return f"{len(worse)} of {len(changes)} became slower or failed: {', '.join(c.cell for c in worse[:3])}"
    if not any(change.verdict == FASTER for change in changes):
        return f"no speed-up: all {len(changes)} differences are inside the noise"
    return None


def merged(records: Sequence[Record]) -> Record:
    """One record of several runs of the same command: the medians' median, the widest interval of each rival."""
    result = copy.deepcopy(records[0])
    others = [record.by_key() for record in records[1:]]
    for key, cell in result.by_key().items():
        for name in list(cell["rivals"]):
            found = [cell["rivals"][name], *(other[key]["rivals"][name] for other in others if key in other)]
            failed = next((one for one in found if "failed" in one), None)
            if failed is not None:
                cell["rivals"][name] = failed
                continue
            for measure in ("seconds", "ratio"):
                values = [one[measure] for one in found if one[measure] is not None]
                if values:
                    cell["rivals"][name][measure] = {
                        "median": statistics.median(value["median"] for value in values),
                        "p20": min(value["p20"] for value in values),
                        "p80": max(value["p80"] for value in values),
                    }
    return result


def report(changes: Sequence[Change]) -> RenderableType:
    """The changes as a table, those that count in bold."""
    numbers = ("before (ms)", "after (ms)", "after / before")
    table = simple_table("B against A", "cell", "rival", *numbers, "verdict", "why", numbers=numbers)
    for change in changes:
        after = "-" if change.after is None else f"{1e3 * change.after:.4g}"
        quotient = "-" if change.after is None else f"{change.after / change.before:.3f}"
        style = {FASTER: "bold green", SLOWER: "bold red", BROKEN: "bold red"}.get(change.verdict, "")
        numbers = (f"{1e3 * change.before:.4g}", after, quotient)
        row = (escape(change.cell), escape(change.rival), *numbers, change.verdict, escape(change.detail))
        table.add_row(*row, style=style)
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in (FASTER, SLOWER, BROKEN, NOISE)}
    return Group(table, ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))


def run_tests(command: str, root: Path) -> bool:
    """Run the tests in a tree; return whether they pass. ``python`` is this interpreter."""
    click.echo(f"tests: {command}")
    return subprocess.run(_with_this_python(command), cwd=root, env=_environment(root)).returncode == 0


def _with_this_python(command: str) -> list[str]:
    words = shlex.split(command)
    return [sys.executable if word in ("python", "python3") else word for word in words[:1]] + words[1:]


def _environment(tree: Path) -> dict[str, str]:
    """Where ``rl_kernels`` is the tree's, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(tree)}


@contextmanager
def worktree(reference: str, repository: Path, folder: Path) -> Iterator[Path]:
    """Check a reference out into ``folder``, build its extension if it has one, and remove it in the end.

    Raises:
        click.ClickException: the reference is unknown, or its extension does not build.
    """
    add = ["git", "-C", str(repository), "worktree", "add", "--detach", "--quiet", str(folder), reference]
    done = subprocess.run(add, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{reference}: {done.stderr.strip().splitlines()[-1]}")
    try:
        if (folder / "setup.py").exists():
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            built = subprocess.run(build, cwd=folder, env=_environment(folder), capture_output=True, text=True)
            if built.returncode:
                raise click.ClickException(f"{reference}: the build failed:\n{built.stderr[-2000:]}")
        yield folder
    finally:
        remove = ["git", "-C", str(repository), "worktree", "remove", "--force", str(folder)]
        subprocess.run(remove, capture_output=True)


def measure_refs(
    before: str, after: str, repository: Path, tests: str | None, options: str, repeats: int
) -> tuple[Record, Record]:
    """Test the candidate, then measure both references in turns with this harness.

    Args:
        before: a git reference: the base.
        after: the candidate.
        repository: the repository's root.
        tests: command that must pass in the candidate's tree; None to run none.
        options: of ``python -m benchmarks run``.
        repeats: how many times each is measured.

    Raises:
        click.ClickException: a reference is unknown, does not build or cannot be measured, or the tests fail.
    """
    with tempfile.TemporaryDirectory(prefix="rl-verify-") as name:
        folder = Path(name)
        with (
            worktree(after, repository, folder / "after") as new,
            worktree(before, repository, folder / "before") as old,
        ):
            if tests is not None and not run_tests(tests, new):
                raise click.ClickException(f"refused: the tests fail in {after} ({tests})")
            # One harness for both, so that only the package differs: old references may have another, or none.
            harness = folder / "harness"
            shutil.copytree(Path(__file__).parent, harness / "benchmarks", ignore=shutil.ignore_patterns("results"))
            records: dict[Path, list[Record]] = {old: [], new: []}
            for turn in range(repeats):
                for tree in (old, new) if turn % 2 == 0 else (new, old):
                    output = folder / f"{tree.name}-{turn}.json"
                    records[tree].append(_measure(tree, harness, options, output))
            return merged(records[old]), merged(records[new])


def _measure(tree: Path, harness: Path, options: str, output: Path) -> Record:
    click.echo(f"{output.stem}: python -m benchmarks run {options}")
    command = [sys.executable, "-m", "benchmarks", "run", *shlex.split(options), "--output", str(output)]
    done = subprocess.run(command, cwd=harness, env=_environment(tree), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"refused: the benchmarks fail on {output.stem}")
    return Record.load(output)


@click.command("verify")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--tests", default=DEFAULT_TESTS, show_default=True, help="Command that must pass first.")
@click.option("--no-tests", is_flag=True, help="For two records only: compare what was tested elsewhere.")
@click.option(
    "--benchmark", "options", default=DEFAULT_BENCHMARK, show_default=True, help="Options of `run`, for refs."
)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Runs of each ref, in turns.")
def verify_command(a: str, b: str, tests: str, no_tests: bool, options: str, repeats: int) -> None:
    """Say whether B is faster than A: two git refs, or two records.

    The tests run first (in B; for records, in the working tree). Exits with 1, saying why, where they fail, where no
    difference leaves the noise (the intervals p20 to p80 overlap), or where something became slower.
    """
    files = [Path(name).is_file() for name in (a, b)]
    if files[0] != files[1]:
        raise click.UsageError(f"A and B: got one record and one git ref ({a}, {b}), expected two of a kind")
    try:
        if files[0]:
            before, after = Record.load(Path(a)), Record.load(Path(b))
            check_alike(before, after)
            if not no_tests and not run_tests(tests, repository_root()):
                raise click.ClickException(f"refused: the tests fail ({tests})")
        else:
            if no_tests:
                raise click.UsageError("--no-tests: got two git refs, expected two records: refs are always tested")
            before, after = measure_refs(a, b, repository_root(), tests, options, repeats)
        changes = compare(before, after)
    except ValueError as error:
        raise click.ClickException(f"refused: {error}") from error
    console().print(report(changes))
    for name, record in (("A", before), ("B", after)):
        if record.git.get("dirty"):
            click.echo(f"note: {name} was measured on a tree with uncommitted changes", err=True)
    why = refusal(changes)
    if why is not None:
        raise click.ClickException(f"refused: {why}")
    click.echo("accepted: faster beyond the noise, nothing slower.")


def repository_root() -> Path:
    """The root of the repository that this harness lies in."""
    return Path(__file__).resolve().parents[1]
