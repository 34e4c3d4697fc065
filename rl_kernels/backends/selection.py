"""Which backend serves a call: a pure function of the call, of what is registered and of what the user asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rl_kernels.backends import record_store
from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend
from rl_kernels.ops.values import Call, Gradients

AUTO = "auto"
ENVIRONMENT_VARIABLE = "RL_KERNELS_BACKEND"


class CannotServe(RuntimeError):
    """The backend asked for cannot serve a call, or none can; the message says why."""


_backends: dict[str, Backend] = {}
_candidates: dict[tuple[Case, str], tuple[Backend, ...]] = {}
_served: dict[tuple[str, str, tuple[Case, ...]], tuple[Case, ...]] = {}
_default = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
_forced: str | None = None
_listeners: list[Callable[[], None]] = []


# What is registered, and asked for.


def register(backend: Backend) -> None:
    """Add a backend. ``auto`` tries backends in the order of their registration: the fastest first."""
    _backends[backend.name] = backend
    refresh()


def refresh() -> None:
    """Choose anew, by the records as they are now."""
    record_store.forget()
    _candidates.clear()
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


# The choice. A backend serves what it can; under ``auto`` also only what neither it nor its record finds worse.


def why_worse(backend: Backend, case: Case, call: Call | None = None) -> str | None:
    """Why ``auto`` passes over a backend that can serve ``case``, or ``call``; None where it does not."""
    reason = backend.worse(case, call)
    return backend.record.worse(case, call) if reason is None and backend.record is not None else reason


def why_not(backend: Backend, case: Case, automatic: bool = False) -> str | None:
    """Why a backend serves no call of ``case``, asked for by name or, ``automatic``, by ``auto``; None where it may."""
    if case.op not in backend.kernels:
        return f"no kernel for {case.op}"
    return backend.why_not(case) or (why_worse(backend, case) if automatic else None)


def _why_not_call(backend: Backend, case: Case, call: Call, automatic: bool) -> str | None:
    """Why ``backend``, which serves ``case``, does not serve ``call``."""
    return backend.why_not_call(call) or (why_worse(backend, case, call) if automatic else None)


def choose(case: Case, backends: tuple[Backend, ...], name: str = AUTO, call: Call | None = None) -> Backend:
    """The backend that serves ``case``; with ``call``, the one that serves that call.

    Raises:
        CannotServe: the one asked for cannot serve it, or none can.
    """
    automatic = name == AUTO
    reasons = {}
    for backend in backends:
        if not automatic and backend.name != name:
            continue
        reason = why_not(backend, case, automatic)
        if reason is None and call is not None:
            reason = _why_not_call(backend, case, call, automatic)
        if reason is None:
            return backend
        reasons[backend.name] = reason
    if not automatic:
        raise CannotServe(f"backend {name!r} cannot serve {case}: {reasons[name]}")
    raise CannotServe(f"no backend serves {case}: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")


def backend_for(call: Call) -> Backend:
    """The backend that serves ``call`` as things are set.

    Raises:
        CannotServe: the one asked for cannot serve it, or none can.
    """
    name, activation = requested(), call.activation
    case = Case(call.op, activation.device.type, activation.dtype)
    candidates = _candidates.get((case, name))
    if candidates is None:
        candidates = _candidates[case, name] = _find_candidates(case, name)
    for backend in candidates:
        if not backend.looks_at_calls or _why_not_call(backend, case, call, name == AUTO) is None:
            return backend
    return choose(case, registered(), name, call)  # Says why there is none.


def _find_candidates(case: Case, name: str) -> tuple[Backend, ...]:
    if not _candidates:
        _tell()
    choose(case, registered(), name)  # Raises where there is none.
    named = (backend for backend in registered() if name in (AUTO, backend.name))
    return tuple(backend for backend in named if why_not(backend, case, name == AUTO) is None)


def run(call: Call) -> Any:
    """Run a call, whose arguments fit, on the backend that serves it."""
    backend = backend_for(call)
    kernel = backend.kernel(call.op)
    return kernel(*call.operands) if call.into is None else _accumulate(backend, kernel, call, call.into)


def _accumulate(
    backend: Backend, kernel: Callable[..., Gradients], call: Call, into: Sequence[torch.Tensor | None]
) -> Gradients:
    """Run a wgrad whose gradients of sources are added to ``into``, where there is such a tensor."""
    given = [buffer.data_ptr() for buffer in into if buffer is not None]
    if backend.accumulates and len({*given}) == len(given):
        weights, coefficients, biases = kernel(*call.operands, into=into)
    else:
        weights, coefficients, biases = kernel(*call.operands)
        for buffer, gradient in zip(into, weights, strict=True):
            if buffer is not None:
                buffer.add_(gradient)
    # What is added is not returned: an op's outputs share nothing with its arguments.
    returned = [g if buffer is None else g.new_empty(0) for g, buffer in zip(weights, into, strict=True)]
    return Gradients(returned, coefficients, biases)


def served_by(backend: str, name: str, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Those of ``cases`` that ``backend`` serves where ``name`` is asked for, its own calls' exceptions aside.

    For ``auto`` not those of which its record says that a rival is faster at some sizes; nor, where it needs a record,
    those of which it says nothing for a kind of call or for one of the GPUs.
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
    if chosen.name != backend:
        return False
    return name != AUTO or chosen.record is None or chosen.record.settles(case)
