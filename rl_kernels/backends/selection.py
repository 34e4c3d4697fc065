"""Which backend serves a call: a pure function of the case, of what is registered and of what the user asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rl_kernels.backends import gate
from rl_kernels.backends.gate import Gate

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


Variants = Iterable[tuple[str, Callable[[], AbstractContextManager[Any]]]]


def _only_one(op: str, dtype: torch.dtype) -> Variants:
    return [("", nullcontext)]


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
        refuses_call: given an op and the arguments of a call, why this backend cannot serve that call of a case that it
            serves; None where it can. None instead of a function: it serves every call.
        automatic_call: as ``automatic``, given an op and the arguments of a call.
        exceptions: given a case, in a few words, which of its calls these two pass on; for people to read.
        gate: what ``auto`` asks of this backend's record after all these; None where it has none.
        accumulates: whether its wgrads take ``into``, tensors to add the sources' gradients to or None.
        variants: given an op and a dtype, the ways in which its kernel can run: each one's name, and what makes it run
            so; the first as it runs by itself.
    """

    name: str
    summary: str
    kernels: Mapping[str, Callable[..., Any]]
    refuses: Callable[[Case], str | None]
    automatic: Callable[[Case], str | None] = lambda case: None
    refuses_call: Callable[[str, Sequence[Any]], str | None] | None = None
    automatic_call: Callable[[str, Sequence[Any]], str | None] | None = None
    exceptions: Callable[[Case], str | None] = lambda case: None
    gate: Gate | None = None
    accumulates: bool = False
    variants: Callable[[str, torch.dtype], Variants] = _only_one

    @property
    def looks_at_calls(self) -> bool:
        """Whether a case alone does not tell that it serves a call."""
        return self.refuses_call is not None or self.automatic_call is not None or self.gate is not None

    def why_not(self, case: Case) -> str | None:
        """Why this backend cannot serve ``case``; None where it can."""
        if case.op not in self.kernels:
            return f"has no kernel for {case.op}"
        return self.refuses(case)

    def why_passed_over(self, case: Case) -> str | None:
        """Why ``auto`` passes this backend over though it can serve ``case``; None where it does not."""
        reason = self.automatic(case)
        return self.gate.refuses(*case) if reason is None and self.gate is not None else reason

    def why_not_call(self, case: Case, arguments: Sequence[Any], automatic: bool) -> str | None:
        """Why this backend, which serves ``case``, does not serve the call; ``automatic``: where ``auto`` asks."""
        reason = self.refuses_call(case.op, arguments) if self.refuses_call is not None else None
        if reason is None and automatic and self.automatic_call is not None:
            reason = self.automatic_call(case.op, arguments)
        if reason is None and automatic and self.gate is not None:
            reason = self.gate.refuses_call(case.op, arguments)
        return reason

    def lost(self, case: Case) -> str | None:
        """At how many of the measured sizes of ``case`` a rival is faster, in words; None where at none."""
        return None if self.gate is None else self.gate.lost(*case)


_backends: dict[str, Backend] = {}
_chosen: dict[tuple[str, str, torch.dtype, str], Callable[..., Any]] = {}
_served: dict[tuple[str, str, tuple[Case, ...]], tuple[Case, ...]] = {}
_default = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
_forced: str | None = None
_listeners: list[Callable[[], None]] = []


def register(backend: Backend) -> None:
    """Add a backend. ``auto`` tries backends in the order of their registration: the fastest first."""
    _backends[backend.name] = backend
    refresh()


def refresh() -> None:
    """Choose anew, by the records as they are now."""
    gate.forget()
    _chosen.clear()
    _served.clear()
    _tell()


def on_change(listener: Callable[[], None], now: bool = True) -> None:
    """Call ``listener`` whenever another backend may be in force.

    Args:
        listener: takes nothing.
        now: call it at once too; else first when a backend is first chosen.
    """
    _listeners.append(listener)
    if now:
        listener()


def _tell() -> None:
    for listener in _listeners:
        listener()


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
    _tell()
    try:
        yield
    finally:
        _forced = previous
        _tell()


def choose(
    case: Case, backends: tuple[Backend, ...], name: str = AUTO, arguments: Sequence[Any] | None = None
) -> Backend:
    """The backend that serves ``case``; with ``arguments``, the one that serves that call.

    Raises:
        CannotServe: the one asked for cannot serve it, or none can.
    """
    if name != AUTO:
        backend = next(backend for backend in backends if backend.name == name)
        reason = _passed_over(backend, case, arguments, automatic=False)
        if reason is not None:
            raise CannotServe(f"backend {name!r} cannot serve {_describe(case)}: {reason}")
        return backend
    reasons = []
    for backend in backends:
        reason = _passed_over(backend, case, arguments, automatic=True)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise CannotServe(f"no backend serves {_describe(case)}: {'; '.join(reasons)}")


def _passed_over(backend: Backend, case: Case, arguments: Sequence[Any] | None, automatic: bool) -> str | None:
    """Why ``backend`` does not serve ``case``, or not the call with ``arguments``; None where it does."""
    reason = backend.why_not(case)
    if reason is None and automatic:
        reason = backend.why_passed_over(case)
    if reason is None and arguments is not None:
        reason = backend.why_not_call(case, arguments, automatic)
    return reason


def _describe(case: Case) -> str:
    return f"{case.op} on {case.device} in {str(case.dtype).removeprefix('torch.')}"


def kernel(op: str, activation: torch.Tensor) -> Callable[..., Any]:
    """The implementation of ``op`` for a call whose first tensor is ``activation``."""
    name = requested()
    key = (op, activation.device.type, activation.dtype, name)
    found = _chosen.get(key)
    if found is None:
        if not _chosen:
            _tell()
        case = Case(*key[:3])
        backend = choose(case, registered(), name)
        found = _chosen[key] = _by_call(case, name) if backend.looks_at_calls else backend.kernels[op]
    return found


def _by_call(case: Case, name: str) -> Callable[..., Any]:
    """A kernel that asks at each call who serves it."""
    automatic, backends = name == AUTO, registered()
    candidates = [
        backend
        for backend in backends
        if name in (AUTO, backend.name) and _passed_over(backend, case, None, automatic) is None
    ]

    def run(*arguments: Any) -> Any:
        for backend in candidates:
            if backend.why_not_call(case, arguments, automatic) is None:
                return backend.kernels[case.op](*arguments)
        return choose(case, backends, name, arguments)  # Says why there is none.

    return run


def accumulate(op: str, arguments: Sequence[Any], into: Sequence[torch.Tensor]) -> Any:
    """Run a wgrad whose gradients of sources are added to ``into``, where this is not empty."""
    activation = arguments[0]
    case = Case(op, activation.device.type, activation.dtype)
    backend = choose(case, registered(), requested(), arguments)
    places = [place if place.numel() > 0 else None for place in into]
    given = [place.data_ptr() for place in places if place is not None]
    if backend.accumulates and len({*given}) == len(given):
        gradients, *others = backend.kernels[op](*arguments, into=places)
    else:
        gradients, *others = backend.kernels[op](*arguments)
        for place, gradient in zip(places, gradients, strict=True):
            if place is not None:
                place.add_(gradient)
    # What is added is not returned: an op's outputs share nothing with its arguments.
    empty = [g if place is None else g.new_empty(0) for g, place in zip(gradients, places, strict=True)]
    return empty, *others


def served_by(backend: str, name: str, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Those of ``cases`` that ``backend`` serves where ``name`` is asked for, its own calls' exceptions aside.

    For ``auto`` not those of which its record says that a rival is faster at some sizes.
    """
    key = (backend, name, cases)
    found = _served.get(key)
    if found is None:
        found = _served[key] = tuple(case for case in cases if _serves(backend, name, case))
    return found


def _serves(backend: str, name: str, case: Case) -> bool:
    try:
        chosen = choose(case, registered(), name)
    except CannotServe:
        return False
    return chosen.name == backend and (name != AUTO or chosen.lost(case) is None)
