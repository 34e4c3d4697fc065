"""Peak memory of a call, from the allocator's own events."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(fn: Callable[[], Any], device: torch.device | str | None = None) -> int:
    """The most memory that ``fn()`` held at once beyond what was held when it began.

    Args:
        fn: called once; call it before to warm up what allocates at first use.
        device: whose allocator; by default CUDA's where there is a GPU, else the CPU's.

    Returns:
        Bytes. On the CPU every allocation that goes through torch's allocator counts (outputs, gradients,
        temporaries), and what vendor libraries take for themselves does not. On ``"meta"`` nothing is allocated or
        computed: what tensors on that device would take, in CUDA's steps of 512 bytes, and no temporary inside an op.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - start
    if torch.device(device).type == "meta":
        with _Counting() as counting:
            result = fn()
        del result
        return counting.peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Else the profiler writes to the terminal.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = fn()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class _Counting(TorchDispatchMode):
    """Counts the memory of tensors on the meta device, from when an op returns them until nothing holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._arguments: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor) and each.is_meta and each.untyped_storage() not in self._known:
                self._arguments.add(each.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.is_meta:
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or storage in self._arguments:
            return
        size = -(-storage.nbytes() // 512) * 512
        self._known[storage] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size
