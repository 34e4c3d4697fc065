"""The kernels compiled for a GPU that need not be there, and what their machine code says.

Launches are caught on the way and only compiled, with the arguments' own specialisations, so that what is looked at is
what a GPU would run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rl_kernels.backends.gpu import hazards, heuristics
from rl_kernels.backends.gpu.disassembler import as_file, disassemble, find_tool, run_tool
from rl_kernels.backends.gpu.heuristics import Config, Work, use_config
from rl_kernels.backends.triton import assembler, configs
from rl_kernels.backends.triton.backend import BACKEND
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call, Geometry, Recipe, Wanted

DEVICES = {"sm_80": heuristics.A100, "sm_90": heuristics.H100, "sm_100": heuristics.H100}
MATRIX_INSTRUCTION = r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b"
SIZE, CHANNELS, BATCH, IMAGE = 4096, 256, 4, 32
"""Sizes of the layers that are compiled for: as divisible as large ones, which is what Triton specialises on."""


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel is made of.

    Attributes:
        name: of the function.
        variant: the op, the element type and the recipe.
        config: the tile and how it runs.
        arch: as ``sm_90``.
        registers: a thread.
        spilled_bytes: of registers, a thread.
        spills_in_loop: instructions in the main loop that move spilled registers.
        shared_bytes: a program.
        products: the matrix instruction in the main loop; empty if there is none.
        register_a: whether that instruction takes its first operand, the mixed weight, from registers.
        shared_stores: instructions in the main loop that write to shared memory.
        load_bytes: of the main loop's narrowest asynchronous copy; of its narrowest load where it copies nothing so.
        hazards: the writes to registers that a product in flight still reads, in words.
        serialised: whether each product in flight is waited for before anything else is done.
        cycles: that a step of the main loop takes of each thing that may bind it, by ``heuristics.limits``; empty for
            kernels that do not multiply matrices.
    """

    name: str
    variant: str
    config: str
    arch: str
    registers: int
    spilled_bytes: int
    spills_in_loop: int
    shared_bytes: int
    products: str
    register_a: bool
    shared_stores: int
    load_bytes: int
    hazards: tuple[str, ...]
    serialised: bool
    cycles: dict[str, float]

    @property
    def bound(self) -> str:
        """What binds the main loop; empty where that is not known."""
        return max(self.cycles, key=self.cycles.__getitem__, default="")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Absent:
    """Stands for the driver of a GPU."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device: those of one architecture must not be taken for another's.
        return int(self.target.arch)

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_only(arch: str) -> Iterator[list[tuple[str, Any]]]:
    """Compile whatever is launched inside for ``arch``; the list fills with (name, compiled kernel)."""
    launch, active, found = JITFunction.run, driver._active, []

    def compile_instead(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = launch(self, *arguments, **{**options, "warmup": True})
        found.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(_Absent(arch))
    JITFunction.run = compile_instead
    try:
        with assembler.compiling_unchecked():
            yield found
    finally:
        JITFunction.run = launch
        driver._active = active


class Variant(NamedTuple):
    """What is compiled: a call of an op, with a configuration forced, in float32 or in TF32 where it is in float32."""

    name: str
    config: Config
    splits: int
    tf32: bool
    work: Work
    call: Callable[[], Any]


def kernels(arch: str, ops: Collection[str] | None = None) -> Iterator[Kernel]:
    """Compile every kernel in every configuration that fits ``arch``, and some variants in one configuration each.

    Args:
        arch: one of ``DEVICES``.
        ops: whose kernels to compile; by default every op's.
    """
    for variant in variants(ops):
        if heuristics.shared_bytes(variant.work, variant.config) > DEVICES[arch].shared_bytes:
            continue
        with use_config(variant.config, variant.splits), tf32(variant.tf32), compiling_only(arch) as found:
            variant.call()
        config = "x".join(map(str, variant.config))
        resident = variant.config in configs.RESIDENT_CONFIGS  # Its sources are read once, and not in the loop.
        work = variant.work._replace(row_bytes=0, scratch_bytes=0) if resident else variant.work
        cycles = heuristics.limits(work, variant.config, DEVICES[arch])
        for name, kernel in found:
            seen = look(kernel, name, variant.name, config, arch)
            yield replace(seen, cycles=cycles) if seen.products else seen


def compilers() -> str:
    """Triton, and the ptxas that assembles for Hopper."""
    ptxas = ".".join(map(str, assembler.version_of(assembler.assembler())))
    return f"triton {triton.__version__}, ptxas {ptxas}"


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set torch's switches for float32 products and convolutions."""
    products: Any = torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = allowed
    try:
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            yield
    finally:
        products.allow_tf32 = before


def variants(ops: Collection[str] | None = None) -> Iterator[Variant]:
    """Every configuration of every op in bfloat16, or float32 where it is for that, and other recipes in one each."""
    ops = tuple(OPS) if ops is None else ops
    recipes: tuple[dict[str, Any], ...] = (
        {"sources": 1},
        {"sources": 4},
        {"per_channel": True},
        {"source_dtype": torch.float32},
        {"dtype": torch.float32, "tf32": True},
        {"splits": 4},
        {"rank": 4},
    )
    for op in (op for op in ops if "linear" in op):
        usual = configs.configs_of(op)
        yield from (_linear(op, config) for config in usual)
        yield from (_linear(op, config, dtype=torch.float32) for config in configs.FLOAT32_CONFIGS)
        yield from (_linear(op, usual[2], **recipe) for recipe in (*recipes, {"sources": 1, "rank": 16}))
    shapes: tuple[dict[str, Any], ...] = (
        {"kernel": (3,)},
        {"kernel": (3, 3, 3)},
        {"channels_last": False},
        {"stride": 2},
        {"groups": 4},
        {"groups": CHANNELS},
        {"groups": CHANNELS, "channels_last": False},
        {"groups": CHANNELS, "rank": 4},
    )
    for op in (op for op in ops if "conv" in op):
        usual = configs.configs_of(op)
        yield from (_conv(op, config) for config in usual)
        yield from (_conv(op, config, dtype=torch.float32) for config in configs.FLOAT32_CONFIGS)
        if not op.endswith("wgrad"):
            yield from (_conv(op, config, channels=config.rows) for config in configs.RESIDENT_CONFIGS)
            yield _conv(op, configs.RESIDENT_CONFIGS[1], channels=configs.RESIDENT_CONFIGS[1].rows, rank=4)
        yield from (_conv(op, usual[2], **options) for options in (*recipes, *shapes))


def _linear(op: str, config: Config, **options: Any) -> Variant:
    layer = _Layer((SIZE, SIZE), **options)
    x = torch.empty(SIZE, SIZE, dtype=layer.dtype)
    return layer.variant(op, config, x, x)


def _conv(
    op: str,
    config: Config,
    kernel: tuple[int, ...] = (3, 3),
    stride: int = 1,
    groups: int = 1,
    channels: int = CHANNELS,
    channels_last: bool = True,
    **options: Any,
) -> Variant:
    layer = _Layer((channels, channels // groups, *kernel), **options)
    dimensions = len(kernel)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    memory_format = formats.get(dimensions, torch.contiguous_format) if channels_last else torch.contiguous_format
    x, dy = (
        torch.empty(BATCH, channels, *(size,) * dimensions, dtype=layer.dtype).to(memory_format=memory_format)
        for size in (IMAGE, IMAGE // stride)
    )
    layer.weights = [weight.to(memory_format=memory_format) for weight in layer.weights]
    layer.geometry = Geometry([stride] * dimensions, [1] * dimensions, [1] * dimensions, groups)
    kind = "depthwise" if groups == channels else f"{groups} groups"
    layer.name += f", {dimensions}d"
    layer.name += f", {channels} channels" * (channels < CHANNELS)
    layer.name += ", NCHW" * (not channels_last) + f", stride {stride}" * (stride > 1) + f", {kind}" * (groups > 1)
    return layer.variant(op, config, x, dy)


class _Layer:
    """Sources that hold nothing, for only their sizes and types matter, and how they are compiled for."""

    def __init__(
        self,
        shape: tuple[int, ...],
        sources: int = 2,
        per_channel: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        source_dtype: torch.dtype | None = None,
        splits: int = 1,
        tf32: bool = False,
        rank: int = 0,
    ):
        self.dtype, self.splits, self.tf32 = dtype, splits, tf32
        source_dtype = source_dtype or dtype
        out = shape[0]
        self.weights = [torch.empty(shape, dtype=source_dtype)] * sources
        self.coefficients = torch.empty((sources, out) if per_channel else (sources,))
        if rank:
            self.coefficients = torch.empty(sources, rank, out + math.prod(shape[1:]))
        self.terms = sources * rank
        self.biases = [torch.empty(out, dtype=source_dtype)] * sources
        self.geometry: Geometry | None = None
        types = str(dtype) if source_dtype == dtype else f"{dtype} on {source_dtype}"
        self.name = f"{types.replace('torch.', '')}{' as TF32' * tf32}, {sources} sources"
        self.name += ", per channel" * per_channel + f", rank {rank}" * (rank > 0) + f", {splits} splits" * (splits > 1)

    def variant(self, op: str, config: Config, x: Tensor, dy: Tensor) -> Variant:
        """A call of ``op`` on this layer, between an x and a dy."""
        call = self._call(op, x, dy)
        kernel = BACKEND.kernel(op)
        name = f"{op} {self.name}"
        return Variant(name, config, self.splits, self.tf32, self._work(op), lambda: kernel(*call.operands))

    def _call(self, op: str, x: Tensor, dy: Tensor) -> Call:
        recipe = Recipe(self.weights, self.coefficients, self.biases)
        if op.endswith("wgrad"):
            every = [True] * len(self.weights)
            return Call(op, dy, recipe, self.geometry, x=x, wanted=Wanted(every, True, every))
        if op.endswith("dgrad"):
            size = None if self.geometry is None else x.shape
            return Call(op, dy, recipe._replace(biases=None), self.geometry, input_size=size)
        return Call(op, x, recipe, self.geometry)

    def _work(self, op: str) -> Work:
        """What tells the shared memory that a configuration takes."""
        element = self.dtype.itemsize
        if op.endswith("wgrad"):
            return Work(SIZE, SIZE, SIZE, element, element, 0, 1.0)
        row_bytes = sum(weight.element_size() for weight in self.weights)
        return Work(SIZE, SIZE, SIZE, row_bytes, element, element, 1.0, terms=self.terms)


def look(compiled: Any, name: str, variant: str, config: str, arch: str) -> Kernel:
    """Read a compiled kernel's machine code."""
    cubin = compiled.asm["cubin"]
    usage, code = _resource_usage(cubin), disassemble(cubin)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources, f"cuobjdump: no resource usage in {usage!r}"
    loop = main_loop(code)
    products = re.search(MATRIX_INSTRUCTION, loop)
    first = re.search(r"\bHGMMA\S*\s+\w+,\s*(\S+?),", loop)
    findings = next(each for each in hazards.check(code) if each.kernel == compiled.metadata.name)
    loads = re.findall(r"\bLDGSTS(\S*)", loop) or re.findall(r"\bLDG(\.\S*)", loop)
    return Kernel(
        name=name,
        variant=variant,
        config=config,
        arch=arch,
        registers=int(resources[1]),
        spilled_bytes=int(resources[2]),
        spills_in_loop=len(re.findall(r"\b(?:LDL|STL)\b", loop)),
        shared_bytes=compiled.metadata.shared,
        products=products[0] if products else "",
        register_a=products is not None and "UTC" not in products[0] and (not first or first[1].startswith("R")),
        shared_stores=len(re.findall(r"\bSTS\b", loop)),
        load_bytes=min(map(_load_bytes, loads), default=0),
        hazards=tuple(map(str, findings.hazards)),
        serialised=findings.serialised,
        cycles={},
    )


@functools.cache
def _resource_usage(cubin: bytes) -> str:
    with as_file(cubin) as path:
        return run_tool(find_tool("cuobjdump"), "-res-usage", path)


def _load_bytes(modifiers: str) -> int:
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", modifiers)
    return int(width[1].lstrip("US")) // 8 if width else 4


def main_loop(code: str) -> str:
    """The innermost loop around products (of matrices, if there are any), disassembled; all of it without a loop."""
    lines = code.splitlines()
    labels = {line.strip().rstrip(":"): number for number, line in enumerate(lines) if line.strip().endswith(":")}
    product = MATRIX_INSTRUCTION if re.search(MATRIX_INSTRUCTION, code) else r"\bFFMA\b"
    loops = []
    for number, line in enumerate(lines):
        target = re.search(r"BRA\S*\s.*?`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], number) < number:
            body = "\n".join(lines[labels[target[1]] : number])
            if re.search(product, body):
                loops.append(body)
    return min(loops, key=len, default=code)
