"""The CUDA extension ``rl_kernels._cuda``: found and loaded, or why not; and the launch of its kernels.

It knows no torch, so that one build serves any. What must fit is the Python code that fills its kernels' parameters:
it is loaded where it was built for this version of the package.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels import _extension
from rl_kernels._version import __version__
from rl_kernels.backends.gpu.operands import on_device

NAME = "_cuda"
RECORD = "_build_cuda.json"
SOURCES = ("cuda/*",)

EXTENSION = _extension.load(_extension.folder(), NAME, RECORD, fits=("rl_kernels", __version__), needs="nvcc")


def build_info() -> dict[str, Any]:
    """``architectures`` as ``"8.0 9.0+PTX"``, the versions ``nvcc`` and ``runtime``; empty without the extension."""
    return {} if EXTENSION.module is None else dict(EXTENSION.module.build_info())


def sources() -> str:
    """What the build was made of, by ``building/cuda.py``; empty without the extension, or an older one."""
    if EXTENSION.module is None:
        return ""
    record: dict[str, str] = json.loads((_extension.folder() / RECORD).read_text())
    return record.get("sources", "")


def is_older_than_its_sources() -> bool:
    """Whether the sources, in a checkout, changed after it was built."""
    return _extension.is_older_than_its_sources(name=NAME, patterns=SOURCES)


def launch(
    op: str,
    name: str,
    grid: tuple[int, int, int],
    shared_bytes: int,
    params: ctypes.Structure,
    operands: Sequence[Tensor],
) -> None:
    """Queue a kernel on the current stream of the device of ``operands``.

    Args:
        op: the op that it serves, for messages.
        name: the kernel's, as RL_KERNEL declares it.
        grid: blocks in x, y and z.
        shared_bytes: dynamic shared memory of a block.
        params: the struct that the kernel takes, laid out as C++ does.
        operands: tensors that it works on: the first is on the device, messages give the shapes of all.

    Raises:
        RuntimeError: where it cannot be queued, or an earlier kernel failed. It names the op and the shapes.
    """
    try:
        if EXTENSION.module is None:
            raise RuntimeError(f"the CUDA kernels are missing: {EXTENSION.missing}")
        with on_device(operands[0]):
            stream = torch.cuda.current_stream(operands[0].device).cuda_stream
            EXTENSION.module.launch(name, grid, shared_bytes, stream, bytes(params))
    except Exception as error:  # torch raises AssertionError where it is built without CUDA
        shapes = ", ".join(str(tuple(operand.shape)) for operand in operands)
        raise RuntimeError(f"{op} on {shapes}: {error}") from error


def address(tensor: Tensor) -> int:
    """The address of a tensor's first element, as kernels take it."""
    return tensor.data_ptr()
