"""``python -m rl_kernels inspect``: what the GPU kernels' machine code looks like, on a machine without a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rl_kernels.backends.triton.offline import Kernel

ARCHES = ("sm_80", "sm_90", "sm_100")
ASYNCHRONOUS = "HGMMA"
PEAK = "matrix instructions"
COLOURS = {"L2": "#4c78a8", "shared memory": "#f58518", "mixing": "#54a24b"}


@click.command("inspect")
@click.option("--arch", "arches", type=click.Choice(ARCHES), multiple=True, help="Repeat for several.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw what limits each configuration into this file (needs matplotlib).",
)
def inspect_command(arches: tuple[str, ...], as_json: bool, plot: Path | None) -> None:
    """Compile every Triton kernel in every configuration, and print what limits it.

    No GPU is needed; it takes two to three minutes an architecture the first time. The columns: registers and bytes
    of spilled ones a thread; KiB of shared memory a program; the matrix instruction, and where it takes the mixed
    weight (A) from; how many writes race with it, or that it is serialised (docs/checking.md); in the main loop the
    stores to shared memory (STS) and the bytes of the narrowest load; and what binds it by the model that
    configurations are chosen by, which is no measurement.
    """
    if find_spec("triton") is None:
        raise click.ClickException("triton is not installed: pip install 'triton>=3.6' (Linux)")
    if plot is not None and find_spec("matplotlib") is None:
        raise click.ClickException("--plot: matplotlib is not installed: pip install matplotlib")
    from rl_kernels.backends.triton import offline

    kernels = [kernel for arch in arches or ARCHES for kernel in offline.kernels(arch)]
    if as_json:
        click.echo(json.dumps([kernel.as_dict() for kernel in kernels], indent=1))
    else:
        click.echo("\n".join([table(kernels), *summary(kernels, offline.compilers())]))
    if plot is not None:
        draw(kernels, plot)


def table(kernels: Sequence[Kernel]) -> str:
    """One line a kernel."""
    from rl_kernels._tables import as_text, simple_table

    numbers = ("regs", "spill", "KiB", "STS", "load")
    columns = ("arch", "kernel", "of", "config", *numbers[:3], "MMA", "A", "hazards", *numbers[3:], "bound by")
    lines = simple_table("", *columns, numbers=numbers)
    for kernel in kernels:
        lines.add_row(
            kernel.arch,
            kernel.name.removesuffix("_kernel"),
            kernel.variant.removeprefix("mixed_"),
            kernel.config,
            str(kernel.registers),
            str(kernel.spilled_bytes),
            f"{kernel.shared_bytes / 1024:.0f}",
            kernel.products,
            ("registers" if kernel.register_a else "shared") if kernel.products else "",
            str(len(kernel.hazards) or ("serialised" if kernel.serialised else "")),
            str(kernel.shared_stores),
            str(kernel.load_bytes),
            kernel.bound,
        )
    return as_text(lines)


def summary(kernels: Sequence[Kernel], compilers: str) -> list[str]:
    """A line on hazards where there are kernels whose products run by themselves; ``compilers`` made them."""
    found = [kernel for kernel in kernels if kernel.products == ASYNCHRONOUS]
    if not found:
        return []
    in_registers, racing = sum(kernel.register_a for kernel in found), sum(bool(kernel.hazards) for kernel in found)
    serialised = sum(kernel.serialised and not kernel.hazards for kernel in found)
    return [
        f"{compilers}: {len(found)} kernels with {ASYNCHRONOUS}, {in_registers} of them with A in registers; "
        f"{racing} have hazards, {serialised} are serialised"
    ]


def draw(kernels: Sequence[Kernel], path: Path) -> None:
    """The fraction of the matrix instructions' peak that each other limit leaves, for the kernels in bfloat16.

    Args:
        kernels: of which those with two bfloat16 sources are drawn.
        path: of the picture; its suffix is the format.
    """
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for kernel in kernels:
        op, types, *_ = kernel.variant.replace(",", "").split()
        if kernel.cycles and types == "bfloat16" and "2 sources" in kernel.variant:
            of_arch = bars.setdefault(op.removeprefix("mixed_"), {}).setdefault(kernel.arch, {})
            of_arch.setdefault(kernel.config, kernel.cycles)
    arches = list(dict.fromkeys(kernel.arch for kernel in kernels))
    heights = [max(map(len, of_op.values())) for of_op in bars.values()]
    size = 4.5 * len(arches) + 1.5, 0.32 * sum(heights) + 0.9 * len(bars) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(bars), len(arches), squeeze=False, height_ratios=heights, sharex=True)
    for (op, of_op), row in zip(bars.items(), axes, strict=True):
        for arch, axis in zip(arches, row, strict=True):
            _draw_bars(axis, of_op.get(arch, {}))
            axis.set_title(f"{op}, {arch}", fontsize=9, loc="left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(COLOURS), fontsize=8, frameon=False)
    figure.supxlabel(
        "fraction of the matrix instructions' peak that each limit leaves (a model; the shortest bar binds)"
    )
    figure.savefig(path, dpi=100)


def _draw_bars(axis: Axes, group: Mapping[str, Mapping[str, float]]) -> None:
    for row, cycles in enumerate(group.values()):
        for bar, (limit, colour) in enumerate(COLOURS.items()):
            fraction = min(1.0, cycles[PEAK] / cycles[limit]) if cycles[limit] > 0 else 1.0
            label = limit if row == 0 else None
            axis.barh(row + 0.27 * (bar - 1), fraction, height=0.25, color=colour, label=label)
    axis.set_yticks(range(len(group)), list(group), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)
