"""``Outer`` coefficients through torch: compiled, exported, transformed, under autocast, counted."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rl_kernels as rl
from rl_kernels import functional as F
from tests.ops.test_outer import outer, random
from tests.transforms.common import tracing


def layer(x: Tensor, left: Tensor, right: Tensor, *weights: Tensor) -> Tensor:
    return F.mixed_linear(x, weights, rl.Outer(left, right))


def arguments_of_layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    weights = [random(5, 7, dtype=dtype) for _ in range(2)]
    return random(3, 7, dtype=dtype), *outer(2, 3, (5, 7), torch.float32), *weights


def test_compiled_in_one_graph() -> None:
    arguments = arguments_of_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(*arguments), compiled(*arguments)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), arguments) for y in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_exported() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, coefficients: rl.Outer) -> Tensor:
            return F.mixed_linear(x, [weight], coefficients)

    x, weight, coefficients = torch.randn(3, 7), torch.randn(5, 7), outer(1, 2, (5, 7), torch.float32)
    program = torch.export.export(Layer(), (x, weight, coefficients))
    assert any("mixed_linear" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, weight, coefficients), Layer()(x, weight, coefficients))


def test_transforms() -> None:
    x, coefficients, weights = random(4, 3, 7), outer(2, 3, (5, 7)), [random(5, 7) for _ in range(2)]
    many = [outer(2, 3, (5, 7)) for _ in range(4)]
    stacked = rl.Outer(*(torch.stack(parts) for parts in zip(*many, strict=True)))

    def run(x: Tensor, coefficients: rl.Outer) -> Tensor:
        return F.mixed_linear(x, weights, coefficients)

    each = torch.vmap(run)(x, stacked)
    torch.testing.assert_close(each, torch.stack([run(a, c) for a, c in zip(x, many, strict=True)]))
    gradient = torch.func.grad(lambda c: run(x, c).square().sum())(coefficients)
    expected = torch.autograd.grad(run(x, coefficients).square().sum(), [*coefficients])
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other)
    _, tangent = torch.func.jvp(lambda c: run(x, c), (coefficients,), (many[0],))
    dense = [torch.einsum("nro,nrk->nok", a, b) for a, b in ((many[0].left, coefficients.right),)]
    dense.append(torch.einsum("nro,nrk->nok", coefficients.left, many[0].right))
    torch.testing.assert_close(tangent, x @ sum(c * w for d in dense for c, w in zip(d, weights, strict=True)).t())


def test_autocast() -> None:
    arguments = arguments_of_layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*arguments)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, arguments, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = layer(*(a.double() for a in arguments))
    torch.testing.assert_close(y.double(), exact, rtol=3e-2, atol=3e-1)


def test_a_frozen_source_is_not_differentiated() -> None:
    x, left, right, *weights = arguments_of_layer()
    weights[1].requires_grad_(False)
    y = layer(x, left, right, *weights)
    assert {node.__class__.__name__ for node, _ in y.grad_fn.next_functions if node is not None} == {
        "AccumulateGrad",
        "CatBackward0",
    }
    y.sum().backward()
    assert weights[1].grad is None and weights[0].grad is not None and left.grad is not None


def test_gradients_added_to_what_is_there() -> None:
    first, second = arguments_of_layer(), None
    second = [a.detach().clone().requires_grad_() for a in first]
    for _ in range(2):
        layer(*first).square().sum().backward()
        with rl.accumulate_into_grad():
            layer(*second).square().sum().backward()
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_flops_are_those_of_the_plain_layer() -> None:
    arguments = arguments_of_layer()
    with FlopCounterMode(display=False) as counter:
        layer(*arguments).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 5 * 7


@tracing
def test_traced_by_jit() -> None:
    arguments = [a.detach() for a in arguments_of_layer()]
    traced = torch.jit.trace(layer, tuple(arguments), check_trace=False)
    others = [a.detach() for a in arguments_of_layer()]
    torch.testing.assert_close(traced(*others), layer(*others))


def test_compiled_with_dynamic_shapes_and_ranks() -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, rank in ((3, 2), (4, 5)):
        coefficients = outer(1, rank, (5, 7), torch.float32)
        x, weight = random(tokens, 7, dtype=torch.float32), random(5, 7, dtype=torch.float32)
        torch.testing.assert_close(compiled(x, *coefficients, weight), layer(x, *coefficients, weight))


def test_checkpointed() -> None:
    x, *rest = arguments_of_layer()
    expected = torch.autograd.grad(layer(x, *rest).square().sum(), [x, *rest])
    y = torch.utils.checkpoint.checkpoint(layer, x, *rest, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(y.square().sum(), [x, *rest]), expected, strict=True):
        assert torch.equal(one, other)


def test_on_the_meta_device() -> None:
    x, left, right, *weights = (a.detach().to("meta").requires_grad_() for a in arguments_of_layer())
    gradients = torch.autograd.grad(layer(x, left, right, *weights).sum(), [left, right])
    assert [g.shape for g in gradients] == [left.shape, right.shape]
