"""The four ways a call can take (rl_kernels/ops/ways.py): each one is taken where it should be, and is right."""

from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor

import rl_kernels as rl
from rl_kernels import functional as F
from tests.transforms.common import Ops


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


def test_a_dispatch_mode_sees_the_ops_of_double_backward() -> None:
    args = arguments(torch.float64)
    with Ops() as ops:
        first = torch.autograd.grad(linear(*args).square().sum(), args, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), args)
    assert ops.seen["rl_kernels::mixed_linear"] >= 2
    assert ops.seen["rl_kernels::mixed_linear_wgrad"] >= 2
