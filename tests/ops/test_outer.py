"""``Outer`` coefficients: values, gradients and memory on the backends that mix them, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import rl_kernels as rl
from rl_kernels import functional
from rl_kernels import functional as F
from rl_kernels.backends import registered
from rl_kernels.backends.selection import CannotServe
from rl_kernels.ops import autograd
from rl_kernels.ops.ways import plain_torch
from rl_kernels.testing import peak_memory
from tests.ops.body import Case, cases, check
from tests.ops.test_gradcheck import CONVOLUTIONS, flat
from tests.ops.test_memory import CASES, MEBI, bound
from tests.ops.test_property import KINDS, SLOWLY_RUN, quiet, small_panels

MIXING = ("reference", "streamed", "cpu")
"""The backends that have these coefficients."""
COMPILED = ("triton",)
"""Those that have them for GPUs, or in an interpreter."""
PARTS = ("left", "right")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def outer(n: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> rl.Outer:
    return rl.Outer(random(n, rank, shape[0], dtype=dtype), random(n, rank, math.prod(shape[1:]), dtype=dtype))


def mixed_by_hand(weights: Any, coefficients: rl.Outer) -> Tensor:
    dense = torch.einsum("nro,nrk->nok", *coefficients)
    total: Tensor = sum(c.reshape(w.shape) * w for c, w in zip(dense, weights, strict=True))
    return total


# Values and gradients.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [*MIXING, *COMPILED, "auto"])
def test_backend(backend: str, kind: str) -> None:
    @settings(quiet, max_examples=6 if backend in SLOWLY_RUN else 60)
    @given(case=cases(KINDS[kind], outer=True))
    def body(case: Case) -> None:
        check(case, backend)

    body()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [8, 96])
def test_streamed_in_small_panels(elements: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_panels(elements, monkeypatch)

    @settings(quiet, max_examples=40)
    @given(case=cases(KINDS[kind], outer=True))
    def body(case: Case) -> None:
        # Indices are what this is about: the vendor's sums over one channel's panel are less exact than a layer's.
        assume(case.dtype == torch.float64 or (elements == 96 and case.dtype.itemsize == 2))
        check(case, "streamed")

    body()


LINEAR = Case(spatial=0, batch=(7,), size=(), channels=(13, 5))
GROUPED = Case(
    spatial=2,
    batch=(2,),
    size=(7, 6),
    channels=(3, 2),
    groups=2,
    kernel=(3, 2),
    stride=(2, 1),
    padding=(1, 1),
    dilation=(1, 2),
)


@pytest.mark.parametrize("base", [LINEAR, GROUPED], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 40])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("backend", ["streamed", "cpu"])
def test_options(backend: str, n: int, rank: int, dtype: torch.dtype, base: Case) -> None:
    """Also with frozen sources, and an empty batch."""
    case = Case(**{**vars(base), "sources": n, "rank": rank, "dtype": dtype})
    check(case, backend)
    check(Case(**{**vars(case), "needs_weights": (False,) * 4}), backend)
    check(Case(**{**vars(case), "batch": (0,)}), backend)


@pytest.mark.parametrize("base", [LINEAR, GROUPED], ids=["linear", "conv"])
@pytest.mark.parametrize("backend", MIXING)
def test_each_gradient(backend: str, base: Case) -> None:
    for flags in itertools.product([False, True], repeat=5):
        names = ("needs_x", "needs_coefficients", "needs_right")
        wanted: dict[str, Any] = dict(zip(names, flags, strict=False))
        wanted |= {"needs_weights": (flags[3], False), "needs_biases": (False, flags[4])}
        check(Case(**{**vars(base), "rank": 2, **wanted}), backend)


@pytest.mark.parametrize("backend", [*MIXING, *COMPILED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ones_on_the_right_are_coefficients_per_channel(dtype: torch.dtype, backend: str) -> None:
    x, dy = torch.randn(7, 13).to(dtype), torch.randn(7, 5).to(dtype)
    weights = [torch.randn(5, 13).to(dtype).requires_grad_() for _ in range(3)]
    channel = random(3, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with rl.use_backend(backend):
        expected = F.mixed_linear(x, weights, channel)
        found = F.mixed_linear(x, weights, rl.Outer(channel[:, None], torch.ones(3, 1, 13)))
        # On cpu the compiler chooses for each kernel which product of the first sum it fuses.
        assert torch.equal(found, expected) or (backend == "cpu" and torch.allclose(found, expected, rtol=1e-5))
        inputs = [channel, *weights]
        pairs = zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_mix() -> None:
    weights, coefficients = [random(6, 2, 3) for _ in range(2)], outer(2, 4, (6, 2, 3))
    torch.testing.assert_close(F.mix(weights, coefficients), mixed_by_hand(weights, coefficients))
    vectors, coefficients = [random(6) for _ in range(2)], outer(2, 4, (6,))
    torch.testing.assert_close(F.mix(vectors, coefficients), mixed_by_hand(vectors, coefficients))
    assert gradcheck(lambda left, right: F.mix(vectors, rl.Outer(left, right)), tuple(coefficients))


@pytest.mark.parametrize("backend", MIXING)
def test_the_mix_is_in_float32_and_rounded_once(backend: str) -> None:
    """Terms that cancel leave what float32 keeps of them, and bfloat16 would not."""
    weights = [torch.ones(1, 1, dtype=torch.bfloat16)] * 2
    coefficients = rl.Outer(torch.tensor([[[1.0], [2.0**-12]], [[-1.0], [0.0]]]), torch.ones(2, 2, 1))
    with rl.use_backend(backend):
        y = F.mixed_linear(torch.ones(1, 1, dtype=torch.bfloat16), weights, coefficients)
    assert y.item() == 2.0**-12


def test_biases_are_summed() -> None:
    x, weights, biases = random(4, 3), [random(5, 3) for _ in range(2)], [random(5) for _ in range(2)]
    coefficients = outer(2, 3, (5, 3))
    y = F.mixed_linear(x, weights, coefficients, biases)
    torch.testing.assert_close(y, x @ mixed_by_hand(weights, coefficients).t() + sum(biases))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", MIXING)
def test_transposed_convolution(backend: str, groups: int) -> None:
    """Left follows the first dimension of the weights, here the input channels."""
    x, shape = random(2, 4, 5, 4), (4, 3, 3, 2)
    weights, biases = [random(*shape) for _ in range(2)], [random(3 * groups) for _ in range(2)]
    coefficients = outer(2, 3, shape)
    settings_ = (2, 1, (1, 0), groups)
    weight = mixed_by_hand(weights, coefficients)
    expected = torch.nn.functional.conv_transpose2d(x, weight, biases[0] + biases[1], *settings_)
    inputs = [x, *coefficients, *weights, *biases]
    dy = torch.randn_like(expected)
    for way in (rl.use_backend(backend), plain_torch()):
        with way:
            y = F.mixed_conv_transpose2d(x, weights, coefficients, biases, *settings_)
            torch.testing.assert_close(y, expected)
            pairs = zip(*(torch.autograd.grad(v, inputs, dy, retain_graph=True) for v in (y, expected)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


# Derivatives of derivatives, and torch's checks of the ops.


@pytest.mark.parametrize("backend", MIXING)
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 3)])
def test_gradcheck_linear(n: int, rank: int, backend: str) -> None:
    weights, biases = [random(5, 3) for _ in range(n)], [random(5) for _ in range(n)]

    def run(x: Tensor, left: Tensor, right: Tensor, *sources: Tensor) -> Tensor:
        return F.mixed_linear(x, sources[:n], rl.Outer(left, right), sources[n:] or None)

    arguments = (random(2, 1, 3), *outer(n, rank, (5, 3)), *weights)
    with rl.use_backend(backend):
        assert gradcheck(run, (*arguments, *biases), check_batched_grad=True, check_forward_ad=True)
        assert gradgradcheck(run, (*arguments, *biases))
        assert gradgradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("backend", MIXING)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradcheck_conv(name: str, backend: str) -> None:
    inside, outside, size, kernel, *geometry, groups = CONVOLUTIONS[name]
    shape = (outside * groups, inside, *kernel)
    convolve = getattr(F, f"mixed_{name.split('-')[0]}")

    def run(x: Tensor, left: Tensor, right: Tensor, *sources: Tensor) -> Tensor:
        return convolve(x, sources[:2], rl.Outer(left, right), sources[2:], *geometry, groups)

    sources = [random(*shape), random(*shape), random(shape[0]), random(shape[0])]
    arguments = (random(2, inside * groups, *size), *outer(2, 2, shape), *sources)
    with rl.use_backend(backend):
        assert gradcheck(run, arguments, fast_mode=True, check_batched_grad=True)
        assert gradgradcheck(run, arguments, fast_mode=True)


def test_gradcheck_of_the_registered_ops() -> None:
    """Up to the third derivative, and of a wgrad that is asked for a part."""
    ops = torch.ops.rl_kernels
    x, dy, weights, biases = random(4, 3), random(4, 2), [random(2, 3) for _ in range(2)], [random(2) for _ in range(2)]
    joined = outer(2, 2, (2, 3)).joined().detach().requires_grad_()

    def forward(x: Tensor, joined: Tensor, *sources: Tensor) -> Tensor:
        return ops.mixed_linear(x, list(sources[:2]), joined, list(sources[2:]))

    def dgrad(dy: Tensor, joined: Tensor, *sources: Tensor) -> Tensor:
        return ops.mixed_linear_dgrad(dy, list(sources), joined)

    def wgrad(masks: Any, dy: Tensor, x: Tensor, joined: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        outputs = ops.mixed_linear_wgrad(dy, x, list(sources[:2]), joined, list(sources[2:]), *masks)
        return tuple(tensor for tensor in flat(outputs) if tensor.numel())

    sources = (*weights, *biases)
    assert gradgradcheck(forward, (x, joined, *sources), fast_mode=True)
    assert gradgradcheck(dgrad, (dy, joined, *weights), fast_mode=True)
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            masks = ([wanted[0], False], wanted[1], [False, wanted[2]])
            arguments = (dy, x, joined, *sources)
            assert gradcheck(lambda *a, m=masks: wgrad(m, *a), arguments)
            if wanted[0] or wanted[1]:
                assert gradgradcheck(lambda *a, m=masks: wgrad(m, *a), arguments, fast_mode=True)


@pytest.mark.parametrize("backend", MIXING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, backend: str) -> None:
    ops = torch.ops.rl_kernels
    shapes: Any = (
        ((5, 7), (3, 7), (3, 5), ()),
        ((4, 3, 2, 3), (2, 6, 5, 4), (2, 4, 4, 4), ([1, 1], [0, 1], [1, 1], 2)),
    )
    for shape, x_shape, y_shape, geometry in shapes:
        kind = "conv" if geometry else "linear"
        weights = [random(*shape, dtype=dtype) for _ in range(2)]
        biases = [random(shape[0], dtype=dtype) for _ in range(2)]
        joined = outer(2, 3, shape, torch.float32).joined().detach().requires_grad_()
        x, dy = random(*x_shape, dtype=dtype), random(*y_shape, dtype=dtype)
        size = [list(x_shape)] if geometry else []
        with rl.use_backend(backend):
            opcheck(getattr(ops, f"mixed_{kind}"), (x, weights, joined, biases, *geometry))
            opcheck(getattr(ops, f"mixed_{kind}_dgrad"), (dy, weights, joined, *size, *geometry))
            for masks in (([True, False], True, [True, True]), ([False, True], False, [False, False])):
                opcheck(getattr(ops, f"mixed_{kind}_wgrad"), (dy, x, weights, joined, biases, *masks, *geometry))


# Memory.


@pytest.mark.parametrize("name", ["linear", "linear-wide", "conv2d", "conv2d-grouped"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("backend", ["streamed", "cpu"])
def test_memory_with_frozen_weights(backend: str, n: int, name: str) -> None:
    """Nothing weight-sized beside the weights, forward and backward."""
    x_shape, shape, call = CASES[name]
    x = torch.randn(x_shape).requires_grad_()
    weights = [torch.randn(shape).mul_(0.01) for _ in range(n)]
    coefficients = outer(n, 4, shape, torch.float32)
    inputs = [x, *coefficients]
    parts = sum(part.nbytes for part in coefficients)

    def step() -> None:
        y = call(x, weights, coefficients)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    with rl.use_backend(backend):
        peak = peak_memory(step)
    y = call(x, weights, coefficients)
    # The parts joined, their gradient, and that in two; what passes between forward and backward.
    allowed = bound(name) + 4 * parts + 2 * y.nbytes + x.nbytes
    assert peak <= allowed < weights[0].nbytes, f"{peak / MEBI:.1f} of {weights[0].nbytes / MEBI:.1f} MiB"


@pytest.mark.parametrize("backend", ["streamed", "cpu"])
def test_memory_of_a_weights_gradient(backend: str) -> None:
    """Beyond that gradient itself."""
    x, weight, coefficients = torch.randn(32, 4096), random(4096, 4096, dtype=torch.float32), None
    coefficients = outer(1, 16, (4096, 4096), torch.float32)
    with rl.use_backend(backend):
        y = F.mixed_linear(x, [weight], coefficients)
        inputs = [weight, *coefficients]
        peak = peak_memory(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True))
    assert peak - weight.nbytes <= bound("linear") + 4 * sum(part.nbytes for part in coefficients)


# What is refused.


def test_backends_without_the_mix_say_so() -> None:
    x, weight, coefficients = torch.randn(3, 7), torch.randn(5, 7), outer(1, 2, (5, 7), torch.float32)
    for backend in registered():
        if backend.name in (*MIXING, *COMPILED):
            continue
        case = next(service.case for service in rl.services("cpu") if service.case.op == "mixed_linear")
        reason = (
            "Outer coefficients" if backend.why_not(case) is None else "needs an NVIDIA GPU|not built|not installed"
        )
        with (
            rl.use_backend(backend.name),
            pytest.raises(CannotServe, match=f"backend '{backend.name}' cannot serve mixed_linear.*({reason})"),
        ):
            F.mixed_linear(x, [weight], coefficients)
        assert "Outer coefficients" in (backend.exceptions(case) or "")


def test_the_fast_path_is_offered_such_a_call_once_the_two_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: dict[Any, list[Any]] = {functional: [], autograd: []}
    for module, calls in offered.items():
        for name in ("mixed_linear_call", "mixed_conv_call"):
            monkeypatch.setattr(module, name, lambda *arguments, calls=calls: calls.append(arguments))
    F.mixed_linear(X, [W], rl.Outer(LEFT, RIGHT))
    F.mixed_conv2d(torch.randn(2, 2, 4, 4), [FILTER], outer(1, 2, FILTER.shape, torch.float32))
    assert not offered[functional]
    assert [(arguments[2].shape, arguments[-1]) for arguments in offered[autograd]] == [
        ((1, 2, 12), True),
        ((1, 2, 24), True),
    ]
    F.mixed_linear(X, [W], [1.0])
    assert len(offered[functional]) == 1


X, W, FILTER = torch.randn(4, 7), torch.randn(5, 7), torch.randn(6, 2, 3, 3)
LEFT, RIGHT = torch.randn(1, 2, 5), torch.randn(1, 2, 7)
ERRORS: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "left of another size": (
        F.mixed_linear,
        (X, [W], rl.Outer(RIGHT, RIGHT)),
        RuntimeError,
        "coefficients.left: got shape (1, 2, 7), expected (1, R, 5) with R of 1 or more for 1 sources of shape (5, 7)",
    ),
    "right of another size": (
        F.mixed_conv2d,
        (torch.randn(2, 4, 8, 8), [FILTER], rl.Outer(torch.randn(1, 2, 6), torch.randn(1, 2, 2))),
        RuntimeError,
        "coefficients.right: got shape (1, 2, 2), expected (1, R, 18)",
    ),
    "two ranks": (
        F.mixed_linear,
        (X, [W], rl.Outer(LEFT, RIGHT[:, :1])),
        RuntimeError,
        "coefficients.right: got shape (1, 1, 7) of rank 1, expected rank 2 as coefficients.left",
    ),
    "no rank": (
        F.mixed_linear,
        (X, [W], rl.Outer(LEFT[:, :0], RIGHT[:, :0])),
        RuntimeError,
        "coefficients.left: got shape (1, 0, 5), expected (1, R, 5) with R of 1 or more",
    ),
    "other sources": (
        F.mixed_linear,
        (X, [W, W], rl.Outer(LEFT, RIGHT)),
        RuntimeError,
        "coefficients.left: got shape (1, 2, 5), expected (2, R, 5)",
    ),
    "left without sources": (
        F.mixed_linear,
        (X, [W], rl.Outer(LEFT[0], RIGHT)),
        RuntimeError,
        "coefficients.left: got shape (2, 5), expected (1, R, 5)",
    ),
    "integers": (
        F.mixed_linear,
        (X, [W], rl.Outer(LEFT, RIGHT.long())),
        RuntimeError,
        "coefficients.right: got dtype torch.int64, expected a floating-point dtype",
    ),
    "numbers": (
        F.mixed_linear,
        (X, [W, W], rl.Outer(0.5, 0.5)),  # type: ignore[arg-type]
        TypeError,
        "coefficients.left: got float, expected a tensor",
    ),
    "another device": (
        F.mixed_linear,
        (X, [W], rl.Outer(LEFT, RIGHT.to("meta"))),
        RuntimeError,
        "coefficients.right: got device meta, expected cpu as weights[0]",
    ),
    "sparse": (
        F.mix,
        ([W], rl.Outer(LEFT.to_sparse(), RIGHT)),
        RuntimeError,
        "coefficients.left: got layout torch.sparse_coo, expected torch.strided",
    ),
    "joined by hand": (
        F.mixed_linear,
        (X, [W], rl.Outer(LEFT, RIGHT).joined()),
        RuntimeError,
        "coefficients: got shape (1, 2, 12), expected one or two dimensions",
    ),
    "of an op, in half precision": (
        torch.ops.rl_kernels.mixed_linear,
        (X.half(), [W.half()], rl.Outer(LEFT, RIGHT).joined().half(), None),
        RuntimeError,
        "coefficients: got dtype torch.float16, expected torch.float32 for torch.float16 weights",
    ),
    "of an op, of another size": (
        torch.ops.rl_kernels.mixed_linear,
        (X, [W], rl.Outer(LEFT, LEFT).joined(), None),
        RuntimeError,
        "coefficients: got shape (1, 2, 10), expected",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(*arguments)


@pytest.mark.parametrize("name", ["coefficients", "out_coefficients"])
def test_attention_refuses_them(name: str) -> None:
    x, packed, out = torch.randn(2, 1, 4), torch.randn(12, 4), torch.randn(4, 4)
    given = {"coefficients": [1.0], name: outer(1, 2, (12, 4), torch.float32)}
    with pytest.raises(TypeError, match=f"^{name}: got Outer, expected a tensor or a sequence"):
        F.mixed_multi_head_attention(x, x, x, 4, 2, [packed], None, None, None, False, 0.0, [out], None, **given)
