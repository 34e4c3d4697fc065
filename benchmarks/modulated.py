"""Ways to run a layer on a frozen weight that is modulated elementwise, ``W * (1 + left^T right)``.

The ceiling has no factors to learn: its backward is the input's gradient alone, one product less than the others'.

The weight asks for no gradient; the input, the two factors and the bias do. What a rival takes is ``(x, left, right,
bias)``, and it returns the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rl_kernels as rl
import rl_kernels.functional as F
from benchmarks.cases import LinearCase, ModulatedCase
from benchmarks.contenders import BOTH, Contender, largest_error, ready, tolerance
from benchmarks.problems import build
from benchmarks.rivals import CEILING, name_of

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Factors:
    """The tensors of a case: a layer's problem, and the two factors beside it.

    Attributes:
        layer: the problem of the layer alone; the weight is its first source's.
        left: ``(rank, out)``.
        right: ``(rank, in / groups * taps)``.
    """

    def __init__(self, case: ModulatedCase, device: str):
        self.case, self.layer = case, build(case.layer, device)
        self.weight, self.bias = self.layer.sources[0]
        generator = torch.Generator(device).manual_seed(1)
        wide = torch.promote_types(self.weight.dtype, torch.float32)

        def random(columns: int) -> Tensor:
            return torch.randn(case.rank, columns, generator=generator, device=device, dtype=wide)

        self.left = random(len(self.weight)) * 0.1
        self.right = random(self.weight[0].numel()) / case.rank

    def factor(self, left: Tensor, right: Tensor) -> Tensor:
        """``1 + left^T right``, shaped as the weight."""
        return (1 + left.t() @ right).reshape(self.weight.shape)

    def modulated(self, x: Tensor, coefficients: rl.Outer, bias: Tensor) -> Tensor:
        """The layer on this package's ops."""
        case = self.case.layer
        if isinstance(case, LinearCase):
            return F.mixed_linear(x, (self.weight,), coefficients, (bias,))
        options = {"stride": case.stride, "padding": case.padding, "groups": case.groups}
        return F.mixed_conv2d(x, (self.weight,), coefficients, (bias,), **options)


def _ceiling(factors: Factors) -> Layer:
    """A plain layer on a weight that was modulated before, of which nothing is learnt but the bias."""
    weight = torch.empty_like(factors.weight).copy_(factors.weight * factors.factor(factors.left, factors.right))
    plain = factors.layer.plain
    return lambda x, left, right, bias: plain(x, (weight, bias))  # noqa: ARG005


def _naive(factors: Factors) -> Layer:
    """The formula as written: a weight-sized factor, a modulated weight, and a gradient of each."""
    plain, weight = factors.layer.plain, factors.weight

    def forward(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        return plain(x, ((weight * factors.factor(left, right)).to(weight.dtype), bias))

    return forward


def _compiled(factors: Factors) -> Layer:
    """The same, fused by inductor."""
    return torch.compile(_naive(factors), dynamic=False)


class _Modulated(nn.Module):
    def __init__(self, factors: Factors, left: Tensor, right: Tensor):
        super().__init__()
        self.factors, self.left, self.right = factors, left, right

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.factors.factor(self.left, self.right)).to(weight.dtype)


def _parametrized(factors: Factors) -> Layer:
    """By torch's own mechanism."""
    holder = nn.Module()
    plain = factors.layer.plain

    def forward(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        if not parametrize.is_parametrized(holder):
            holder.weight = nn.Parameter(factors.weight, requires_grad=False)
            parametrize.register_parametrization(holder, "weight", _Modulated(factors, left, right))
        modulated: Any = holder.weight
        return plain(x, (modulated, bias))

    return forward


def _products(factors: Factors) -> Layer:
    """``x W^T + sum_r left_r * ((x * right_r) W^T)``: no modulated weight, R + 1 products. Of linear layers only."""
    weight = factors.weight

    def forward(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        scaled = torch.cat((x.unsqueeze(0), x * right.to(x.dtype).unsqueeze(1)))
        first, *rest = torch.nn.functional.linear(scaled, weight)
        for rows, term in zip(left.to(x.dtype), rest, strict=True):
            first = first + rows * term
        return first + bias

    return forward


RIVALS: dict[str, Callable[[Factors], Layer]] = {
    CEILING: _ceiling,
    "naive": _naive,
    "compile": _compiled,
    "parametrize": _parametrized,
    "two_products": _products,
}
"""By the names that these ways have for a mix, too: ``two_products`` is the form without a weight."""
OF_LINEAR_LAYERS = ("two_products",)
"""Those that convolutions have not: a filter's taps meet different pixels."""


def _ours(factors: Factors) -> Layer:
    def forward(x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        sides = (torch.cat((torch.ones_like(side[:1]), side)).unsqueeze(0) for side in (left, right))
        return factors.modulated(x, rl.Outer(*sides), bias)

    return forward


def entrants(
    case: ModulatedCase, mode: str, rivals: list[str], backends: list[str], device: str
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Name and maker of each contender of a cell, the ceiling first."""
    factors = Factors(case, device)
    truth = _true_results(factors, mode)
    served = [name for name in RIVALS if isinstance(case.layer, LinearCase) or name not in OF_LINEAR_LAYERS]
    for name in served:
        if name == CEILING or name in rivals:
            make = RIVALS[name]
            yield name, partial(_enter, name, make, factors, mode, truth)
    for backend in backends:
        context = partial(rl.use_backend, backend)
        yield name_of(backend), partial(_enter, name_of(backend), _ours, factors, mode, truth, context)


def _leaves(factors: Factors, mode: str, wide: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    values = {"x": factors.layer.x, "left": factors.left, "right": factors.right, "bias": factors.bias}
    return {
        name: nn.Parameter(value.detach() if wide is None else value.detach().to(wide), requires_grad=mode == BOTH)
        for name, value in values.items()
    }


def _true_results(factors: Factors, mode: str) -> dict[str, tuple[Tensor, Tensor | float]]:
    """In float64, of the modulated weight as it is."""
    leaves = _leaves(factors, mode, torch.float64)
    weight = factors.weight.double() * factors.factor(leaves["left"], leaves["right"])
    output = factors.layer.plain(leaves["x"], (weight, leaves["bias"]))
    found = {"output": output.detach()}
    if mode == BOTH:
        output.backward(factors.layer.gradient.double())
        found |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: (value, float(value.norm())) for name, value in found.items()}


def _enter(
    name: str,
    make: Callable[[Factors], Layer],
    factors: Factors,
    mode: str,
    truth: dict[str, tuple[Tensor, Tensor | float]],
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Contender:
    leaves = _leaves(factors, mode)
    learnt = {key: leaf for key, leaf in leaves.items() if name != CEILING or key not in ("left", "right")}

    def compare(output: Tensor) -> float:
        found = {"output": output.detach()}
        found |= {key: leaf.grad for key, leaf in learnt.items() if leaf.grad is not None}
        expected = {key: truth[key] for key in ("output", *learnt) if key in truth}
        return largest_error(found, expected, tolerance(factors.layer))

    forward = partial(make(factors), *leaves.values())
    return ready(name, forward, [*learnt.values()], factors.layer.gradient, mode, within, compare, sources=1)
