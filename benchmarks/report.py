"""A record as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from benchmarks.record import Record, timed
from benchmarks.rivals import CEILING
from rl_kernels._tables import WIDTH, simple_table

MEBI = 1 << 20


def console() -> Console:
    """The terminal; wide enough for a table where the output goes elsewhere."""
    found = Console()
    if not found.is_terminal:
        found.width = WIDTH
    return found


def table(record: Record) -> RenderableType:
    """Two tables, of time and of memory; rows are cells, columns rivals, the best in bold. Then what failed."""
    base, names = sorted(baselines(record)), [name for name in record.rivals() if name not in baselines(record)]
    columns = [escape(name.replace("[", "\n[").replace("_products", "_\nproducts")) for name in names]
    time = simple_table("Time over the baseline's", "cell", "baseline", *columns, numbers=("baseline", *columns))
    title = "Peak extra memory beyond outputs and gradients, MiB"
    memory = simple_table(title, "cell", "baseline", *columns, numbers=("baseline", *columns))
    failures = []
    for cell in record.cells:
        title, rivals = f"{cell['case']['key']}, {cell['mode']}", cell["rivals"]
        first = next(rivals[name] for name in (cell["baseline"], *base) if name in rivals)
        time.add_row(title, duration(first), *_with_best([ratio(rivals.get(name)) for name in names]))
        memory.add_row(title, extra_memory(first), *_with_best([extra_memory(rivals.get(name)) for name in names]))
        failures += [f"{title}: {name}: {found['failed']}" for name, found in rivals.items() if "failed" in found]
    return Group(time, memory, *(Text(f"failed: {line}", style="red") for line in failures))


def _with_best(texts: list[str]) -> list[str]:
    """The least of the numbers among ``texts`` in bold."""
    numbers = [float(text) for text in texts if text[:1].isdigit()]
    return [f"[bold]{text}[/bold]" if text[:1].isdigit() and float(text) == min(numbers) else text for text in texts]


def baselines(record: Record) -> set[str]:
    """The names of the cells' baselines."""
    return {cell["baseline"] for cell in record.cells} | {CEILING}


def best_rival(cell: dict[str, Any], among: str = "") -> str | None:
    """The fastest by the median, the baseline apart; None where nobody else was timed.

    Args:
        cell: of a record.
        among: only names that start so.
    """
    medians = {
        name: rival["seconds"]["median"]
        for name, rival in timed(cell)
        if name != cell["baseline"] and name.startswith(among)
    }
    return min(medians, key=medians.__getitem__) if medians else None


def ratio(rival: dict[str, Any] | None) -> str:
    """The median ratio to the baseline, ``"failed"``, or ``"-"`` where there is none."""
    if rival is None:
        return "-"
    if "failed" in rival:
        return "failed"
    return "-" if rival["ratio"] is None else f"{rival['ratio']['median']:.2f}"


def duration(rival: dict[str, Any]) -> str:
    """The median time with a unit that suits it."""
    if "failed" in rival:
        return "failed"
    seconds = rival["seconds"]["median"]
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def extra_memory(rival: dict[str, Any] | None) -> str:
    """Peak extra memory by the allocator's events, in MiB."""
    if rival is None or "failed" in rival:
        return "-"
    return f"{rival['peak_extra_bytes'] / MEBI:.2f}"
