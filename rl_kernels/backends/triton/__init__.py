"""The Triton kernels: portable over NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rl_kernels.backends.gpu import convolution, heuristics, operands
from rl_kernels.backends.gpu.operands import arithmetic
from rl_kernels.backends.selection import Case, Variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_SOURCES = 8
CAPABILITY = (8, 0)
OLDEST = (3, 6)
"""Triton, of which earlier versions do not pass tuples of tensors to kernels as these use them."""


def kernels(ops: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The implementation of each of ``ops``; Triton is imported at the first call."""
    return gpu.kernels_of(__name__, ops)


def refuses(case: Case) -> str | None:
    reason = _missing()
    if reason is not None:
        return reason
    if case.dtype not in DTYPES:
        return f"has no kernel for {str(case.dtype).removeprefix('torch.')}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if case.device == "cpu" else "is interpreted (TRITON_INTERPRET=1): on CPUs only"
    if case.device != "cuda":
        return "runs on NVIDIA GPUs"
    return None


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # As ROCm's and other builds name theirs otherwise.
        return None
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return f"triton {version} is older than {'.'.join(map(str, OLDEST))}" if parts < OLDEST else None


def automatic(case: Case) -> str | None:
    return "is interpreted (TRITON_INTERPRET=1)" if os.environ.get("TRITON_INTERPRET") == "1" else None


def refuses_call(op: str, arguments: Sequence[Any]) -> str | None:
    activation, weights = arguments[0], arguments[2 if op.endswith("wgrad") else 1]
    if len(weights) > MOST_SOURCES:
        return f"mixes at most {MOST_SOURCES} sources"
    if activation.is_cuda and torch.cuda.get_device_capability(activation.device) < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    return None


def files() -> list[Path]:
    """What a record of these kernels is bound to: their sources."""
    own = [path for path in Path(__file__).parent.glob("*.py") if path.name != "offline.py"]
    return own + [Path(inspect.getfile(module)) for module in (convolution, gpu, heuristics)]


def compiler() -> str:
    """Triton and its version, but for the last part, which leaves code as it is."""
    return "triton " + ".".join(importlib.import_module("triton").__version__.split(".")[:2])


def variants(op: str, dtype: torch.dtype) -> Variants:
    """As the heuristic chooses, and in every configuration that it may choose for two sources on this device."""
    yield "", contextlib.nullcontext
    from rl_kernels.backends.triton import configs

    wgrad = op.endswith("wgrad")
    if "linear" in op:
        usual = configs.WGRAD_CONFIGS if wgrad else configs.PRODUCT_CONFIGS
    elif wgrad:
        usual = gpu.module_of(__name__, op).CONV_WGRAD_CONFIGS
    else:
        usual = (*gpu.module_of(__name__, op).CONV_CONFIGS, *configs.RESIDENT_CONFIGS)
    size = dtype.itemsize
    row, scratch = (size, 0) if wgrad else (2 * size, size)
    work = heuristics.Work(1, 1, 1, row, size, scratch, 1.0)
    most = heuristics.device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")).shared_bytes
    for config in configs.usable(usual, arithmetic(dtype, "conv" in op)):
        if heuristics.shared_bytes(work, config) <= most:
            for splits in (1, 3):
                name = f"configuration {'x'.join(map(str, config))}, {splits} splits"
                yield name, functools.partial(heuristics.use_config, config, splits)
