"""How autograd, and every transform of torch, sees the ops.

One formula a gradient serves two bindings: a lean ``autograd.Function`` for eager calls, and the registered ops for
everything that traces. A call takes the first of these ways that fits; the order matters, each way is there for what
the later ones break:

1. autocast is on: cast the activation as torch's own layers do, and re-enter with autocast off;
2. a functorch transform or forward-mode AD is active, or an argument is a tensor subclass or batched: the recipe in
   plain aten (``_composite.py``), which torch can differentiate, batch and shard in every way it knows (this one
   materialises the mixed weight); so do the registered ops themselves, where a captured graph is transformed; but a
   linear layer of DTensors that are sharded in a common way calls the ops on its local shards (``_sharding.py``);
3. compiling, exporting or tracing, or a dispatch mode is active: the registered op, one node for every observer;
4. otherwise the lean ``Function``.

Before all of them an ordinary call on the CPU is offered to the C++ extension, whose fast path is the fourth way
without a step in Python (``csrc/bindings``). It declines whatever belongs to the first three ways, and bad
arguments; where its backward meets any of that, it comes back to the formulas here.

The set of ops is closed under differentiation. With ``W`` the recipe over ``weights``:

* forward ``y = x W``: ``dx = dgrad(dy)``, and ``wgrad(dy, x)``;
* dgrad is linear in ``dy`` with the transposed recipe: its gradients are a forward and a ``wgrad``;
* wgrad yields ``dW_j = c_j G`` and ``dc_j = <G, W_j>``. Against gradients ``U_j`` and ``u_j`` of those its value is
  ``<G, H>`` with ``H = sum_j c_j U_j + u_j W_j``: a recipe again, of 2N sources, so its gradients are the same ops.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from rl_kernels import _composite, _ops
from rl_kernels._accumulation import places
from rl_kernels._extension import EXTENSION, mixed_conv_call, mixed_linear_call, without_fast_path
from rl_kernels._recipe import accumulate_dtype, factors, mix
from rl_kernels._sharding import are_distributed, linear_on_shards

Gradients = Sequence[Tensor | None]


class Family(NamedTuple):
    """The three ops of one kind of layer, wgrad also in place, and the same in plain aten."""

    forward: Any
    dgrad: Any
    wgrad: Any
    wgrad_: Any
    check: Callable[..., None]
    """Raises unless the forward's arguments fit."""
    fast: Callable[..., Tensor | None]
    """The forward's fast path; None where it declines."""
    composite: Callable[..., Tensor]
    composite_dgrad: Callable[..., Tensor]
    """Of ``dy``, the mixed weight, the input's size and the geometry."""
    composite_wgrad: Callable[..., Tensor]
    """The gradient of the mixed weight, of ``dy``, ``x``, a tensor shaped as it and the geometry."""
    channel_dim: int
    """Where the output has its channels."""
    dgrad_takes_input_size: bool


def _fast_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    stride: Sequence[int],
    *geometry: Any,
) -> Tensor | None:
    return mixed_conv_call(x, weights, coefficients, biases, len(stride), stride, *geometry)


LINEAR = Family(
    _ops.mixed_linear,
    _ops.mixed_linear_dgrad,
    _ops.mixed_linear_wgrad,
    _ops.mixed_linear_wgrad_,
    _ops.check_mixed_linear,
    mixed_linear_call,
    _composite.linear,
    _composite.linear_dgrad,
    _composite.linear_wgrad,
    channel_dim=-1,
    dgrad_takes_input_size=False,
)
CONV = Family(
    _ops.mixed_conv,
    _ops.mixed_conv_dgrad,
    _ops.mixed_conv_wgrad,
    _ops.mixed_conv_wgrad_,
    _ops.check_mixed_conv,
    _fast_conv,
    _composite.conv,
    _composite.conv_dgrad,
    _composite.conv_wgrad,
    channel_dim=1,
    dgrad_takes_input_size=True,
)

# Tracers wrap every tensor in one of the last two, and see the registered ops.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

# Private names of torch, absent from some versions: without them the transform in question cannot be active.
_functorch_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_dispatch_stack_depth: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_batchedtensor", lambda t: False)
_is_legacy_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)


_plain_torch = False


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, every call takes way 2: what a user could write in plain torch. For comparisons."""
    global _plain_torch
    previous, _plain_torch = _plain_torch, True
    try:
        with without_fast_path():
            yield
    finally:
        _plain_torch = previous


def _is_transformed() -> bool:
    return _functorch_is_active() or getattr(forward_ad, "_current_level", -1) >= 0


def _needs_composite(tensors: Sequence[Tensor]) -> bool:
    if _plain_torch or _is_transformed():
        return True
    if any(type(tensor) not in _PLAIN_TYPES for tensor in tensors):
        return True
    return not torch.compiler.is_compiling() and any(_is_batched(t) or _is_legacy_batched(t) for t in tensors)


def _is_observed(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or type(tensor) in (FakeTensor, FunctionalTensor)
        or _dispatch_stack_depth() > 0
        or torch.jit.is_tracing()
    )


def mixed_forward(
    family: Family,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    geometry: tuple[Any, ...] = (),
) -> Tensor:
    """The forward of ``family``, by the first of the ways that fits."""
    if not torch.compiler.is_compiling():
        y = family.fast(x, weights, coefficients, biases, *geometry)
        if y is not None:
            return y
    device = x.device.type
    if device != "meta" and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return mixed_forward(family, *_autocast(dtype, x, weights, biases, coefficients), geometry)
    if _needs_composite((x, coefficients, *weights, *(biases or ()))):
        family.check(x, weights, coefficients, biases, *geometry)
        if are_distributed(x, weights, coefficients, biases) and family is LINEAR:
            local = functools.partial(mixed_forward, LINEAR)
            if (y := linear_on_shards(local, x, weights, coefficients, biases)) is not None:
                return y
        return family.composite(x, weights, coefficients, biases, *geometry)
    if _is_observed(x):
        return family.forward(x, weights, coefficients, biases, *geometry)
    if biases is not None and any(bias.is_neg() for bias in biases):
        biases = [bias.resolve_neg() for bias in biases]  # An op's dispatch sees lazy negation, but not in Tensor[]?.
    if torch.is_grad_enabled() and _requires_grad(x, coefficients, weights, biases):
        return _Forward.apply(family, geometry, len(weights), x, coefficients, *weights, *(biases or ()))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return family.forward(x, weights, coefficients, biases, *geometry)


def _autocast(
    dtype: torch.dtype, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, coefficients: Tensor
) -> tuple[Tensor, Sequence[Tensor], Tensor, Sequence[Tensor] | None]:
    """Cast as autocast casts for torch's layers: everything but float64.

    float32 sources stay as they are: the ops round the mix itself to the dtype of x, so that no cast copy of a whole
    weight is made, and their gradients arrive in float32.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    if all(weight.dtype == torch.float32 for weight in weights) and dtype != torch.float32:
        return cast(x), weights, coefficients, biases
    return cast(x), [cast(w) for w in weights], coefficients, None if biases is None else [cast(b) for b in biases]


def _requires_grad(*arguments: Tensor | Sequence[Tensor] | None) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif argument is not None and any(tensor.requires_grad for tensor in argument):
            return True
    return False


def _dgrad(
    family: Family,
    dy: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    input_size: Sequence[int],
    geometry: tuple[Any, ...],
) -> Tensor:
    if _needs_composite((dy, coefficients, *weights)):
        return family.composite_dgrad(dy, mix(weights, coefficients, dy.dtype), input_size, *geometry)
    if family.dgrad_takes_input_size:
        geometry = (list(input_size), *geometry)
    if _is_observed(dy):
        return family.dgrad(dy, weights, coefficients, *geometry)
    if torch.is_grad_enabled() and _requires_grad(dy, coefficients, weights):
        return _Dgrad.apply(family, geometry, dy, coefficients, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return family.dgrad(dy, weights, coefficients, *geometry)


class Masks(NamedTuple):
    """Which gradients a ``wgrad`` is asked for."""

    weights: list[bool]
    coefficients: bool
    biases: list[bool]


def _wgrad(
    family: Family,
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    masks: Masks,
    geometry: tuple[Any, ...],
) -> tuple[Gradients, Tensor | None, Gradients]:
    """``wgrad`` with None for what is not asked for."""
    n = len(weights)
    if not (any(masks.weights) or masks.coefficients or any(masks.biases)):
        return [None] * n, None, [None] * len(masks.biases)
    if _needs_composite((dy, x, coefficients, *weights, *(biases or ()))):
        return _composite_wgrad(family, dy, x, weights, coefficients, biases, masks, geometry)
    if _is_observed(dy):
        dweights, dcoefficients, dbiases = family.wgrad(dy, x, weights, coefficients, biases, *masks, *geometry)
    elif torch.is_grad_enabled() and _requires_grad(dy, x, coefficients, weights, biases):
        flat = _Wgrad.apply(family, geometry, masks, n, dy, x, coefficients, *weights, *(biases or ()))
        dweights, dcoefficients, dbiases = flat[:n], flat[n], flat[n + 1 :]
    elif (into := places(weights, masks.weights)) is not None:
        dweights, dcoefficients, dbiases = family.wgrad_(dy, x, weights, coefficients, biases, *masks, *geometry, into)
        dweights = [None if place.numel() > 0 else g for g, place in zip(dweights, into, strict=True)]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            dweights, dcoefficients, dbiases = family.wgrad(dy, x, weights, coefficients, biases, *masks, *geometry)
    return (
        [g if wanted else None for g, wanted in zip(dweights, masks.weights, strict=True)],
        dcoefficients if masks.coefficients else None,
        [g if wanted else None for g, wanted in zip(dbiases, masks.biases, strict=True)],
    )


def _composite_wgrad(
    family: Family,
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    masks: Masks,
    geometry: tuple[Any, ...],
) -> tuple[Gradients, Tensor | None, Gradients]:
    compute = accumulate_dtype(weights[0].dtype)
    dbiases = _bias_gradients(family, dy, coefficients, biases, masks.biases)
    if not (any(masks.weights) or masks.coefficients):
        return [None] * len(weights), None, dbiases
    g = family.composite_wgrad(dy.to(compute), x.to(compute), weights[0].to(compute), *geometry)
    dweights = [
        (factor * g).to(weight.dtype) if wanted else None
        for factor, weight, wanted in zip(factors(coefficients, g.dim()), weights, masks.weights, strict=True)
    ]
    if not masks.coefficients:
        return dweights, None, dbiases
    rows = torch.stack([(g * weight).sum(list(range(1, g.dim()))) for weight in weights])
    if biases is not None:
        total = _sum_to_channels(family, dy, compute)
        rows = rows + torch.stack([total * bias for bias in biases])
    return dweights, rows if coefficients.dim() == 2 else rows.sum(1), dbiases


# The formulas.


def _sum_to_channels(family: Family, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """``dy`` summed over everything but its channels: the gradient of a mixed bias."""
    channel = family.channel_dim % dy.dim()
    others = [dim for dim in range(dy.dim()) if dim != channel]
    return dy.sum(others, dtype=dtype) if others else dy.to(dtype)


def _forward_gradients(
    family: Family,
    dy: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    input_size: Sequence[int],
    needs_x: bool,
    masks: Masks,
    geometry: tuple[Any, ...],
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor | None, Gradients, Tensor | None, Gradients]:
    """Gradients of a forward. ``x`` may be None where neither the weights nor the coefficients need one.

    ``memory_format`` is that of a convolution's output, and so of its gradients, however dy comes (expanded, say).
    """
    if (
        memory_format is not None
        and not _needs_composite((dy,))
        and _ops.conv_memory_format(dy, weights) != memory_format
    ):
        dy = dy.clone(memory_format=memory_format)  # Not contiguous(), which leaves sizes of 1 as they are.
    dx = _dgrad(family, dy, weights, coefficients, input_size, geometry) if needs_x else None
    if x is None:
        dweights: Gradients = [None] * len(weights)
        return dx, dweights, None, _bias_gradients(family, dy, coefficients, biases, masks.biases)
    return dx, *_wgrad(family, dy, x, weights, coefficients, biases, masks, geometry)


def _bias_gradients(
    family: Family, dy: Tensor, coefficients: Tensor, biases: Sequence[Tensor] | None, mask: Sequence[bool]
) -> Gradients:
    if biases is None or not any(mask):
        return [None] * len(mask)
    total = _sum_to_channels(family, dy, coefficients.dtype)
    return [
        (coefficients[j] * total).to(bias.dtype) if wanted else None
        for j, (bias, wanted) in enumerate(zip(biases, mask, strict=True))
    ]


def _gradients_for_extension(
    conv: bool,
    dy: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    input_size: Sequence[int],
    needs_x: bool,
    weights_mask: list[bool],
    coefficients_mask: bool,
    biases_mask: list[bool],
    geometry: tuple[Any, ...],
) -> Gradients:
    """Gradients of a forward that the extension ran, for its backward where it cannot call the kernels itself."""
    masks = Masks(weights_mask, coefficients_mask, biases_mask)
    dx, dweights, dcoefficients, dbiases = _forward_gradients(
        CONV if conv else LINEAR, dy, x, weights, coefficients, biases, input_size, needs_x, masks, geometry
    )
    return dx, dcoefficients, *dweights, *dbiases


if EXTENSION.module is not None:
    EXTENSION.module.set_formulas(_gradients_for_extension)


def _dgrad_gradients(
    family: Family,
    g: Tensor,
    dy: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    needs_dy: bool,
    masks: Masks,
    geometry: tuple[Any, ...],
) -> tuple[Tensor | None, Gradients, Tensor | None]:
    """Gradients of a dgrad, against ``g``, shaped as x."""
    d_dy = mixed_forward(family, g, weights, coefficients, None, geometry) if needs_dy else None
    dweights, dcoefficients, _ = _wgrad(family, dy, g, weights, coefficients, None, masks, geometry)
    return d_dy, dweights, dcoefficients


def _wgrad_gradients(
    family: Family,
    gradients: tuple[Gradients, Tensor | None, Gradients],
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    needs_dy: bool,
    needs_x: bool,
    masks: Masks,
    geometry: tuple[Any, ...],
) -> tuple[Tensor | None, Tensor | None, Gradients, Tensor | None, Gradients]:
    """Gradients of a wgrad, against ``gradients`` = (U_j of each dW_j, u of dc, V_j of each dbias_j)."""
    by_weight, by_coefficient, by_bias = gradients
    n = len(weights)
    given = [j for j in range(n) if by_weight[j] is not None]
    sources = [u for u in by_weight if u is not None]
    rows = [coefficients[j] for j in given]
    if by_coefficient is not None:
        sources += weights
        rows += list(by_coefficient)
    d_dy = d_x = d_coefficients = None
    d_weights: list[Tensor | None] = [None] * n
    d_biases: list[Tensor | None] = [None] * len(masks.biases)
    if sources:
        mixed = torch.stack(rows)
        if needs_dy:
            d_dy = mixed_forward(family, x, sources, mixed, None, geometry)
        if needs_x:
            d_x = _dgrad(family, dy, sources, mixed, x.shape, geometry)
        asked = [False] * len(given) + (masks.weights if by_coefficient is not None else [])
        dsources, dmixed, _ = _wgrad(
            family, dy, x, sources, mixed, None, Masks(asked, masks.coefficients and bool(given), []), geometry
        )
        if by_coefficient is not None:
            d_weights = list(dsources[len(given) :])
        if dmixed is not None:
            zero = torch.zeros_like(coefficients[0])
            found = dict(zip(given, dmixed.unbind(), strict=False))
            d_coefficients = torch.stack([found.get(j, zero) for j in range(n)])
    if biases is not None and (by_coefficient is not None or any(v is not None for v in by_bias)):
        d_dy, d_coefficients, d_biases = _bias_terms(
            family, by_coefficient, by_bias, dy, coefficients, biases, needs_dy, masks, d_dy, d_coefficients
        )
    return d_dy, d_x, d_weights, d_coefficients, d_biases


def _bias_terms(
    family: Family,
    by_coefficient: Tensor | None,
    by_bias: Gradients,
    dy: Tensor,
    coefficients: Tensor,
    biases: Sequence[Tensor],
    needs_dy: bool,
    masks: Masks,
    d_dy: Tensor | None,
    d_coefficients: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """What the biases add to a wgrad's gradients: with s = sum(dy), dbias_j = c_j s and <s, b_j> within dc_j."""
    dtype = accumulate_dtype(biases[0].dtype)
    s = _sum_to_channels(family, dy, dtype)
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
            if masks.biases[j]:
                d_biases[j] = (by_coefficient[j] * s).to(bias.dtype)
    if needs_dy:
        spread = by_s if family.channel_dim == -1 else by_s.reshape(-1, *(1,) * (dy.dim() - 2))
        d_dy = spread.to(dy.dtype).expand_as(dy) if d_dy is None else d_dy + spread.to(dy.dtype)
    if masks.coefficients and any(v is not None for v in by_bias):
        term = torch.stack(per_source)
        d_coefficients = term if d_coefficients is None else d_coefficients + term
    return d_dy, d_coefficients, d_biases


# Binding 4: lean Functions. Tensors are flattened into the argument list, as Function.apply sees no tensor in a list.


class _Forward(Function):
    @staticmethod
    def forward(
        ctx: Any, family: Family, geometry: tuple[Any, ...], n: int, x: Tensor, coefficients: Tensor, *sources: Tensor
    ) -> Tensor:
        weights, biases = sources[:n], sources[n:] or None
        needs_weights = any(ctx.needs_input_grad[4 : 5 + n])
        ctx.save_for_backward(x if needs_weights else None, coefficients, *sources)
        ctx.family, ctx.geometry, ctx.n, ctx.input_size = family, geometry, n, x.shape
        ctx.memory_format = _ops.conv_memory_format(x, weights) if family is CONV else None
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return family.forward(x, weights, coefficients, biases, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        x, coefficients, *sources = ctx.saved_tensors
        if dy is None:
            return (None,) * (5 + len(sources))
        n = ctx.n
        _, _, _, needs_x, needs_coefficients, *needs_sources = ctx.needs_input_grad
        masks = Masks(needs_sources[:n], needs_coefficients, needs_sources[n:])
        dx, dweights, dcoefficients, dbiases = _forward_gradients(
            ctx.family,
            dy,
            x,
            sources[:n],
            coefficients,
            sources[n:] or None,
            ctx.input_size,
            needs_x,
            masks,
            ctx.geometry,
            ctx.memory_format,
        )
        return None, None, None, dx, dcoefficients, *dweights, *dbiases


class _Dgrad(Function):
    @staticmethod
    def forward(
        ctx: Any, family: Family, geometry: tuple[Any, ...], dy: Tensor, coefficients: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(dy, coefficients, *weights)
        ctx.family, ctx.geometry = family, geometry
        with torch._C._AutoDispatchBelowAutograd():
            return family.dgrad(dy, weights, coefficients, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, coefficients, *weights = ctx.saved_tensors
        _, _, needs_dy, needs_coefficients, *needs_weights = ctx.needs_input_grad
        geometry = ctx.geometry[1:] if ctx.family.dgrad_takes_input_size else ctx.geometry
        d_dy, dweights, dcoefficients = _dgrad_gradients(
            ctx.family, g, dy, weights, coefficients, needs_dy, Masks(needs_weights, needs_coefficients, []), geometry
        )
        return None, None, d_dy, dcoefficients, *dweights


class _Wgrad(Function):
    @staticmethod
    def forward(
        ctx: Any,
        family: Family,
        geometry: tuple[Any, ...],
        masks: Masks,
        n: int,
        dy: Tensor,
        x: Tensor,
        coefficients: Tensor,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases = sources[:n], sources[n:] or None
        ctx.save_for_backward(dy, x, coefficients, *sources)
        ctx.family, ctx.geometry, ctx.n = family, geometry, n
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            dweights, dcoefficients, dbiases = family.wgrad(dy, x, weights, coefficients, biases, *masks, *geometry)
        return (*dweights, dcoefficients, *dbiases)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        dy, x, coefficients, *sources = ctx.saved_tensors
        n = ctx.n
        _, _, _, _, needs_dy, needs_x, needs_coefficients, *needs_sources = ctx.needs_input_grad
        d_dy, d_x, d_weights, d_coefficients, d_biases = _wgrad_gradients(
            ctx.family,
            (gradients[:n], gradients[n], gradients[n + 1 :]),
            dy,
            x,
            sources[:n],
            coefficients,
            sources[n:] or None,
            needs_dy,
            needs_x,
            Masks(needs_sources[:n], needs_coefficients, needs_sources[n:]),
            ctx.geometry,
        )
        return None, None, None, None, d_dy, d_x, d_coefficients, *d_weights, *d_biases


# Binding 3: the same formulas, registered with the ops.


def _listed(mask: Any, tensors: Sequence[Tensor] | None) -> list[bool]:
    return [] if tensors is None else list(mask)


def _register(family: Family) -> None:
    def save_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weights, coefficients, biases, *geometry = inputs
        ctx.save_for_backward(x, coefficients, *weights, *(biases or ()))
        ctx.n, ctx.has_biases, ctx.geometry = len(weights), biases is not None, tuple(geometry)

    def forward_backward(ctx: Any, dy: Tensor) -> Any:
        x, coefficients, *sources = ctx.saved_tensors
        weights, biases = sources[: ctx.n], sources[ctx.n :] if ctx.has_biases else None
        needs_x, needs_weights, needs_coefficients, needs_biases, *_ = ctx.needs_input_grad
        masks = Masks(list(needs_weights), needs_coefficients, _listed(needs_biases, biases))
        memory_format = _ops.conv_memory_format(x, weights) if family is CONV else None
        dx, dweights, dcoefficients, dbiases = _forward_gradients(
            family, dy, x, weights, coefficients, biases, x.shape, needs_x, masks, ctx.geometry, memory_format
        )
        rest = (None,) * len(ctx.geometry)
        return dx, list(dweights), dcoefficients, list(dbiases) if ctx.has_biases else None, *rest

    def save_dgrad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dy, weights, coefficients, *geometry = inputs
        ctx.save_for_backward(dy, coefficients, *weights)
        ctx.geometry = tuple(geometry)

    def dgrad_backward(ctx: Any, g: Tensor) -> Any:
        dy, coefficients, *weights = ctx.saved_tensors
        needs_dy, needs_weights, needs_coefficients, *_ = ctx.needs_input_grad
        geometry = ctx.geometry[1:] if family.dgrad_takes_input_size else ctx.geometry
        masks = Masks(list(needs_weights), needs_coefficients, [])
        d_dy, dweights, dcoefficients = _dgrad_gradients(
            family, g, dy, weights, coefficients, needs_dy, masks, geometry
        )
        return d_dy, list(dweights), dcoefficients, *(None,) * len(ctx.geometry)

    def save_wgrad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dy, x, weights, coefficients, biases, weights_mask, coefficients_mask, biases_mask, *geometry = inputs
        ctx.save_for_backward(dy, x, coefficients, *weights, *(biases or ()))
        ctx.n, ctx.has_biases, ctx.geometry = len(weights), biases is not None, tuple(geometry)
        ctx.masks = Masks(list(weights_mask), coefficients_mask, list(biases_mask))

    def wgrad_backward(ctx: Any, by_weight: Gradients, by_coefficient: Tensor | None, by_bias: Gradients) -> Any:
        dy, x, coefficients, *sources = ctx.saved_tensors
        weights, biases = sources[: ctx.n], sources[ctx.n :] if ctx.has_biases else None
        needs_dy, needs_x, needs_weights, needs_coefficients, needs_biases, *_ = ctx.needs_input_grad
        masks = Masks(list(needs_weights), needs_coefficients, _listed(needs_biases, biases))
        gradients = (
            [g if wanted else None for g, wanted in zip(by_weight, ctx.masks.weights, strict=True)],
            by_coefficient if ctx.masks.coefficients else None,
            [g if wanted else None for g, wanted in zip(by_bias, ctx.masks.biases, strict=True)],
        )
        d_dy, d_x, d_weights, d_coefficients, d_biases = _wgrad_gradients(
            family, gradients, dy, x, weights, coefficients, biases, needs_dy, needs_x, masks, ctx.geometry
        )
        by_masks: tuple[Any, ...] = (None, None, None if ctx.has_biases else [])
        rest = (None,) * len(ctx.geometry)
        return (
            d_dy,
            d_x,
            list(d_weights),
            d_coefficients,
            list(d_biases) if ctx.has_biases else None,
            *by_masks,
            *rest,
        )

    def composite_dgrad(dy: Tensor, weights: Sequence[Tensor], coefficients: Tensor, *geometry: Any) -> Tensor:
        input_size = geometry[0] if family.dgrad_takes_input_size else ()
        rest = geometry[1:] if family.dgrad_takes_input_size else geometry
        return family.composite_dgrad(dy, mix(weights, coefficients, dy.dtype), input_size, *rest)

    def composite_wgrad(
        dy: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        coefficients: Tensor,
        biases: Sequence[Tensor] | None,
        weights_mask: list[bool],
        coefficients_mask: bool,
        biases_mask: list[bool],
        *geometry: Any,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        masks = Masks(weights_mask, coefficients_mask, biases_mask)
        found = _composite_wgrad(family, dy, x, weights, coefficients, biases, masks, geometry)
        dweights, dcoefficients, dbiases = found
        return (
            [w.new_empty(0) if g is None else g for w, g in zip(weights, dweights, strict=True)],
            coefficients.new_empty(0) if dcoefficients is None else dcoefficients,
            [b.new_empty(0) if g is None else g for b, g in zip(biases or (), dbiases, strict=True)],
        )

    _register_op(family.forward, forward_backward, save_forward, family.composite)
    _register_op(family.dgrad, dgrad_backward, save_dgrad, composite_dgrad)
    _register_op(family.wgrad, wgrad_backward, save_wgrad, composite_wgrad)


def _register_op(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None], composite: Callable[..., Any]
) -> None:
    """As ``torch.library.register_autograd``, which loses the tangents of forward-mode AD without a word.

    A graph that was captured holds the op: what transforms it gets ``composite`` here.
    """
    formula = make_autograd_impl(op, Info(backward, setup_context))
    check = _ops.CHECKS[op._opname]

    def run(keyset: Any, *arguments: Any) -> Any:
        if not _is_transformed():
            return formula(keyset, *arguments)
        check(*arguments)
        return composite(*arguments)

    _ops.LIBRARY.impl(op, run, "Autograd", with_keyset=True)
    _ops.LIBRARY.impl(op, composite, "FuncTorchBatched")


_register(LINEAR)
_register(CONV)
