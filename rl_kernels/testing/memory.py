"""Peak memory of a call, from the allocator's own events."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_memory(fn: Callable[[], Any], device: torch.device | str | None = None) -> int:
    """The most memory that ``fn()`` held at once beyond what was held when it began.

    Args:
        fn: called once; call it before to warm up what allocates at first use.
        device: whose allocator; by default CUDA's where there is a GPU, else the CPU's.

    Returns:
        Bytes. On the CPU every allocation that goes through torch's allocator counts (outputs, gradients,
        temporaries), and what vendor libraries take for themselves does not.
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
