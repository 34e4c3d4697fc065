"""What the Triton kernels can run. Importing this imports no Triton: the kernels do, at the first call."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend, Variants, kernels_in
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.operands import arithmetic
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.backends.triton import configs
from rl_kernels.ops.values import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SOURCES = 8
MAX_TERMS = 64
"""Sources times the rank of ``Outer`` coefficients: every term is code, and takes registers, of a main loop."""
MAX_FAST_TERMS = 16
"""So many are held in registers; with 32 the main loops of forward and dgrad spill, in each tile that was looked at."""
CAPABILITY = (8, 0)
OLDEST = (3, 6)
"""The first Triton that passes tuples of tensors to kernels as these use them."""

KERNEL_FILES = (
    *("assembler.py", "linear.py", "conv.py", "dense.py", "depthwise.py", "resident.py"),
    *("tile.py", "mix.py", "pixels.py", "epilogue.py", "outer.py", "configs.py"),
    *("../gpu/heuristics.py", "../gpu/convolution.py", "../gpu/operands.py"),
)
"""The files that hold kernels, and those that choose which kernel runs and what it is compiled for."""


def _files() -> list[Path]:
    """What a record of these kernels is bound to."""
    return [(Path(__file__).parent / name).resolve() for name in KERNEL_FILES]


def _compiler() -> str:
    """Triton and its version, but for the last part, which leaves code as it is."""
    return "triton " + ".".join(importlib.import_module("triton").__version__.split(".")[:2])


@functools.cache
def _missing() -> str | None:
    """Why there is no Triton that compiles these kernels; None where there is one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # As ROCm's and other builds name theirs otherwise.
        return None
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return f"triton {version} is older than {'.'.join(map(str, OLDEST))}" if parts < OLDEST else None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _assembler() -> Any:
    """The module that imports Triton's compiler."""
    return importlib.import_module("rl_kernels.backends.triton.assembler")


def _terms(call: Call) -> int:
    """Of ``Outer`` coefficients; 0 of others."""
    n, rank, *_ = call.recipe.coefficients.shape if call.recipe.is_outer else (0, 0)
    return n * rank


class Triton(Backend):
    """The Triton kernels."""

    name = "triton"
    summary = "Triton: the mixed tile is the first operand of the matrix instructions"
    kernels = kernels_in(linear="rl_kernels.backends.triton.linear", conv="rl_kernels.backends.triton.conv")
    accumulates = True
    record = RecordStore("triton", needed=True, files=_files, compiler=_compiler)

    def why_not(self, case: Case) -> str | None:
        """Triton, the dtype or the device; Triton's interpreter runs on CPU tensors."""
        reason = _missing()
        if reason is not None:
            return reason
        if case.dtype not in DTYPES:
            return f"no kernel for {case.dtype_name}"
        if _is_interpreted():
            return None if case.device == "cpu" else "interpreted (TRITON_INTERPRET=1), on CPUs only"
        return None if case.device == "cuda" else "needs an NVIDIA GPU"

    def why_not_call(self, call: Call) -> str | None:
        """The recipe, the number of sources, or the age of the GPU."""
        if _terms(call) > MAX_TERMS:
            return f"Outer coefficients of more than {MAX_TERMS} terms (sources times rank)"
        if len(call.recipe.weights) > MAX_SOURCES:
            return f"more than {MAX_SOURCES} sources"
        device = call.activation.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
            return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
        return None

    def worse(self, case: Case, call: Call | None = None) -> str | None:
        """Triton's interpreter is for tests; a main loop holds so many terms of ``Outer`` coefficients."""
        if _is_interpreted():
            return "interpreted (TRITON_INTERPRET=1)"
        if call is None or call.op.endswith("wgrad") or _terms(call) <= MAX_FAST_TERMS:
            return None
        return f"Outer coefficients of more than {MAX_FAST_TERMS} terms (sources times rank)"

    def watched(self) -> contextlib.AbstractContextManager[list[str]]:
        """Hazards in what was compiled for Hopper."""
        if _is_interpreted():
            return super().watched()
        watching: contextlib.AbstractContextManager[list[str]] = _assembler().watching()
        return watching

    def exceptions(self, case: Case) -> str | None:
        """The recipe, and the number of sources."""
        terms = f"{MAX_TERMS} terms (sources times rank) of Outer coefficients, {MAX_FAST_TERMS} of forward and dgrad"
        return f"not more than {MAX_SOURCES} sources, or {terms} by itself"

    def variants(self, op: str, dtype: torch.dtype) -> Variants:
        """As the heuristic chooses, and in every configuration that it may choose for two sources on this device."""
        yield "", contextlib.nullcontext
        wgrad, size = op.endswith("wgrad"), dtype.itemsize
        row, scratch = (size, 0) if wgrad else (2 * size, size)
        work = heuristics.Work(1, 1, 1, row, size, scratch, 1.0)
        device = heuristics.device_of(heuristics.current_device())
        usual = configs.configs_of(op) + (configs.RESIDENT_CONFIGS if "conv" in op and not wgrad else ())
        if not wgrad and torch.cuda.is_available():
            usual = _assembler().sound_configs(usual, heuristics.current_device())
        for config in configs.usable(usual, arithmetic(dtype, "conv" in op)):
            if heuristics.shared_bytes(work, config) <= device.shared_bytes:
                for splits in (1, 3):
                    name = f"configuration {'x'.join(map(str, config))}, {splits} splits"
                    yield name, functools.partial(heuristics.use_config, config, splits)


BACKEND = Triton()
