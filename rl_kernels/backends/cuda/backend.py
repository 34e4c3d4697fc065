"""What the CUDA C++ kernels can run, and what others do better."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

import torch

from rl_kernels import _extension
from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend, Variants, kernels_in
from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.operands import IEEE, arithmetic
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.ops.values import Call

CAPABILITY = (8, 0)
KINDS = tuple(f"{kind} channels_last{strided}" for kind in ("dense", "grouped") for strided in ("", " strided"))

_C: Any = getattr(_extension.EXTENSION.module, "cuda", None)


def _files() -> list[Path]:
    """What a record of these kernels is bound to where the build says nothing of itself: the extension."""
    module = extension.EXTENSION.module
    return [] if module is None else [Path(module.__file__)]


def _build(device: torch.device) -> str:
    """What made the code that a device runs: the sources, the flags, nvcc, and the architecture it was made for."""
    made_of = extension.sources()
    if not made_of or device.type != "cuda" or not torch.cuda.is_available():
        return ""
    return f"{made_of} {code_for(torch.cuda.get_device_capability(device), extension.build_info()['architectures'])}"


def code_for(capability: tuple[int, int], architectures: str) -> str:
    """Which of ``"8.0 9.0a 9.0+PTX"`` a GPU runs: the latest code of its generation, else the latest PTX."""
    codes, texts = [], []
    for each in architectures.split():
        major, minor, only = re.fullmatch(r"(\d+)\.(\d)([af]?)(?:\+PTX)?", each).groups()  # type: ignore[union-attr]
        number = int(major), int(minor)
        if number == capability or (not only and number[0] == capability[0] and number <= capability):
            codes.append((number, only))
        if each.endswith("+PTX") and not only and number <= capability:
            texts.append(number)
    if codes:
        (major, minor), only = max(codes)
        return f"sm_{major}{minor}{only}"
    return "compute_{}{}".format(*max(texts)) if texts else "none"


def _compiler() -> str:
    """The compiler nvcc and its version."""
    return f"nvcc {extension.build_info().get('nvcc', 'none')}"


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, this GPU has {have[0]}.{have[1]}"
    return None


class Cuda(Backend):
    """The CUDA C++ kernels."""

    name = "cuda"
    summary = "CUDA C++: the fragments of the sources are mixed in registers for mma.sync"
    kernels = kernels_in(linear="rl_kernels.backends.cuda.kernels", conv="rl_kernels.backends.cuda.kernels")
    accumulates = True
    record = RecordStore("cuda", needed=True, files=_files, compiler=_compiler, build=_build, kinds=KINDS)

    def why_not(self, case: Case) -> str | None:
        """The device, the dtype, or that there is no extension."""
        if case.device != "cuda" or torch.version.hip:
            return "needs an NVIDIA GPU"
        if case.dtype not in configs.ELEMENTS:
            return f"no kernel for {case.dtype_name}"
        return extension.EXTENSION.missing

    def why_not_call(self, call: Call) -> str | None:
        """The recipe, types and sizes, as C++ finds them (``csrc/bindings/cuda/rules.cpp``), TF32, or the GPU's age."""
        if call.recipe.is_outer:
            return "no kernel for Outer coefficients"
        activation, recipe = call.activation, call.recipe
        reason = _C.why_not(activation, recipe.weights, recipe.coefficients, call.input_size or (), call.geometry)
        if reason is not None:
            return str(reason)
        if arithmetic(activation.dtype, call.geometry is not None) == IEEE:
            return "torch's switch for TF32 is off, and float32 is multiplied as nothing else"
        return _why_not_device(activation.device) if activation.is_cuda else None

    def worse(self, case: Case, call: Call | None = None) -> str | None:
        """Channels that do not lie together, of which 16 bytes cannot be copied at once, or few of them."""
        if call is None:
            return None
        reason = _C.worse(call.activation, call.x, call.recipe.weights, call.geometry)
        return None if reason is None else str(reason)

    def exceptions(self, case: Case) -> str | None:
        """The recipe, the number of sources, and of convolutions what ``worse`` says."""
        few = "not Outer coefficients, more than 4 sources"
        if "conv" not in case.op:
            return few
        return f"{few}, fewer than 16 channels a group or anything but channels_last"

    def variants(self, op: str, dtype: torch.dtype) -> Variants:
        """As the heuristic chooses, and in every configuration and number of stages that two sources leave room for."""
        yield "", contextlib.nullcontext
        wgrad = op.endswith("wgrad")
        work = heuristics.Work(1, 1, 1, (1 if wgrad else 2) * dtype.itemsize, dtype.itemsize, 0, 1.0)
        device = heuristics.device_of(heuristics.current_device())
        for config in configs.WGRADS if wgrad else configs.PRODUCTS:
            for stages in configs.STAGES:
                each = config._replace(depth=configs.STEP_BYTES // dtype.itemsize, stages=stages)
                if heuristics.shared_bytes(work, each) <= device.shared_bytes:
                    splits = 3 if stages == configs.STAGES[-1] else 1
                    name = f"configuration {'x'.join(map(str, each))}, {splits} splits"
                    yield name, functools.partial(heuristics.use_config, each, splits)


BACKEND = Cuda()
