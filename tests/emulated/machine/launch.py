"""Launch a kernel's PTX on arguments of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.emulated.machine import families as families  # registers what decodes instructions
from tests.emulated.machine import ptx
from tests.emulated.machine.machine import Launch
from tests.emulated.machine.memory import GLOBAL, PARAM, RAW, REGION, Array, Storage
from tests.emulated.machine.tma import tensormap
from tests.emulated.machine.values import TYPES, literal


class Output:
    """An array whose bytes may only be read after they are written.

    Attributes:
        written: of each element, whether it is, after the launch.
    """

    def __init__(self, array: Tensor | Array):
        self.array = array
        self.written: Array = np.zeros(0, bool)


class TensorMap(NamedTuple):
    """A tensor map that the host makes, as an argument.

    Attributes:
        tensor: whose part it is of.
        shape: of the part; strides: in elements; box: of a copy. The innermost dimension comes last.
        swizzle: in bytes; 0 for none.
        elemtype: as tensormap.replace numbers it; None for the tensor's.
        nans: whether what is outside is NaN, and not 0.
    """

    tensor: Tensor | Output
    shape: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    swizzle: int
    elemtype: int | None = None
    nans: bool = False


ELEMTYPES = {torch.uint8: 0, torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 10}


class Buffer:
    """The bytes under tensors that share a storage, of which only their elements are inside."""

    def __init__(self, tensor: Tensor, number: int):
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        self.shift = tensor.untyped_storage().data_ptr() % 256
        self.base = (number << REGION) + self.shift
        self.storage = Storage(self.shift + len(self.bytes), f"argument {number - GLOBAL}")
        self.storage.inside[:] = 0
        self.here = slice(self.shift, self.shift + len(self.bytes))
        self.storage.data[self.here] = self.bytes

    def elements(self, flags: Array, tensor: Tensor) -> Array:
        """A byte's flag for each element of the tensor, by its strides, to read or set."""
        size = tensor.element_size()
        first = self.shift + tensor.storage_offset() * size
        strides = [stride * size for stride in tensor.stride()] + [1]
        shape = [*tensor.shape, size]
        return np.lib.stride_tricks.as_strided(flags[first:], shape, strides)


def run(
    text: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    shared_bytes: int = 0,
    seed: int = 0,
    late: bool | None = None,
    limit: int = 5_000_000,
    buffers: dict[int, Buffer] | None = None,
) -> None:
    """Execute a kernel; what it writes is in the arguments afterwards.

    Args:
        text: PTX.
        name: of the kernel.
        grid: of CTAs; block: of threads. Up to three numbers each.
        arguments: one a parameter: a tensor or array (its address is passed; wrapped in ``Output`` if the kernel must
            not read what is there before it), a ``TensorMap``, bytes, a number, or None for a null pointer.
        shared_bytes: of dynamic shared memory.
        seed: of the order of CTAs and warps, and of when asynchronous copies take effect.
        late: whether that is as late as possible; None for by chance.
        limit: instructions of a CTA's warps together, after which it counts as endless.
        buffers: what addresses within the arguments point to, by their storages' addresses on the host.
    """
    module = ptx.parse(text)
    kernel = module.kernels[name]
    buffers = {} if buffers is None else buffers
    outputs: list[tuple[Output, Tensor, Buffer]] = []
    values: list[Any] = []
    for given in arguments:
        argument = given.tensor if isinstance(given, TensorMap) else given
        array = argument.array if isinstance(argument, Output) else argument
        if not isinstance(array, (np.ndarray, Tensor)):
            values.append(0 if array is None else array)
            continue
        tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()
        key = tensor.untyped_storage().data_ptr()
        buffer = buffers.setdefault(key, Buffer(tensor, GLOBAL + 1 + len(buffers)))
        if tensor.numel():
            buffer.elements(buffer.storage.inside, tensor)[...] = 255
            if isinstance(argument, Output):
                outputs.append((argument, tensor, buffer))
            else:
                buffer.elements(buffer.storage.valid, tensor)[...] = 255
        address = buffer.base + int(tensor.storage_offset()) * tensor.element_size()
        if isinstance(given, TensorMap):
            kind = ELEMTYPES[tensor.dtype] if given.elemtype is None else given.elemtype
            swizzle = {0: 0, 32: 1, 64: 2, 128: 3}[given.swizzle]
            values.append(tensormap(address, given.shape, given.strides, given.box, kind, swizzle, given.nans))
        else:
            values.append(address)
    regions = {GLOBAL + 1 + i: buffer.storage for i, buffer in enumerate(buffers.values())}
    symbols: dict[str, tuple[str, int]] = {}
    regions[PARAM] = _parameters(kernel, values, symbols)
    sizes = _variables([*module.variables, *kernel.variables], regions, symbols, shared_bytes)
    x, y, z = [*block, 1, 1][:3]
    gx, gy, gz = [*grid, 1, 1][:3]
    launch = Launch(
        kernel, (gx, gy, gz), (x, y, z), regions, symbols, sizes["shared"], shared_bytes, sizes["local"], late, limit
    )
    try:
        launch.run(seed)
    finally:
        for buffer in buffers.values():
            buffer.bytes[:] = buffer.storage.data[buffer.here]
        for output, tensor, buffer in outputs:
            output.written = (buffer.elements(buffer.storage.valid, tensor) == 255).all(-1)


def _parameters(kernel: ptx.Kernel, values: list[Any], symbols: dict[str, tuple[str, int]]) -> Storage:
    if len(values) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(values)}")
    data = b""
    for parameter, value in zip(kernel.parameters, values, strict=True):
        data += bytes(-len(data) % parameter.align)
        symbols[parameter.name] = "param", len(data)
        if not isinstance(value, bytes):
            raw = RAW[parameter.size]
            type = TYPES[parameter.type]
            if isinstance(value, float) and not type.floating:  # Triton declares its floats as bits.
                type = TYPES[f"f{parameter.size * 8}"]
            whole = np.array([int(value) % (1 << 8 * parameter.size)], np.uint64).astype(raw)
            value = (type.encode(np.array([value])) if type.floating else whole).tobytes()
        if len(value) != parameter.size:
            raise TypeError(f"{parameter.name} has {parameter.size} bytes, not {len(value)}")
        data += value
    storage = Storage(len(data), "parameters")
    storage.data[: len(data)] = np.frombuffer(data, np.uint8)
    storage.inside[len(data) :] = 0
    storage.valid[:] = 255
    return storage


def _variables(
    variables: list[ptx.Variable], regions: dict[int, Storage], symbols: dict[str, tuple[str, int]], dynamic: int
) -> dict[str, int]:
    """Place variables; returns the bytes of shared memory, and of local memory a thread. Dynamic shared comes last."""
    sizes = {"shared": 0, "local": 0}
    for variable in sorted(variables, key=lambda variable: variable.size == 0):
        if variable.space in sizes:
            align = max(variable.align, 16 if not variable.size else 1)
            at = -(-sizes[variable.space] // align) * align
            symbols[variable.name] = variable.space, at
            sizes[variable.space] = at + variable.size
            continue
        number = GLOBAL + 1 + len(regions)
        storage = Storage(variable.size, variable.name, fill=0)
        storage.inside[variable.size :] = 0
        storage.valid[:] = 255
        raw = [literal(str(value), TYPES[variable.type]) for value in variable.values]
        data = b"".join(value[:1].tobytes() for value in raw if value is not None)
        storage.data[: len(data)] = np.frombuffer(data, np.uint8)
        regions[number] = storage
        symbols[variable.name] = variable.space, number << REGION
    sizes["local"] = -(-sizes["local"] // 16) * 16
    sizes["shared"] = -(-sizes["shared"] // 16) * 16 + dynamic if dynamic else sizes["shared"]
    return sizes
