"""torch.func's and torch.autograd's transforms: they give on a mixed layer what they give on the naive formula."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import functional as autograd_functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from rl_kernels._supported import release
from tests.transforms.common import KINDS, Ops, Problem, images, loss_of, net, problem, tracing

EVERYTHING = tuple(range(6))


def tangents(values: Any, seed: int = 1, batch: tuple[int, ...] = ()) -> Any:
    """Random tensors shaped as ``values``, or a batch of each."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*batch, *v.shape, dtype=v.dtype, generator=generator) for v in values)


def leaves(values: tuple[Tensor, ...]) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def in_dims(*batched: int) -> tuple[int | None, ...]:
    return tuple(0 if j in batched else None for j in EVERYTHING)


def over(*batched: int, **options: Any) -> Callable[..., Any]:
    """vmap over some of the arguments."""

    def transform(function: Any, arguments: Any) -> Any:
        many = [torch.stack([a, -a, 2 * a]) if j in batched else a for j, a in enumerate(arguments)]
        return vmap(function, in_dims(*batched), **options)(*many)

    return transform


def per_sample(function: Any, arguments: Any) -> Any:
    x, *rest = arguments
    return vmap(grad(loss_of(function), EVERYTHING), in_dims(0))(torch.stack([x, 2 * x]), *rest)


def backward_through_vmap(function: Any, arguments: Any) -> Any:
    made = leaves(arguments)
    return torch.autograd.grad(over(1, 2)(function, made).pow(3).sum(), made)


def batched_backward(function: Any, arguments: Any) -> Any:
    made = leaves(arguments)
    y = function(*made)
    (dy,) = tangents([y], batch=(3,))
    once = torch.autograd.grad(y, made, dy, is_grads_batched=True, retain_graph=True)
    return once, vmap(lambda dy: torch.autograd.grad(y, made, dy, retain_graph=True))(dy)


def batched_double_backward(function: Any, arguments: Any) -> Any:
    made = leaves(arguments)
    first = torch.autograd.grad(loss_of(function)(*made), made, create_graph=True)
    vectors = tangents(arguments, batch=(3,))
    batched = torch.autograd.grad(first, made, vectors, is_grads_batched=True, retain_graph=True)
    return batched, vmap(lambda *v: torch.autograd.grad(first, made, v, retain_graph=True))(*vectors)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, a: grad(loss_of(f), EVERYTHING)(*a),
    "vjp": lambda f, a: vjp(f, *a)[1](tangents([f(*a)])[0]),
    "jvp": lambda f, a: jvp(f, a, tangents(a)),
    "linearize": lambda f, a: linearize(f, *a)[1](*tangents(a)),
    "jacrev": lambda f, a: jacrev(f, EVERYTHING)(*a),
    "jacfwd": lambda f, a: jacfwd(f, EVERYTHING)(*a),
    "jacrev of jacrev": lambda f, a: jacrev(jacrev(loss_of(f), (0, 1, 2)), (0, 1, 2))(*a),
    "hessian": lambda f, a: hessian(loss_of(f), EVERYTHING)(*a),
    "vmap over x": over(0),
    "vmap over coefficients": over(1),
    "vmap over a source": over(2),
    "vmap over everything": over(*EVERYTHING),
    "vmap in chunks": over(0, 1, chunk_size=2),
    "vmap of vmap": lambda f, a: over(0)(lambda *b: over(1)(f, b), a),
    "gradients of each sample": per_sample,
    "backward through vmap": backward_through_vmap,
    "batched backward": batched_backward,
    "batched double backward": batched_double_backward,
    "autograd's jacobian, vectorized": lambda f, a: autograd_functional.jacobian(f, a, vectorize=True),
    "autograd's hessian, vectorized": lambda f, a: autograd_functional.hessian(loss_of(f), a, vectorize=True),
    "autograd's hessian, forward": lambda f, a: autograd_functional.hessian(
        loss_of(f), a, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd's vhp": lambda f, a: autograd_functional.vhp(loss_of(f), a, tangents(a)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_the_naive_formula(name: str, kind: str) -> None:
    mixed, naive, arguments = problem(kind)
    found, expected = (TRANSFORMS[name](function, arguments) for function in (mixed, naive))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "gradients of each sample", "backward through vmap"])
def test_a_source_with_a_coefficient_of_zero(name: str, kind: str) -> None:
    """It adds nothing to the result, and its coefficient still has a gradient."""
    mixed, naive, (x, _, *sources) = problem(kind)
    arguments = (x, torch.tensor([0.0, 0.7], dtype=x.dtype), *sources)
    found, expected = (TRANSFORMS[name](function, arguments) for function in (mixed, naive))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "kind"), [("grad", "conv"), ("jvp", "linear"), ("vmap over a source", "linear")])
def test_compiled_transforms(name: str, kind: str) -> None:
    mixed, naive, arguments = problem(kind)
    directions = tangents(arguments)

    def run(function: Any, *arguments: Tensor) -> Any:
        return jvp(function, arguments, directions) if name == "jvp" else TRANSFORMS[name](function, arguments)

    compiled = torch.compile(lambda *a: run(mixed, *a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), run(naive, *arguments))


def test_what_torch_cannot_transform() -> None:
    """func.grad of a function that was compiled as one graph: torch refuses it for its own layers too."""
    mixed, naive, arguments = problem("linear")
    for function in (mixed, naive):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match=r"func\.grad\(compiled_fn\) function from eager mode is not supported"):
            grad(loss_of(compiled))(*arguments)


# Forward mode: a tangent that is lost is a zero that nobody sees.


def traced(function: Any, arguments: Any) -> Any:
    return torch.jit.trace(function, arguments, check_trace=False)


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "eager": lambda f, a: f,
    "compiled": lambda f, a: torch.compile(f, backend="aot_eager", fullgraph=True),
    "exported": lambda f, a: torch.export.export(Called(f), a).module(),
    "make_fx": lambda f, a: make_fx(f)(*a),
    "traced": traced,
    "checkpointed": lambda f, a: lambda *b: checkpoint(f, *b, use_reentrant=False),
}


def tangent_of(function: Any, arguments: Any, directions: Any, modes: Any = None) -> Tensor | None:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, t) for a, t in zip(arguments, directions, strict=True)]
        if modes is None:
            return forward_ad.unpack_dual(function(*duals)).tangent
        with modes:
            return forward_ad.unpack_dual(function(*duals)).tangent


_TORCH = release(torch.__version__)
REFUSED = [way for way, refuses in (("checkpointed", _TORCH < (2, 12)), ("compiled", _TORCH >= (2, 14))) if refuses]
"""Ways in which this torch refuses forward mode of plain layers, too; none of torch 2.12 and 2.13."""


@tracing
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode(way: str, kind: str) -> None:
    """Of one argument at a time, with and without gradients asked for."""
    mixed, naive, arguments = problem(kind)
    if way in REFUSED:
        try:
            tangent_of(WAYS[way](naive, arguments), arguments, tangents(arguments))
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} refuses it of plain layers, too: {str(error).splitlines()[0]}")
    function = WAYS[way](mixed, arguments)
    for requires_grad in (False, True) if way != "compiled" else (False,):
        given = [a.clone().requires_grad_(requires_grad) for a in arguments]
        for j in EVERYTHING:
            directions = [t * float(k == j) for k, t in enumerate(tangents(arguments))]
            expected = jvp(naive, arguments, tuple(directions))[1]
            torch.testing.assert_close(tangent_of(function, given, directions), expected)


def test_forward_mode_of_a_compiled_backward() -> None:
    """torch has no forward mode of what it compiled with a backward, of its own layers neither: it says so."""
    mixed, naive, arguments = problem("linear", requires_grad=True)
    for function in (mixed, naive):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        # The latter since torch 2.14.
        with pytest.raises(
            RuntimeError, match=r"must implement the jvp function|Attempted to wrap a dual tensor input"
        ):
            tangent_of(compiled, arguments, tangents(arguments))


@pytest.mark.parametrize(
    "modes",
    [torch.no_grad(), Ops(), torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "dispatch mode", "autocast"],
)
def test_forward_mode_in_other_modes(modes: Any) -> None:
    mixed, naive, arguments = problem("linear")
    found, expected = (tangent_of(f, arguments, tangents(arguments), modes) for f in (mixed, naive))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_over_backward(kind: str) -> None:
    """Graphs that were made without duals, and meet them in backward, first order and second."""
    mixed, naive, arguments = problem(kind)
    results = []
    for function in (mixed, naive):
        made = leaves(arguments)
        y = function(*made)
        first = torch.autograd.grad(y.pow(3).sum(), made, create_graph=True)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(*tangents([y]), *tangents([y], seed=2))
            vectors = map(forward_ad.make_dual, tangents(made), tangents(made, seed=2))
            once = torch.autograd.grad(y, made, dy, retain_graph=True)
            twice = torch.autograd.grad(first, made, tuple(vectors))
            results.append([forward_ad.unpack_dual(g).tangent for g in (*once, *twice)])
    torch.testing.assert_close(*results)


# Graphs that were captured hold the registered ops.


def captured_gradient(case: Problem) -> Any:
    """A graph of the forward op and both gradients'."""
    graph = make_fx(grad_by_autograd(case.mixed))(*case.arguments)
    kind = "linear" if case.arguments[0].dim() == 2 else "conv"
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {f"rl_kernels.mixed_{kind}{op}.default" for op in ("", "_dgrad", "_wgrad")} <= targets
    for node in graph.graph.nodes:  # These would drop the tangents, whatever follows.
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.recompile()
    return graph


def grad_by_autograd(function: Any) -> Any:
    def run(*arguments: Tensor) -> Any:
        made = [a.detach().requires_grad_() for a in arguments]
        return torch.autograd.grad(function(*made).pow(3).sum(), made)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_a_captured_gradient(kind: str) -> None:
    case = problem(kind)
    graph, expected = captured_gradient(case), grad(loss_of(case.naive), EVERYTHING)
    directions = tangents(case.arguments)
    wanted = jvp(expected, case.arguments, directions)[1]
    torch.testing.assert_close(jvp(graph, case.arguments, directions)[1], list(wanted))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, case.arguments, directions)
        torch.testing.assert_close([forward_ad.unpack_dual(g).tangent for g in graph(*duals)], list(wanted))
    for transform in (over(0), over(1, 2), lambda f, a: jacrev(lambda *b: f(*b)[2], EVERYTHING)(*a)):
        torch.testing.assert_close(transform(graph, case.arguments), transform(expected, case.arguments))


@pytest.mark.parametrize("name", ["grad", "hessian", "vmap over x", "gradients of each sample"])
def test_transforms_of_an_exported_function(name: str) -> None:
    mixed, naive, arguments = problem("conv")
    module = torch.export.export(Called(mixed), arguments).module()
    torch.testing.assert_close(TRANSFORMS[name](module, arguments), TRANSFORMS[name](naive, arguments))


def test_a_part_of_a_wgrad_under_forward_mode() -> None:
    """What is not asked for stays an empty tensor."""
    x, c, w1, w2, b1, b2 = problem("linear").arguments
    dy = torch.randn(4, 4, dtype=torch.float64)

    def run(x: Tensor) -> Any:
        return torch.ops.rl_kernels.mixed_linear_wgrad(
            dy, x, [w1, w2], c, [b1, b2], [False, True], False, [True, False]
        )

    (dweights, dc, dbiases), (t_weights, t_c, _) = jvp(run, (x,), (x,))
    assert [g.numel() for g in (*dweights, dc, *dbiases)] == [0, 16 + 8, 0, 4, 0]
    torch.testing.assert_close(t_weights[1], dweights[1])
    assert t_c.numel() == 0


# Models.


def test_functional_call_and_gradients_of_each_sample() -> None:
    """The sources' parameters, given by name, reach the replaced layers."""
    model, x = net(torch.float64), images(dtype=torch.float64)
    parameters = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).pow(3).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    model.load_state_dict(parameters)
    for j, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).pow(3).sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close({name: g[j] for name, g in found.items()}, expected)


def test_an_ensemble_of_models() -> None:
    models, x = [net(torch.float64, seed) for seed in range(3)], images(dtype=torch.float64)
    parameters, buffers = stack_module_state(models)
    assert sorted(parameters) == sorted(name for name, _ in models[0].named_parameters())
    skeleton = copy.deepcopy(models[0]).to("meta")
    run = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))
    y = run(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([model(x) for model in models]))
    found = torch.autograd.grad(y.pow(3).sum(), list(parameters.values()))
    for model in models:
        model(x).pow(3).sum().backward()
    expected = [torch.stack([m.get_parameter(name).grad for m in models]) for name in parameters]
    torch.testing.assert_close(list(found), expected)
