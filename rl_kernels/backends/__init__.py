"""The backends: how each op is run. Importing this package registers them, and makes the ops run on them."""

from __future__ import annotations

from typing import Any

import torch

from rl_kernels.backends import cpu, cuda, reference, selection, streamed, triton
from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend
from rl_kernels.backends.selection import register, registered
from rl_kernels.backends.services import Service, Services, services
from rl_kernels.ops.schema import LIBRARY, OPS, Op
from rl_kernels.ops.values import Call

__all__ = ["Backend", "Case", "Service", "Services", "register", "registered", "services"]

# In the order in which auto tries them.
for _module in (cpu, triton, cuda, streamed, reference):
    register(_module.BACKEND)


def _implement(op: Op) -> None:
    """Make ``op`` run on the backend that serves each call of it, its arguments once checked."""

    def run(*arguments: Any) -> Any:
        call = Call.of(op.name, arguments)
        op.check(call)
        result = selection.run(call)
        return result if isinstance(result, torch.Tensor) else tuple(result)

    def run_in_place(*arguments: Any) -> Any:
        *rest, into = arguments
        call = Call.of(op.name, rest)
        op.check(call)
        call = call._replace(into=[buffer if buffer.numel() > 0 else None for buffer in into])
        return tuple(selection.run(call))

    LIBRARY.impl(op.name, run, "CompositeExplicitAutograd")
    if op.in_place_overload is not None:
        LIBRARY.impl(f"{op.name}_", run_in_place, "CompositeExplicitAutograd")


for _op in OPS.values():
    _implement(_op)

cpu.follow_selection()
cuda.follow_selection()
