"""The formulas of ``autograd.py``, given to the registered ops, and to the C++ extension's backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl

from rl_kernels._extension import EXTENSION
from rl_kernels.ops.autograd import CONV, LINEAR, Differentiated, DifferentiatedWgrad, Family, dgrad_gradients
from rl_kernels.ops.mix import mix
from rl_kernels.ops.schema import LIBRARY, OPS
from rl_kernels.ops.shapes import conv_memory_format
from rl_kernels.ops.values import Call, Geometry, Recipe, Wanted
from rl_kernels.ops.ways import is_transformed


def _listed(mask: Any, tensors: Sequence[Tensor] | None) -> list[bool]:
    return [] if tensors is None else list(mask)


def _nones(geometry: Geometry | None) -> tuple[None, ...]:
    """The gradients of a geometry's arguments."""
    return () if geometry is None else (None,) * len(geometry)


def _save(name: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    """Keep the call of an op for its backward."""
    call = Call.of(name, inputs)
    weights, coefficients, biases = call.recipe
    x = () if call.x is None else (call.x,)
    ctx.save_for_backward(call.activation, *x, coefficients, *weights, *(biases or ()))
    ctx.n, ctx.has_biases, ctx.geometry, ctx.wanted = len(weights), biases is not None, call.geometry, call.wanted


def _saved_recipe(ctx: Any, coefficients: Tensor, sources: Sequence[Tensor]) -> Recipe:
    return Recipe(sources[: ctx.n], coefficients, sources[ctx.n :] if ctx.has_biases else None)


def _register_forward(family: Family) -> None:
    name = family.forward.name

    def backward(ctx: Any, dy: Tensor) -> Any:
        x, coefficients, *sources = ctx.saved_tensors
        recipe, geometry = _saved_recipe(ctx, coefficients, sources), ctx.geometry
        wants_x, wants_weights, wants_coefficients, wants_biases, *_ = ctx.needs_input_grad
        wanted = Wanted(list(wants_weights), wants_coefficients, _listed(wants_biases, recipe.biases))
        memory_format = conv_memory_format(x, recipe.weights) if family is CONV else None
        differentiated = Differentiated(family, recipe, geometry, x.shape, wants_x, wanted, memory_format)
        dx, dweights, dcoefficients, dbiases = differentiated.gradients(dy, x)
        return dx, list(dweights), dcoefficients, list(dbiases) if ctx.has_biases else None, *_nones(ctx.geometry)

    def composite(*arguments: Any) -> Tensor:
        call = Call.of(name, arguments)
        return family.composite.forward(call.activation, call.recipe, call.geometry)

    _register_op(name, backward, composite)


def _register_dgrad(family: Family) -> None:
    name = family.dgrad.name

    def backward(ctx: Any, g: Tensor) -> Any:
        dy, coefficients, *weights = ctx.saved_tensors
        wants_dy, wants_weights, wants_coefficients, *_ = ctx.needs_input_grad
        recipe, wanted = Recipe(weights, coefficients), Wanted(list(wants_weights), wants_coefficients, [])
        memory_format = conv_memory_format(dy, weights) if family is CONV else None
        d_dy, dweights, dcoefficients = dgrad_gradients(
            family, g, dy, recipe, wants_dy, wanted, ctx.geometry, memory_format
        )
        size = (None,) if family is CONV else ()
        return d_dy, list(dweights), dcoefficients, *size, *_nones(ctx.geometry)

    def composite(*arguments: Any) -> Tensor:
        call = Call.of(name, arguments)
        weight = mix(call.recipe.weights, call.recipe.coefficients, call.activation.dtype)
        return family.composite.dgrad(call.activation, weight, call.input_size or (), call.geometry)

    _register_op(name, backward, composite)


def _register_wgrad(family: Family) -> None:
    name = family.wgrad.name

    def backward(
        ctx: Any,
        by_weight: Sequence[Tensor | None],
        by_coefficient: Tensor | None,
        by_bias: Sequence[Tensor | None],
    ) -> Any:
        dy, x, coefficients, *sources = ctx.saved_tensors
        recipe, returned = _saved_recipe(ctx, coefficients, sources), ctx.wanted
        wants_dy, wants_x, wants_weights, wants_coefficients, wants_biases, *_ = ctx.needs_input_grad
        wanted = Wanted(list(wants_weights), wants_coefficients, _listed(wants_biases, recipe.biases))
        against = (
            [g if want else None for g, want in zip(by_weight, returned.weights, strict=True)],
            by_coefficient if returned.coefficients else None,
            [g if want else None for g, want in zip(by_bias, returned.biases, strict=True)],
        )
        differentiated = DifferentiatedWgrad(family, dy, x, recipe, ctx.geometry, wants_dy, wants_x, wanted)
        d_dy, d_x, d_weights, d_coefficients, d_biases = differentiated.gradients(against)
        of_biases = list(d_biases) if ctx.has_biases else None
        of_masks: tuple[Any, ...] = (None, None, None if ctx.has_biases else [])
        return d_dy, d_x, list(d_weights), d_coefficients, of_biases, *of_masks, *_nones(ctx.geometry)

    def composite(*arguments: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        call = Call.of(name, arguments)
        assert call.x is not None and call.wanted is not None
        weights, coefficients, biases = call.recipe
        dweights, dcoefficients, dbiases = family.composite.gradients(
            call.activation, call.x, call.recipe, call.wanted, call.geometry
        )
        return (
            [w.new_empty(0) if g is None else g for w, g in zip(weights, dweights, strict=True)],
            coefficients.new_empty(0) if dcoefficients is None else dcoefficients,
            [b.new_empty(0) if g is None else g for b, g in zip(biases or (), dbiases, strict=True)],
        )

    _register_op(name, backward, composite)


def _register_op(name: str, backward: Callable[..., Any], composite: Callable[..., Any]) -> None:
    """As ``torch.library.register_autograd``, which loses the tangents of forward-mode AD without a word.

    A graph that was captured holds the op: what transforms it gets ``composite`` here.
    """
    op = OPS[name]
    formula = make_autograd_impl(op.overload, Info(backward, functools.partial(_save, name)))

    def run(keyset: Any, *arguments: Any) -> Any:
        if not is_transformed():
            return formula(keyset, *arguments)
        op.check(Call.of(name, arguments))
        return composite(*arguments)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)
    LIBRARY.impl(name, composite, "FuncTorchBatched")


for _family in (LINEAR, CONV):
    _register_forward(_family)
    _register_dgrad(_family)
    _register_wgrad(_family)


def _gradients_for_extension(*arguments: Any) -> Sequence[Tensor | None]:
    """Gradients of a forward that the extension ran, for its backward where it cannot call the kernels itself.

    What C++ passes (``csrc/bindings/backward.cpp``): whether it is a convolution, dy, x, the recipe, the shape of x,
    which gradients are wanted, and the geometry as a tuple, empty for a linear layer.
    """
    conv, dy, x, weights, coefficients, biases, input_size, wants_x, *wanted, geometry = arguments
    differentiated = Differentiated(
        CONV if conv else LINEAR,
        Recipe(weights, coefficients, biases),
        Geometry(*geometry) if geometry else None,
        input_size,
        wants_x,
        Wanted(*wanted),
    )
    dx, dweights, dcoefficients, dbiases = differentiated.gradients(dy, x)
    return dx, dcoefficients, *dweights, *dbiases


if EXTENSION.module is not None:
    EXTENSION.module.set_formulas(_gradients_for_extension)
