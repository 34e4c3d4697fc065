"""Strides of every kind going in, and exactly torch's memory formats coming out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rl_kernels.backends.selection import CannotServe
from rl_kernels.ops import shapes
from tests.hostile import BACKENDS, LEFT_OUT, MIXED, PLAIN, SPATIAL, plain_mix, using
from tests.ops.body import _strides

MEMORY_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


# Strides going in.


def transposed(value: Tensor) -> Tensor:
    """Every dimension in reverse order in memory; a vector as a column of a matrix."""
    if value.dim() == 1:
        return torch.stack([value, torch.full_like(value, torch.nan)], 1)[:, 0]
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


def sliced(value: Tensor) -> Tensor:
    """Every second element of every dimension, NaN between them."""
    wide = torch.full([2 * size + 1 for size in value.shape], torch.nan, dtype=value.dtype)
    inner = wide[(slice(1, None, 2),) * value.dim()]
    inner.copy_(value)
    return inner


def expanded(value: Tensor) -> Tensor:
    """One value along the last dimension, with a stride of 0."""
    return value[..., :1].expand_as(value)


def everywhere_expanded(value: Tensor) -> Tensor:
    """One value, all strides 0: what ``sum`` hands back."""
    return value.flatten()[0].expand_as(value)


def negated(value: Tensor) -> Tensor:
    """torch has no negative strides: its nearest view is the imaginary part of a conjugate, negated when read."""
    view = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert view.is_neg()
    return view


def misaligned(value: Tensor) -> Tensor:
    """One element past the start of an allocation."""
    flat = torch.full((value.numel() + 1,), torch.nan, dtype=value.dtype)
    flat[1:] = value.flatten()
    return flat[1:].view(value.shape)


def repeats(view: Callable[[Tensor], Tensor], name: str, value: Tensor) -> bool:
    """Whether the channels' coefficients would be one value: ``test_one_coefficient_expanded_to_all_channels``."""
    return name == "c" and value.dim() == 2 and view in (expanded, everywhere_expanded)


VIEWS: list[Callable[[Tensor], Tensor]] = [transposed, sliced, expanded, everywhere_expanded, negated, misaligned]


def leaves(spatial: int, granularity: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous arguments of a call and a gradient of its output, by name."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (3, 5, *(4,) * spatial),
        "w0": (6, 5, *(2,) * spatial),
        "w1": (6, 5, *(2,) * spatial),
        "c": (2,) if granularity == "scalar" else (2, 6),
        "b0": (6,),
        "b1": (6,),
        "dy": (3, 6, *(3,) * spatial),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradients(spatial: int, arguments: dict[str, Tensor], mixed: bool) -> list[Tensor]:
    """The output, and the gradients of everything; in plain torch, or not."""
    x, w0, w1, c, b0, b1 = inputs = [arguments[name].requires_grad_() for name in ("x", "w0", "w1", "c", "b0", "b1")]
    if mixed:
        y = MIXED[spatial](x, (w0, w1), c, (b0, b1))
    else:
        y = PLAIN[spatial](x, plain_mix((w0, w1), c), plain_mix((b0, b1), c))
    return [y.detach(), *torch.autograd.grad(y, inputs, arguments["dy"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_views_of_every_argument(kind: str, backend: str, granularity: str, dtype: torch.dtype) -> None:
    """Each argument alone as each kind of view, then all of them."""
    spatial, contiguous = SPATIAL[kind], leaves(SPATIAL[kind], granularity, dtype)
    for view, name in itertools.product(VIEWS, [*contiguous, "everything"]):
        arguments = {
            key: view(value) if name in (key, "everything") and not repeats(view, key, value) else value.clone()
            for key, value in contiguous.items()
        }
        expected = gradients(spatial, {key: value.clone().contiguous() for key, value in arguments.items()}, False)
        arguments = {key: value.detach() for key, value in arguments.items()}
        try:
            with using(backend):
                found = gradients(spatial, arguments, True)
        except CannotServe:  # A filter whose taps lie apart in two directions, which auto leaves to the next backend.
            assert backend in ("cpu", LEFT_OUT) and spatial > 1 and name in ("w0", "w1", "everything")
            with using("auto"):
                found = gradients(spatial, arguments, True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one, other, msg=lambda m, v=view, n=name: f"{n} {v.__name__}: {m}", atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_one_coefficient_expanded_to_all_channels(kind: str, backend: str) -> None:
    """As ``coefficients[:, None].expand(n, out)``: a gradient for every channel, which expand then sums."""
    arguments = leaves(SPATIAL[kind], "channel", torch.float64)
    arguments["c"] = expanded(arguments["c"])
    expected = gradients(SPATIAL[kind], {key: value.clone().contiguous() for key, value in arguments.items()}, False)
    with using(backend):
        found = gradients(SPATIAL[kind], arguments, True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),
    "mean": lambda y: y.mean(),
    "mean of the last dimension": lambda y: y.mean(-1).square().sum(),
    "mean of the channels": lambda y: y.mean(1).square().sum(),
    "mean of the batch": lambda y: y.mean(0).square().sum(),
    "one element": lambda y: y.flatten()[3],
    "a diagonal": lambda y: y.diagonal().sum(),
    "a repeated row": lambda y: y[[0, 0, 1]].sum(),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_gradients_that_a_loss_expands(kind: str, backend: str, reduction: str) -> None:
    arguments = leaves(SPATIAL[kind], "scalar", torch.float64)
    names = ("x", "w0", "w1", "c", "b0", "b1")
    x, w0, w1, c, b0, b1 = inputs = [arguments[name].requires_grad_() for name in names]
    expected_y = PLAIN[SPATIAL[kind]](x, plain_mix((w0, w1), c), plain_mix((b0, b1), c))
    expected = torch.autograd.grad(REDUCTIONS[reduction](expected_y), inputs)
    with using(backend):
        y = MIXED[SPATIAL[kind]](x, (w0, w1), c, (b0, b1))
        found = torch.autograd.grad(REDUCTIONS[reduction](y), inputs)
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")


# Memory formats coming out.

# x, weights, groups, stride: of a usual size, grouped, depthwise, pointwise, strided, and where sizes of 1 leave it to
# the strides of others whether a tensor is channels_last.
SHAPES: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], int, int]]] = {
    2: [
        ((2, 4, 6, 5), (6, 4, 3, 2), 1, 1),
        ((2, 4, 6, 5), (6, 2, 3, 2), 2, 1),
        ((2, 4, 6, 5), (4, 1, 3, 2), 4, 1),
        ((2, 4, 6, 5), (6, 4, 1, 1), 1, 1),
        ((2, 4, 6, 5), (6, 4, 1, 1), 1, 2),
        ((2, 1, 6, 5), (6, 1, 3, 3), 1, 1),
        ((1, 4, 6, 5), (1, 4, 3, 3), 1, 1),
        ((2, 4, 3, 3), (6, 4, 3, 3), 1, 1),
    ],
    3: [
        ((2, 4, 3, 6, 5), (6, 4, 2, 3, 2), 1, 1),
        ((2, 4, 3, 6, 5), (6, 4, 1, 1, 1), 1, 1),
        ((2, 4, 3, 6, 5), (4, 1, 2, 1, 1), 4, 1),
    ],
}
COMBINATIONS = list(itertools.product((False, True), repeat=3))
"""Whether x, the first source and the second are channels_last."""


def formatted(value: Tensor, channels_last: bool) -> Tensor:
    return value.contiguous(memory_format=MEMORY_FORMATS[value.dim() - 2]) if channels_last else value


def formats(spatial: int, dtype: torch.dtype, backend: str, of_dy: Callable[[Tensor], list[Tensor]]) -> int:
    """Hold the strides of outputs and gradients against those of torch's layer whose weight is the first source.

    Returns in how many cases torch itself kept channels_last: in three dimensions its own kernels, which it takes
    where oneDNN does not serve or does not pay (float64; on one thread, small filters), know of no memory format.
    """
    kept = 0
    for (x_shape, shape, groups, stride), (x_last, first_last, second_last) in itertools.product(
        SHAPES[spatial], COMBINATIONS
    ):
        x = formatted(torch.randn(x_shape).to(dtype), x_last)
        w0, w1 = (formatted(torch.randn(shape).to(dtype), last) for last in (first_last, second_last))
        options = {"groups": groups, "stride": stride}
        plain_x, plain_w = x.clone().requires_grad_(), w0.clone().requires_grad_()
        plain_y = PLAIN[spatial](plain_x, plain_w, **options)
        mixing = torch.float64 if dtype == torch.float64 else torch.float32
        for dy in of_dy(plain_y):
            plain_dx, plain_dw = torch.autograd.grad(plain_y, (plain_x, plain_w), dy, retain_graph=True)
            inputs = [value.clone().requires_grad_() for value in (x, w0, w1)]
            coefficients = torch.tensor([0.5, -0.25], dtype=mixing, requires_grad=True)
            with using(backend):
                y = MIXED[spatial](inputs[0], inputs[1:], coefficients, **options)
                dx, dw0, dw1 = torch.autograd.grad(y, inputs, dy, retain_graph=True)
                y.backward(dy)
            case = f"{x_shape} {shape} groups {groups} stride {stride} x {x_last} w0 {first_last} w1 {second_last}"
            case += f" dy {dy.stride()}"
            asked = shapes.is_channels_last(x) or shapes.is_channels_last(w0)
            if spatial == 3 and asked and not is_last(plain_y):
                # torch's own layer dropped it. Ours keeps it, as torch's does on GPUs.
                assert plain_y.is_contiguous() and is_last(y), case
                continue
            kept += is_last(plain_y)
            for name, one, other in (("y", y, plain_y), ("dx", dx, plain_dx), ("dw0", dw0, plain_dw)):
                assert _strides(one) == _strides(other), f"{case}: {name} {one.stride()}, not {other.stride()}"
            assert _strides(dw1) == _strides(dw0), case
            for value in inputs:
                assert value.grad is not None and _strides(value.grad) == _strides(value), case
    return kept


def is_last(value: Tensor) -> bool:
    return value.is_contiguous(memory_format=MEMORY_FORMATS[value.dim() - 2])


def as_y(y: Tensor) -> list[Tensor]:
    return [torch.ones_like(y)]


def otherwise(y: Tensor) -> list[Tensor]:
    """Contiguous, channels_last, expanded, and through a flattening."""
    ones = torch.ones(y.shape, dtype=y.dtype)
    return [ones, formatted(ones, True), torch.ones((), dtype=y.dtype).expand(y.shape), ones.flatten(1).view(y.shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spatial", [2, 3])
def test_memory_formats(spatial: int, backend: str, dtype: torch.dtype) -> None:
    """Of outputs and gradients, for every combination of those of x and of the sources."""
    kept = formats(spatial, dtype, backend, as_y)
    own = dtype == torch.float64 or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert kept > 0 or (spatial == 3 and own), "torch's own kernels of three dimensions know of no memory format"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spatial", [2, 3])
def test_memory_formats_however_dy_comes(spatial: int, backend: str) -> None:
    """A mean over the image expands its gradient: what comes before it stays channels_last."""
    formats(spatial, torch.float32, backend, otherwise)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_formats_of_a_frozen_layer(backend: str) -> None:
    """Whose x is not kept."""
    x, w = formatted(torch.randn(2, 4, 6, 5), True).requires_grad_(), torch.randn(6, 4, 3, 3)
    with using(backend):
        (dx,) = torch.autograd.grad(MIXED[2](x, (w, w), (0.5, 0.5)).mean(), x)
    (plain,) = torch.autograd.grad(PLAIN[2](x, w).mean(), x)
    assert _strides(plain) == _strides(x) == _strides(dx)


def test_the_compiler_lays_out_alike() -> None:
    """The formulas are traced with the formats that eager calls have."""
    x, w0, w1 = (torch.randn(s, requires_grad=True) for s in ((2, 4, 6, 5), (6, 4, 3, 3), (6, 4, 3, 3)))
    last = formatted(x.detach(), True).requires_grad_()

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        return MIXED[2](x, weights, torch.tensor([0.5, 0.25])).mean((2, 3)).square().sum()

    (dx,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(last, w0, w1), last)
    with using(LEFT_OUT):
        (expected,) = torch.autograd.grad(loss(last, w0, w1), last)
    torch.testing.assert_close(dx, expected)
    assert is_last(dx) and is_last(expected)
