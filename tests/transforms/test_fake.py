"""Tensors without data: fake tensors, the meta device, and models that are initialised later."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import rl_kernels as rl
from rl_kernels.nn import ReplacementLinear
from tests.conversion.common import spread_out
from tests.transforms.common import KINDS, Net, gradients, images, net, problem


def looks(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_fakes_look_as_results_do(channels_last: bool) -> None:
    """Shapes, strides and dtypes of a model's output and gradients, without data and without touching any."""
    model = net()
    x = images()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def run(model: nn.Module, x: Tensor) -> dict[str, Any]:
        before = model.convs[0](x)
        after = model.convs[1](before)
        y = model.linears(model.convs[2](after).tanh().mean((2, 3)))
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), before, retain_graph=True)
        return {"output": after, "input's gradient": gradient, "y": y} | gradients(model, y)

    real = run(model, x)
    mode, fake_model = FakeTensorMode(), copy.deepcopy(model)
    for module in fake_model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach())))
    fake_x = mode.from_tensor(x)
    with mode:
        fakes = run(fake_model, fake_x)
    assert all(isinstance(fake, FakeTensor) for fake in fakes.values())
    assert {k: looks(v) for k, v in fakes.items()} == {k: looks(v) for k, v in real.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_shapes(kind: str) -> None:
    """A fake of unknown batch size stays one: the graph serves every batch."""
    mixed, naive, (x, *rest) = problem(kind)
    graph = make_fx(mixed, tracing_mode="symbolic")(x, *rest)
    assert [node.target for node in graph.graph.nodes if "rl_kernels" in str(node.target)]
    other = torch.cat([x, -x, x])
    torch.testing.assert_close(graph(other, *rest), naive(other, *rest))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(a, static_shapes=a is not x) for a in (x, *rest)]
    with mode:
        batch = mixed(*fakes).shape[0]
    assert isinstance(batch, torch.SymInt)
    assert batch.node.expr == fakes[0].shape[0].node.expr


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind: str) -> None:
    mixed, _, arguments = problem(kind, torch.float32, requires_grad=True)
    on_meta = [a.detach().to("meta").requires_grad_() for a in arguments]
    y, real = mixed(*on_meta), mixed(*arguments)
    assert y.is_meta and looks(y) == looks(real)
    found = torch.autograd.grad(y.sum(), on_meta)
    expected = torch.autograd.grad(real.sum(), arguments)
    assert all(g.is_meta for g in found)
    assert [looks(g) for g in found] == [looks(g) for g in expected]


def test_meta_tensors_under_autocast() -> None:
    """autocast of the CPU is not the meta device's."""
    mixed, _, arguments = problem("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(*(a.to("meta") for a in arguments)).dtype == torch.float32


def test_planned_replaced_and_merged_before_there_is_memory() -> None:
    """On the meta device, then given memory, then loaded."""
    with torch.device("meta"):
        model = Net()
    plan = rl.plan(model, every=2)
    model = rl.replace(model, plan)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(images().to("meta")).shape == (3, 4)
    merged = rl.merge(copy.deepcopy(model))
    assert merged(images().to("meta")).shape == (3, 4)

    other, x = net(), images()
    model = model.to_empty(device="cpu")
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(gradients(model, model(x)), gradients(other, other(x)))


def test_meta_models_load_by_assignment() -> None:
    with torch.device("meta"):
        model = Net()
    rl.replace(model, rl.plan(model, every=2))
    other, x = net(), images()
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(model(x), other(x))


def test_sources_whose_initialisation_was_skipped() -> None:
    """torch.nn.utils.skip_init, then weights of their own: the layer reads what was filled in afterwards."""
    sources = [nn.utils.skip_init(nn.Linear, 4, 3) for _ in range(2)]
    layer = ReplacementLinear(sources, init=(0.3, -0.7))
    spread = nn.ModuleList(sources)
    for parameter in spread.parameters():
        nn.init.zeros_(parameter)
    spread_out(spread)
    x = torch.randn(2, 4)
    expected = nn.functional.linear(
        x, 0.3 * sources[0].weight - 0.7 * sources[1].weight, 0.3 * sources[0].bias - 0.7 * sources[1].bias
    )
    torch.testing.assert_close(layer(x), expected)
    assert expected.all()


def test_a_lone_layer_on_meta_keeps_its_options() -> None:
    with torch.device("meta"):
        sources = [nn.Linear(4, 4) for _ in range(3)]
        layer = ReplacementLinear(sources, granularity="channel", constraint="convex")
    assert layer.coefficients.is_meta and layer.coefficients.shape == (3, 4)
    assert layer(torch.randn(2, 4, device="meta")).shape == (2, 4)
    assert layer.merged().weight.is_meta
