"""Random calls of the CUDA backend's ops, and what their launches come to when addresses are named."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.gpu.heuristics import A100, ADA, H100, Config
from rl_kernels.ops.shapes import conv_output_size
from rl_kernels.ops.values import Call, Geometry, Recipe, Wanted
from tests.emulated.structs import addresses, owner, struct_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = {"A100": (80, A100), "ADA": (89, ADA), "H100": (90, H100), "tiny": (80, A100._replace(multiprocessors=2))}
SIZES = (1, 3, 8, 16, 17, 24, 64, 65, 96, 128, 200, 256, 512)
LARGE = (512, 768, 1024, 2304, 4096)
FORCED = (None, None, None, (Config(64, 64, 32, 4, 3), 3), (Config(128, 128, 32, 4, 2), 1))


class Case(NamedTuple):
    """A call, and how it is to be planned."""

    call: Call
    device: str
    forced: tuple[Config, int] | None


class Drawn:
    """The case of a number, the same every time; nothing is written to its tensors."""

    def __init__(self, number: int):
        self.draw = random.Random(number)
        self.kind = self.draw.choice(["linear", "conv"])
        self.way = self.draw.choice(["", "_dgrad", "_wgrad"])
        self.dtype = self.draw.choice(DTYPES)
        self.sources = self.draw.choice([1, 2, 2, 2, 3, 4])

    def case(self) -> Case:
        call = self.linear() if self.kind == "linear" else self.conv()
        device, forced = self.draw.choice(list(DEVICES)), self.draw.choice(FORCED)
        if forced is not None:
            forced = forced[0]._replace(depth=64 // self.dtype.itemsize), forced[1]
            if self.way == "_wgrad":
                forced = forced[0]._replace(warps=8 if forced[0].rows == 128 else 4), forced[1]
        return Case(call, device, forced)

    def linear(self) -> Call:
        sizes = self.draw.choice([SIZES, SIZES, LARGE])
        tokens, out, within = (self.draw.choice([*sizes, *((5, 16) if i == 0 else ())]) for i in range(3))
        weights = [self.matrix(out, within) for _ in range(self.sources)]
        x, dy = self.matrix(tokens, within), self.matrix(tokens, out)
        return self.call_of(x, dy, weights, None)

    def matrix(self, rows: int, columns: int) -> Tensor:
        way = self.draw.choice(["whole", "whole", "whole", "padded", "apart", "columns"])
        if way == "padded":
            return torch.empty(rows, columns + 8, dtype=self.dtype)[:, :columns]
        if way == "apart":
            return torch.empty(rows, 2 * columns + 1, dtype=self.dtype)[:, 1::2]
        return (
            torch.empty(columns, rows, dtype=self.dtype).t()
            if way == "columns"
            else torch.empty(rows, columns, dtype=self.dtype)
        )

    def conv(self) -> Call:
        spatial, few = self.draw.choice([1, 2, 2, 2, 3]), self.draw.random() < 0.5
        groups = self.draw.choice([1, 1, 1, 2, 4])
        channels = (3, 8, 16, 20, 32, 64) if few else (16, 64, 96, 128, 256)
        out, within = (self.draw.choice(channels) for _ in range(2))
        taps = [self.draw.choice([1, 2, 3, 3]) for _ in range(spatial)] if self.draw.random() < 0.7 else [1] * spatial
        plain = all(tap == 1 for tap in taps) and self.draw.random() < 0.7
        geometry = Geometry(
            *(
                [1 if plain and i != 1 else 0 if plain else self.draw.choice(values) for _ in range(spatial)]
                for i, values in enumerate([(1, 1, 2, 3), (0, 1, 2), (1, 1, 2)])
            ),
            groups,
        )
        size = [self.draw.choice([7, 9, 14, 28, 56] if spatial < 3 else [5, 8, 13]) for _ in range(spatial)]
        batch = self.draw.choice([1, 2, 8, 32])
        weights = [self.image(out * groups, within, taps) for _ in range(self.sources)]
        x = self.image(batch, within * groups, size)
        dy = self.image(batch, out * groups, conv_output_size(size, taps, geometry))
        return self.call_of(x, dy, weights, geometry)

    def image(self, first: int, channels: int, sizes: Sequence[int]) -> Tensor:
        way = self.draw.choice(["innermost", "innermost", "contiguous", "sliced"])
        if way == "innermost":
            return torch.empty(first, *sizes, channels, dtype=self.dtype).movedim(-1, 1)
        if way == "sliced":
            return torch.empty(first, *sizes, channels + 8, dtype=self.dtype)[..., :channels].movedim(-1, 1)
        return torch.empty(first, channels, *sizes, dtype=self.dtype)

    def call_of(self, x: Tensor, dy: Tensor, weights: list[Tensor], geometry: Geometry | None) -> Call:
        out = weights[0].shape[0]
        shape = (self.sources, out) if self.draw.random() < 0.4 else (self.sources,)
        coefficients = torch.empty(shape)
        biases = [torch.empty(out, dtype=self.dtype) for _ in weights] if self.draw.random() < 0.5 else None
        op = f"mixed_{self.kind}{self.way}"
        if self.way == "":
            return Call(op, x, Recipe(weights, coefficients, biases), geometry)
        if self.way == "_dgrad":
            size = None if geometry is None else [*x.shape]
            return Call(op, dy, Recipe(weights, coefficients), geometry, input_size=size)
        want = [self.draw.random() < 0.8 for _ in range(2 * len(weights) + 1)]
        wanted = Wanted(want[: len(weights)], want[-1], want[len(weights) : -1] if biases else [])
        into = None
        if self.draw.random() < 0.3:
            into = [
                self.draw.choice([None, torch.empty_like(w), torch.empty_like(w, dtype=torch.float32)]) for w in weights
            ]
        return Call(op, dy, Recipe(weights, coefficients, biases), geometry, x=x, wanted=wanted, into=into)


def named(call: Call, found: Any) -> dict[str, Tensor]:
    """The tensors of a call and of what came out, by name."""
    tensors = {"activation": call.activation, "coefficients": call.recipe.coefficients}
    tensors |= {f"weights {j}": weight for j, weight in enumerate(call.recipe.weights)}
    tensors |= {f"biases {j}": bias for j, bias in enumerate(call.recipe.biases or ())}
    if call.x is not None:
        tensors["x"] = call.x
    if isinstance(found, Tensor):
        return tensors | {"out": found}
    return tensors | {f"gradients {j}": gradient for j, gradient in enumerate(found[0])}


def digest(kernel: str, grid: Iterable[int], shared_bytes: int, params: bytes, tensors: dict[str, Tensor]) -> list[Any]:
    """A launch: its kernel, its grid, its shared memory, and a hash of its parameters in which tensors are named."""
    struct = struct_of(kernel).from_buffer_copy(params)
    where = []
    for field, address in addresses(struct):
        found = owner(list(tensors.values()), address.value) if address.value else None
        if found is not None:
            name = next(name for name, tensor in tensors.items() if tensor is found)
            where.append((field, name, address.value - found.untyped_storage().data_ptr()))
        elif address.value:
            where.append((field, "workspace", 0))
        address.value = 0
    content = repr(where).encode() + ctypes.string_at(ctypes.addressof(struct), ctypes.sizeof(struct))
    return [kernel, *grid, shared_bytes, hashlib.sha256(content).hexdigest()[:12]]
