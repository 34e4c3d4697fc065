"""The CUDA backend with its kernels executed here: compiled by nvcc, launched on tensors of the host."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from building.cuda import ELEMENTS, SOURCES
from rl_kernels.backends.cuda import configs, extension
from tests.emulated.compilers import compiled_files
from tests.emulated.machine.launch import Buffer, run
from tests.emulated.machine.memory import GLOBAL

Edit = tuple[str, str, str]
"""A file of csrc/cuda, a text in it and what to put there: a fault to be caught."""


class Device:
    """Gives tensors of the host addresses on a device that is not there, and executes kernels on them."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}

    def address(self, tensor: Tensor) -> int:
        """A tensor's, which for a storage stays as long as this lives; what is between its elements stays outside."""
        key = tensor.untyped_storage().data_ptr()
        if key not in self.buffers:
            self.buffers[key] = Buffer(tensor, GLOBAL + 1 + len(self.buffers))
        buffer = self.buffers[key]
        if tensor.numel():
            buffer.elements(buffer.storage.inside, tensor)[...] = 255
            buffer.elements(buffer.storage.valid, tensor)[...] = 255
        return buffer.base + tensor.storage_offset() * tensor.element_size()

    def run(self, *arguments: Any) -> None:
        """As ``launch.run``, on what the tensors hold now."""
        for buffer in self.buffers.values():
            buffer.storage.data[buffer.here] = buffer.bytes
        run(*arguments, buffers=self.buffers)


@contextlib.contextmanager
def emulated(
    seed: int = 0,
    late: bool | None = None,
    edit: Edit | None = None,
    arch: str = "80",
) -> Iterator[list[str]]:
    """Inside, the CUDA backend takes tensors of the host, and executes its kernels; yields the names of those.

    Args:
        seed: of the order of blocks and warps, and of when asynchronous copies take effect.
        late: whether that is as late as possible; None for by chance.
        edit: of the kernels.
        arch: that they are compiled for.
    """
    launched: list[str] = []
    device = Device()

    def launch(
        op: str,
        name: str,
        grid: tuple[int, int, int],
        shared_bytes: int,
        params: ctypes.Structure,
        operands: Sequence[Tensor],
    ) -> None:
        launched.append(name)
        text = ptx_of(name, arch, edit)
        block = (configs.KERNELS[name].threads,)
        device.run(text, name, grid, block, [bytes(params)], shared_bytes, seed + len(launched), late)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "launch", launch)
        patch.setattr(extension, "address", device.address)
        yield launched


class Recorded(NamedTuple):
    """A launch that was only recorded."""

    op: str
    kernel: str
    grid: tuple[int, int, int]
    shared_bytes: int
    params: ctypes.Structure
    operands: Sequence[Tensor]


@contextlib.contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Inside, the CUDA backend takes tensors of the host, and launches nothing; yields what it would launch."""
    launches: list[Recorded] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "launch", lambda *launch: launches.append(Recorded(*launch)))
        yield launches


@functools.cache
def ptx_of(name: str, arch: str, edit: Edit | None = None) -> str:
    """The PTX of the file that has a kernel, for its element type."""
    main, element = f"{name.split('_')[0]}_sm80.cu", name.rsplit("_", 1)[1]
    files = {path.name: path.read_text() for path in sorted(SOURCES.iterdir())}
    if edit is not None:
        file, old, new = edit
        if files[file].count(old) != 1:  # No AssertionError: that is what a planted fault is caught by.
            raise ValueError(f"{file} has {old!r} {files[file].count(old)} times")
        files[file] = files[file].replace(old, new)
        # The smallest tiles are enough to see it, and the others take longest to compile.
        listed = files["kernels_sm80.cuh"]
        files["kernels_sm80.cuh"] = re.sub(
            r"^ *(PRODUCT|WGRAD)_KERNELS\(layer, Addressing, 128.*\n", "", listed, flags=re.MULTILINE
        )
    flags = "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", f"-DRL_ELEMENT={ELEMENTS[element]}"
    return compiled_files(files, main, arch, *flags)
