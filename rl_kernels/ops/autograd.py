"""The ops differentiated. ``forward``, ``dgrad`` and ``wgrad`` go the ways of ``ways.py``; every way shares one formula
a gradient.

The set of ops is closed under differentiation. With ``W`` the recipe over ``weights``:

* forward ``y = x W``: ``dx = dgrad(dy)``, and ``wgrad(dy, x)``;
* dgrad is linear in ``dy`` with the transposed recipe: its gradients are a forward and a ``wgrad``;
* wgrad yields ``dW_j = c_j G`` and ``dc_j = <G, W_j>``. Against gradients ``U_j`` and ``u_j`` of those its value is
  ``<G, H>`` with ``H = sum_j c_j U_j + u_j W_j``: a recipe again, of 2N sources, so its gradients are the same ops.
  Of ``Outer`` coefficients ``c_j = l_j r_j`` the second term is ``(u_j r_j) W_j + (l_j v_j) W_j``: of 3N sources.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from rl_kernels._extension import mixed_conv_call, mixed_linear_call
from rl_kernels.ops import composite, conv, linear
from rl_kernels.ops.accumulation import buffers
from rl_kernels.ops.composite import Composite, MaybeGradients
from rl_kernels.ops.mix import accumulate_dtype, mix
from rl_kernels.ops.schema import Op
from rl_kernels.ops.shapes import conv_memory_format
from rl_kernels.ops.sharding import are_distributed, conv_on_shards, linear_on_shards
from rl_kernels.ops.values import Call, Geometry, Outer, Recipe, Wanted
from rl_kernels.ops.ways import (
    autocast_cast,
    autocast_dtype,
    is_observed,
    needs_composite,
    needs_lean_node,
)


class Family(NamedTuple):
    """One kind of layer.

    Attributes:
        forward: the op.
        dgrad: the gradient of its input.
        wgrad: the gradients of its recipe.
        composite: the same in plain aten.
        fast: the forward's fast path, ``(x, recipe, geometry)``; None where it declines.
    """

    forward: Op
    dgrad: Op
    wgrad: Op
    composite: Composite
    fast: Callable[[Tensor, Recipe, Geometry | None], Tensor | None]


def _fast_linear(x: Tensor, recipe: Recipe, _: Geometry | None) -> Tensor | None:
    return mixed_linear_call(x, *recipe, True)


def _fast_conv(x: Tensor, recipe: Recipe, geometry: Geometry | None) -> Tensor | None:
    assert geometry is not None
    return mixed_conv_call(x, *recipe, len(geometry.stride), *geometry, True)


LINEAR = Family(linear.FORWARD, linear.DGRAD, linear.WGRAD, composite.LINEAR, _fast_linear)
CONV = Family(conv.FORWARD, conv.DGRAD, conv.WGRAD, composite.CONV, _fast_conv)


# The three ops, by the way that fits.


def mixed_forward(family: Family, x: Tensor, recipe: Recipe, geometry: Geometry | None = None) -> Tensor:
    """The forward of ``family``; the fast path first."""
    if not torch.compiler.is_compiling():
        y = family.fast(x, recipe, geometry)
        if y is not None:
            return y
    return mixed_forward_in_python(family, x, recipe, geometry)


def mixed_forward_in_python(family: Family, x: Tensor, recipe: Recipe, geometry: Geometry | None = None) -> Tensor:
    """The forward of ``family``, where the fast path has declined."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return mixed_forward(family, *autocast_cast(dtype, x, recipe), geometry)
    if needs_composite((x, *recipe.tensors())):
        family.forward.check(Call(family.forward.name, x, recipe, geometry))
        if are_distributed(x, recipe):
            local = functools.partial(mixed_forward, family, geometry=geometry)
            y = linear_on_shards(local, x, recipe) if geometry is None else conv_on_shards(local, x, recipe)
            if y is not None:
                return y
        return family.composite.forward(x, recipe, geometry)
    if is_observed(x):
        return family.forward.overload(x, *recipe, *(geometry or ()))
    weights, coefficients, biases = recipe
    if biases is not None and any(bias.is_neg() for bias in biases):
        biases = [bias.resolve_neg() for bias in biases]  # An op's dispatch sees lazy negation, but not in Tensor[]?.
    if needs_lean_node(x, *recipe.tensors()):
        return _Forward.apply(_Node(family, geometry, len(weights)), x, coefficients, *weights, *(biases or ()))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return family.forward.overload(x, weights, coefficients, biases, *(geometry or ()))


def mixed_dgrad(
    family: Family, dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry | None
) -> Tensor:
    """The dgrad of ``family``; biases of the recipe are left out."""
    weights, coefficients, _ = recipe
    if needs_composite((dy, coefficients, *weights)):
        return family.composite.dgrad(dy, mix(weights, coefficients, dy.dtype), input_size, geometry)
    size = None if geometry is None else list(input_size)
    call = Call(family.dgrad.name, dy, recipe, geometry, input_size=size)
    if is_observed(dy):
        return family.dgrad.overload(*call.arguments())
    if needs_lean_node(dy, coefficients, *weights):
        return _Dgrad.apply(_Node(family, geometry, len(weights), size), dy, coefficients, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return family.dgrad.overload(*call.arguments())


def _wgrad(
    family: Family, dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, geometry: Geometry | None
) -> MaybeGradients:
    """The wgrad of ``family``, with None for what is not wanted."""
    if not wanted:
        return [None] * len(recipe.weights), None, [None] * len(wanted.biases)
    if needs_composite((dy, x, *recipe.tensors())):
        return family.composite.gradients(dy, x, recipe, wanted, geometry)
    n = len(recipe.weights)
    call = Call(family.wgrad.name, dy, recipe, geometry, x=x, wanted=wanted)
    if is_observed(dy):
        dweights, dcoefficients, dbiases = family.wgrad.overload(*call.arguments())
    elif needs_lean_node(dy, x, *recipe.tensors()):
        node = _Node(family, geometry, n, wanted=wanted)
        flat = _Wgrad.apply(node, dy, x, *recipe.tensors())
        dweights, dcoefficients, dbiases = flat[:n], flat[n], flat[n + 1 :]
    elif (into := buffers(recipe.weights, wanted.weights)) is not None:
        dweights, dcoefficients, dbiases = family.wgrad.in_place_overload(*call.arguments(), into)
        dweights = [None if buffer.numel() > 0 else g for g, buffer in zip(dweights, into, strict=True)]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            dweights, dcoefficients, dbiases = family.wgrad.overload(*call.arguments())
    return (
        [g if want else None for g, want in zip(dweights, wanted.weights, strict=True)],
        dcoefficients if wanted.coefficients else None,
        [g if want else None for g, want in zip(dbiases, wanted.biases, strict=True)],
    )


# The formulas.


def _laid_out(gradient: Tensor, recipe: Recipe, memory_format: torch.memory_format | None) -> Tensor:
    """The gradient of an output, laid out as that is; None where it has no format, or any is right."""
    if memory_format is None or needs_composite((gradient,)):
        return gradient
    if conv_memory_format(gradient, recipe.weights) == memory_format:
        return gradient
    return gradient.clone(memory_format=memory_format)  # Not contiguous(), which leaves sizes of 1 as they are.


class Differentiated(NamedTuple):
    """A forward, and which of its gradients are wanted.

    Attributes:
        family: whose forward.
        recipe: of the layer.
        geometry: of a convolution.
        input_size: the shape of x.
        wants_x: whether x wants its gradient.
        wanted: which gradients of the recipe.
        memory_format: of a convolution's output, and so of its gradient, however dy comes (expanded, say).
    """

    family: Family
    recipe: Recipe
    geometry: Geometry | None
    input_size: Sequence[int]
    wants_x: bool
    wanted: Wanted
    memory_format: torch.memory_format | None = None

    def gradients(
        self, dy: Tensor, x: Tensor | None
    ) -> tuple[Tensor | None, Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
        """Those of x, the weights, the coefficients, the biases; x may be None where no product is wanted."""
        family, recipe, geometry = self.family, self.recipe, self.geometry
        dy = _laid_out(dy, recipe, self.memory_format)
        dx = mixed_dgrad(family, dy, recipe, self.input_size, geometry) if self.wants_x else None
        if x is None:
            dbiases = family.composite.bias_gradients(dy, recipe, self.wanted.biases)
            return dx, [None] * len(recipe.weights), None, dbiases
        return dx, *_wgrad(family, dy, x, recipe, self.wanted, geometry)


def dgrad_gradients(
    family: Family,
    g: Tensor,
    dy: Tensor | None,
    recipe: Recipe,
    wants_dy: bool,
    wanted: Wanted,
    geometry: Geometry | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor | None, Sequence[Tensor | None], Tensor | None]:
    """Gradients of a dgrad against ``g``, shaped as x: those of dy, the weights, the coefficients.

    ``dy`` may be None where no product is wanted; ``memory_format`` is that of a convolution's dx, and so of ``g``.
    """
    g = _laid_out(g, recipe, memory_format)
    d_dy = mixed_forward(family, g, recipe, geometry) if wants_dy else None
    if dy is None:
        return d_dy, [None] * len(recipe.weights), None
    dweights, dcoefficients, _ = _wgrad(family, dy, g, recipe, wanted, geometry)
    return d_dy, dweights, dcoefficients


class DifferentiatedWgrad(NamedTuple):
    """A wgrad, and which of its gradients are wanted.

    Attributes:
        family: whose wgrad.
        dy: its argument.
        x: its argument.
        recipe: its argument.
        geometry: of a convolution.
        wants_dy: whether dy wants its gradient.
        wants_x: whether x does.
        wanted: which gradients of the recipe.
    """

    family: Family
    dy: Tensor
    x: Tensor
    recipe: Recipe
    geometry: Geometry | None
    wants_dy: bool
    wants_x: bool
    wanted: Wanted

    def gradients(
        self, against: MaybeGradients
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
        """Those of dy, x, the weights, the coefficients, the biases, ``against`` = (U_j, u, V_j of each dbias_j)."""
        by_weight, by_coefficient, by_bias = against
        n, biases = len(self.recipe.weights), self.recipe.biases
        of_biases = None if self.recipe.is_outer else by_coefficient  # Of which biases have a part.
        d_dy = d_x = d_coefficients = None
        d_weights: list[Tensor | None] = [None] * n
        d_biases: list[Tensor | None] = [None] * len(self.wanted.biases)
        given = [j for j in range(n) if by_weight[j] is not None]
        if given or by_coefficient is not None:
            d_dy, d_x, d_weights, d_coefficients = self._product_terms(by_weight, by_coefficient, given)
        if biases is not None and (of_biases is not None or any(v is not None for v in by_bias)):
            by_s, d_biases, term = self._bias_terms(of_biases, by_bias, biases)
            if self.wants_dy:
                spread = (
                    by_s if self.family.composite.channel_dim == -1 else by_s.reshape(-1, *(1,) * (self.dy.dim() - 2))
                )
                spread = spread.to(self.dy.dtype)
                d_dy = spread.expand_as(self.dy) if d_dy is None else d_dy + spread
            if term is not None:
                d_coefficients = term if d_coefficients is None else d_coefficients + term
        return d_dy, d_x, d_weights, d_coefficients, d_biases

    def _product_terms(
        self, by_weight: Sequence[Tensor | None], by_coefficient: Tensor | None, given: list[int]
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], Tensor | None]:
        """What follows from ``<G, H>``, H the recipe of the U_j that are ``given`` and, with u, of the weights."""
        family, geometry, wanted = self.family, self.geometry, self.wanted
        weights, coefficients, _ = self.recipe
        n = len(weights)
        sources = [u for u in by_weight if u is not None]
        rows = [coefficients[j] for j in given]
        directions = self._directions(by_coefficient)
        for direction in directions:
            sources += weights
            rows += list(direction)
        h = Recipe(sources, torch.stack(rows))
        d_dy = mixed_forward(family, self.x, h, geometry) if self.wants_dy else None
        d_x = mixed_dgrad(family, self.dy, h, self.x.shape, geometry) if self.wants_x else None
        # The directions of Outer coefficients depend on these.
        depends = bool(given) or (self.recipe.is_outer and bool(directions))
        asked = Wanted(
            [False] * len(given) + list(wanted.weights) * len(directions), wanted.coefficients and depends, []
        )
        dsources, dmixed, _ = _wgrad(family, self.dy, self.x, h, asked, geometry)
        d_weights = [_sum_of(dsources[len(given) + j :: n]) for j in range(n)]
        d_coefficients = None
        if dmixed is not None:
            zero = torch.zeros_like(coefficients[0])
            found = dict(zip(given, dmixed.unbind(), strict=False))
            d_coefficients = torch.stack([found.get(j, zero) for j in range(n)])
            if self.recipe.is_outer and directions:
                out = weights[0].shape[0]
                by_left, by_right = dmixed[len(given) :].split(n)
                mixed = Outer(Outer.of(by_right, out).left, Outer.of(by_left, out).right)
                d_coefficients = d_coefficients + mixed.joined()
        return d_dy, d_x, d_weights, d_coefficients

    def _directions(self, by_coefficient: Tensor | None) -> list[Tensor]:
        """Coefficients of the weights in H, N of them each: u; of ``Outer`` ones left's u with right, left with
        right's.
        """
        if by_coefficient is None:
            return []
        if not self.recipe.is_outer:
            return [by_coefficient]
        out = self.recipe.weights[0].shape[0]
        (left, right), (by_left, by_right) = (Outer.of(c, out) for c in (self.recipe.coefficients, by_coefficient))
        return [Outer(by_left, right).joined(), Outer(left, by_right).joined()]

    def _bias_terms(
        self, by_coefficient: Tensor | None, by_bias: Sequence[Tensor | None], biases: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """What the biases add: with s = sum(dy), dbias_j = c_j s and <s, b_j> within dc_j (not of ``Outer`` ones).

        Returns:
            The gradient of s, those of the biases, and a term of the coefficients' where one is wanted.
        """
        coefficients = self.recipe.bias_coefficients
        dtype = accumulate_dtype(biases[0].dtype)
        s = self.family.composite.sum_to_channels(self.dy, dtype)
        by_s = torch.zeros_like(s)
        d_biases: list[Tensor | None] = [None] * len(biases)
        per_source = [torch.zeros_like(coefficients[j]) for j in range(len(biases))]
        for j, (bias, v) in enumerate(zip(biases, by_bias, strict=True)):
            if v is not None:
                by_s = by_s + coefficients[j] * v.to(dtype)
                product = s * v.to(dtype)
                per_source[j] = product if coefficients.dim() == 2 else product.sum()
            if by_coefficient is not None:
                by_s = by_s + by_coefficient[j] * bias.to(dtype)
                if self.wanted.biases[j]:
                    d_biases[j] = (by_coefficient[j] * s).to(bias.dtype)
        wants_term = self.wanted.coefficients and not self.recipe.is_outer and any(v is not None for v in by_bias)
        return by_s, d_biases, torch.stack(per_source) if wants_term else None


def _sum_of(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there; None where none is."""
    there = [g for g in gradients if g is not None]
    return functools.reduce(torch.add, there) if there else None


# The lean way. Tensors are flattened into the argument list, as Function.apply sees no tensor in a list.


class _Node(NamedTuple):
    """What a node keeps besides tensors."""

    family: Family
    geometry: Geometry | None
    n: int
    input_size: Sequence[int] | None = None
    wanted: Wanted | None = None

    def recipe(self, coefficients: Tensor, sources: Sequence[Tensor]) -> Recipe:
        """From tensors in the order in which they are flattened."""
        return Recipe(sources[: self.n], coefficients, sources[self.n :] or None)

    def wanted_of(self, coefficients: bool, sources: Sequence[bool]) -> Wanted:
        """The same of what autograd asks for."""
        return Wanted(sources[: self.n], coefficients, sources[self.n :])


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, node: _Node, x: Tensor, coefficients: Tensor, *sources: Tensor) -> Tensor:
        recipe = node.recipe(coefficients, sources)
        wants_product = any(ctx.needs_input_grad[2 : 3 + node.n])
        ctx.save_for_backward(x if wants_product else None, coefficients, *sources)
        ctx.node, ctx.input_size = node, x.shape
        ctx.memory_format = conv_memory_format(x, recipe.weights) if node.family is CONV else None
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return node.family.forward.overload(x, *recipe, *(node.geometry or ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        x, coefficients, *sources = ctx.saved_tensors
        if dy is None:
            return (None,) * (3 + len(sources))
        node = ctx.node
        _, wants_x, wants_coefficients, *wants_sources = ctx.needs_input_grad
        recipe, wanted = node.recipe(coefficients, sources), node.wanted_of(wants_coefficients, wants_sources)
        differentiated = Differentiated(
            node.family, recipe, node.geometry, ctx.input_size, wants_x, wanted, ctx.memory_format
        )
        dx, dweights, dcoefficients, dbiases = differentiated.gradients(dy, x)
        return None, dx, dcoefficients, *dweights, *dbiases


class _Dgrad(Function):
    @staticmethod
    def forward(ctx: Any, node: _Node, dy: Tensor, coefficients: Tensor, *weights: Tensor) -> Tensor:
        wants_product = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(dy if wants_product else None, coefficients, *weights)
        ctx.node = node
        ctx.memory_format = conv_memory_format(dy, weights) if node.family is CONV else None
        recipe = Recipe(weights, coefficients)
        call = Call(node.family.dgrad.name, dy, recipe, node.geometry, input_size=node.input_size)
        with torch._C._AutoDispatchBelowAutograd():
            return node.family.dgrad.overload(*call.arguments())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, coefficients, *weights = ctx.saved_tensors
        _, wants_dy, wants_coefficients, *wants_weights = ctx.needs_input_grad
        recipe, wanted = Recipe(weights, coefficients), Wanted(wants_weights, wants_coefficients, [])
        family, geometry = ctx.node.family, ctx.node.geometry
        d_dy, dweights, dcoefficients = dgrad_gradients(
            family, g, dy, recipe, wants_dy, wanted, geometry, ctx.memory_format
        )
        return None, d_dy, dcoefficients, *dweights


class _Wgrad(Function):
    @staticmethod
    def forward(
        ctx: Any, node: _Node, dy: Tensor, x: Tensor, coefficients: Tensor, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(dy, x, coefficients, *sources)
        ctx.node = node
        ctx.set_materialize_grads(False)
        recipe = node.recipe(coefficients, sources)
        call = Call(node.family.wgrad.name, dy, recipe, node.geometry, x=x, wanted=node.wanted)
        with torch._C._AutoDispatchBelowAutograd():
            dweights, dcoefficients, dbiases = node.family.wgrad.overload(*call.arguments())
        return (*dweights, dcoefficients, *dbiases)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        dy, x, coefficients, *sources = ctx.saved_tensors
        node, n = ctx.node, ctx.node.n
        _, wants_dy, wants_x, wants_coefficients, *wants_sources = ctx.needs_input_grad
        recipe, wanted = node.recipe(coefficients, sources), node.wanted_of(wants_coefficients, wants_sources)
        differentiated = DifferentiatedWgrad(node.family, dy, x, recipe, node.geometry, wants_dy, wants_x, wanted)
        against = gradients[:n], gradients[n], gradients[n + 1 :]
        d_dy, d_x, d_weights, d_coefficients, d_biases = differentiated.gradients(against)
        return None, d_dy, d_x, d_coefficients, *d_weights, *d_biases
