"""Which backend serves a call: a pure function of the case, of what is registered and of what the user asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

AUTO = "auto"
ENVIRONMENT_VARIABLE = "RL_KERNELS_BACKEND"


class CannotServe(RuntimeError):
    """The backend asked for cannot serve a call, or none can; the message says why."""


class Case(NamedTuple):
    """What the choice depends on."""

    op: str
    device: str
    """The device's type, as ``torch.device.type``."""
    dtype: torch.dtype
    """Of the activation."""


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: as in ``use_backend``.
        summary: what it does, in a line.
        kernels: the implementation of each op that it has, by the op's name.
        refuses: given a case, why this backend cannot serve it; None where it can.
        automatic: given a case, why ``auto`` passes this backend over though it can serve the case; None where it does
            not.
    """

    name: str
    summary: str
    kernels: Mapping[str, Callable[..., Any]]
    refuses: Callable[[Case], str | None]
    automatic: Callable[[Case], str | None] = lambda case: None

    def why_not(self, case: Case) -> str | None:
        """Why this backend cannot serve ``case``; None where it can."""
        if case.op not in self.kernels:
            return f"has no kernel for {case.op}"
        return self.refuses(case)


_backends: dict[str, Backend] = {}
_chosen: dict[tuple[str, str, torch.dtype, str], Callable[..., Any]] = {}
_default = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
_forced: str | None = None


def register(backend: Backend) -> None:
    """Add a backend. ``auto`` tries backends in the order of their registration: the fastest first."""
    _backends[backend.name] = backend
    _chosen.clear()


def registered() -> tuple[Backend, ...]:
    """Every backend, in the order in which ``auto`` tries them."""
    return tuple(_backends.values())


def requested() -> str:
    """The backend asked for by ``use_backend``, else by ``RL_KERNELS_BACKEND`` at import, else ``"auto"``.

    Raises:
        ValueError: the environment variable named none.
    """
    return _forced or _known(_default, ENVIRONMENT_VARIABLE)


def _known(name: str, source: str = "backend") -> str:
    if name != AUTO and name not in _backends:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join((AUTO, *_backends))}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op called inside with one backend.

    Args:
        name: a backend's name, or ``"auto"``. The setting is the process's, as torch's own backend switches are; a
            backward pass takes the backend in force when it runs.

    Raises:
        ValueError: the name is unknown. A call that the backend cannot serve raises CannotServe, a RuntimeError.
    """
    global _forced
    previous, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = previous


def choose(case: Case, backends: tuple[Backend, ...], name: str = AUTO) -> Backend:
    """The backend that serves ``case``.

    Raises:
        CannotServe: the one asked for cannot serve it, or none can.
    """
    if name != AUTO:
        backend = next(backend for backend in backends if backend.name == name)
        reason = backend.why_not(case)
        if reason is not None:
            raise CannotServe(f"backend {name!r} cannot serve {_describe(case)}: {reason}")
        return backend
    for backend in backends:
        if backend.why_not(case) is None and backend.automatic(case) is None:
            return backend
    reasons = "; ".join(f"{backend.name}: {backend.why_not(case) or backend.automatic(case)}" for backend in backends)
    raise CannotServe(f"no backend serves {_describe(case)}: {reasons}")


def _describe(case: Case) -> str:
    return f"{case.op} on {case.device} in {str(case.dtype).removeprefix('torch.')}"


def kernel(op: str, activation: torch.Tensor) -> Callable[..., Any]:
    """The implementation of ``op`` for a call whose first tensor is ``activation``."""
    name = requested()
    key = (op, activation.device.type, activation.dtype, name)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = choose(Case(*key[:3]), registered(), name).kernels[op]
    return found
