"""Timing several calls side by side, and the memory of one."""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender
from rl_kernels.testing import Clock, peak_memory


@dataclass(frozen=True)
class Settings:
    """How a cell is measured; recorded as it is.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: few rounds.
        cold: evict the caches before every call.
        seed: of the order of the rivals within a round.
        warmup_calls: calls of each rival before the first round.
        sample_seconds: a sample is as many calls as take this long, at least one.
        cell_seconds: aimed at for all the rounds of a cell.
        min_rounds: at least so many rounds, however long they take.
        max_rounds: and at most so many.
    """

    device: str = "cpu"
    quick: bool = False
    cold: bool = False
    seed: int = 0
    warmup_calls: int = 3
    sample_seconds: float = 2e-3
    cell_seconds: float = 6.0
    min_rounds: int = 7
    max_rounds: int = 40

    @classmethod
    def for_quick(cls, device: str, cold: bool) -> Settings:
        """A first look: a few rounds."""
        return cls(device, quick=True, cold=cold, warmup_calls=1, cell_seconds=0.7, min_rounds=5, max_rounds=7)


def time_interleaved(
    contenders: Sequence[Contender], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time all contenders in turns: in every round each gives one sample, in an order that is shuffled each time.

    A machine that slows down then slows all alike, and none always follows the same other.

    Returns:
        Seconds a call by name, one a round; and how many calls each sample took.
    """
    clock = Clock(settings.device, settings.cold)
    calls = {}
    for contender in contenders:
        with contender.context():
            for _ in range(settings.warmup_calls):
                contender.call()
            once = clock.seconds(contender.call)
            if once < 0.1:
                once = min(once, clock.seconds(contender.call))
            contender.release()
        calls[contender.name] = max(1, math.ceil(settings.sample_seconds / max(once, 1e-9)))
        if settings.cold:
            calls[contender.name] = min(calls[contender.name], 20)  # Eviction takes far longer than such a call.

    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order, shuffled = list(contenders), random.Random(settings.seed)
    start = time.perf_counter()
    for done in range(settings.max_rounds):
        shuffled.shuffle(order)
        for contender in order:
            with contender.context():
                samples[contender.name].append(clock.seconds(contender.call, calls[contender.name]))
            contender.release()  # The next one finds the same memory.
        if done + 1 >= settings.min_rounds and time.perf_counter() - start > settings.cell_seconds:
            break
    return samples, calls


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    return {"median": statistics.median(values), "p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile, linear between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratios(samples: Mapping[str, Sequence[float]], baseline: str) -> dict[str, list[float]]:
    """Each sample over the baseline's of the same round."""
    base = samples[baseline]
    return {name: [mine / its for mine, its in zip(values, base, strict=True)] for name, values in samples.items()}


def extra_memory(contender: Contender, device: str) -> dict[str, int | None]:
    """Peak bytes of one call beyond its outputs and gradients: by the allocator's events, and by resident memory.

    Resident memory includes what vendor libraries take for themselves; it is None where it cannot be measured. A
    workspace that is kept from call to call shows in neither.
    """
    with contender.context():
        contender.call()
        contender.release()
        events = peak_memory(contender.call, device)
        contender.release()
        resident = resident_growth(contender.call) if device == "cpu" else None
        contender.release()
    return {
        "peak_extra_bytes": max(0, events - contender.returned_bytes),
        "rss_extra_bytes": None if resident is None else max(0, resident - contender.returned_bytes),
    }


def resident_growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which the process's resident memory peaks above where it was, or None where Linux does not say."""
    try:
        # What the allocator has kept would be used again and not be seen to grow.
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # The peak is the present value from here on.
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields[name].split()[0]) << 10
