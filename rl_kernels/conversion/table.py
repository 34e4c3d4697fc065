"""A plan as tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rl_kernels import _tables
from rl_kernels._tables import simple_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rl_kernels.conversion.plans import Plan


def as_text(plan: Plan) -> str:
    """The tables as plain text."""
    return _tables.as_text(render(plan))


def render(plan: Plan) -> RenderableType:
    """What is replaced, what was skipped, what stays a replaced block's own, and the totals."""
    tables: list[RenderableType] = [_heading(plan), _replaced(plan)]
    if plan.skipped:
        tables.append(_skipped(plan))
    if any(block.own for block in plan.replaced):
        tables.append(_own(plan))
    return Group(*tables, _totals(plan))


def _heading(plan: Plan) -> Text:
    unit = plan.level
    lines = [f"Plan for {plan.model}: {plan.blocks} {unit}s"]
    if unit == "block":
        lines[0] += ": " + "; ".join(
            f"{stage.blocks} {stage.class_name} in {stage.path or 'it'}" for stage in plan.stages
        )
    if plan.fell_back:
        lines.append("No block has two neighbours of its shape: single layers are replaced instead.")
    due = f"A replacement falls due every {plan.every} {unit}s, first at number {plan.offset}"
    lines.append(due + (". " if plan.strict else f", and goes to the first {unit} from there on that can be replaced."))
    if plan.strict:
        lines[-1] += f"A {unit} that cannot be replaced then is skipped."
    if plan.targets:
        lines.append(f"Targets: {', '.join(plan.targets)} only.")
    return Text("\n".join([*lines, ""]))


def _replaced(plan: Plan) -> Table:
    numbers = ("#", "parameters", "after")
    table = simple_table("Replaced", "#", plan.level, "mixed from", "layers", "parameters", "after", numbers=numbers)
    for block in plan.replaced:
        counts = Counter(layer.class_name for layer in block.layers)
        layers = "\n".join(f"{n} {name}" for name, n in counts.items())
        before, after = block.parameters, block.parameters - block.saved
        table.add_row(str(block.number), block.path, "\n".join(block.sources), layers, f"{before:,}", f"{after:,}")
    return table


def _skipped(plan: Plan) -> Table:
    table = simple_table("Due, but skipped", "#", plan.level, "why", "", numbers=("#",))
    for block in plan.skipped:
        table.add_row(str(block.number), block.path, block.reason, block.detail)
    return table


def _own(plan: Plan) -> Table:
    numbers = ("parameters",)
    table = simple_table("Stays a replaced block's own", "what", "class", "in", "parameters", "why", numbers=numbers)
    rows: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for block in plan.replaced:
        for part in block.own:
            rows[part.path, part.class_name, part.reason].append((block.number, part.parameters))
    for (path, class_name, reason), places in rows.items():
        blocks = ", ".join(str(number) for number, _ in places)
        table.add_row(path, class_name, blocks, f"{sum(size for _, size in places):,}", reason)
    return table


def _totals(plan: Plan) -> Text:
    options = plan.options
    unit = plan.level if options.share == "block" else "layer"
    pairs = f"one pair of coefficients a {unit}" + (" and channel" if options.granularity == "channel" else "")
    starts = {None: "0.5 each", "fit": "the least-squares fit"}
    start = str(options.init) if isinstance(options.init, tuple) else starts[options.init]
    details = [pairs, options.constraint, f"starting from {start}"]
    if options.detach:
        details.append("no gradient to the " + " or the ".join(("previous", "next")[j] for j in options.detach))
    return Text(
        f"{len(plan.replaced)} of {plan.blocks} {plan.level}s replaced; {', '.join(details)}.\n"
        f"Parameters: {plan.parameters:,} -> {plan.parameters_after:,} "
        f"({plan.saved:,} saved, {100 * plan.saved / plan.parameters:.1f} %)"
    )
