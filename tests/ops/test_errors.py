"""Bad input raises before anything is computed, naming the argument, what came and what was expected."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels import functional as F
from rl_kernels.backends import Case, selection
from tests.backends.planted import Planted

W = torch.randn(5, 7)
FILTER = torch.randn(6, 2, 3, 3)
BIAS = torch.randn(5)
X = torch.randn(4, 7)
IMAGE = torch.randn(2, 4, 8, 8)
PAIR = (0.5, 0.5)

CASES: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "no source": (F.mixed_linear, (X, [], []), RuntimeError, r"weights: got no tensor, expected one or more"),
    "source of another kind": (
        F.mixed_linear,
        (X, [W, 3.0], PAIR),
        TypeError,
        r"weights\[1\]: got float, expected a tensor",
    ),
    "sources of two shapes": (
        F.mixed_linear,
        (X, [W, W.t()], PAIR),
        RuntimeError,
        r"weights\[1\]: got shape \(7, 5\), expected \(5, 7\)",
    ),
    "sources of two dtypes": (
        F.mixed_linear,
        (X, [W, W.double()], PAIR),
        RuntimeError,
        r"weights\[1\]: got dtype torch.float64, expected torch.float32",
    ),
    "source on another device": (
        F.mixed_linear,
        (X, [W, W.to("meta")], PAIR),
        RuntimeError,
        r"weights\[1\]: got device meta, expected cpu",
    ),
    "integer weights": (
        F.mixed_linear,
        (X.long(), [W.long()], [1.0]),
        RuntimeError,
        r"weights\[0\]: got dtype torch.int64, expected a floating-point dtype",
    ),
    "complex weights": (
        F.mixed_linear,
        (X, [W.to(torch.complex64)], [1.0]),
        RuntimeError,
        r"weights\[0\]: got dtype torch.complex64, expected a floating-point",
    ),
    "weight of three dimensions": (
        F.mixed_linear,
        (X, [W[None]], [1.0]),
        RuntimeError,
        r"weights\[0\]: got shape \(1, 5, 7\), expected \(out_features, in_features\)",
    ),
    "x of another width": (
        F.mixed_linear,
        (X[:, :6], [W], [1.0]),
        RuntimeError,
        r"x: got shape \(4, 6\), expected \(\*, 7\)",
    ),
    "x without dimensions": (
        F.mixed_linear,
        (torch.tensor(1.0), [W], [1.0]),
        RuntimeError,
        r"x: got shape \(\), expected \(\*, 7\)",
    ),
    "x of another dtype": (
        F.mixed_linear,
        (X.double(), [W], [1.0]),
        RuntimeError,
        r"x: got dtype torch.float64, expected torch.float32",
    ),
    "x on another device": (
        F.mixed_linear,
        (X.to("meta"), [W], [1.0]),
        RuntimeError,
        r"x: got device meta, expected cpu",
    ),
    "x that is no tensor": (F.mixed_conv2d, ([1.0], [FILTER], [1.0]), TypeError, r"x: got list, expected a tensor"),
    "too few coefficients": (
        F.mixed_linear,
        (X, [W, W], [1.0]),
        RuntimeError,
        r"coefficients: got 1, expected 2 as there are weights",
    ),
    "coefficients of the wrong shape": (
        F.mixed_linear,
        (X, [W, W], torch.ones(2, 4)),
        RuntimeError,
        r"coefficients: got shape \(2, 4\), expected \(2,\) or \(2, 5\)",
    ),
    "a coefficient of two elements": (
        F.mixed_linear,
        (X, [W, W], [torch.ones(2), 1.0]),
        RuntimeError,
        r"coefficients\[0\]: got shape \(2,\), expected one element",
    ),
    "integer coefficients": (
        F.mixed_linear,
        (X, [W, W], torch.ones(2, dtype=torch.long)),
        RuntimeError,
        r"coefficients: got dtype torch.int64, expected a floating-point dtype",
    ),
    "coefficients of another kind": (F.mixed_linear, (X, [W], 1.0), TypeError, r"coefficients: got float, expected"),
    "coefficients on another device": (
        F.mixed_linear,
        (X, [W], torch.ones(1, device="meta")),
        RuntimeError,
        r"coefficients: got device meta, expected cpu",
    ),
    "too few biases": (
        F.mixed_linear,
        (X, [W, W], PAIR, [BIAS]),
        RuntimeError,
        r"biases: got 1 tensors, expected 2",
    ),
    "bias of the wrong shape": (
        F.mixed_linear,
        (X, [W], [1.0], [BIAS[:4]]),
        RuntimeError,
        r"biases\[0\]: got shape \(4,\), expected \(5,\)",
    ),
    "bias of another dtype": (
        F.mixed_linear,
        (X, [W], [1.0], [BIAS.double()]),
        RuntimeError,
        r"biases\[0\]: got dtype torch.float64, expected torch.float32",
    ),
    "bias on another device": (
        F.mixed_linear,
        (X, [W], [1.0], [BIAS.to("meta")]),
        RuntimeError,
        r"biases\[0\]: got device meta, expected cpu",
    ),
    "channels that do not fit": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0]),
        RuntimeError,
        r"x: got 4 channels \(shape \(2, 4, 8, 8\)\), expected 2 .* groups=1",
    ),
    "groups that do not divide": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, 1, 0, 1, 4),
        RuntimeError,
        r"groups: got 4, expected a divisor of the 6 output channels",
    ),
    "no groups": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, 1, 0, 1, 0),
        RuntimeError,
        r"groups: got 0, expected 1 or more",
    ),
    "stride of zero": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, 0, 0, 1, 2),
        RuntimeError,
        r"stride: got \[0, 0\], expected 2 integers of 1 or more",
    ),
    "negative padding": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, 1, -1, 1, 2),
        RuntimeError,
        r"padding: got \[-1, -1\], expected 2 integers of 0 or more",
    ),
    "three strides": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, (1, 1, 1), 0, 1, 2),
        RuntimeError,
        r"stride: got \(1, 1, 1\), expected an integer or 2 of them",
    ),
    "unknown padding": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, 1, "full", 1, 2),
        RuntimeError,
        r"padding: got 'full', expected 'valid', 'same' or integers",
    ),
    "'same' with a stride": (
        F.mixed_conv2d,
        (IMAGE, [FILTER], [1.0], None, 2, "same", 1, 2),
        RuntimeError,
        r"padding: got 'same' with stride \[2, 2\], expected stride 1",
    ),
    "kernel beyond the image": (
        F.mixed_conv2d,
        (IMAGE[..., :2], [FILTER], [1.0], None, 1, 0, 1, 2),
        RuntimeError,
        r"x: got spatial size \(8, 2\), expected at least the kernel's extent",
    ),
    "image of the wrong dimension": (
        F.mixed_conv2d,
        (IMAGE[0, 0], [FILTER], [1.0]),
        RuntimeError,
        r"x: got shape \(8, 8\), expected 3 \(unbatched\) or 4 dimensions",
    ),
    "filter of the wrong dimension": (
        F.mixed_conv1d,
        (IMAGE[0], [FILTER], [1.0]),
        RuntimeError,
        r"weights\[0\]: got shape \(6, 2, 3, 3\), expected 3 dimensions",
    ),
    "mix of scalars": (F.mix, ([torch.tensor(1.0)], [1.0]), RuntimeError, r"weights\[0\]: got a 0-dimensional tensor"),
    "mix of two shapes": (F.mix, ([BIAS, BIAS[:2]], PAIR), RuntimeError, r"weights\[1\]: got shape \(2,\)"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments, kind, message = CASES[name]

    def computed(*args: Any) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(selection, "run", computed)
    with pytest.raises(kind, match=message):
        function(*arguments)


@pytest.mark.parametrize("way", ["eager", "compile", "functorch"])
def test_the_same_words_everywhere(way: str) -> None:
    """Eager calls, compiled ones and transforms refuse with one message."""

    def call(x: Tensor) -> Tensor:
        return F.mixed_linear(x, (W, W), PAIR)

    x = X[:, :6]
    with pytest.raises(Exception, match=r"x: got shape \(4, 6\), expected \(\*, 7\) for weights of \(5, 7\)"):
        if way == "compile":
            torch.compile(call, backend="eager", fullgraph=True)(x)
        elif way == "functorch":
            torch.func.vjp(call, x)
        else:
            call(x)


def test_raw_ops_check_too() -> None:
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"dy: got shape \(4, 7\), expected \(\*, 5\)"):
        torch.ops.rl_kernels.mixed_linear_dgrad(X, [W], one)
    with pytest.raises(RuntimeError, match=r"dy: got shape \(3, 5\), expected \(4, 5\)"):
        torch.ops.rl_kernels.mixed_linear_wgrad(torch.randn(3, 5), X, [W], one, None, [True], True, [])
    with pytest.raises(RuntimeError, match=r"dy: got torch.float64 on cpu, expected torch.float32 on cpu"):
        torch.ops.rl_kernels.mixed_linear_wgrad(torch.randn(4, 5).double(), X, [W], one, None, [True], True, [])
    with pytest.raises(RuntimeError, match=r"weights_mask: got 2 entries, expected 1"):
        torch.ops.rl_kernels.mixed_linear_wgrad(torch.randn(4, 5), X, [W], one, None, [True, True], True, [])
    with pytest.raises(RuntimeError, match=r"biases_mask: got 1 entries, expected 0"):
        torch.ops.rl_kernels.mixed_linear_wgrad(torch.randn(4, 5), X, [W], one, None, [True], True, [True])
    with pytest.raises(RuntimeError, match=r"coefficients: got dtype torch.float64, expected torch.float32"):
        torch.ops.rl_kernels.mixed_linear(X, [W], one.double(), None)
    geometry = ([1, 1], [0, 0], [1, 1], 2)
    with pytest.raises(RuntimeError, match=r"dy: got shape \(2, 6, 5, 6\), expected \(2, 6, 6, 6\)"):
        torch.ops.rl_kernels.mixed_conv_dgrad(torch.randn(2, 6, 5, 6), [FILTER], one, [2, 4, 8, 8], *geometry)
    with pytest.raises(RuntimeError, match=r"input_size: got \[2, 3, 8, 8\], expected \(batch, 4, 2 spatial sizes\)"):
        torch.ops.rl_kernels.mixed_conv_dgrad(torch.randn(2, 6, 6, 6), [FILTER], one, [2, 3, 8, 8], *geometry)


def test_an_in_place_change_before_backward_is_caught() -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = F.mixed_linear(x, (w, W), PAIR)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


ONE = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, [ONE], (1.0,)), "x: got NoneType, expected a tensor"),
        (([1.0], [ONE], (1.0,)), "x: got list, expected a tensor"),
        ((ONE, None, (1.0,)), "weights: got NoneType, expected a sequence of tensors"),
        ((ONE, (ONE for _ in range(1)), (1.0,)), "weights: got generator, expected a sequence of tensors"),
        ((ONE, ONE, (1.0,)), "weights: got Tensor, expected a sequence of tensors"),
        ((ONE, [ONE], ("a",)), r"coefficients\[0\]: got 'a', expected a float or a one-element tensor"),
        ((ONE, [ONE], (1j,)), r"coefficients\[0\]: got 1j, expected a float or a one-element tensor"),
        ((ONE, [ONE], (1.0,), torch.randn(2)), "biases: got Tensor, expected a sequence of tensors or None"),
    ],
    ids=[f"kind {j}" for j in range(8)],  # Workers must agree: what the arguments print as differs.
)
def test_arguments_of_a_wrong_kind(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        F.mixed_linear(*arguments)


def test_a_stride_that_is_no_integer() -> None:
    with pytest.raises(RuntimeError, match=r"^stride: got 1\.5, expected an integer or 2 of them$"):
        F.mixed_conv2d(torch.randn(1, 2, 3, 3), [torch.randn(2, 2, 1, 1)], (1.0,), stride=1.5)  # type: ignore[arg-type]


def test_sources_in_a_parameter_list() -> None:
    weights = torch.nn.ParameterList([ONE, ONE])
    assert torch.equal(F.mixed_linear(ONE, weights, (0.5, 0.5)), F.mixed_linear(ONE, [*weights], (0.5, 0.5)))


def test_no_backend_says_why() -> None:
    stub = Planted({}, "stub")
    case = Case("mixed_linear", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="no backend serves mixed_linear on cpu in float32: stub: no kernel for"):
        selection.choose(case, (stub,))
