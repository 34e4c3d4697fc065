"""Backends that are no part of the package, for tests of the choice between backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rl_kernels.backends import Backend, Case
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.ops.values import Call

Kernel = Callable[..., Any]


class Planted(Backend):
    """A backend made of functions.

    Args:
        kernels: by the op.
        name: of the backend.
        why_not: its answer for a case.
        why_not_call: its answer for a call.
        worse: its answer for a case, and a call or None.
        record: of its kernels.
        accumulates: whether its wgrads take ``into``.
    """

    summary = "planted"

    def __init__(
        self,
        kernels: dict[str, Kernel],
        name: str = "planted",
        *,
        why_not: Callable[[Case], str | None] = lambda case: None,
        why_not_call: Callable[[Call], str | None] = lambda call: None,
        worse: Callable[[Case, Call | None], str | None] = lambda case, call: None,
        record: RecordStore | None = None,
        accumulates: bool = False,
    ):
        self.functions, self.answers = kernels, (why_not, why_not_call, worse)
        self.name, self.record, self.accumulates = name, record, accumulates  # type: ignore[misc]
        self.kernels = {op: f"tests.backends.planted:{op}" for op in kernels}  # type: ignore[misc]

    def kernel(self, op: str) -> Kernel:
        return self.functions[op]

    def why_not(self, case: Case) -> str | None:
        return self.answers[0](case)

    def why_not_call(self, call: Call) -> str | None:
        return self.answers[1](call)

    def worse(self, case: Case, call: Call | None = None) -> str | None:
        return self.answers[2](case, call)
