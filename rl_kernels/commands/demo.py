"""``python -m rl_kernels demo``: two small networks trained on real digits, whole and with blocks replaced.

:func:`run_demo` trains every model of :mod:`rl_kernels.systems.digits` end to end and replaced, from the same seeds,
and leaves a table on the terminal, a plot and a JSON record.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import rl_kernels as rl
from rl_kernels._machine import machine, versions
from rl_kernels.systems.digits import (
    SYSTEMS,
    Digits,
    History,
    System,
    build_model,
    load_digits,
    make_optimizer,
    optimizer_bytes,
    steps_per_epoch,
    train,
    training_step,
)
from rl_kernels.testing import peak_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHOLE, REPLACED = "end-to-end", "replaced"
COLOURS = {WHOLE: "#4c566a", REPLACED: "#d9622b"}
MEGABYTE = 1e6


@dataclass
class Result:
    """One variant of one model, over all seeds.

    Attributes:
        model: name of the system.
        variant: ``"end-to-end"`` or ``"replaced"``.
        parameters: number of trainable numbers.
        peak_bytes: most memory held during a training step: parameters, buffers, optimizer state, gradients,
            activations and temporaries.
        runs: one record a seed.
    """

    model: str
    variant: str
    parameters: int
    peak_bytes: int
    runs: list[History] = field(default_factory=list)

    @property
    def final_accuracies(self) -> list[float]:
        """Test accuracy after the last epoch, one a seed."""
        return [run.test_accuracy[-1] for run in self.runs]

    @property
    def accuracy(self) -> float:
        """Mean over the seeds of the final test accuracy."""
        return statistics.fmean(self.final_accuracies)

    @property
    def accuracy_spread(self) -> float | None:
        """Sample standard deviation over the seeds of the final test accuracy; None for a single seed."""
        return statistics.stdev(self.final_accuracies) if len(self.runs) > 1 else None

    @property
    def step_seconds(self) -> float:
        """Median duration of a training step, over all steps of all seeds."""
        return statistics.median(seconds for run in self.runs for seconds in run.step_seconds)

    @property
    def optimizer_bytes(self) -> int:
        """Size of the optimizer's state."""
        return self.runs[0].optimizer_bytes

    def as_record(self) -> dict[str, Any]:
        """Return the summary and every run as plain JSON types."""
        return {
            "model": self.model,
            "variant": self.variant,
            "parameters": self.parameters,
            "optimizer_bytes": self.optimizer_bytes,
            "peak_bytes": self.peak_bytes,
            "step_seconds_median": self.step_seconds,
            "test_accuracy_mean": self.accuracy,
            "test_accuracy_stdev": self.accuracy_spread,
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


def peak_of_a_step(system: System, data: Digits, every: int | None) -> int:
    """Measure the most memory held during a training step, in bytes: the model, the optimizer's state and the rest."""
    model = build_model(system, seed=0, every=every)
    optimizer = make_optimizer(model, system.learning_rate, system.weight_decay)
    images, labels = data.train_images[: system.batch_size], data.train_labels[: system.batch_size]
    training_step(model, optimizer, images, labels)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + optimizer_bytes(optimizer)
    return held + peak_memory(lambda: training_step(model, optimizer, images, labels), images.device)


def run_demo(
    output: Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    every: int = 4,
    epochs: int | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Train every system end to end and replaced, report on ``console``, and write a plot and a record.

    Args:
        output: folder for ``demo.png`` and ``demo.json``; made where it is missing.
        quick: fewer epochs and seeds, for a first look.
        seeds: number of seeds; 3 by default, 2 when quick.
        every: of the replaced variant, as in :func:`rl_kernels.plan`.
        epochs: passes over the data, instead of each system's own number.
        console: where the report goes; the terminal by default.

    Returns:
        One result for each model and variant.

    Raises:
        ImportError: the ``demo`` extra is not installed.
        ValueError: nothing can be replaced with this ``every``.
    """
    try:
        import matplotlib  # noqa: F401  (found missing now, not after the training)
    except ImportError as error:
        raise ImportError("the demo's plot needs matplotlib: pip install 'rl_kernels[demo]'") from error

    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    if seeds is None:
        seeds = 2 if quick else 3
    lengths = {name: epochs or (system.quick_epochs if quick else system.epochs) for name, system in SYSTEMS.items()}
    plans = make_plans(every)
    for name, plan in plans.items():
        console.rule(name)
        console.print(plan)

    console.rule("training")
    with one_thread():
        results = train_all(load_digits(), every, seeds, lengths, console)
        record = {
            "schema": 2,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions("numpy", "scikit-learn", "matplotlib"),
            "arguments": {"quick": quick, "seeds": seeds, "every": every, "epochs": lengths},
            "systems": {
                name: {key: value for key, value in dataclasses.asdict(system).items() if key != "build"}
                for name, system in SYSTEMS.items()
            },
            "backends": str(rl.services()).splitlines(),
            "plans": {name: json.loads(plan.to_json()) for name, plan in plans.items()},
            "results": [result.as_record() for result in results],
        }
    console.print(results_table(results, every))
    plot(results, every, output / "demo.png")
    record["seconds"] = round(time.perf_counter() - started, 1)
    (output / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"curves: {output / 'demo.png'}   record: {output / 'demo.json'}", highlight=False, soft_wrap=True)
    console.print("longer training, other data: make systems; python -m rl_kernels train replacement", highlight=False)
    return results


def make_plans(every: int) -> dict[str, rl.Plan]:
    """Plan the replacements of each system's model; raises ValueError where there are none."""
    return {name: rl.plan(system.build(), every=every) for name, system in SYSTEMS.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread.

    At the demo's sizes a second thread gains little, and on a busy machine two that wait for each other stall.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_all(data: Digits, every: int, seeds: int, lengths: dict[str, int], console: Console) -> list[Result]:
    """Train every variant of every system from every seed, with a progress bar and a line a run.

    Args:
        data: the digits.
        every: of the replaced variant.
        seeds: number of seeds, counted from 0.
        lengths: epochs of each system.
        console: where the progress goes.
    """
    variants = {WHOLE: None, REPLACED: every}
    results = []
    for name, system in SYSTEMS.items():
        for variant, spacing in variants.items():
            parameters = sum(p.numel() for p in build_model(system, 0, spacing).parameters() if p.requires_grad)
            results.append(Result(name, variant, parameters, peak_of_a_step(system, data, spacing)))

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    steps = sum(lengths[name] * steps_per_epoch(data, system.batch_size) for name, system in SYSTEMS.items())
    with progress:
        task = progress.add_task("", total=steps * len(variants) * seeds)
        # The variants take turns, so that a machine that slows down slows both.
        for seed, result in itertools.product(range(seeds), results):
            progress.update(task, description=f"{result.model}, {result.variant}, seed {seed}")
            system = SYSTEMS[result.model]
            history = train(
                build_model(system, seed, variants[result.variant]),
                data,
                epochs=lengths[result.model],
                seed=seed,
                batch_size=system.batch_size,
                learning_rate=system.learning_rate,
                weight_decay=system.weight_decay,
                on_step=lambda: progress.advance(task),
            )
            result.runs.append(history)
            console.print(
                f"seed {seed}  {result.model:<12}  {result.variant:<10}  test accuracy "
                f"{100 * history.test_accuracy[-1]:6.2f} %  {sum(history.step_seconds):5.1f} s",
                highlight=False,
            )
    return results


def results_table(results: Sequence[Result], every: int) -> Table:
    """Lay the results out as a table for the terminal."""
    seeds = len(results[0].runs)
    table = Table(
        title=f"scikit-learn's digits, every={every}",
        caption=(
            f"accuracy: mean ± standard deviation over {seeds} seeds; optimizer: its state;\n"
            "step: median time; peak: most memory held during a training step"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for heading in ("test\naccuracy (%)", "\nparameters", "optimizer\n(MB)", "step\n(ms)", "peak\n(MB)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.model,
            result.variant,
            accuracy_text(result, 2),
            f"{result.parameters:,}",
            f"{result.optimizer_bytes / MEGABYTE:.2f}",
            f"{1e3 * result.step_seconds:.1f}",
            f"{result.peak_bytes / MEGABYTE:.1f}",
            end_section=result.variant == REPLACED,
        )
    return table


def accuracy_text(result: Result, digits: int) -> str:
    """Write a result's accuracy in percent, with its spread where there is one."""
    spread = "" if result.accuracy_spread is None else f" ± {100 * result.accuracy_spread:.{digits}f}"
    return f"{100 * result.accuracy:.{digits}f}{spread}"


def plot(results: Sequence[Result], every: int, path: Path) -> None:
    """Write a PNG with a row a model: training loss, test accuracy, and what replacement saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    models = list(dict.fromkeys(result.model for result in results))
    figure = Figure(figsize=(13, 1.2 + 3.4 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(models), 3, squeeze=False, width_ratios=(1, 1, 0.9))
    for (loss_axes, accuracy_axes, cost_axes), model in zip(rows, models, strict=True):
        variants = {result.variant: result for result in results if result.model == model}
        for result in variants.values():
            label = f"{result.variant}: {accuracy_text(result, 1)} %"
            draw_curves(loss_axes, [run.train_loss for run in result.runs], result.variant, label=None)
            percent = [[100 * value for value in run.test_accuracy] for run in result.runs]
            draw_curves(accuracy_axes, percent, result.variant, label=label)
        loss_axes.set(title=f"{model}: training loss", ylabel="cross-entropy", yscale="log", xlabel="epoch")
        accuracy_axes.set(title=f"{model}: test accuracy", ylabel="% right", xlabel="epoch")
        accuracy_axes.legend(loc="lower right", frameon=False)
        draw_costs(cost_axes, variants[WHOLE], variants[REPLACED])
        cost_axes.set_title(f"{model}: cost when replaced")
        for axes in (loss_axes, accuracy_axes):
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (loss_axes, accuracy_axes, cost_axes):
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(11)
    seeds = len(results[0].runs)
    figure.suptitle(
        f"Replacement Learning on scikit-learn's digits, every={every} "
        f"(lines: mean over {seeds} seed{'s' if seeds > 1 else ''}, bands: lowest to highest)",
        fontsize=13,
    )
    figure.savefig(path, dpi=120)


def draw_curves(axes: Axes, curves: Sequence[Sequence[float]], variant: str, label: str | None) -> None:
    """Draw the mean over seeds of one curve a seed, with a band from the lowest to the highest."""
    by_epoch = list(zip(*curves, strict=True))
    epochs = range(1, len(by_epoch) + 1)
    colour = COLOURS[variant]
    axes.plot(epochs, [statistics.fmean(values) for values in by_epoch], color=colour, linewidth=2, label=label)
    axes.fill_between(epochs, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=colour, alpha=0.2, lw=0)


def draw_costs(axes: Axes, whole: Result, replaced: Result) -> None:
    """Draw what the replaced variant costs, in percent of the whole one."""
    costs = {
        "parameters": (replaced.parameters, whole.parameters, f"{replaced.parameters:,}"),
        "optimizer state": (
            replaced.optimizer_bytes,
            whole.optimizer_bytes,
            f"{replaced.optimizer_bytes / MEGABYTE:.2f} MB",
        ),
        "step time": (replaced.step_seconds, whole.step_seconds, f"{1e3 * replaced.step_seconds:.1f} ms"),
        "peak memory": (replaced.peak_bytes, whole.peak_bytes, f"{replaced.peak_bytes / MEGABYTE:.1f} MB"),
    }
    percent = [100 * mine / theirs for mine, theirs, _ in costs.values()]
    axes.barh(list(costs), percent, color=COLOURS[REPLACED], height=0.55)
    for row, (value, (_, _, text)) in enumerate(zip(percent, costs.values(), strict=True)):
        axes.text(max(100, value) + 4, row, f"{value:.0f} %  ({text})", va="center", fontsize=9)
    axes.axvline(100, color=COLOURS[WHOLE], linewidth=2)
    axes.set_xlim(0, 1.6 * max(100, *percent))
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.invert_yaxis()
    axes.set_xlabel("% of end-to-end")


@click.command()
@click.option("--quick", is_flag=True, help="Fewer epochs and seeds: a first look in under 40 seconds.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo_output"),
    show_default=True,
    help="Folder for the plot and the JSON record.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Runs of each variant.  [default: 3, or 2 with --quick]")
@click.option(
    "--every",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="A replacement falls due every so many blocks.",
)
def demo_command(quick: bool, output: Path, seeds: int | None, every: int) -> None:
    """Train a small ResNet and a small ViT on real digits, end to end and with blocks replaced.

    Prints a table of what replacement costs and saves, and writes the curves (demo.png) and a record of everything
    (demo.json). Takes under three minutes on two cores.
    """
    try:
        make_plans(every)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--every") from error
    try:
        run_demo(output, quick=quick, seeds=seeds, every=every)
    except ImportError as error:
        raise click.ClickException(str(error)) from error
