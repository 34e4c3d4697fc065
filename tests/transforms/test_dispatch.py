"""The four ways a call can take (rl_kernels/_autograd.py): each one is taken where it should be, and is right."""

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rl_kernels as rl
from rl_kernels import functional as F


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, coefficients, two weights and two biases."""
    mixing = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [((4, 7), dtype), ((2,), mixing), ((5, 7), dtype), ((5, 7), dtype), ((5,), dtype), ((5,), dtype)]
    return tuple(torch.randn(shape, dtype=torch.float64).to(kind).requires_grad_() for shape, kind in shapes)


def linear(x: Tensor, coefficients: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return F.mixed_linear(x, (w1, w2), coefficients, (b1, b2))


def conv(x: Tensor, coefficients: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    filters = [w.reshape(5, 7, 1) for w in (w1, w2)]
    return F.mixed_conv1d(x.reshape(4, 7, 1), filters, coefficients, (b1, b2))


def naive(x: Tensor, coefficients: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    a, b = coefficients[0], coefficients[1]
    return torch.nn.functional.linear(x, a * w1 + b * w2, a * b1 + b * b2)


class Ops(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [linear, conv])
def test_a_dispatch_mode_sees_our_ops(function: Any) -> None:
    args = arguments()
    with Ops() as ops:
        y = function(*args)
        torch.autograd.grad(y, args, torch.ones_like(y))
    kind = "linear" if function is linear else "conv"
    assert ops.seen[f"rl_kernels::mixed_{kind}"] == 1
    assert ops.seen[f"rl_kernels::mixed_{kind}_dgrad"] == 1
    assert ops.seen[f"rl_kernels::mixed_{kind}_wgrad"] == 1
    assert not any(name in ops.seen for name in ("aten::mm", "aten::addmm", "aten::convolution"))


@pytest.mark.parametrize("function", [linear, conv])
def test_compiled_graphs_hold_our_ops_forward_and_backward(function: Any) -> None:
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    args = arguments()
    y = aot_function(function, fw_compiler=keep, bw_compiler=keep)(*args)
    expected = torch.autograd.grad(function(*args), args, torch.ones_like(y))
    found = torch.autograd.grad(y, args, torch.ones_like(y))
    kind = "linear" if function is linear else "conv"
    for op in (f"mixed_{kind}", f"mixed_{kind}_dgrad", f"mixed_{kind}_wgrad"):
        assert f"rl_kernels.{op}.default" in targets
    assert not any(name.startswith(("aten.mm", "aten.addmm", "aten.conv")) for name in targets)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_eager_takes_the_lean_function() -> None:
    args = arguments()
    with rl.use_backend("streamed"):
        assert type(linear(*args).grad_fn).__name__ == "_ForwardBackward"
        with torch.no_grad():
            assert linear(*args).grad_fn is None


@pytest.mark.parametrize("way", ["plain", "create_graph", "compile", "autocast"])
def test_gradients_equal_the_naive_formula(way: str) -> None:
    args = arguments(torch.float32 if way == "autocast" else torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        function = torch.compile(linear, fullgraph=True, backend="aot_eager") if way == "compile" else linear
        y, expected = function(*args), naive(*args)
    assert y.dtype == expected.dtype
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, args, dy, create_graph=way == "create_graph")
    for a, b in zip(found, torch.autograd.grad(expected, args, dy), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0.02, "atol": 0.05} if way == "autocast" else {}))


def test_functorch_transforms() -> None:
    args = arguments(torch.float64)

    def loss(*args: Tensor) -> Tensor:
        return linear(*args).square().sum()

    def naive_loss(*args: Tensor) -> Tensor:
        return naive(*args).square().sum()

    everything = tuple(range(6))
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        found, expected = (transform(f, argnums=everything)(*args) for f in (loss, naive_loss))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    batched = torch.randn(3, 4, 7, dtype=torch.float64)
    in_dims = (0, None, None, None, None, None)
    torch.testing.assert_close(
        torch.vmap(linear, in_dims)(batched, *args[1:]), torch.vmap(naive, in_dims)(batched, *args[1:])
    )
    found, expected = (torch.func.hessian(f, argnums=1)(*args) for f in (loss, naive_loss))
    torch.testing.assert_close(found, expected)


def test_forward_mode_is_never_silently_zero() -> None:
    args = tuple(a.detach() for a in arguments(torch.float64))
    tangents = tuple(torch.randn_like(a) for a in args)
    found = torch.func.jvp(linear, args, tangents)
    expected = torch.func.jvp(naive, args, tangents)
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(a, t) for a, t in zip(args, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(linear(*dual)).tangent
    torch.testing.assert_close(tangent, expected[1])


def test_batched_gradients() -> None:
    args = arguments(torch.float64)
    dys = torch.randn(3, 4, 5, dtype=torch.float64)
    found = torch.autograd.grad(linear(*args), args, dys, is_grads_batched=True)
    expected = torch.autograd.grad(naive(*args), args, dys, is_grads_batched=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_subclass_gets_a_right_result() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x, coefficients, w1, w2, b1, b2 = (a.detach() for a in arguments(torch.float64))
    y = linear(TwoTensor(x, 2 * x), coefficients, w1, w2, b1, b2)
    torch.testing.assert_close(y.a, naive(x, coefficients, w1, w2, b1, b2))
    torch.testing.assert_close(y.b, naive(2 * x, coefficients, w1, w2, b1, b2))


def test_meta_tensors() -> None:
    x, w = torch.empty(3, 7, device="meta"), torch.empty(5, 7, device="meta")
    y = F.mixed_linear(x, (w, w), torch.empty(2, device="meta"))
    assert y.is_meta and y.shape == (3, 5)


@pytest.mark.parametrize("function", [linear, conv])
def test_flops_are_those_of_the_plain_layer(function: Any) -> None:
    args = arguments()
    with FlopCounterMode(display=False) as counter:
        y = function(*args)
    assert counter.get_total_flops() == 2 * 4 * 7 * 5
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(function(*args), args, torch.ones_like(y))
    assert counter.get_total_flops() == 3 * 2 * 4 * 7 * 5


def test_flops_of_a_convolution() -> None:
    x, w = torch.randn(2, 6, 9, 8, requires_grad=True), torch.randn(4, 3, 3, 2, requires_grad=True)
    counts = []
    for call in (
        lambda: F.mixed_conv2d(x, (w, w), (1.0, 0.5), None, 2, 1, 1, 2),
        lambda: torch.nn.functional.conv2d(x, w, None, 2, 1, 1, 2),
    ):
        with FlopCounterMode(display=False) as counter:
            y = call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * y.numel() * 3 * 3 * 2
    with FlopCounterMode(display=False) as counter:
        F.mixed_conv2d(x, (w, w), (1.0, 0.5), None, 2, 1, 1, 2).sum().backward()
    assert counter.get_total_flops() == 3 * counts[0]


def test_a_dispatch_mode_sees_the_ops_of_double_backward() -> None:
    args = arguments(torch.float64)
    with Ops() as ops:
        first = torch.autograd.grad(linear(*args).square().sum(), args, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), args)
    assert ops.seen["rl_kernels::mixed_linear"] >= 2
    assert ops.seen["rl_kernels::mixed_linear_wgrad"] >= 2


def test_autocast_keeps_float64() -> None:
    args = arguments(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*args).dtype == torch.float64


def test_autocast_of_half_precision_weights() -> None:
    args = arguments(torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert linear(*args).dtype == torch.float16
