"""Launches of Triton's kernels, caught as they are compiled, and executed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from rl_kernels.backends.triton import offline
from tests.emulated.machine import ptx
from tests.emulated.machine.launch import Output, TensorMap, run


class Launched(NamedTuple):
    """A launch of a Triton kernel that was caught: compiled, and on what it would have run."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


@contextlib.contextmanager
def catching(arch: str, then: Callable[[Launched], None] | None = None) -> Iterator[list[Launched]]:
    """Compile whatever Triton launches inside for ``arch``; the list fills with the launches.

    Args:
        arch: as ``sm_80``.
        then: what is done with each at once, as ``run_triton``.
    """
    with offline.compiling_only(arch):
        compile_only, caught = JITFunction.run, []

        def catch(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
            compiled = compile_only(self, *arguments, grid=grid, **options)
            named = dict(zip(self.arg_names, arguments, strict=False)) | options
            given = [named[name] for name in self.arg_names if name in named]
            size = grid(named) if callable(grid) else grid
            signature = compiled.src.signature
            kinds = [signature[name] for name in self.arg_names if name in named]
            passed = _passed(given, kinds, iter(compiled.metadata.tensordesc_meta or ()))
            caught.append(Launched(self.fn.__name__, compiled, tuple(size), passed))
            if then is not None:
                then(caught[-1])
            return compiled

        JITFunction.run = catch
        try:
            yield caught
        finally:
            JITFunction.run = compile_only


def _passed(values: Sequence[Any], signature: Sequence[Any], maps: Iterator[dict[str, Any]]) -> list[Any]:
    """The arguments that compiled code takes, of which tuples are flattened and constants are left out.

    A descriptor is passed as a tensor map, which the compiler says how to make, and sizes and strides.
    """
    passed: list[Any] = []
    for value, kind in zip(values, signature, strict=True):
        if isinstance(kind, (tuple, list)):
            passed += _passed(value, kind, maps)
        elif str(kind).startswith("tensordesc"):
            how, nans = next(maps), value.padding == "nan"
            swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[how["swizzle"]]
            box, shape, strides = how["block_size"], list(value.shape), list(value.strides)
            passed.append(TensorMap(value.base, shape, strides, box, swizzle, how["elem_type"], nans))
            passed += [*shape, *strides]
        elif kind != "constexpr":
            passed.append(value)
    return passed


def run_triton(launched: Launched, seed: int = 0, late: bool | None = None, text: str | None = None) -> None:
    """Execute a launch that was caught; text: of another PTX for it."""
    compiled = launched.compiled
    text = compiled.asm["ptx"] if text is None else text
    data = compiled.metadata
    more = len(ptx.parse(text).kernels[data.name].parameters) - len(launched.arguments)
    scratch = _scratch(data.global_scratch_size * int(np.prod(launched.grid)), data.global_scratch_align)
    arguments = [*launched.arguments, *[scratch, None][:more]]
    # A kernel that specialises its warps has more than it is said to.
    threads = re.search(r"\.reqntid (\d+)", text)
    block = int(threads[1]) if threads else 32 * data.num_warps
    run(text, data.name, launched.grid, (block,), arguments, data.shared, seed, late)


def _scratch(size: int, align: int) -> Output | None:
    """Memory for a kernel's own use."""
    if not size:
        return None
    memory = torch.zeros(size + align, dtype=torch.uint8)
    first = -memory.data_ptr() % align
    return Output(memory[first : first + size])
