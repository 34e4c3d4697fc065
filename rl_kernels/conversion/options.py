"""The options of replaced blocks, checked when they are made."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from rl_kernels.nn.coefficients import GRANULARITIES, Constraint, Granularity, check_constraint, check_convex

Level = Literal["auto", "block", "layer"]
Norms = Literal["mixed", "own"]
Share = Literal["block", "layer"]


@dataclass(frozen=True)
class Options:
    """How the layers of a replaced block mix: see ``plan``. Checked when made.

    ``share`` becomes ``"block"`` where it is None, and ``"layer"`` with ``granularity="channel"``.
    """

    init: Literal["fit"] | tuple[float, ...] | None = None
    constraint: Constraint = "free"
    granularity: Granularity = "scalar"
    detach: tuple[int, ...] = ()
    share: Share | None = None
    norms: Norms = "mixed"

    def __post_init__(self) -> None:
        one_of("granularity", self.granularity, GRANULARITIES)
        one_of("norms", self.norms, get_args(Norms))
        channel = self.granularity == "channel"
        if self.share is None:
            object.__setattr__(self, "share", "layer" if channel else "block")
        one_of("share", self.share, get_args(Share))
        if channel and self.share == "block":
            raise ValueError("share: got 'block' with granularity 'channel', expected 'layer' or None")
        object.__setattr__(self, "init", _checked_init(self.init))
        check_constraint(self.constraint)
        if isinstance(self.init, tuple) and self.constraint == "convex":
            check_convex(torch.tensor(self.init, dtype=torch.float64, device="cpu"))
        if not isinstance(self.detach, Collection) or not set(self.detach) <= {0, 1}:
            raise ValueError(f"detach: got {self.detach!r}, expected indices out of 0 (the previous) and 1 (the next)")
        object.__setattr__(self, "detach", tuple(sorted(set(self.detach))))


def one_of(name: str, value: object, expected: Iterable[str]) -> None:
    """Raise unless ``value`` is one of the ``expected``."""
    if value not in tuple(expected):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, expected))}")


def _checked_init(init: Any) -> Literal["fit"] | tuple[float, ...] | None:
    if init is None or (isinstance(init, str) and init == "fit"):
        return cast('Literal["fit"] | None', init)
    try:
        values = tuple(float(value) for value in (init.tolist() if isinstance(init, Tensor) else init))
    except (TypeError, ValueError):
        values = ()
    if len(values) != 2:
        raise ValueError(f"init: got {init!r}, expected None, 'fit' or two numbers")
    return values
