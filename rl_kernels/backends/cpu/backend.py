"""What the C++ kernels can run, and where the vendor's on mixed panels do better."""

from __future__ import annotations

from pathlib import Path

import torch

from rl_kernels._extension import EXTENSION
from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend, kernels_in
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.ops.values import Call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_C = EXTENSION.module


def _files() -> list[Path]:
    """What a record of these kernels is bound to: the extension."""
    return [] if _C is None else [Path(_C.__file__)]


class Cpu(Backend):
    """The C++ kernels."""

    name = "cpu"
    summary = "C++: the mix fused into the packing of each thread's panels"
    kernels = kernels_in(linear="rl_kernels.backends.cpu.kernels", conv="rl_kernels.backends.cpu.kernels")
    record = RecordStore("cpu", needed=False, files=_files)

    def why_not(self, case: Case) -> str | None:
        """The device, the dtype, or that there is no extension."""
        if case.device != "cpu":
            return "needs a CPU"
        if case.dtype not in DTYPES:
            return f"no kernel for {case.dtype_name}"
        return EXTENSION.missing

    def why_not_call(self, call: Call) -> str | None:
        """Types, layouts and sizes, as C++ finds them (``why_not_*`` in ``csrc/cpu/torch/rules.cpp``)."""
        activation, weights = call.activation, call.recipe.weights
        if call.geometry is None:
            reason = _C.why_not_linear(activation, weights)
        else:
            reason = _C.why_not_conv(activation, weights, *call.geometry)
        return str(reason) if reason else None

    def worse(self, case: Case, call: Call | None = None) -> str | None:
        """Shapes at which the vendor's kernels are faster (``worse_*`` in ``csrc/cpu/torch/rules.cpp``)."""
        if call is None:
            return None
        arguments = (call.activation, call.recipe.weights, call.recipe.coefficients, call.wanted is not None)
        if call.geometry is None:
            reason = _C.worse_linear(*arguments)
        else:
            reason = _C.worse_conv(*arguments, *call.geometry)
        return str(reason) if reason else None

    def exceptions(self, case: Case) -> str | None:
        """Of ``worse``."""
        passed_on = []
        if "conv" in case.op:
            passed_on.append("few channels a group" + " and filters above 1 MiB" * (case.dtype == torch.float32))
        if case.dtype == torch.bfloat16:
            passed_on.append("many rows, where the CPU multiplies bfloat16")
        if case.op.endswith("wgrad"):
            passed_on.append("Outer coefficients of a rank above 8 on few rows")
        return f"not {', '.join(passed_on)}" if passed_on else None


BACKEND = Cpu()
