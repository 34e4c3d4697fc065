"""Which backend serves what as things are set, and why: for people."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend
from rl_kernels.backends.selection import AUTO, choose, registered, requested, why_not, why_worse
from rl_kernels.ops.schema import OPS


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
            table.add_row(case.op, case.device, case.dtype_name, service.backend, serves, service.reason)
        return as_text(table)


def services(device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Services:
    """Say which backend serves which op, and why.

    Args:
        device: to ask about; by default CUDA where there is a GPU, else the CPU.
        dtype: of the activation.

    Returns:
        One ``Service`` per op and backend; print it for a table.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = requested()
    found = []
    for op in OPS:
        case = Case(op, torch.device(device).type, dtype)
        serving = choose(case, registered()).name if name == AUTO else name
        for backend in registered():
            cannot = why_not(backend, case)
            serves = cannot is None and backend.name == serving
            why = _why_serving(backend, case, name) if serves else _why_idle(backend, case, name, serving)
            found.append(Service(case, backend.name, serves, cannot or why))
    return Services(found)


def _why_serving(backend: Backend, case: Case, name: str) -> str:
    if name != AUTO:
        return "asked for"
    lost = None if backend.record is None else backend.record.lost(case)
    return "; ".join(filter(None, (backend.summary, backend.exceptions(case), lost)))


def _why_idle(backend: Backend, case: Case, name: str, serving: str) -> str:
    if name != AUTO:
        return f"{name} is asked for"
    return why_worse(backend, case) or f"{serving} comes first"
