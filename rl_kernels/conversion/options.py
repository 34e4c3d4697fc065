"""The options of replaced blocks, checked when they are made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from rl_kernels.conversion.grouping import Granularity
from rl_kernels.nn.coefficients import Constraint, Init, check_constraint, check_convex

Level = Literal["auto", "block", "layer"]
Norms = Literal["mixed", "own"]
Share = Literal["block", "layer"]
Boundaries = Literal["skipped", "blocks"]


@dataclass(frozen=True)
class Options:
    """How the layers of a replaced block mix: see ``plan``. Checked when made.

    ``share`` becomes ``"block"`` where it is None, and ``"layer"`` where the granularity is not ``"scalar"``.
    """

    init: Literal["fit"] | tuple[float, ...] | None = None
    constraint: Constraint = "free"
    granularity: Granularity = "scalar"
    detach: tuple[int, ...] = ()
    share: Share | None = None
    norms: Norms = "mixed"
    window: int = 1
    boundaries: Boundaries = "skipped"

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool):
            raise TypeError(f"window: got {self.window!r}, expected an integer")
        if self.window < 1:
            raise ValueError(f"window: got {self.window}, expected at least 1")
        one_of("boundaries", self.boundaries, get_args(Boundaries))
        one_of("granularity", self.granularity, get_args(Granularity))
        one_of("norms", self.norms, get_args(Norms))
        finer = self.granularity != "scalar"
        if self.share is None:
            object.__setattr__(self, "share", "layer" if finer else "block")
        one_of("share", self.share, get_args(Share))
        if finer and self.share == "block":
            raise ValueError(f"share: got 'block' with granularity {self.granularity!r}, expected 'layer' or None")
        object.__setattr__(self, "init", _checked_init(self.init, 2 * self.window))
        check_constraint(self.constraint)
        if isinstance(self.init, tuple) and self.constraint == "convex":
            check_convex(torch.tensor(self.init, dtype=torch.float64, device="cpu"))
        if not isinstance(self.detach, Collection) or not set(self.detach) <= set(range(2 * self.window)):
            further = f" and so on below {2 * self.window}" if self.window > 1 else ""
            expected = f"indices out of 0 (the previous) and 1 (the next){further}"
            raise ValueError(f"detach: got {self.detach!r}, expected {expected}")
        object.__setattr__(self, "detach", tuple(sorted(set(self.detach))))

    @property
    def distances(self) -> tuple[int, ...]:
        """How far the neighbours are that there may be, the previous and the next of each distance: -1, 1, -2, 2."""
        return tuple(sign * distance for distance in range(1, self.window + 1) for sign in (-1, 1))

    def start(self, distances: Sequence[int], factors: Sequence[float]) -> Init:
        """Where the coefficients of sources at these distances start, as a layer's ``init`` has it.

        ``factors`` say what of its neighbour's number each has.
        """
        if isinstance(self.init, str):
            return self.init
        convex = self.constraint == "convex"
        # Free, the near two alone: then the mix has the mean and the variance that it has without the others.
        numbers = self.init or [0.5 if abs(distance) == 1 or convex else 0.0 for distance in self.distances]
        by_distance = dict(zip(self.distances, numbers, strict=True))
        found = [by_distance[distance] * factor for distance, factor in zip(distances, factors, strict=True)]
        total = sum(found) if convex else 1.0
        return [number / total for number in found]

    def detached(self, distances: Sequence[int]) -> tuple[int, ...]:
        """Which of the sources at these distances get no gradient."""
        left_out = {self.distances[j] for j in self.detach}
        return tuple(j for j, distance in enumerate(distances) if distance in left_out)


def one_of(name: str, value: object, expected: Iterable[object]) -> None:
    """Raise unless ``value`` is one of the ``expected``."""
    if value not in tuple(expected):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, expected))}")


def at_least(name: str, value: object, least: int) -> None:
    """Raise unless ``value`` is an integer of at least that."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def _checked_init(init: Any, count: int) -> Literal["fit"] | tuple[float, ...] | None:
    if init is None or (isinstance(init, str) and init == "fit"):
        return cast('Literal["fit"] | None', init)
    try:
        values = tuple(float(value) for value in (init.tolist() if isinstance(init, Tensor) else init))
    except (TypeError, ValueError):
        values = ()
    if len(values) != count:
        expected = "two numbers" if count == 2 else f"{count} numbers"
        raise ValueError(f"init: got {init!r}, expected None, 'fit' or {expected}")
    return values
