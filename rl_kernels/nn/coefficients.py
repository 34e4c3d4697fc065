"""The learnable coefficients of a replaced layer or block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Constraint = Literal["free", "convex"]
Granularity = Literal["scalar", "channel"] | int
Init = Literal["fit"] | Sequence[float] | Tensor | None

CONSTRAINTS = ("free", "convex")
GRANULARITIES = ("scalar", "channel")

_SMALLEST_CONVEX = 1e-3  # A convex coefficient of 0 has an infinite logit, and would never learn.


class Coefficients(nn.Module):
    """N coefficients, scalar or one per output channel, free or convex. Calling it returns them.

    The paper (arXiv 2410.01239) has two scalars a block, learned freely; it leaves open how they start and whether
    they are constrained.

    Args:
        initial: ``(N,)``, or ``(N, out)`` for one coefficient per output channel.
        constraint: ``"free"``: the parameter ``coefficients`` is what the layer mixes with. ``"convex"``: they are
            positive and sum to 1 over the sources (for two, ``a + b = 1``), as the softmax of the parameter
            ``logits``.

    Raises:
        ValueError: an unknown constraint; or convex initial values that are not positive with sum 1.
    """

    _start: Tensor | None = None
    """The initial values, on the CPU: what ``reset_parameters`` sets. Coefficients of 0.1.0 do not have them."""

    def __init__(self, initial: Tensor, constraint: Constraint = "free"):
        super().__init__()
        check_constraint(constraint)
        self.constraint: Constraint = constraint
        if not initial.is_meta:
            self._start = initial.detach().to("cpu", copy=True)
        if constraint == "free":
            self.coefficients = nn.Parameter(initial.detach().clone())
            return
        check_convex(initial)
        self.logits = nn.Parameter(initial.detach().log())

    def reset_parameters(self) -> None:
        """Start anew, at the initial values: after ``to_empty``, or before another training run."""
        parameter = self.coefficients if self.constraint == "free" else self.logits
        start = torch.tensor(1 / self.shape[0]) if self._start is None else self._start
        with torch.no_grad():
            parameter.copy_(start if self.constraint == "free" else start.log())

    def forward(self) -> Tensor:
        """The coefficients, ``(N,)`` or ``(N, out)``."""
        found = self._parameters.get("coefficients")  # The usual case, without the search of nn.Module.__getattr__.
        if found is not None:
            return found
        return self.coefficients if self.constraint == "free" else self.logits.softmax(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Coefficients:
        # Half a model's precision is no place to learn two scalars: .half() and .bfloat16() move them, no more.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, *args, **kwargs)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N,)`` or ``(N, out)``."""
        return tuple((self.coefficients if self.constraint == "free" else self.logits).shape)

    def extra_repr(self) -> str:
        """Shape and constraint, for printing."""
        return f"{self.shape}, constraint={self.constraint!r}"


class GroupedCoefficients(Coefficients):
    """N coefficients for each of G groups of output channels. Calling it returns them channel by channel.

    Args:
        initial: ``(N, G)``.
        constraint: as ``Coefficients``'.
        channels: how many consecutive output channels a group has.
    """

    def __init__(self, initial: Tensor, constraint: Constraint = "free", *, channels: int):
        super().__init__(initial, constraint)
        self.channels = channels

    def forward(self) -> Tensor:
        """The coefficients, ``(N, G * channels)``."""
        return super().forward().repeat_interleave(self.channels, dim=1)

    def extra_repr(self) -> str:
        """Shape, channels and constraint, for printing."""
        return f"{super().extra_repr()}, channels={self.channels}"


def check_granularity(granularity: object) -> None:
    """Raise unless it is ``"scalar"``, ``"channel"`` or a number of groups."""
    number = isinstance(granularity, int) and not isinstance(granularity, bool) and granularity >= 1
    if not number and granularity not in GRANULARITIES:
        expected = f"one of {', '.join(GRANULARITIES)}, or a number of groups"
        raise ValueError(f"granularity: got {granularity!r}, expected {expected}")


def check_constraint(constraint: str) -> None:
    """Raise unless there is such a constraint."""
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint: got {constraint!r}, expected one of {', '.join(CONSTRAINTS)}")


def check_convex(initial: Tensor) -> None:
    """Raise unless convex coefficients can start at ``initial``: positive, with sum 1 over the sources."""
    total = initial.sum(0)
    if not initial.is_meta and (bool((initial <= 0).any()) or not torch.allclose(total, torch.ones_like(total))):
        raise ValueError(f"init: got {initial.tolist()}, expected positive coefficients with sum 1 (convex)")


def initial_coefficients(
    init: Init, n: int, out: int | None, constraint: Constraint, pairs: Iterable[tuple[Tensor, Sequence[Tensor]]]
) -> Tensor:
    """Where coefficients start, on the CPU.

    Args:
        init: None for 1/N each (0.5 for two neighbours); the values; or ``"fit"``.
        n: how many sources.
        out: how many coefficients a source has: as many as output channels, or groups of them; None for scalars.
        constraint: the fit obeys it.
        pairs: for ``"fit"``: every own weight with its sources' weights, to be met in the least-squares sense.

    Returns:
        ``(n,)`` or ``(n, out)``, float32 or float64: to be cast to the parameter's dtype. Whatever default device and
        dtype are in force.
    """
    if isinstance(init, str):
        if init != "fit":
            raise ValueError(f"init: got {init!r}, expected 'fit', numbers or None")
        found = list(pairs)
        if any(weight.is_meta for own, sources in found for weight in (own, *sources)):
            raise ValueError("init: got 'fit' with weights on the meta device, expected weights that hold values")
        if not found:
            raise ValueError("init: got 'fit' without own=..., the plain layer whose weight is to be fitted")
        return fit(found, groups=out, convex=constraint == "convex")
    shape = (n,) if out is None else (n, out)
    if init is None:
        return torch.full(shape, 1 / n, dtype=torch.float64, device="cpu")
    values = torch.as_tensor(init, dtype=torch.float64, device="cpu").detach()
    if values.shape == (n,) and out is not None:
        values = values[:, None].expand(shape)
    if values.shape != shape:
        raise ValueError(f"init: got shape {tuple(values.shape)}, expected {shape} or ({n},)")
    return values


def fit(pairs: Sequence[tuple[Tensor, Sequence[Tensor]]], *, groups: int | None = None, convex: bool = False) -> Tensor:
    """The coefficients whose mix is nearest to given weights: ``argmin_c sum ||W - sum_j c_j W_j||^2``.

    Args:
        pairs: each an own weight ``(out, ...)`` and its N sources. One set of coefficients serves them all.
        groups: one set for each of so many groups of consecutive output channels, which all weights must divide into;
            None for one set.
        convex: positive coefficients with sum 1.

    Returns:
        ``(N,)`` or ``(N, groups)``: float32, or float64 for float64 weights. Of several solutions the smallest.
    """
    grams, moments = [], []
    for own, sources in pairs:
        stacked = torch.stack([_by_channel(source) for source in sources], dim=1)
        gram, moment = stacked @ stacked.mT, (stacked @ _by_channel(own).unsqueeze(2)).squeeze(2)
        # Without groups the pairs are summed at once: their weights may differ in shape.
        grams.append(gram.sum(0, keepdim=True) if groups is None else gram.unflatten(0, (groups, -1)).sum(1))
        moments.append(moment.sum(0, keepdim=True) if groups is None else moment.unflatten(0, (groups, -1)).sum(1))
    gram, moment = torch.stack(grams).sum(0), torch.stack(moments).sum(0)
    solution = _fit_convex(gram, moment) if convex else torch.linalg.pinv(gram) @ moment.unsqueeze(2)
    solution = solution.reshape(-1) if groups is None else solution.reshape(moment.shape).mT
    dtype = torch.float64 if pairs[0][0].dtype == torch.float64 else torch.float32
    return solution.to("cpu", dtype).contiguous()


def _by_channel(weight: Tensor) -> Tensor:
    """``weight`` in float64, flattened to ``(out, elements a channel)``."""
    weight = weight.detach().double()
    return weight.unsqueeze(1) if weight.dim() == 1 else weight.flatten(1)


def _fit_convex(gram: Tensor, moment: Tensor) -> Tensor:
    """The best point of the simplex: the best of its faces. ``gram`` is ``(batch, N, N)``, ``moment`` ``(batch, N)``.

    On a face (a set of sources that alone take part) the minimum solves a linear system; 2^N - 1 faces are few.
    """
    batch, n = moment.shape
    best = torch.full_like(moment, 1 / n)
    least = torch.full_like(moment[:, 0], torch.inf)
    # The largest face first, and a smaller one only where it is better by more than rounding: equal sources share.
    margin = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1)
    for face in (list(c) for size in range(n, 0, -1) for c in itertools.combinations(range(n), size)):
        system = torch.zeros(batch, len(face) + 1, len(face) + 1, dtype=gram.dtype, device=gram.device)
        system[:, :-1, :-1] = gram[:, face][:, :, face]
        system[:, -1, :-1] = system[:, :-1, -1] = 1
        right = torch.cat([moment[:, face], torch.ones_like(moment[:, :1])], dim=1)
        point = torch.zeros_like(moment)
        point[:, face] = (torch.linalg.pinv(system) @ right.unsqueeze(2)).squeeze(2)[:, :-1]
        loss = (point.unsqueeze(1) @ gram @ point.unsqueeze(2)).flatten() - 2 * (point * moment).sum(1)
        better = (point >= 0).all(1) & (loss < least - margin)
        best, least = torch.where(better[:, None], point, best), torch.where(better, loss, least)
    best = best.clamp_min(_SMALLEST_CONVEX)
    return best / best.sum(1, keepdim=True)
