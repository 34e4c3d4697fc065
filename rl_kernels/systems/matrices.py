"""Experiments of several variants and seeds: the questions that the reviewers of Replacement Learning asked."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import track

from rl_kernels.systems import config as configs
from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import System
from rl_kernels.systems.registry import system
from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner.stopping import Stopped, leave_interrupts_to_the_parent


@dataclass(frozen=True)
class Matrix:
    """Variants of one preset.

    Attributes:
        question: that it answers.
        system: that is trained.
        preset: of it, which all variants have.
        seeds: of each variant, from 0.
        variants: label to settings, ``key=value``; the first is what the others are compared with. ``{label}`` stands
            for the folder of the run of that variant, or base, with the same seed, which is then trained before.
        shared: settings of all.
        bases: as variants, of runs that variants begin with and that are not compared, as on other data.
    """

    question: str
    system: str
    preset: str
    seeds: int
    variants: Mapping[str, Sequence[str]]
    shared: Sequence[str] = ()
    bases: Mapping[str, Sequence[str]] = field(default_factory=dict)


ONE_THREAD = ("runtime.accelerator=cpu", "runtime.threads=1")
NARROW = (*ONE_THREAD, "model.width=4")
"""Of ResNet-32: what two cores train in minutes."""
WHOLE = ("replacement.every=null",)

MATRICES = {
    "digits-resnet": Matrix(
        "How many blocks, which neighbours learn, which coefficients, and what do simpler nets of that size reach?",
        "replacement",
        "digits",
        5,
        {
            "whole": WHOLE,
            "every-2": ("every=2",),
            "every-3": ("every=3",),
            "every-4": ("every=4",),
            "every-6": ("every=6",),
            "every-4-offset-2": ("every=4", "offset=2"),
            "every-4-detach-both": ("every=4", "detach=[0,1]"),
            "every-4-detach-next": ("every=4", "detach=[1]"),
            "every-4-convex": ("every=4", "constraint=convex"),
            "every-4-channel": ("every=4", "granularity=channel"),
            "every-4-window": ("every=4", "window=2"),
            "every-4-boundaries": ("every=4", "boundaries=blocks"),
            "control-removed": ("every=4", "control=removed"),
            "control-tied": ("every=4", "control=tied"),
            "control-frozen": ("every=4", "control=frozen"),
            "control-narrowed": ("every=4", "control=narrowed"),
        },
        ONE_THREAD,
    ),
    "digits-vit": Matrix(
        "Is it better to replace a transformer's attention only?",
        "replacement",
        "digits-vit",
        5,
        {
            "whole": WHOLE,
            "attention": ("targets=[attention]",),
            "whole-blocks": (),
            "projection": ("granularity=projection",),
        },
        ONE_THREAD,
    ),
    "animals": Matrix(
        "What does replacement cost on drawn animals, and what do simpler nets of that size reach?",
        "replacement",
        "animals",
        2,
        {
            "whole": WHOLE,
            "every-4": (),
            "every-4-boundaries": ("boundaries=blocks",),
            "control-removed": ("control=removed",),
            "control-narrowed": ("control=narrowed",),
        },
        (*NARROW, "epochs=6"),
    ),
    "fine-tuning": Matrix(
        "What is left of a trained net when it is converted, and what do two epochs bring back?",
        "replacement",
        "animals",
        2,
        {
            "trained-whole": (*WHOLE, "epochs=6"),
            **{
                label: ("weights={trained-whole}", "epochs=2", "learning_rate=0.001", *settings)
                for label, settings in {
                    "whole-on": WHOLE,
                    "fit": ("init=fit",),
                    "fit-channel": ("init=fit", "granularity=channel"),
                    "halves": (),
                    "removed": ("control=removed",),
                }.items()
            },
        },
        NARROW,
    ),
    "local": Matrix(
        "What do locally supervised modules cost and save, beside back-propagation and its checkpointing?",
        "local",
        "short",
        3,
        {
            **{
                method: (f"method={method}",)
                for method in ("bp", "checkpointing", "greedy", "dgl", "infopro-contrast", "man++", "hilo", "mlaan")
            },
            "man++-weights": ("method=man++", "mixing=weights"),
            "mlaan-cascades-only": ("method=mlaan", "independent=false"),
            "mlaan-weights": ("method=mlaan", "mixing=weights"),
        },
        # Heads as narrow, beside those of public code, as the network is.
        (*NARROW, "limit=2000", "epochs=5", "modules=4", "head_width=32", "probe=true"),
    ),
}


def _transfer(question: str, *target: str) -> Matrix:
    """A network of the drawn animals learns another set, by parts of it or as a whole."""
    on_base = {
        "full": ("kind=full",),
        "probe": ("kind=none", "norms=frozen"),
        "norms": ("kind=none",),
        "last-stage": ("kind=none", "unfrozen=[blocks.6,blocks.7,blocks.8]"),
        "channel": ("kind=channel",),
        "outer-1": ("rank=1",),
        "outer": (),
        "mixout": ("kind=mixout", "rank=4"),
        "gate": ("kind=gate",),
        "lora-1": ("kind=lora", "rank=1"),
        "lora": ("kind=lora",),
    }
    # As ordinary training has them: all the network's weights decay.
    base = ("kind=full", "data.name=animals", "weight_decay=0.05", "batch_size=128", "epochs=10")
    return Matrix(
        question,
        "modulation",
        "mnist5k",
        3,
        {
            **{label: ("weights={base}", *target, *settings) for label, settings in on_base.items()},
            "full-at-random": ("kind=full", *target),
        },
        (*ONE_THREAD, "model.width=8"),
        {"base": base},
    )


MATRICES |= {
    "transfer": _transfer(
        "A trained net, frozen, learns 1,000 digits: what do modulators reach, beside other ways to adapt it?",
        "limit=1000",
        "epochs=10",
    ),
    "transfer-100": _transfer("The same with 100 digits.", "limit=100", "batch_size=20", "epochs=20"),
}


def carry_out(
    matrix: Matrix, out: Path, jobs: int, *, epochs: int | None = None, seeds: int | None = None
) -> list[Path]:
    """Train every run of a matrix that is not finished in ``out``; what was begun goes on from its last checkpoint.

    Args:
        matrix: what to train.
        out: gets a folder a variant, and in it a folder a seed.
        jobs: processes at a time.
        epochs: instead of the preset's and the variants'; None leaves them.
        seeds: instead of the matrix's.

    Returns:
        The variants' folders, in the matrix's order.
    """
    chosen = system(matrix.system)
    more = () if epochs is None else (f"epochs={epochs}",)
    # First those that others begin with.
    waves: tuple[dict[Path, Config], dict[Path, Config]] = ({}, {})
    for label, settings in {**matrix.bases, **matrix.variants}.items():
        for seed in range(matrix.seeds if seeds is None else seeds):
            folder = f"seed-{seed}"
            filled = list(settings)
            for other in (*matrix.bases, *matrix.variants):
                filled = [each.replace(f"{{{other}}}", str((out / other / folder).resolve())) for each in filled]
            told = (*matrix.shared, *filled, *more, f"seed={seed}")
            config = configs.resolve(chosen.config, chosen.presets, matrix.preset, None, told)
            waves[filled != list(settings)][out / label / folder] = config
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / files.ORDER, list(matrix.variants))
    for wave in waves:
        if wave:
            run_all(chosen, wave, jobs)
    return [out / label for label in matrix.variants]


def run_all(chosen: System[Any], runs: Mapping[Path, Config], jobs: int) -> None:
    """Train, go on with, or leave finished the run in each folder, ``jobs`` at a time in processes of their own."""
    if jobs == 1:
        for folder, config in runs.items():
            run_one(chosen.name, config, folder, show=True)
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise Stopped(number, "; the same command goes on where the runs are")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=leave_interrupts_to_the_parent)
    try:
        pending = [pool.submit(run_one, chosen.name, config, folder, show=False) for folder, config in runs.items()]
        for future in track(as_completed(pending), "runs", len(pending), console=Console(stderr=True)):
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()  # A run notices it after its step, and writes a checkpoint.
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_one(name: str, config: Config, folder: Path, *, show: bool) -> None:
    """Train, go on with, or leave finished the run in ``folder``.

    Raises:
        RunError: it holds a run of another config.
    """
    from rl_kernels.systems.runner.training import read_run, resume, train

    if not (folder / files.RUN).exists():
        train(system(name), config, folder, show=show)
        return
    if read_run(folder)[1] != config:
        raise files.RunError(f"out: {folder} holds a run of another config: name another folder")
    resume(folder, show=show)
