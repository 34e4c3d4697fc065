"""Which ptxas assembles these kernels for Hopper, and what is done where only one with a known defect is there.

ptxas up to CUDA 13.2 overwrites registers that a ``wgmma`` in flight still reads (``gpu/hazards.py``), and Triton 3.6
emits PTX that asks for it. Triton 3.9 assembles for Hopper with the newer of the two ptxas in its package, which is
free of it; for 3.8, whose package has such a one too, this module does the same, for these kernels alone. Elsewhere
the tiles that were seen to race are not chosen, and every kernel is looked at when it is compiled: one that would race
is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rl_kernels.backends.gpu import hazards
from rl_kernels.backends.gpu.disassembler import disassemble, run_tool
from rl_kernels.backends.gpu.heuristics import Config

HOPPER = 90
FIXED = (13, 3)
"""The first ptxas that keeps other writes away from the registers of a product in flight."""
FIXED_TRITON = (3, 8)
"""The first Triton whose PTX does."""
ONLY_CUDA_13 = 13000
"""The oldest driver, as torch states it, that loads what a ptxas of CUDA 13 made."""
RACING_TILES = frozenset({(128, 256), (128, 128), (64, 32), (64, 16)})
"""Rows and columns of the products that an older ptxas, or Triton, was seen to let race: docs/checking.md has them."""
VARIABLE = "TRITON_PTXAS_PATH"

_refuses = True


class RacingKernel(RuntimeError):
    """A kernel whose machine code overwrites registers that its products still read."""


def version_of(ptxas: str | Path) -> tuple[int, int]:
    """Of a ptxas: (13, 3)."""
    return _version_of(str(ptxas))


@functools.cache
def _version_of(ptxas: str) -> tuple[int, int]:
    said = run_tool(Path(ptxas), "--version")
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise RuntimeError(f"{ptxas}: no version in {said!r}")
    return int(found[1]), int(found[2])


def newer_assembler() -> str | None:
    """The ptxas that is free of the defect, where Triton would take one that is not; None where it is not needed.

    Nor is it taken where the user names a ptxas, or where the driver does not load what it makes.
    """
    own = get_ptxas(HOPPER).path
    if os.environ.get(VARIABLE) or version_of(own) >= FIXED or not _driver_loads_cuda_13():
        return None
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    return newer.path if newer is not None and version_of(newer.path) >= FIXED else None


@functools.cache
def _driver_loads_cuda_13() -> bool:
    if not torch.cuda.is_available() or torch.version.hip:
        return True  # Nothing is loaded.
    internals: Any = torch._C
    return bool(internals._cuda_getDriverVersion() >= ONLY_CUDA_13)


def assembler() -> str:
    """The ptxas that assembles these kernels for Hopper."""
    return newer_assembler() or str(get_ptxas(HOPPER).path)


def has_sound_ptx() -> bool:
    """Whether the PTX that Triton makes of these kernels for Hopper is right by itself."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= FIXED_TRITON


def is_sound() -> bool:
    """Whether what Triton and ptxas make of these kernels for Hopper is free of the defect."""
    return has_sound_ptx() and version_of(assembler()) >= FIXED


@functools.lru_cache(maxsize=256)
def sound_configs(configs: tuple[Config, ...], device: torch.device) -> tuple[Config, ...]:
    """Those of the configurations of a product with a mixed operand that may be chosen on a device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return configs
    return without_racing(configs)


def without_racing(configs: tuple[Config, ...]) -> tuple[Config, ...]:
    """Those that are not seen to race on Hopper with the Triton and the ptxas that are here."""
    if is_sound():
        return configs
    return tuple(config for config in configs if (config.rows, config.columns) not in RACING_TILES)


# Compilation.


def assembled(kernel: Any) -> Any:
    """Decorate a kernel of Triton's that multiplies: for Hopper it is assembled, and looked at, as this module says."""
    if isinstance(kernel, JITFunction):  # Not where it is interpreted.
        function: Any = kernel
        function._do_compile = functools.partial(_compile, function, function._do_compile)
    return kernel


def _compile(kernel: Any, compile_it: Callable[..., Any], key: Any, signature: Any, device: Any, *rest: Any) -> Any:
    if driver.active.get_current_target().arch != HOPPER:
        return compile_it(key, signature, device, *rest)
    newer = newer_assembler()
    with contextlib.nullcontext() if newer is None else _assembling_with(newer):
        compiled = compile_it(key, signature, device, *rest)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
    if _refuses and compiled is not None and not is_sound():
        try:
            _refuse(compiled)
        except Exception:
            kernel.device_caches[device][0].pop(key, None)  # Or the next launch would run it.
            raise
    return compiled


@contextlib.contextmanager
def _assembling_with(ptxas: str) -> Iterator[None]:
    """Inside, Triton assembles with ``ptxas``, and keeps the result apart from what another one made."""
    previous = knobs.runtime.add_stages_inspection_hook

    def hook(*arguments: Any) -> Any:
        if not arguments:  # It is asked for its part of the key under which Triton keeps the compiled kernel.
            before, before_hash = previous() if previous is not None else ("", "")
            mine = f"ptxas {version_of(ptxas)}"
            return before + mine, before_hash + mine
        if previous is not None:
            previous(*arguments)
        stages = arguments[1]
        assemble = stages["cubin"]

        def assemble_anew(*given: Any) -> Any:
            with knobs.nvidia.scope():
                knobs.nvidia.ptxas = ptxas
                return assemble(*given)

        stages["cubin"] = assemble_anew
        return None

    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = previous


def _refuse(compiled: Any) -> None:
    wrong = why_unsafe(compiled)
    if wrong is not None:
        raise RacingKernel(
            f"{wrong}. Triton {triton.__version__} with ptxas {'.'.join(map(str, version_of(assembler())))} "
            f"makes code for Hopper that races; Triton 3.8 with a driver for CUDA 13, or Triton 3.9, does not"
        )


# What a compiled kernel is.


def why_unsafe(compiled: Any) -> str | None:
    """Why a kernel compiled for Hopper must not run: its first hazard, or that nobody can look; None where it may."""
    name = compiled.metadata.name
    if "wgmma.mma_async" not in compiled.asm["ptx"]:
        return None
    try:
        found = hazards.check(disassemble(compiled.asm["cubin"]))
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        return f"{name}: its machine code cannot be checked for hazards: {error}"
    first = next((hazard for each in found for hazard in each.hazards), None)
    return None if first is None else f"{name}: a hazard in its machine code: {first}"


@contextlib.contextmanager
def compiling_unchecked() -> Iterator[None]:
    """Inside, no kernel is refused: for looking at what is compiled."""
    global _refuses
    before, _refuses = _refuses, False
    try:
        yield
    finally:
        _refuses = before


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """Launch inside; at the end the list fills with why the kernels that were launched must not run on Hopper."""
    launch, launched, wrong = JITFunction.run, dict[str, Any](), list[str]()

    def note(self: Any, *arguments: Any, **options: Any) -> Any:
        compiled = launch(self, *arguments, **options)
        if compiled is not None and driver.active.get_current_target().arch == HOPPER:
            launched[compiled.hash] = compiled
        return compiled

    JITFunction.run = note
    try:
        yield wrong
    finally:
        JITFunction.run = launch
    wrong += filter(None, map(why_unsafe, launched.values()))
