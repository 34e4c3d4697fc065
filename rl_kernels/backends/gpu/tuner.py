"""Configurations found by timing, for a program that runs long enough to pay for it: a table, which is data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rl_kernels.backends.gpu.heuristics import Config, Device, Table, Work, candidates, recording, use_table

MAX_TIMED = 12
"""Configurations of each product that are timed: those with the best estimates."""
MAX_RATIO = 0.98
"""A configuration's time over that of the estimate's choice, at most, to replace it: what is above may be noise."""


def tune(
    step: Callable[[], Any], path: Path | str | None = None, seconds: Callable[[Callable[[], Any]], float] | None = None
) -> Table:
    """Time the best-estimated configurations of every product that a step runs, each within the step.

    Run it under ``rl.use_backend("triton")``. Each configuration is compiled when it is first timed: expect minutes.

    Args:
        step: what is to be fast, such as a training step, run again and again.
        path: write the table here, as JSON for ``load``.
        seconds: measures a step; by default the median of nine, by CUDA events.

    Returns:
        A table for ``heuristics.use_table``: an entry for each product at which another configuration than the
        estimate's was faster.
    """
    seconds = seconds or seconds_on_gpu
    with recording() as seen:
        step()
    table: Table = {}
    for (work, device), configs in seen.items():
        first, *others = candidates(work, configs, device)[:MAX_TIMED]
        times = {}
        for candidate in (first, *others):
            with use_table({**table, (work, device): candidate}):
                times[candidate] = seconds(step)
        best = min(times, key=times.__getitem__)
        if times[best] < MAX_RATIO * times[first]:
            table[work, device] = best
    if path is not None:
        save(table, path)
    return table


def seconds_on_gpu(step: Callable[[], Any]) -> float:
    """The median time of a step by CUDA events, after two that compile and warm up."""
    for _ in range(2):
        step()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def save(table: Table, path: Path | str) -> None:
    """Write a table, an entry a line."""
    lines = [
        json.dumps({"work": work._asdict(), "device": device._asdict(), "config": config._asdict(), "splits": splits})
        for (work, device), (config, splits) in table.items()
    ]
    Path(path).write_text("[\n" + ",\n".join(lines) + "\n]\n")


def load(path: Path | str) -> Table:
    """Read what ``save`` wrote.

    Raises:
        ValueError: the file holds no such table.
    """
    try:
        return {
            (Work(**entry["work"]), Device(**entry["device"])): (Config(**entry["config"]), int(entry["splits"]))
            for entry in json.loads(Path(path).read_text())
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got no table of configurations: {error}") from error
