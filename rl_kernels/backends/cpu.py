"""The C++ kernels for CPUs: the mix fused into the packing of each thread's own panels (``csrc/cpu``)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rl_kernels._extension import EXTENSION
from rl_kernels.backends.selection import Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_C = EXTENSION.module


def kernels(ops: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The kernel of each of ``ops``; without the extension nothing calls them."""
    return {op: getattr(_C, op, _missing) for op in ops}


def _missing(*arguments: Any) -> Any:
    raise RuntimeError(f"the C++ kernels are missing: {EXTENSION.missing}")


def refuses(case: Case) -> str | None:
    if case.device != "cpu":
        return "runs on CPUs"
    if case.dtype not in DTYPES:
        return f"has no kernel for {str(case.dtype).removeprefix('torch.')}"
    return EXTENSION.missing


def refuses_call(op: str, arguments: Sequence[Any]) -> str | None:
    reason = _C.why_not_linear(*_recipe(op, arguments)) if "linear" in op else _C.why_not_conv(*_conv(op, arguments))
    return str(reason) if reason else None


def slower(op: str, arguments: Sequence[Any]) -> str | None:
    reason = _C.worse_linear(*_recipe(op, arguments)) if "linear" in op else _C.worse_conv(*_conv(op, arguments))
    return str(reason) if reason else None


def exceptions(case: Case) -> str | None:
    """Which calls go to the next backend, in a few words."""
    passed_on = []
    if "conv" in case.op:
        passed_on.append("few channels a group" + " and filters above 1 MiB" * (case.dtype == torch.float32))
    if case.dtype == torch.bfloat16:
        passed_on.append("many rows, where the CPU multiplies bfloat16")
    return f"not {' or '.join(passed_on)}" if passed_on else None


def files() -> list[Path]:
    """What a record of these kernels is bound to: the extension."""
    return [] if _C is None else [Path(_C.__file__)]


def _recipe(op: str, arguments: Sequence[Any]) -> tuple[Any, Any]:
    """The activation and the weights of any op's arguments."""
    return arguments[0], arguments[2 if op.endswith("wgrad") else 1]


def _conv(op: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The same, and the geometry, which comes last."""
    return *_recipe(op, arguments), *arguments[-4:]


def capability() -> str | None:
    """The path in use: ``"avx512"``, ``"avx2"`` or ``"scalar"``; None without the extension."""
    return None if _C is None else build_info()["capability"]


def build_info() -> dict[str, Any]:
    """What the extension was built for and with, and the path in use; empty without it."""
    return {} if _C is None else dict(_C.build_info())


def set_serving(cases: Iterable[Case], forced: bool) -> None:
    """Tell the fast path what this backend serves as things are set now.

    Args:
        cases: those for which it is the backend in force.
        forced: whether it was asked for by name, and so takes the calls too on which ``slower`` has something to say.
    """
    if _C is not None:
        _C.set_serving(_bits(tuple(cases)), forced)


@functools.cache
def _bits(cases: tuple[Case, ...]) -> int:
    return functools.reduce(operator.or_, (_C.serving_bit(case.op, case.dtype) for case in cases), 0)
