"""``python -m rl_kernels plan``: the plan for a named model, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click
from rich.console import Console

from rl_kernels.conversion.grouping import Granularity
from rl_kernels.conversion.memory import STATES, Optimizer
from rl_kernels.conversion.options import Boundaries, Level, Norms, Share
from rl_kernels.conversion.planner import plan
from rl_kernels.conversion.targets import NAMED
from rl_kernels.conversion.zoo import build


@click.command("plan")
@click.argument("model")
@click.option("--every", type=int, help="Replace a block in this many.  [default: 4]")
@click.option("--budget", help="Instead: replace as few as let training fit, as 1.5GiB; activations not counted.")
@click.option("--optimizer", type=click.Choice(list(STATES)), default="adamw", show_default=True, help="Of training.")
@click.option("--offset", type=int, help="Number of the block at which the first falls due.  [default: as --every]")
@click.option("--strict", is_flag=True, help="Skip what is due and cannot be replaced, instead of taking the next.")
@click.option("--level", type=click.Choice(get_args(Level)), default="auto", show_default=True, help="What counts.")
@click.option("--targets", type=click.Choice(list(NAMED)), multiple=True, help="Replace these only. Repeatable.")
@click.option("--norms", type=click.Choice(get_args(Norms)), default="mixed", show_default=True)
@click.option("--granularity", type=click.Choice(get_args(Granularity)), default="scalar", show_default=True)
@click.option("--share", type=click.Choice(get_args(Share)), help="Coefficients for each.  [default: block]")
@click.option("--window", type=int, default=1, show_default=True, help="Neighbours on each side.")
@click.option("--boundaries", type=click.Choice(get_args(Boundaries)), default="skipped", show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Save the plan to this file too.")
def plan_command(
    model: str,
    every: int | None,
    budget: str | None,
    optimizer: Optimizer,
    offset: int | None,
    strict: bool,
    level: Level,
    targets: tuple[str, ...],
    norms: Norms,
    granularity: Granularity,
    share: Share | None,
    window: int,
    boundaries: Boundaries,
    path: Path | None,
) -> None:
    """Show which blocks of MODEL would be replaced, and by which neighbours.

    MODEL is the name of a torchvision or timm model or a transformers model type, looked for in this order:
    resnet34, vit_tiny_patch16_224, bert; or timm/resnet18 for one library's.
    """
    try:
        made = plan(
            build(model),
            every,
            targets=targets or None,
            offset=offset,
            strict=strict,
            level=level,
            granularity=granularity,
            share=share,
            norms=norms,
            window=window,
            boundaries=boundaries,
            budget=budget,
            optimizer=optimizer,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console = Console()
    if console.is_terminal:
        console.print(made)
    else:
        click.echo(str(made))
    if path is not None:
        made.save(path)
