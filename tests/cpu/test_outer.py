"""``Outer`` coefficients in the C++ kernels: what is particular to them beside ``tests/ops/test_outer.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels._extension import EXTENSION, mixed_conv_call, mixed_linear_call
from rl_kernels.backends import Case as Asked
from rl_kernels.backends import cpu
from rl_kernels.ops import values
from rl_kernels.ops.values import Geometry
from rl_kernels.testing import peak_memory
from tests.cpu.common import KINDS, assert_same, off_the_fast_path
from tests.cpu.test_fast_path import ops_of
from tests.ops.body import Case, check
from tests.ops.test_outer import GROUPED, LINEAR, outer

MEBI = 1 << 20
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GEOMETRY: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}


def changed(base: Case, **options: Any) -> Case:
    return Case(**{**vars(base), "rank": 3, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 9, 16, 17, 70])
def test_few_rows_and_many(rows: int, dtype: torch.dtype) -> None:
    """Over more rows and columns of W than are mixed ahead, packed or finished at once."""
    for channels, layout in (((300, 150), "contiguous"), ((1100, 21), "sliced"), ((37, 300), "transposed")):
        layouts = ("contiguous", layout, "contiguous")
        check(changed(LINEAR, batch=(rows,), channels=channels, dtype=dtype, layouts=layouts), "cpu")


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_half_precision_activations_on_float32_weights(rows: int, x_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((rows, 300), (40, 300)))
    left, right = (torch.randn(shape, generator=generator) for shape in ((1, 2, 40), (1, 2, 300)))
    mixed = (torch.einsum("ro,rk->ok", left[0], right[0]) * weight).to(x_dtype)
    y = F.mixed_linear(x.to(x_dtype), [weight], rl.Outer(left, right))
    torch.testing.assert_close(y.double(), x.to(x_dtype).double() @ mixed.double().t(), rtol=2e-2, atol=5e-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["whole filter", "plain", "grouped", "dilated", "pointwise", "split"])
def test_convolutions(case: str, layout: str, dtype: torch.dtype) -> None:
    """Rows that lie with their channels innermost have right read so; a few channels a group have a whole filter."""
    two: dict[str, Any] = {"spatial": 2, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "kernel": (3, 3)}
    options: dict[str, Any] = {
        "whole filter": {"channels": (3, 2), "groups": 4},
        "plain": {"channels": (70, 40), "groups": 1},
        "grouped": {"channels": (17, 20), "groups": 3, "stride": (2, 1)},
        "dilated": {"channels": (33, 17), "groups": 1, "dilation": (2, 1)},
        "pointwise": {"channels": (300, 40), "groups": 1, "kernel": (1, 1), "padding": (0, 0)},
        "split": {"channels": (2, 5), "groups": 1, "size": (40, 40)},
    }[case]
    options = {"size": (7, 9), **two, **options}
    check(changed(GROUPED, **options, dtype=dtype, layouts=(layout, layout, "contiguous")), "cpu")
    check(changed(GROUPED, **options, dtype=dtype, layouts=("contiguous", layout, "contiguous"), sources=1), "cpu")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [*KINDS, "conv of few items"])
def test_gradients_of_right_are_the_same_every_time(kind: str, threads: int) -> None:
    """Threads share out rows, each with sums of its own, which are added in order."""
    options = {
        "linear": changed(LINEAR, batch=(33,), channels=(1300, 190)),
        "conv": changed(GROUPED, spatial=2, size=(9, 9), channels=(40, 60), kernel=(3, 3)),
        "conv of few items": changed(GROUPED, spatial=2, size=(60, 60), channels=(4, 6), kernel=(3, 3)),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            check(options[kind], "cpu")  # which holds two runs against each other
    finally:
        torch.set_num_threads(before)


def call(kind: str, biased: bool = True, needs: bool = True) -> tuple[Tensor, list[Tensor], rl.Outer, Any]:
    shape = (6, 7) if kind == "linear" else (6, 2, 3, 3)
    x = torch.randn((4, 7) if kind == "linear" else (2, 4, 7, 5)).requires_grad_(needs)
    weights = [torch.randn(shape).requires_grad_(needs) for _ in range(2)]
    coefficients = rl.Outer(*(part.detach().requires_grad_(needs) for part in outer(2, 3, shape, torch.float32)))
    return x, weights, coefficients, [torch.randn(6).requires_grad_(needs) for _ in range(2)] if biased else None


def run(kind: str, arguments: Any) -> Tensor:
    return F.mixed_linear(*arguments) if kind == "linear" else F.mixed_conv2d(*arguments, **GEOMETRY)


def leaves(arguments: Any) -> list[Tensor]:
    x, weights, coefficients, biases = arguments
    return [x, *weights, *coefficients, *(biases or ())]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_gives_the_same(kind: str, biased: bool) -> None:
    arguments = call(kind, biased)
    y = run(kind, arguments)
    assert y.grad_fn is not None and f"Mixed{kind.capitalize()}" in y.grad_fn.name()
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves(arguments), dy)
    with off_the_fast_path():
        expected = run(kind, arguments)
        assert torch.equal(y, expected)
        assert_same(found, torch.autograd.grad(expected, leaves(arguments), dy))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_biases_alone(kind: str) -> None:
    """Those of a sum: one value, in two tensors."""
    arguments = call(kind)
    y = run(kind, arguments)
    dy = torch.randn_like(y)
    found: list[Tensor] = []
    ran = ops_of(lambda: found.extend(torch.autograd.grad(y, arguments[3], dy)))
    assert not ran
    expected = dy.sum([d for d in range(dy.dim()) if d != 1])
    for gradient in found:
        torch.testing.assert_close(gradient, expected)
    assert found[0].data_ptr() != found[1].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_takes_joined_ones_from_the_ops_only(kind: str) -> None:
    x, weights, coefficients, biases = call(kind, needs=False)
    fast, rest = (mixed_linear_call, ()) if kind == "linear" else (mixed_conv_call, (2, *GEOMETRY.values()))
    joined = coefficients.joined()
    assert fast(x, weights, joined, biases, *rest) is None
    assert torch.equal(fast(x, weights, joined, biases, *rest, True), run(kind, (x, weights, coefficients, biases)))
    for wrong in (joined[..., 1:], joined[:, :0], joined[:1], joined.double()):
        assert fast(x, weights, wrong, biases, *rest, True) is None


def test_coefficients_of_any_strides() -> None:
    """As an op may be given them."""
    x, weights, coefficients, _ = call("linear", needs=False)
    joined = coefficients.joined()
    expected = torch.ops.rl_kernels.mixed_linear(x, weights, joined, None)
    for strided in (joined.transpose(0, 2).contiguous().transpose(0, 2), joined.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(torch.ops.rl_kernels.mixed_linear(x, weights, strided, None), expected)


@pytest.mark.parametrize("wanted", ["everything", "coefficients"])
@pytest.mark.parametrize("kind", ["linear", "few rows", "conv", "pointwise"])
def test_memory(kind: str, wanted: str) -> None:
    """Beyond the outputs and the sums of left's and right's gradients: scratch, which the allocator does not see."""
    x_shape, shape = {
        "linear": ((32, 4096), (4096, 4096)),
        "few rows": ((2, 4096), (4096, 4096)),
        "conv": ((1, 1536, 7, 7), (1536, 1536, 3, 3)),
        "pointwise": ((1, 4096, 3, 3), (4096, 4096, 1, 1)),
    }[kind]
    x, rank = torch.randn(x_shape, requires_grad=True), 16
    weights = [torch.randn(shape, requires_grad=wanted == "everything")]
    coefficients = outer(1, rank, shape, torch.float32)
    joined = coefficients.joined().detach().requires_grad_()
    inputs = [x, joined, *weights] if wanted == "everything" else [x, joined]
    recipe = (weights, joined, None)
    geometry = () if len(shape) == 2 else ([1, 1], [shape[2] // 2] * 2, [1, 1], 1)
    op = getattr(torch.ops.rl_kernels, "mixed_conv" if geometry else "mixed_linear")
    forward = peak_memory(lambda: op(x.detach(), [w.detach() for w in weights], joined.detach(), None, *geometry))
    y = op(x, *recipe, *geometry)
    assert forward <= y.nbytes + MEBI
    backward = peak_memory(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True))
    threads, columns, out = torch.get_num_threads(), weights[0][0].numel(), shape[0]
    # In double: of left one for every 1024 columns at most, of right one a thread.
    sums = 8 * rank * (out * -(-columns // 1024) + columns * 2 * threads)
    allowed = sum(tensor.nbytes for tensor in inputs) + sums + 2 * y.nbytes + MEBI
    assert backward <= allowed, f"{backward / MEBI:.1f} of {allowed / MEBI:.1f} MiB"
    assert allowed - sum(tensor.nbytes for tensor in inputs) < weights[0].nbytes or threads > 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_high_rank_are_left_to_streamed_on_few_rows(kind: str) -> None:
    shape = (6, 7) if kind == "linear" else (6, 7, 1, 1)
    geometry = None if kind == "linear" else Geometry([1, 1], [0, 0], [1, 1], 1)

    def left(op: str, rank: int, rows: int) -> bool:
        x, weight = torch.randn((rows, 7) if kind == "linear" else (1, 7, rows, 1)), torch.randn(shape)
        recipe = values.Recipe([weight], outer(1, rank, shape, torch.float32).joined())
        wanted = values.Wanted([False], True, []) if op else None
        asked = values.Call(f"mixed_{kind}{op}", x, recipe, geometry, x=x if op else None, wanted=wanted)
        return cpu.BACKEND.worse(Asked(asked.op, "cpu", x.dtype), asked) is not None

    assert left("_wgrad", 9, 64) and not left("_wgrad", 8, 64) and not left("_wgrad", 9, 4096)
    assert not left("", 9, 64)


def test_more_sources_than_the_kernels_mix() -> None:
    """A second derivative is of three times as many."""
    weights = [torch.randn(5, 7) for _ in range(17)]
    coefficients = outer(17, 1, (5, 7), torch.float32)
    assert EXTENSION.module.why_not_linear(torch.randn(3, 7), weights) is not None
    with rl.use_backend("auto"):
        assert F.mixed_linear(torch.randn(3, 7), weights, coefficients).shape == (3, 5)
