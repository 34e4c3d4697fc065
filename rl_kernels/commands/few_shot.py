"""``python -m rl_kernels few-shot``: tasks of few images, learnt by modulators and by what they are compared with."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rl_kernels._tables import as_text, simple_table
from rl_kernels.commands.systems import JOBS, errors_in_words

if TYPE_CHECKING:
    from rl_kernels.systems.modulation.episodes import FewShot

VARIANTS: dict[str, dict[str, Any]] = {
    "maml": {"method": "maml"},
    "maml-first-order": {"method": "maml", "second_order": False},
    "anil": {"method": "anil"},
    "norms": {"method": "norms"},
    "channel": {"method": "channel"},
    "outer": {"method": "outer"},
    "outer-first-order": {"method": "outer", "second_order": False},
    "outer-and-network": {"method": "outer", "learn_base": True},
    "mixout": {"method": "mixout"},
}
"""What is compared, by label; the first is what the others' differences are to."""


@click.command("few-shot")
@click.option("--variant", "labels", multiple=True, type=click.Choice(list(VARIANTS)), help="Repeatable; else all.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A field of all, as shots=5. Repeatable.")
@click.option(
    "--data", multiple=True, metavar="NAME", help="Sets whose classes are taken.  [default: animals, mnist5k]"
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="So many, from 0.")
@click.option("--json", "record", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here, too.")
@JOBS
def few_shot_command(
    labels: tuple[str, ...],
    settings: tuple[str, ...],
    data: tuple[str, ...],
    seeds: int,
    record: Path | None,
    jobs: int,
) -> None:
    """Learn to learn tasks of few images, and compare ways to adapt a network to them.

    Three classes in five of each set are trained on, the others are those of test episodes. Accuracy is the mean over
    test episodes, with half the interval of 95 % of that mean; a seed's test episodes are the same for all variants.
    """
    with errors_in_words():
        from rl_kernels._machine import machine, versions
        from rl_kernels.systems.modulation.episodes import FewShot
        from rl_kernels.systems.runner.folder import write_json

        told = _read(settings, FewShot)
        chosen = {label: VARIANTS[label] for label in labels or VARIANTS}
        by_seed = [[FewShot(**{**told, **each, "seed": seed}) for each in chosen.values()] for seed in range(seeds)]
        names = data or ("animals", "mnist5k")
        if jobs == 1:
            found = [_of_one_seed(wanted, names) for wanted in by_seed]
        else:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                found = [each.result() for each in [pool.submit(_of_one_seed, w, names) for w in by_seed]]
        rows = {label: [of_seed[number] for of_seed in found] for number, label in enumerate(chosen)}
        _print(rows)
        if record is not None:
            about = {"data": list(names), "machine": machine(), "versions": versions("numpy")}
            write_json(record, {**about, "variants": rows})


def _of_one_seed(wanted: Sequence[FewShot], names: Sequence[str]) -> list[dict[str, Any]]:
    import torch

    from rl_kernels.systems.modulation.episodes import load_classes, run

    torch.set_num_threads(1)
    return run(wanted, load_classes(names, wanted[0].size))


def _read(settings: Sequence[str], kind: type[FewShot]) -> dict[str, Any]:
    import yaml

    types = {each.name: type(each.default) for each in dataclasses.fields(kind)}
    told: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in types or key in ("method", "seed"):
            known = ", ".join(name for name in types if name not in ("method", "seed"))
            raise ValueError(f"set: got {setting!r}, expected key=value, the key one of {known}")
        value = yaml.safe_load(text)
        if types[key] is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML reads 1e-3 as text.
        if type(value) is not types[key]:
            raise ValueError(f"set: got {setting!r}, expected {types[key].__name__}")
        told[key] = value
    return told


def _print(rows: dict[str, list[dict[str, Any]]]) -> None:
    headings = ("adapted parameters", "accuracy %", "+-", "by seed", "s of learning", "ms an episode")
    drawn = simple_table("", "", *headings, numbers=headings)
    for label, seeds in rows.items():
        first = seeds[0]
        # Independent episodes of each seed.
        half = sum(each["interval"] ** 2 for each in seeds) ** 0.5 / len(seeds)
        drawn.add_row(
            label,
            f"{first['parameters']:,}",
            f"{100 * statistics.fmean(each['accuracy'] for each in seeds):.2f}",
            f"{100 * half:.2f}",
            ", ".join(f"{100 * each['accuracy']:.1f}" for each in seeds),
            f"{statistics.fmean(each['learning_seconds'] for each in seeds):.0f}",
            f"{1000 * statistics.fmean(each['evaluation_seconds'] / each['evaluated'] for each in seeds):.1f}",
        )
    click.echo(as_text(drawn))
