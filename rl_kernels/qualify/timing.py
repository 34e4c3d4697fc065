"""Where a backend's kernels win on this machine: calls timed beside their rivals."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from rl_kernels.backends import Backend, Case, registered
from rl_kernels.backends.records import MATERIALISED, Point, describe
from rl_kernels.qualify.problems import Problem, make_call
from rl_kernels.testing import Clock

RIVALS = {"streamed": "streamed", "reference": MATERIALISED}
"""The rivals' names in a record, by the backend that runs them."""
SAMPLE_SECONDS = 1e-3
"""On a CPU a sample is as many calls as take this long, at least one."""
CALLS_ON_GPU = 3
"""In a sample on a GPU, with cold caches each."""


class Effort(NamedTuple):
    """How long a point is timed.

    Attributes:
        seconds: aimed at.
        min_rounds: however long they take.
        max_rounds: however little they take.
    """

    seconds: float
    min_rounds: int
    max_rounds: int


FULL, QUICK = Effort(0.25, 5, 25), Effort(0.1, 3, 9)


class Stopwatch:
    """Times points on one device; on a GPU with cold caches.

    Args:
        device: where.
        effort: how long a point is timed.
    """

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.clock = Clock(device, cold=device.type == "cuda")

    def measure(self, backend: Backend, problem: Problem, case: Case) -> Point | None:
        """Time one call; None where ``auto`` would not ask this backend, or memory does not suffice.

        A loss has to be seen twice.
        """
        try:
            call = make_call(problem, case.op, case.dtype, self.device)
            if backend.why_not_call(call) is not None or backend.worse(case, call) is not None:
                return None
            kernels = {backend.name: backend.kernel(case.op)}
            kernels |= {RIVALS[name]: kernel_of(name, case.op) for name in RIVALS}
            calls = {name: lambda kernel=kernel: kernel(*call.operands) for name, kernel in kernels.items()}
            for _ in range(2):
                rivals = self.medians(calls)
                point = Point(case.op, case.dtype_name, *describe(call), rivals.pop(backend.name), rivals)
                if point.won:
                    break
        except torch.OutOfMemoryError:
            return None
        return point

    def medians(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """The median time of each call, of rounds in which all take turns in an order that is shuffled each time."""
        on_gpu, effort = self.device.type == "cuda", self.effort
        counts, total = {}, 0.0
        for name, call in calls.items():
            once = self.clock.seconds(call)
            if once < effort.seconds or on_gpu:  # The first call compiles, or fills caches.
                once = self.clock.seconds(call)
            counts[name] = CALLS_ON_GPU if on_gpu else max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-6)))
            total += counts[name] * once
        rounds = max(effort.min_rounds, min(effort.max_rounds, int(effort.seconds / total)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order, shuffled = list(calls), random.Random(0)
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                samples[name].append(self.clock.seconds(calls[name], counts[name]))
        return {name: statistics.median(values) for name, values in samples.items()}


def kernel_of(backend: str, op: str) -> Callable[..., Any]:
    """A registered backend's kernel."""
    return next(found.kernel(op) for found in registered() if found.name == backend)
