"""The backends: how each op is run. Importing this package registers them, in the order in which auto tries them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rl_kernels import _ops
from rl_kernels.backends import cpu, cuda, reference, selection, streamed, triton
from rl_kernels.backends.gate import Gate
from rl_kernels.backends.selection import AUTO, Backend, Case, choose, register, registered, requested

__all__ = ["Backend", "Case", "Service", "Services", "backends", "register", "registered"]


def _kernels(module: Any) -> dict[str, Callable[..., Any]]:
    return {op: getattr(module, op) for op in _ops.SCHEMAS if hasattr(module, op)}


def _anything(case: Case) -> str | None:
    return None


register(
    Backend(
        "cpu",
        "C++: the mix fused into the packing of each thread's panels",
        cpu.kernels(_ops.SCHEMAS),
        cpu.refuses,
        refuses_call=cpu.refuses_call,
        automatic_call=cpu.slower,
        exceptions=cpu.exceptions,
        gate=Gate("cpu", needed=False, files=cpu.files),
    )
)
register(
    Backend(
        "triton",
        "Triton: the mixed tile is the first operand of the matrix instructions",
        triton.kernels(_ops.SCHEMAS),
        triton.refuses,
        automatic=triton.automatic,
        refuses_call=triton.refuses_call,
        gate=Gate("triton", needed=True, files=triton.files, compiler=triton.compiler),
        variants=triton.variants,
        accumulates=True,
    )
)
register(
    Backend(
        "cuda",
        "CUDA C++: the fragments of the sources are mixed in registers for mma.sync",
        cuda.kernels(_ops.SCHEMAS),
        cuda.refuses,
        refuses_call=cuda.refuses_call,
        automatic_call=cuda.automatic_call,
        exceptions=cuda.exceptions,
        gate=Gate("cuda", needed=True, files=cuda.files, compiler=cuda.compiler),
        variants=cuda.variants,
        accumulates=True,
    )
)
register(
    Backend(
        "streamed", "bounded panels of the mixed weight through the vendor's products", _kernels(streamed), _anything
    )
)
register(Backend("reference", "plain torch on a materialised weight: the meaning", _kernels(reference), _anything))


def _implement(op: str) -> None:
    check = _ops.CHECKS[op]

    def run(activation: torch.Tensor, *arguments: Any) -> Any:
        check(activation, *arguments)
        return selection.kernel(op, activation)(activation, *arguments)

    _ops.LIBRARY.impl(op, run, "CompositeExplicitAutograd")


for _op in _ops.SCHEMAS:
    _implement(_op)


def _implement_in_place(op: str) -> None:
    check = _ops.CHECKS[op]

    def run(*arguments: Any) -> Any:
        *rest, into = arguments
        check(*rest)
        return selection.accumulate(op, rest, into)

    _ops.LIBRARY.impl(f"{op}_", run, "CompositeExplicitAutograd")


for _op in _ops.IN_PLACE_SCHEMAS:
    _implement_in_place(_op.removesuffix("_"))


_CPU_CASES = tuple(Case(op, "cpu", dtype) for op in _ops.SCHEMAS for dtype in cpu.DTYPES)


def _tell_fast_path() -> None:
    """Keep the C++ fast path to the backend in force; where the environment names none, it has to raise."""
    try:
        name = requested()
    except ValueError:
        cpu.set_serving((), forced=False)
        return
    cpu.set_serving(selection.served_by("cpu", name, _CPU_CASES), forced=name != AUTO)


selection.on_change(_tell_fast_path, now=False)  # It asks for a record, and nothing is read at import.


@dataclass(frozen=True)
class Service:
    """What one backend does for one case.

    Attributes:
        case: the op, device type and dtype.
        backend: the backend's name.
        serves: whether it takes such calls as things are set now.
        reason: why, in a few words.
    """

    case: Case
    backend: str
    serves: bool
    reason: str


class Services(tuple[Service, ...]):
    """A list of ``Service`` that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        from rl_kernels._tables import as_text, simple_table

        table = simple_table("", "op", "device", "dtype", "backend", "serves", "why")
        for service in self:
            case, serves = service.case, "yes" if service.serves else "no"
            dtype = str(case.dtype).removeprefix("torch.")
            table.add_row(case.op, case.device, dtype, service.backend, serves, service.reason)
        return as_text(table)


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Services:
    """Say which backend serves which op, and why.

    Args:
        device: to ask about; by default CUDA where there is a GPU, else the CPU.
        dtype: of the activation.

    Returns:
        One ``Service`` per op and backend; print it for a table.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    name = requested()
    for op in _ops.SCHEMAS:
        case = Case(op, torch.device(device).type, dtype)
        serving = choose(case, registered()).name if name == AUTO else name
        for backend in registered():
            reason = backend.why_not(case)
            serves = reason is None and backend.name == serving
            if reason is None:
                if serves and name == AUTO:
                    reason = "; ".join(filter(None, (backend.summary, backend.exceptions(case), backend.lost(case))))
                elif serves:
                    reason = "asked for"
                elif name != AUTO:
                    reason = f"{name} is asked for"
                else:
                    reason = backend.why_passed_over(case) or f"{serving} comes first"
            found.append(Service(case, backend.name, serves, reason))
    return Services(found)
