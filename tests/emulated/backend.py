"""The CUDA backend with its kernels executed here: compiled by nvcc, launched on tensors of the host."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from building.cuda import ELEMENTS, SOURCES
from rl_kernels import _extension
from rl_kernels.backends.gpu.heuristics import H100
from rl_kernels.ops.values import Geometry
from tests.emulated import structs
from tests.emulated.compilers import compiled_files
from tests.emulated.machine.launch import Buffer, run
from tests.emulated.machine.memory import GLOBAL

Edit = tuple[str, str, str]
"""A file of csrc/cuda, a text in it and what to put there: a fault to be caught."""


H100_FACTS = (90, H100.multiprocessors, H100.shared_bytes)
"""What plans depend on, of a GPU: its compute capability, its multiprocessors, and the shared memory of a block."""


class Launch(NamedTuple):
    """A launch as C++ hands it over; ``tensors`` are all that the call has, its workspaces included."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int
    device: int
    params: bytes
    tensors: Sequence[Tensor]


class Device:
    """Gives tensors of the host addresses on a device that is not there, and executes kernels on them."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}

    def run(self, launch: Launch, text: str, seed: int, late: bool | None) -> None:
        """As ``launch.run``, on what the tensors hold now."""
        for tensor in launch.tensors:
            self.know(tensor)
        for buffer in self.buffers.values():
            buffer.storage.data[buffer.here] = buffer.bytes
        struct = structs.struct_of(launch.kernel).from_buffer_copy(launch.params)
        for field, address in structs.addresses(struct):
            if address.value:
                tensor = structs.owner(launch.tensors, address.value)
                assert tensor is not None, f"{field} of {launch.kernel} is in no tensor of the call"
                address.value = self.moved(tensor, address.value)
        run(
            text,
            launch.kernel,
            launch.grid,
            (launch.threads,),
            [bytes(struct)],
            launch.shared_bytes,
            seed,
            late,
            buffers=self.buffers,
        )

    def know(self, tensor: Tensor) -> None:
        """What is between a tensor's elements stays outside."""
        key = tensor.untyped_storage().data_ptr()
        if key not in self.buffers:  # It keeps the storage: nothing else will be there.
            self.buffers[key] = Buffer(tensor, GLOBAL + 1 + len(self.buffers))
        buffer = self.buffers[key]
        if tensor.numel():
            buffer.elements(buffer.storage.inside, tensor)[...] = 255
            buffer.elements(buffer.storage.valid, tensor)[...] = 255

    def moved(self, tensor: Tensor, address: int) -> int:
        """An address in a tensor's storage, on the device."""
        key = tensor.untyped_storage().data_ptr()
        return self.buffers[key].base + address - key


@contextlib.contextmanager
def posing(
    record: Callable[[tuple[Any, ...]], object] | None, facts: tuple[int, int, int] = H100_FACTS
) -> Iterator[None]:
    """Inside, tensors of the host pose as a GPU's, and what the CUDA backend does goes to ``record``, or nowhere."""
    _extension.EXTENSION.module.cuda.pose(facts, record)
    try:
        yield
    finally:
        _extension.EXTENSION.module.cuda.end_pose()


@contextlib.contextmanager
def emulated(
    seed: int = 0,
    late: bool | None = None,
    edit: Edit | None = None,
    arch: str = "80",
    facts: tuple[int, int, int] = H100_FACTS,
) -> Iterator[list[str]]:
    """Inside, the CUDA backend takes tensors of the host, and executes its kernels; yields the names of those.

    Args:
        seed: of the order of blocks and warps, and of when asynchronous copies take effect.
        late: whether that is as late as possible; None for by chance.
        edit: of the kernels.
        arch: that they are compiled for.
        facts: of the device that is not there.
    """
    launched: list[str] = []
    device = Device()

    def execute(event: tuple[Any, ...]) -> None:
        if event[0] != "launch":
            return
        launch = Launch(*event[1:])
        launched.append(launch.kernel)
        device.run(launch, ptx_of(launch.kernel, arch, edit), seed + len(launched), late)

    with posing(execute, facts):
        yield launched


@contextlib.contextmanager
def recorded(facts: tuple[int, int, int] = H100_FACTS) -> Iterator[list[Launch]]:
    """Inside, the CUDA backend takes tensors of the host, and launches nothing; yields what it would launch."""
    launches: list[Launch] = []

    def keep(event: tuple[Any, ...]) -> None:
        if event[0] == "launch":
            launches.append(Launch(*event[1:]))

    with posing(keep, facts):
        yield launches


def multiply(
    out: Tensor,
    activation: Tensor,
    recipe: tuple[Sequence[Tensor], Tensor, Sequence[Tensor] | None],
    transposed: bool,
    geometry: Geometry | None,
    skinny_splits: int = 0,
    resident: tuple[int, int] = (0, 0),
) -> None:
    """The product of forward, or transposed, of dgrad, written to ``out``, of any strides.

    Args:
        out: (tokens, features), or (batch, features, *pixels).
        activation: the same with channels.
        recipe: the sources, the coefficients, the biases.
        transposed: whether it is dgrad's.
        geometry: of a convolution.
        skinny_splits: in how many parts skinny kernels split the sum; 0: in as many as fill the device.
        resident: how many blocks and stages resident kernels have; 0: as is best, or other kernels.
    """
    module = _extension.EXTENSION.module.cuda
    module.multiply(out, activation, recipe, transposed, geometry, (None, (0, skinny_splits, *resident)))


@functools.cache
def ptx_of(name: str, arch: str, edit: Edit | None = None) -> str:
    """The PTX of the file that has a kernel, for its element type; an edit of a file that it has no use for is none."""
    main, element = f"{name.split('_')[0]}_sm80.cu", name.rsplit("_", 1)[1]
    files = included_by(main)
    if edit is not None and edit[0] in files:
        file, old, new = edit
        if files[file].count(old) != 1:  # No AssertionError: that is what a planted fault is caught by.
            raise ValueError(f"{file} has {old!r} {files[file].count(old)} times")
        files[file] = files[file].replace(old, new)
        # The smallest tiles are enough to see it, and the others take longest to compile.
        listed = files.get("kernels_sm80.cuh")
        if listed is not None:
            files["kernels_sm80.cuh"] = re.sub(
                r"^ *(PRODUCT|WGRAD)_KERNELS\(layer, Addressing, 128.*\n", "", listed, flags=re.MULTILINE
            )
    flags = "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", f"-DRL_ELEMENT={ELEMENTS[element]}"
    return compiled_files(files, main, arch, *flags)


def included_by(file: str) -> dict[str, str]:
    """A file of csrc/cuda and those that it includes, and they, by name."""
    text = (SOURCES / file).read_text()
    found = {file: text}
    for name in re.findall(r'^#include "(.+)"$', text, flags=re.MULTILINE):
        found |= included_by(name)
    return found
