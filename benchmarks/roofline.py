"""What this machine can do at most: measured read bandwidth and matrix-product rate, and the bound that follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.contenders import BOTH, FORWARD
from rl_kernels.testing.clock import MEBI, last_level_cache


def measure_roofline(device: str, dtypes: Sequence[str]) -> dict[str, Any]:
    """The read bandwidth (bytes a second) and, in each dtype, the matrix product's rate (operations a second).

    The best of several tries, with as many threads as torch has now.
    """
    size = (4 if device == "cuda" else 1) * max(256 * MEBI, 4 * last_level_cache(device))
    buffer = torch.ones(size // 4, device=device)
    bandwidth = buffer.nbytes / _best(buffer.sum, device)
    del buffer
    side = 8192 if device == "cuda" else 2048
    rates = {}
    for name in dtypes:
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
        rates[name] = 2 * side**3 / _best(lambda left=left, right=right: left @ right, device)
    return {"read_bytes_per_second": bandwidth, "matrix_side": side, "flops_per_second": rates}


def _best(call: Any, device: str, tries: int = 5) -> float:
    best = float("inf")
    for _ in range(tries + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bound_seconds(case: Case, mode: str, sources: int, roofline: dict[str, Any], flops: int | None = None) -> float:
    """The least time the case can take: its products at full rate, or its compulsory bytes at full bandwidth.

    Compulsory is what each pass must read and write once when nothing stays in a cache between passes: the input, every
    source, the output; and going back, the output's gradient and these again, and all gradients. A case that fits in
    the cache can beat this bound while the cache is warm.

    Args:
        case: what is run.
        mode: forward, forward+backward, or a whole step.
        sources: how many weights are read (and how many gradients of weights written).
        roofline: as measured.
        flops: of the whole mode, where the case has no formula; the bytes then do not count.
    """
    rate = roofline["flops_per_second"][case.dtype]
    if case.flops is None or case.elements is None:
        assert flops is not None, "flops: got None, expected a number for a case without a formula"
        return flops / rate
    x, weight, y = case.elements
    elements = x + sources * weight + y
    if mode == BOTH:
        elements += y + x + sources * weight + x + sources * weight
    total = case.flops * {FORWARD: 1, BOTH: 3}[mode]
    size = torch.empty((), dtype=getattr(torch, case.dtype)).element_size()
    return max(total / rate, elements * size / roofline["read_bytes_per_second"])
