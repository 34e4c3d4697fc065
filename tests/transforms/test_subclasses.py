"""Tensor subclasses and modes: a right result or the subclass's own refusal, never a wrong number."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.nn import ReplacementLinear
from tests.transforms.common import KINDS, Ops, problem


class Quantized(Tensor):
    """int8 values and a scale, in the guise of a float tensor; computes with what they stand for."""

    values: Tensor
    scale: float

    @staticmethod
    def __new__(cls, values: Tensor, scale: float, dtype: torch.dtype) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)  # type: ignore

    def __init__(self, values: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.values, self.scale = values, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Quantized({self.values}, {self.scale})"

    @classmethod
    def of(cls, tensor: Tensor, scale: float = 1 / 16) -> Any:
        return cls((tensor.detach() / scale).round().clamp(-128, 127).to(torch.int8), scale, tensor.dtype)

    def dequantized(self) -> Tensor:
        return self.values.to(self.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values"], (self.scale, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["values"], *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            (tensor,) = args
            return cls(tensor.values, tensor.scale, tensor.dtype)
        args, kwargs = tree_map(lambda t: t.dequantized() if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


class Refusing(Quantized):
    """As real ones, which know a few ops only."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("aten::mm"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        raise NotImplementedError(f"Refusing knows nothing of {func}")


@pytest.mark.parametrize("mode", ["eager", "dispatch mode", "compiled"])
@pytest.mark.parametrize("which", [(2,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_source(kind: str, which: tuple[int, ...], mode: str) -> None:
    """The result, and the gradients of all that is not quantised."""
    mixed, naive, arguments = problem(kind, torch.float32, requires_grad=True)
    quantized = {j: Quantized.of(arguments[j]) for j in which}
    given = [quantized.get(j, a) for j, a in enumerate(arguments)]
    plain = [quantized[j].dequantized() if j in which else a for j, a in enumerate(arguments)]
    function = torch.compile(mixed, backend="aot_eager", fullgraph=True) if mode == "compiled" else mixed
    if mode == "dispatch mode":
        with Ops():
            y = function(*given)
    else:
        y = function(*given)
    expected = naive(*plain)
    torch.testing.assert_close(y, expected)
    wanted = [a for j, a in enumerate(arguments) if j not in which]
    found = torch.autograd.grad(y.pow(3).sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(expected.pow(3).sum(), wanted))


def test_a_layer_whose_source_is_quantized_later() -> None:
    """As quantisation libraries do it: the parameter is swapped in place, and the replaced layer follows."""
    sources = [nn.Linear(6, 4) for _ in range(2)]
    layer, x = ReplacementLinear(sources, init=(0.3, -0.7)), torch.randn(3, 6)
    before = layer(x)
    quantized = Quantized.of(sources[0].weight)
    sources[0].weight = nn.Parameter(quantized, requires_grad=False)
    y = layer(x)
    bias = 0.3 * sources[0].bias - 0.7 * sources[1].bias
    expected = nn.functional.linear(x, 0.3 * quantized.dequantized() - 0.7 * sources[1].weight, bias)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, before, atol=1e-4)
    torch.testing.assert_close(layer.merged()(x), expected)


def test_a_quantized_source_under_autocast_and_vmap() -> None:
    mixed, naive, (x, c, w1, *rest) = problem("linear", torch.float32)
    quantized = Quantized.of(w1)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (f(x, c, w, *rest) for f, w in ((mixed, quantized), (naive, quantized.dequantized())))
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)
    many = torch.vmap(lambda x: mixed(x, c, quantized, *rest))(torch.stack([x, -x]))
    torch.testing.assert_close(many[1], naive(-x, c, quantized.dequantized(), *rest))


@pytest.mark.parametrize("backend", ["auto", "streamed", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_that_refuses_is_heard(kind: str, backend: str) -> None:
    mixed, _, (x, c, w1, *rest) = problem(kind, torch.float32)
    with (
        rl.use_backend(backend),
        pytest.raises(
            NotImplementedError,
            match=r"weights: got .*\.Refusing.*\(Refusing knows nothing of aten.*rl_kernels\.merge before",
        ),
    ):
        mixed(x, c, Refusing.of(w1), *rest)


# A pair of tensors that compute side by side.


@pytest.mark.parametrize("j", range(6), ids=["x", "coefficients", "w1", "w2", "b1", "b2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_tensors(kind: str, j: int) -> None:
    """In any place: values, and gradients of the pair and of the rest."""
    mixed, naive, arguments = problem(kind, requires_grad=True)
    results = []
    for factor in (1.0, 2.0):
        given = [factor * a if k == j else a for k, a in enumerate(arguments)]
        y = naive(*given)
        results.append((y, *torch.autograd.grad(y.pow(3).sum(), given)))
    pair = TwoTensor(arguments[j].detach(), 2 * arguments[j].detach()).requires_grad_()
    given = [pair if k == j else a for k, a in enumerate(arguments)]
    y = mixed(*given)
    found = (y, *torch.autograd.grad(y.pow(3).sum(), given))
    torch.testing.assert_close([t.a for t in found], list(results[0]))
    torch.testing.assert_close([t.b for t in found], list(results[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_output_gradients(kind: str) -> None:
    """The forward took the fast path: only the backward meets the subclass."""
    mixed, naive, arguments = problem(kind, requires_grad=True)
    y, expected = mixed(*arguments), naive(*arguments)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, arguments, TwoTensor(dy, 2 * dy))
    wanted = torch.autograd.grad(expected, arguments, dy)
    torch.testing.assert_close([g.a for g in found], list(wanted))
    torch.testing.assert_close([g.b for g in found], [2 * g for g in wanted])


def test_a_compiled_pair() -> None:
    mixed, naive, (x, *rest) = problem("conv")
    y = torch.compile(mixed, backend="aot_eager", fullgraph=True)(TwoTensor(x, 2 * x), *rest)
    torch.testing.assert_close([y.a, y.b], [naive(x, *rest), naive(2 * x, *rest)])


# __torch_function__.


class Named(Tensor):
    """A subclass of the simple kind, which keeps its type and hears of every function."""

    heard: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("j", [0, 1, 2, 5], ids=["x", "coefficients", "w1", "b2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_torch_function_subclass(kind: str, j: int) -> None:
    mixed, naive, arguments = problem(kind)
    Named.heard.clear()
    y = mixed(*(a.as_subclass(Named) if k == j else a for k, a in enumerate(arguments)))
    assert type(y) is Named
    assert {"linear", "conv2d", "conv_transpose2d"} & set(Named.heard)
    torch.testing.assert_close(y.as_subclass(Tensor), naive(*arguments))


class Scaled(Tensor):
    """Says in __torch_function__ alone what it stands for: twice its data, in every product."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
            args = tree_map(lambda t: 2 * t.as_subclass(Tensor) if isinstance(t, cls) else t, args)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_that_changes_what_a_product_means() -> None:
    mixed, naive, (x, c, w1, w2, b1, b2) = problem("linear")
    y = mixed(x, c, w1.as_subclass(Scaled), w2, b1, b2)
    torch.testing.assert_close(y.as_subclass(Tensor), naive(x, c, 2 * w1, w2, b1, b2))


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_modes_within_modes(kind: str) -> None:
    """Function and dispatch modes, nested; and torch's own mode of a default device."""
    mixed, naive, arguments = problem(kind, requires_grad=True)
    # A transposed convolution is the dgrad of one.
    kind, forward = ("conv", "_dgrad") if kind == "conv_transpose" else (kind, "")
    op = f"rl_kernels::mixed_{kind}"
    with torch.device("cpu"), Listening() as listening, Ops() as outer, Ops() as inner:
        y = mixed(*arguments)
        torch.autograd.grad(y.sum(), arguments)
    assert listening.calls > 0
    assert outer.seen[op + forward] == inner.seen[op + forward] == 1
    assert outer.seen[f"{op}_wgrad"] == inner.seen[f"{op}_wgrad"] == 1
    torch.testing.assert_close(y, naive(*arguments))


# What is no ordinary tensor without being a subclass.


def test_other_plain_kinds() -> None:
    mixed, naive, (x, c, w1, *rest) = problem("linear", torch.float32)
    expected = naive(x, c, w1, *rest)
    for weight in (nn.Buffer(w1), nn.Parameter(w1), torch._neg_view(-w1), w1.expand(1, *w1.shape)[0]):
        torch.testing.assert_close(mixed(x, c, weight, *rest), expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), r"weights\[0\]: got dtype torch.qint8"),
        (lambda w: w.to(torch.int8), r"weights\[0\]: got dtype torch.int8"),
        (lambda w: w.to(torch.complex64), r"weights\[0\]: got dtype torch.complex64"),
        (lambda w: w.to_sparse(), r"weights\[0\]: got layout torch.sparse_coo, expected torch.strided"),
        (lambda w: w.to_mkldnn(), r"weights\[0\]: got layout torch._mkldnn, expected torch.strided"),
        (lambda w: w.tolist(), r"weights\[0\]: got list, expected a tensor"),
        (lambda w: nn.UninitializedParameter(), "uninitialized parameter"),
    ],
    ids=["quantized", "int8", "complex", "sparse", "mkldnn", "list", "uninitialized"],
)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore::DeprecationWarning")
def test_weights_that_cannot_be_mixed_are_named(weight: Any, message: str) -> None:
    x, w = torch.randn(3, 6), torch.randn(4, 6)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        F.mixed_linear(x, (weight(w), w), (0.3, -0.7))


def test_sparse_activations_are_named() -> None:
    x, w = torch.randn(3, 6), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match=r"^x: got layout torch\.sparse_coo, expected torch\.strided"):
        F.mixed_linear(x.to_sparse(), (w, w), (0.3, -0.7))
