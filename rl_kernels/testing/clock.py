"""The time of a call, on a CPU or a GPU, with caches as they are or emptied before; and the host's part of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEBI = 1 << 20
CYCLES_A_SECOND = 2e9
"""Of a GPU, at most about: how long it is kept busy is counted in cycles."""
LEAST_HEADSTART = 1e-4
"""Seconds."""


def last_level_cache(device: torch.device | str) -> int:
    """Bytes of the largest cache: the GPU's L2, or what Linux says of the CPU (64 MiB where it says nothing)."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 * MEBI)


class Clock:
    """Times calls on one device.

    Args:
        device: ``"cpu"``, ``"cuda"`` or one of several GPUs.
        cold: empty the caches before every call.
    """

    def __init__(self, device: torch.device | str, cold: bool) -> None:
        self.device, self.cold = torch.device(device), cold
        self._buffer: torch.Tensor | None = None

    def evict(self) -> None:
        """Stream through a buffer of twice the last cache: nothing else stays in it."""
        if self._buffer is None:
            size = max(64 * MEBI, 2 * last_level_cache(self.device))
            self._buffer = torch.zeros(size // 4, device=self.device)
        self._buffer.sum()  # A read: dirty lines would be written back on the next call's time.

    def seconds(self, call: Callable[[], Any], calls: int = 1) -> float:
        """Seconds a call takes, as a mean over ``calls``; eviction is not counted.

        On a GPU these are the device's: it is kept busy while the host queues the calls, so that it waits for none.
        """
        if self.device.type == "cuda":
            return self._seconds_on_gpu(call, calls)
        if not self.cold:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            self.evict()
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total / calls

    def host_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds that the host takes for a call; on a GPU to queue it, which is the least of three."""
        if self.device.type != "cuda":
            return self.seconds(call)
        return min(self._queued(call) for _ in range(3))

    def _queued(self, call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _seconds_on_gpu(self, call: Callable[[], Any], calls: int) -> float:
        spans = calls if self.cold else 1
        headstart = 2 * self._queued(call) * (1 if self.cold else calls) + LEAST_HEADSTART
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(spans)]
        torch.cuda.synchronize()
        for start, end in events:
            if self.cold:
                self.evict()
            torch.cuda._sleep(int(headstart * CYCLES_A_SECOND))
            start.record()
            for _ in range(1 if self.cold else calls):
                call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls
