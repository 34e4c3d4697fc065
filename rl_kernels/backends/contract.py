"""What a backend is: one object, which says what it can run and where others do better."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch

from rl_kernels.backends.case import Case
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call

Variants = Iterable[tuple[str, Callable[[], AbstractContextManager[Any]]]]


class Backend(ABC):
    """One way to run the ops. A backend's package ends in ``BACKEND``, its only object.

    Its kernels take ``Call.operands``: ``(x, recipe)``, ``(dy, recipe)`` or ``(dy, x, recipe, wanted)``, of a
    convolution ``(x, recipe, geometry)``, ``(dy, recipe, input_size, geometry)`` or ``(dy, x, recipe, wanted,
    geometry)``; where it ``accumulates`` its wgrads take the keyword ``into`` as well. They return what the op returns,
    and run on arguments that passed the op's check.

    Three questions are asked of it, whose answer is a reason, in a few words, or None: ``why_not``, ``why_not_call``,
    ``worse``. A reason names a cause: "needs channels_last", not "is for channels_last".

    Attributes:
        name: as in ``use_backend``.
        summary: what it does, in a line.
        kernels: where the kernel of each op is that it has, as ``"module:function"``; imported at the first call.
        accumulates: whether its wgrads add to ``into`` themselves; for the others what they return is added.
        record: what was measured of its kernels on this machine, which ``auto`` goes by; None: nothing is needed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    kernels: ClassVar[Mapping[str, str]]
    accumulates: ClassVar[bool] = False
    record: RecordStore | None = None

    @abstractmethod
    def why_not(self, case: Case) -> str | None:
        """Why it cannot run any call of ``case``; None where it can run some."""

    def why_not_call(self, call: Call) -> str | None:
        """Why it cannot run this call of a case that it can run; None where it can."""
        return None

    def worse(self, case: Case, call: Call | None = None) -> str | None:
        """Why ``auto`` should take another backend though this one can; None where it should not.

        Without ``call``: for every call of ``case``.
        """
        return None

    def exceptions(self, case: Case) -> str | None:
        """For people to read: which calls of ``case`` the two other questions turn away, in a few words."""
        return None

    def variants(self, op: str, dtype: torch.dtype) -> Variants:
        """The ways in which a kernel can run: each one's name, and what makes it run so; the first as by itself."""
        return [("", nullcontext)]

    def watched(self) -> AbstractContextManager[list[str]]:
        """Run its kernels inside; at the end the list fills with why their machine code is not to be trusted."""
        return nullcontext([])

    @functools.cached_property
    def looks_at_calls(self) -> bool:
        """Whether a case alone does not tell that it serves a call."""
        kind = type(self)
        asks = kind.why_not_call is not Backend.why_not_call or kind.worse is not Backend.worse
        return asks or self.record is not None

    def kernel(self, op: str) -> Callable[..., Any]:
        """The kernel of ``op``, imported."""
        return _imported(self.kernels[op])


@functools.cache
def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    kernel: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return kernel


def kernels_in(**modules: str) -> dict[str, str]:
    """``Backend.kernels`` of functions called as their ops, by the kind of layer: ``kernels_in(linear="module", ...)``.

    A kind is an op's name without ``mixed_``, ``_dgrad`` and ``_wgrad``.
    """
    kinds = {op: op.removeprefix("mixed_").removesuffix("_dgrad").removesuffix("_wgrad") for op in OPS}
    return {op: f"{modules[kind]}:{op}" for op, kind in kinds.items() if kind in modules}
