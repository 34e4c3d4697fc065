"""The CUDA C++ kernels (``csrc/cuda``): for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.params import MOST_SOURCES
from rl_kernels.backends.gpu import convolution, heuristics, operands
from rl_kernels.backends.gpu.operands import IEEE, arithmetic
from rl_kernels.backends.selection import Case, Variants

CAPABILITY = (8, 0)
MOST_GROUPS = (1 << 16) - 1
"""Of a convolution: a dimension of the grid."""
LEAST_CHANNELS = 16
"""A group, of input and output, for ``auto``: products of fewer are mostly padding."""


def kernels(ops: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The implementation of each of ``ops``."""
    return gpu.kernels_of(__name__, ops)


def refuses(case: Case) -> str | None:
    if case.device != "cuda" or torch.version.hip:
        return "runs on NVIDIA GPUs"
    if case.dtype not in configs.NAMES:
        return f"has no kernel for {str(case.dtype).removeprefix('torch.')}"
    return extension.EXTENSION.missing


def refuses_call(op: str, arguments: Sequence[Any]) -> str | None:
    activation, weights, coefficients = _operands(op, arguments)
    if len(weights) > MOST_SOURCES:
        return f"mixes at most {MOST_SOURCES} sources"
    if any(weight.dtype != activation.dtype for weight in weights):
        return "has no kernel for sources of another type than the activation"
    if coefficients.dtype != torch.float32:
        return "takes coefficients in float32"
    if arithmetic(activation.dtype, "conv" in op) == IEEE:
        return "multiplies float32 as TF32 only, which torch's switch for it does not allow"
    out, within, *taps = weights[0].shape
    counts = [activation.numel() // max(1, activation.shape[-1 if "linear" in op else 1])]
    counts += [max(out, within) * math.prod(taps)]
    counts += [math.prod(arguments[3]) // max(1, arguments[3][1])] if op == "mixed_conv_dgrad" else []
    if max(counts) >= (1 << 31) - 512:  # Less a tile.
        return "counts pixels and channels in 31 bits"
    if "conv" in op and arguments[-1] > MOST_GROUPS:
        return f"takes at most {MOST_GROUPS} groups"
    if activation.is_cuda:
        return _refuses_device(activation.device)
    return None


@functools.cache
def _refuses_device(device: torch.device) -> str | None:
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, this GPU has {have[0]}.{have[1]}"
    return None


def automatic_call(op: str, arguments: Sequence[Any]) -> str | None:
    """Why a call is for another backend: copies of 16 bytes need channels that lie together."""
    activation, weights, _ = _operands(op, arguments)
    if "linear" in op:
        return None if all(weight.stride(1) == 1 for weight in weights) else "copies sources that lie by columns slowly"
    least = min(weights[0].shape[1], weights[0].shape[0] // arguments[-1])
    if least < LEAST_CHANNELS:
        return f"is not for fewer than {LEAST_CHANNELS} channels a group"
    tensors = (activation, *weights, *([arguments[1]] if op.endswith("wgrad") else []))
    return None if all(tensor.stride(1) == 1 for tensor in tensors) else "is for channels_last"


def exceptions(case: Case) -> str | None:
    return "not convolutions but channels_last ones of 16 channels a group and more" if "conv" in case.op else None


def _operands(op: str, arguments: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The activation, the sources and the coefficients of an op's arguments."""
    first = 2 if op.endswith("wgrad") else 1
    return arguments[0], arguments[first], arguments[first + 1]


def files() -> list[Path]:
    """What a record of these kernels is bound to: the extension, and what chooses among its kernels."""
    own = [*Path(__file__).parent.glob("*.py"), *(Path(str(m.__file__)) for m in (convolution, gpu, heuristics))]
    module = extension.EXTENSION.module
    return own if module is None else [*own, Path(module.__file__)]


def compiler() -> str:
    """nvcc and its version."""
    return f"nvcc {extension.build_info().get('nvcc', 'none')}"


def variants(op: str, dtype: torch.dtype) -> Variants:
    """As the heuristic chooses, and in every configuration and number of stages that it may choose for two sources."""
    yield "", contextlib.nullcontext
    wgrad = op.endswith("wgrad")
    work = heuristics.Work(1, 1, 1, (1 if wgrad else 2) * dtype.itemsize, dtype.itemsize, 0, 1.0)
    most = heuristics.device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")).shared_bytes
    for config in configs.WGRADS if wgrad else configs.PRODUCTS:
        for stages in configs.STAGES:
            each = config._replace(depth=configs.STEP_BYTES // dtype.itemsize, stages=stages)
            if heuristics.shared_bytes(work, each) <= most:
                splits = 3 if stages == configs.STAGES[-1] else 1
                name = f"configuration {'x'.join(map(str, each))}, {splits} splits"
                yield name, functools.partial(heuristics.use_config, each, splits)
