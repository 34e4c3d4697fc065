"""Transposed convolutions: torch's on the mixed weight, on every backend, with all gradients and nothing stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as aten
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.backends import registered, selection, streamed
from rl_kernels.ops.values import Call
from rl_kernels.ops.ways import plain_torch
from rl_kernels.testing import assert_as_accurate, compare, peak_memory

BACKENDS = [backend.name for backend in registered()]
MIXED: dict[int, Any] = {1: F.mixed_conv_transpose1d, 2: F.mixed_conv_transpose2d, 3: F.mixed_conv_transpose3d}
PLAIN: dict[int, Any] = {1: aten.conv_transpose1d, 2: aten.conv_transpose2d, 3: aten.conv_transpose3d}
DIMS = pytest.mark.parametrize("dim", [1, 2, 3], ids=["conv1d", "conv2d", "conv3d"])
Result = dict[str, Tensor]


def results(function: Any, leaves: list[Tensor], power: int = 1) -> Result:
    """The output and all gradients of ``function(*leaves)``."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, dy**power)
    return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def recipe_of(weight: tuple[int, ...], out: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The coefficients, two weights and two biases."""
    mixing = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (weight, weight, (out,), (out,)))
    return [torch.tensor([0.75, -0.375], dtype=mixing), *tensors]


def assert_as_plain(dim: int, x: Tensor, recipe: list[Tensor], *settings: Any, atol: float = 1e-9) -> None:
    def mixed(x: Tensor, c: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return MIXED[dim](x, (w1, w2), c, (b1, b2), *settings)

    def plain(x: Tensor, c: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return PLAIN[dim](x, c[0] * w1 + c[1] * w2, c[0] * b1 + c[1] * b2, *settings)

    found, expected = results(mixed, [x, *recipe]), results(plain, [x, *recipe])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        assert found[name].dtype == value.dtype


# Values and gradients.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@DIMS
def test_samples(dim: int, backend: str, dtype: torch.dtype) -> None:
    """Every sample that torch ships, as accurate as plain torch."""
    (info,) = (info for info in op_db if info.name == f"nn.functional.conv_transpose{dim}d")
    count = 0
    for sample in info.sample_inputs("cpu", torch.float64):
        weight, bias = sample.args
        recipe = recipe_of(tuple(weight.shape), 0 if bias is None else len(bias), dtype)
        leaves = [sample.input.detach().to(dtype), *recipe[: 3 if bias is None else 5]]

        def run(x: Tensor, c: Tensor, w1: Tensor, w2: Tensor, *biases: Tensor, settings: Any = sample.kwargs) -> Tensor:
            return MIXED[dim](x, (w1, w2), c, biases or None, **settings)

        with rl.use_backend(backend):
            found = results(run, leaves)
        with plain_torch():
            plain, truth = results(run, leaves), results(run, [leaf.double() for leaf in leaves])
            squares = results(run, [leaf.double().square() for leaf in leaves], power=2)
        spread = {key: value.abs().sqrt() for key, value in squares.items()}
        assert_as_accurate(compare(found, plain, truth, spread, dtype), f"{dim}d {backend} {sample}")
        count += 1
    assert count >= 10


# stride, padding, output_padding, groups, dilation; those with an output_padding of a stride or more are cut out of the
# whole product.
SETTINGS: tuple[tuple[Any, ...], ...] = (
    (1, 0, 0, 1, 1),
    (2, 1, 1, 2, 1),
    (3, 2, 2, 1, 1),
    (2, 1, 1, 1, 3),
    (1, 1, 2, 2, 3),
    (2, 3, 3, 1, 4),
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@DIMS
def test_settings(dim: int, settings: tuple[Any, ...]) -> None:
    out = 3 * settings[3]
    x = torch.randn(2, 4, *(4, 3, 5)[:dim], dtype=torch.float64)
    assert_as_plain(dim, x, recipe_of((4, 3, *(3, 2, 3)[:dim]), out), *settings)


def test_settings_that_differ_by_dimension() -> None:
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    assert_as_plain(2, x, recipe_of((4, 3, 3, 2), 6), (2, 1), [1, 0], (1, 1), 2, (1, 3))


@pytest.mark.parametrize("name", ["conv1d", "conv2d-grouped", "conv2d-cut", "conv3d"])
@pytest.mark.parametrize("backend", ["reference", "streamed", "cpu"])
def test_gradcheck(backend: str, name: str) -> None:
    dim, x_shape, weight, settings = {
        "conv1d": (1, (2, 2, 4), (2, 3, 2), (2, 1, 1)),
        "conv2d-grouped": (2, (2, 4, 2, 3), (4, 1, 2, 2), ((2, 1), 0, 0, 2)),
        "conv2d-cut": (2, (1, 2, 3, 2), (2, 1, 2, 2), (1, 1, (0, 1), 1, 2)),
        "conv3d": (3, (1, 2, 2, 1, 2), (2, 1, 2, 1, 2), ((2, 1, 2), 0, (1, 0, 1))),
    }[name]
    out = weight[1] * (settings[3] if len(settings) > 3 else 1)  # type: ignore[misc]
    leaves = [torch.randn(x_shape, dtype=torch.float64), *recipe_of(weight, out)]

    def run(x: Tensor, c: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return MIXED[dim](x, (w1, w2), c, (b1, b2), *settings)

    for leaf in leaves:
        leaf.requires_grad_()
    with rl.use_backend(backend):
        assert gradcheck(run, leaves, fast_mode=dim == 3, check_batched_grad=True)
        assert gradgradcheck(run, leaves, fast_mode=True)


@DIMS
def test_unbatched_and_empty(dim: int) -> None:
    recipe = recipe_of((4, 3, *(2,) * dim), 3)
    x = torch.randn(4, *(3,) * dim, dtype=torch.float64)
    assert_as_plain(dim, x, recipe, 2)
    assert_as_plain(dim, x.new_empty(0, *x.shape), recipe, 2)


def test_no_elements() -> None:
    """Zeros or the bias, and zero gradients, where torch refuses."""
    for inside, out, padding in ((0, 3, 0), (4, 0, 0), (4, 3, 2)):
        x = torch.randn(2, inside, 3, requires_grad=True)
        weights = [torch.randn(inside, out, 2, requires_grad=True) for _ in range(2)]
        for backend in ("reference", "streamed", "cpu"):
            with rl.use_backend(backend):
                y = F.mixed_conv_transpose1d(x, weights, (0.5, 0.25), [torch.ones(out)] * 2, padding=padding)
                assert torch.equal(y, torch.full((2, out, 4 - 2 * padding), 0.75))
                for gradient in torch.autograd.grad(y.sum(), [x, *weights]):
                    assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [2, 3], ids=["conv2d", "conv3d"])
def test_channels_last(dim: int, backend: str) -> None:
    """Outputs and gradients are laid out as x or the first source, however the incoming gradient comes."""
    layout = torch.channels_last if dim == 2 else torch.channels_last_3d
    c, w1, w2, b1, b2 = recipe_of((4, 3, *(3,) * dim), 3, torch.float32)
    for of_x, of_weights in ((layout, torch.contiguous_format), (torch.contiguous_format, layout)):
        x = torch.randn(2, 4, *(4,) * dim).contiguous(memory_format=of_x).requires_grad_()
        weights = [w.contiguous(memory_format=of_weights).requires_grad_() for w in (w1, w2)]
        with rl.use_backend(backend):
            y = MIXED[dim](x, weights, c, (b1, b2), 2, 1, 1)
            dx, dw = torch.autograd.grad(y, [x, weights[0]], y.new_ones(1, 1, *(1,) * dim).expand(y.shape))
        assert all(tensor.is_contiguous(memory_format=layout) for tensor in (y, dx, dw))
        torch.testing.assert_close(y, PLAIN[dim](x, 0.75 * w1 - 0.375 * w2, 0.75 * b1 - 0.375 * b2, 2, 1, 1))


def test_a_dilated_kernel_of_one() -> None:
    x, (c, w1, w2, *_) = torch.randn(2, 2, 7, 3), recipe_of((2, 3, 3, 1), 3, torch.float32)
    expected = aten.conv_transpose2d(x, 0.75 * w1 - 0.375 * w2, None, (3, 2), (2, 1), dilation=(2, 1))
    settings: dict[str, Any] = {"stride": (3, 2), "padding": (2, 1), "dilation": (2, 2)}
    weights = [w.bfloat16().to(memory_format=torch.channels_last) for w in (w1, w2)]
    y = F.mixed_conv_transpose2d(x.bfloat16(), weights, c, None, **settings)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.1)


# Nothing is computed, stored or kept that is not asked for.


@pytest.mark.parametrize("frozen", ["x", "weights", "nothing"])
def test_only_what_is_asked_for_is_computed(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    run = selection.run
    monkeypatch.setattr(selection, "run", lambda call: asked.append(call.op) or run(call))
    x = torch.randn(2, 4, 5, requires_grad=frozen != "x")
    c, *weights = (t.requires_grad_(frozen != "weights") for t in recipe_of((4, 3, 2), 3, torch.float32)[:3])
    held: list[int] = []
    with rl.use_backend("streamed"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
            y = F.mixed_conv_transpose1d(x, weights, c)
        y.sum().backward()
    expected = ["mixed_conv_dgrad"]
    expected += ["mixed_conv"] if frozen != "x" else []
    expected += ["mixed_conv_wgrad"] if frozen != "weights" else []
    assert asked == expected
    assert set(held) <= {t.data_ptr() for t in (x, c, *weights)}
    assert (x.data_ptr() in held) == (frozen != "weights")


def test_conv_transpose_memory() -> None:
    """A weight of 81 MiB: the workspace beyond what is returned, forward and backward."""
    weights = [torch.randn(1536, 1536, 3, 3).mul_(0.01) for _ in range(2)]
    x, c = torch.randn(1, 1536, 7, 7), torch.tensor([0.5, 0.25])
    bound = streamed.workspace_bytes("cpu") + 40 * x.nbytes
    assert weights[0].nbytes >= 2 * bound

    def run() -> Tensor:
        return F.mixed_conv_transpose2d(x, weights, c, None, 2, 1, 1)

    with rl.use_backend("streamed"):
        for wanted in (x, c):
            wanted.requires_grad_()
            y = run()
            assert peak_memory(run) - y.nbytes <= bound
            backward = peak_memory(lambda y=y, wanted=wanted: torch.autograd.grad(y, wanted, y, retain_graph=True))
            assert backward - wanted.nbytes <= bound
            wanted.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_added_to_what_is_there_conv(backend: str) -> None:
    x, (c, *weights) = torch.randn(2, 4, 5), recipe_of((4, 3, 2), 3, torch.float32)[:3]
    weights = [w.requires_grad_() for w in weights]
    with rl.use_backend(backend):
        F.mixed_conv_transpose1d(x, weights, c).square().sum().backward()
        once, buffers = [w.grad.clone() for w in weights], [w.grad for w in weights]
        with rl.accumulate_into_grad():
            F.mixed_conv_transpose1d(x, weights, c).square().sum().backward()
    for weight, gradient, buffer in zip(weights, once, buffers, strict=True):
        assert weight.grad is buffer
        torch.testing.assert_close(buffer, 2 * gradient)


def test_sources_that_are_one_tensor_conv() -> None:
    x, w = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(y.square().sum(), w)[0]
        for y in (F.mixed_conv_transpose1d(x, (w, w), (0.5, 0.25)), aten.conv_transpose1d(x, 0.75 * w))
    )
    torch.testing.assert_close(found, expected)


# Errors.

X, FILTER = torch.randn(2, 4, 6), torch.randn(4, 3, 3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "channels": ({"x": torch.randn(2, 5, 6)}, RuntimeError, r"x: got 5 channels .* expected 4 for weights of \(4, 3"),
    "dimensions": ({"x": torch.randn(4)}, RuntimeError, r"x: got shape \(4,\), expected 2 \(unbatched\) or 3"),
    "no pixels": ({"x": X[..., :0]}, RuntimeError, r"x: got spatial size \(0,\), expected 1 or more"),
    "dtype": ({"x": X.double()}, RuntimeError, r"x: got dtype torch.float64, expected torch.float32"),
    "no tensor": ({"x": 3.0}, TypeError, r"x: got float, expected a tensor"),
    "filter's dimensions": (
        {"weights": [FILTER[0]]},
        RuntimeError,
        r"weights\[0\]: got shape \(3, 3\), expected 3 dimensions \(in_channels, out_channels / groups",
    ),
    "no kernel": ({"weights": [FILTER[..., :0]]}, RuntimeError, r"weights\[0\]: .* expected a kernel of 1 or more"),
    "two shapes": ({"weights": [FILTER, FILTER[:2]], "coefficients": [1, 1]}, RuntimeError, r"weights\[1\]: got shape"),
    "channelwise": (
        {"coefficients": torch.ones(1, 3)},
        RuntimeError,
        r"coefficients: got shape \(1, 3\), expected \(1,\): a transposed convolution has one a source",
    ),
    "input-channelwise": ({"coefficients": torch.ones(1, 4)}, RuntimeError, r"coefficients: got shape \(1, 4\)"),
    "groups": ({"groups": 3}, RuntimeError, r"groups: got 3, expected a divisor of the 4 input channels"),
    "no groups": ({"groups": 0}, RuntimeError, r"groups: got 0, expected 1 or more"),
    "biases": ({"biases": [torch.ones(4)]}, RuntimeError, r"biases\[0\]: got shape \(4,\), expected \(3,\)"),
    "groups' biases": ({"biases": [torch.ones(3)], "groups": 2}, RuntimeError, r"biases\[0\]: .* expected \(6,\)"),
    "biases' number": ({"biases": [torch.ones(3)] * 2}, RuntimeError, r"biases: got 2 tensors, expected 1"),
    "stride": ({"stride": 0}, RuntimeError, r"stride: got \[0\], expected 1 integers of 1 or more"),
    "strides": ({"stride": (1, 1)}, RuntimeError, r"stride: got \(1, 1\), expected an integer or 1 of them"),
    "padding": ({"padding": -1}, RuntimeError, r"padding: got \[-1\], expected 1 integers of 0 or more"),
    "named padding": ({"padding": "same"}, RuntimeError, r"padding: got 'same', expected an integer"),
    "dilation": ({"dilation": 0}, RuntimeError, r"dilation: got \[0\]"),
    "output_padding": ({"output_padding": 1}, RuntimeError, r"output_padding: got \[1\], expected 0 or more, and less"),
    "negative": ({"output_padding": -1, "stride": 2}, RuntimeError, r"output_padding: got \[-1\]"),
    "no output": ({"padding": 5}, RuntimeError, r"padding: got \[5\], .* leave \[-2\], expected 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_errors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch refuses, before anything is computed."""

    def fail(call: Call) -> None:
        raise AssertionError(f"{call.op} was run")

    monkeypatch.setattr(selection, "run", fail)
    given, kind, message = REFUSED[name]
    arguments = {"x": X, "weights": [FILTER], "coefficients": [1.0], **given}
    with pytest.raises(kind, match=message):
        F.mixed_conv_transpose1d(**arguments)
    if "channelwise" in name:
        return
    plain = {"input": arguments["x"], "weight": arguments["weights"][-1], "bias": arguments.get("biases", [None])[-1]}
    settings = {key: value for key, value in given.items() if key not in ("x", "weights", "coefficients", "biases")}
    if len(arguments["weights"]) == 1 and name != "biases' number":
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            aten.conv_transpose1d(**plain, **settings)
