"""ReplacementByForward: a class's own forward on mixed parameters, against that class on parameters mixed by hand."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as aten
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, weight_norm

from rl_kernels.nn import Coefficients, ReplacementByForward, ReplacementLinear
from rl_kernels.nn.wrapped import numbers_stored, why_not_wrapped
from tests.nn.common import assert_accurate, assert_as_by_hand


class TheirRMSNorm(nn.Module):
    """As transformers' LlamaRMSNorm and its kin."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ShiftedNorm(TheirRMSNorm):
    """As Gemma's: 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class ScaledStdConv(nn.Conv2d):
    """As timm's ScaledStdConv2d: the weight is standardised, then scaled by a gain of four dimensions."""

    def __init__(self, channels: int, **settings: Any):
        super().__init__(channels, channels, 3, padding=1, **settings)
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        weight = aten.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)
        return aten.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class TheirLinear(nn.Linear):
    """As FalconLinear, with a factor that is a number."""

    def __init__(self, size: int, bias: bool = True):
        super().__init__(size, size, bias)
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, twice: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        y = self.factor * (x @ self.weight.T)
        y = y if self.bias is None else y + self.bias
        return (y, 2 * y) if twice else y


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: statistics, an activation inside, and a buffer that is put, not written to."""

    def __init__(self, size: int, **settings: Any):
        super().__init__(size, **settings)
        self.act = nn.Sequential(nn.Dropout(0.5), nn.ReLU())
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean()
        return self.act(super().forward(x))


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "rms": (lambda: TheirRMSNorm(6), (4, 3, 6)),
    "shifted": (lambda: ShiftedNorm(6), (4, 3, 6)),
    "conv": (lambda: ScaledStdConv(6, groups=2), (2, 6, 4, 3)),
    "linear": (lambda: TheirLinear(6), (4, 3, 6)),
    "linear without bias": (lambda: TheirLinear(6, bias=False), (4, 6)),
    "batch norm": (lambda: BatchNormAct(6), (4, 6, 3, 2)),
    "plain linear": (lambda: nn.Linear(6, 6), (4, 6)),
    "prelu": (lambda: nn.PReLU(6), (4, 6, 3)),
}
ALL = pytest.mark.parametrize("kind", KINDS)
BY_CHANNEL = ("rms", "shifted", "conv", "batch norm", "plain linear", "prelu")


def layers(kind: str, n: int = 2, dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(0)
    found = [KINDS[kind][0]().to(dtype) for _ in range(n)]
    for layer in found:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) + 1.5)
    return found


def given(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(KINDS[kind][1], dtype=dtype).requires_grad_()


def replaced(kind: str, n: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> ReplacementByForward:
    return ReplacementByForward(layers(kind, n, dtype), **{"init": [0.3 + 0.4 * j for j in range(n)], **options})


# Values and gradients.


@ALL
@pytest.mark.parametrize("n", [1, 2, 3])
def test_as_by_hand(kind: str, n: int) -> None:
    assert_as_by_hand(replaced(kind, n), given(kind))
    assert_as_by_hand(replaced(kind, n).eval(), given(kind))


@pytest.mark.parametrize("kind", BY_CHANNEL)
def test_channel_granularity(kind: str) -> None:
    init = torch.tensor([[0.3], [0.9]]) * torch.linspace(0.5, 1.5, 6)
    layer = replaced(kind, init=init, granularity="channel").eval()
    assert layer.coefficients.shape == (2, 6)
    assert_as_by_hand(layer, given(kind))


@pytest.mark.parametrize("kind", ["rms", "conv", "linear"])
def test_half_precision_and_shared_coefficients(kind: str) -> None:
    assert_accurate(replaced(kind, dtype=torch.float32), given(kind, torch.float32))
    half = replaced(kind, dtype=torch.bfloat16)
    assert half.coefficients.dtype == torch.float32 and half(given(kind, torch.bfloat16)).dtype == torch.bfloat16
    shared = Coefficients(torch.tensor([0.3, 0.7], dtype=torch.float64))
    layer = replaced(kind, init=None, coefficients=shared, detach=[0])
    layer.sources[1].weight.requires_grad_(False)
    assert list(layer.parameters()) == []
    assert_as_by_hand(layer, given(kind))
    convex = replaced(kind, init=(0.25, 0.75), constraint="convex")
    assert_as_by_hand(convex, given(kind))


def test_arguments_and_results_are_the_class_s() -> None:
    layer, x = replaced("linear"), given("linear")
    y, double = layer(x, twice=True)
    torch.testing.assert_close(double, 2 * y)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("kind", ["rms", "conv", "linear"])
def test_fit(kind: str) -> None:
    """Matrices alone where there are some, every vector elsewhere."""
    *sources, own = layers(kind, 3)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if kind == "rms" or parameter.dim() > 1:
                parameter.copy_(0.2 * getattr(sources[0], name) + 0.5 * getattr(sources[1], name))
    layer = ReplacementByForward(sources, own=own, init="fit")
    torch.testing.assert_close(layer.coefficients.detach(), torch.tensor([0.2, 0.5], dtype=torch.float64))
    assert len(ReplacementByForward.fit_pairs(own, sources)) == 1


# What the layer has of the one that it replaces.


def test_settings_are_those_of_own() -> None:
    own = TheirRMSNorm(6, eps=0.5).double()
    layer = ReplacementByForward(layers("rms"), own=own, init=(0.3, 0.9))
    assert layer.variance_epsilon == 0.5 and replaced("rms").variance_epsilon == 1e-6
    assert_as_by_hand(layer, given("rms"), plain=own)
    assert "TheirRMSNorm, (6,), eps=0.5, sources=2" in repr(layer)
    for name in ("running_mean", "unknown", "_shelf"):
        assert not hasattr(layer, name)


@ALL
def test_parameters_are_read_as_mixed(kind: str) -> None:
    layer = replaced(kind)
    for name, parameter in layer.sources[0].named_parameters():
        expected = 0.3 * parameter + 0.7 * layer.sources[1].get_parameter(name)
        torch.testing.assert_close(getattr(layer, name), expected)
    assert [name for name, _ in layer.named_parameters()] == ["mixing.coefficients"]


def test_buffers_are_the_layer_s_own() -> None:
    """Copied, updated, moved, saved, loaded and copied again under the plain layer's names."""
    *sources, own = layers("batch norm", 3)
    own.running_mean.fill_(2.0)
    layer = ReplacementByForward(sources, own=own, init=(0.3, 0.7))
    assert sorted(layer.state_dict()) == ["mixing.coefficients", "num_batches_tracked", "running_mean", "running_var"]
    plain = copy.deepcopy(own)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    for step in range(4):
        x = given("batch norm").detach() * (step + 1)
        for module in (layer, plain):
            module.train(step < 3)
            assert module.act[0].training == (step < 3)
            module.act[0].p = 0.0
        torch.testing.assert_close(layer(x), plain(x))
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(layer.get_buffer(name), buffer)
    assert float(own.running_mean[0]) == 2.0 and int(sources[0].num_batches_tracked) == 0
    again = ReplacementByForward(sources, init=(0.1, 0.1))
    assert not again.running_mean.any()
    again.load_state_dict(layer.state_dict())
    again.act[0].p = 0.0
    torch.testing.assert_close(again.eval()(x), layer(x))
    assert layer.float().running_mean.dtype == torch.float32
    assert dict(layer.named_buffers())["last"].dtype == torch.float32


@ALL
def test_copies(kind: str) -> None:
    """deepcopy, pickle, torch.save, of a model with both ends, and in training afterwards."""
    first, last = layers(kind)
    model = nn.Sequential(first, ReplacementByForward((first, last), init=(0.3, 0.7)), last).eval()
    x = given(kind)
    y = model[1](x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)
    for twin in copies:
        assert twin[1].sources[0] is twin[0]
        assert torch.equal(twin[1](x), y)
        twin.train()
        twin[1](x)
        if kind == "batch norm":
            assert twin[1].running_mean.any() and not model[1].running_mean.any()


@ALL
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_merged(kind: str, training: bool) -> None:
    layer, x = replaced(kind).train(training), given(kind)
    if kind == "batch norm":
        layer.act[0].p = 0.0
    merged = layer.merged()
    assert type(merged) is type(layer.sources[0]) and merged.training == training
    torch.testing.assert_close(merged(x), layer(x))
    assert all(isinstance(parameter, nn.Parameter) for parameter in merged.parameters())
    assert merged.state_dict().keys() == layer.sources[0].state_dict().keys()


def test_hooks_stay_behind() -> None:
    *sources, own = layers("rms", 3)
    heard: list[Any] = []
    own.register_forward_hook(lambda *_: heard.append(1))
    ReplacementByForward(sources, own=own)(given("rms"))
    assert heard == []


def test_rebind() -> None:
    layer, others = replaced("conv"), layers("conv", 4)[2:]
    layer.rebind(*others)
    assert_as_by_hand(layer, given("conv"))
    with pytest.raises(ValueError, match=r"sources\[0\]: got class .*TheirLinear, expected .*ScaledStdConv as the one"):
        layer.rebind(*layers("linear"))


# Transforms.


@pytest.mark.parametrize("kind", ["rms", "conv", "linear", "batch norm"])
def test_compile(kind: str) -> None:
    torch._dynamo.reset()  # All kinds are one forward, which is compiled only so many times.
    layer, x = replaced(kind).eval(), given(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    leaves = [x, layer.mixing.coefficients, *layer.sources[0].parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    for gradient, expected in zip(found, torch.autograd.grad(layer(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_compiled_statistics() -> None:
    torch._dynamo.reset()
    layer, x = replaced("batch norm"), given("batch norm")
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x)
        twin(x)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer)


@pytest.mark.parametrize("kind", ["conv", "batch norm"])
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
def test_export(kind: str, strict: bool) -> None:
    first, last = layers(kind)
    model = nn.Sequential(first, ReplacementByForward((first, last), init=(0.3, 0.7)), last).eval()
    x = given(kind).detach()
    shapes = {"input": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict).module()
    other = torch.cat([x, -x])
    torch.testing.assert_close(exported(other), model(other))


@pytest.mark.parametrize("kind", ["rms", "conv", "linear"])
def test_functional_transforms(kind: str) -> None:
    layer, x = replaced(kind), given(kind).detach()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(layer(x).square().sum(), layer.mixing.coefficients)[0]
    torch.testing.assert_close(grad(loss)(parameters, x)["mixing.coefficients"], expected)
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, x]))["mixing.coefficients"]
    torch.testing.assert_close(each, torch.stack([expected, expected]))
    _, tangent = jvp(lambda x: layer(x), (x,), (torch.ones_like(x),))
    step = 1e-6
    torch.testing.assert_close(tangent, (layer(x + step) - layer(x - step)) / (2 * step), rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    layer, x = replaced("linear", dtype=torch.float32), given("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), layer.sources[0](x)
    assert y.dtype == plain.dtype


# What it refuses.


class Holder(nn.Module):
    def __init__(self, **attributes: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, value in attributes.items():
            setattr(self, name, value(self) if callable(value) and not isinstance(value, nn.Module) else value)


def patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


REFUSED: dict[str, tuple[Any, str]] = {
    "replaced": (lambda: ReplacementLinear([nn.Linear(3, 3)]), "it is itself replaced"),
    "nothing to mix": (lambda: nn.ReLU(), "it has no parameters of its own"),
    "container": (lambda: nn.Sequential(nn.Linear(3, 3)), "it has no parameters of its own"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "modules in it have parameters"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "modules in it have parameters"),
    "embedding": (lambda: nn.Embedding(3, 3), "it looks up a few rows"),
    "recurrent": (lambda: nn.LSTM(3, 3), "it holds its parameters twice, as _flat_weights"),
    "lazy": (lambda: nn.LazyLinear(3), "its weight is uninitialised"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "its weight is torch.complex64"),
    "float8": (lambda: Holder(weight=lambda _: nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))), "its weight is"),
    "patched": (patched, "its forward is not its class's"),
    "beside": (lambda: Holder(others=[nn.Linear(3, 3)]), "it refers to another module, as others"),
    "of a graph": (lambda: Holder(twice=lambda self: 2 * self.weight), "a tensor that autograd made, as twice"),
    "named": (lambda: Holder(sources=nn.ReLU()), "its sources has a name that replaced layers use"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, reason = REFUSED[name]
    assert reason in why_not_wrapped(make())
    with pytest.raises((TypeError, ValueError), match=r"sources\[0\]: got .*(cannot be mixed: |is itself replaced)"):
        ReplacementByForward([make()])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_make() -> None:
    assert "WeightNorm of torch.nn.utils.weight_norm makes its weight" in why_not_wrapped(weight_norm(nn.Linear(3, 3)))


def test_sources_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"sources\[1\]: got class .*ShiftedNorm, expected .*TheirRMSNorm as sources"):
        ReplacementByForward([TheirRMSNorm(6), ShiftedNorm(6)])
    with pytest.raises(ValueError, match=r"sources\[1\]: got weight \(5,\), expected \(6,\) as sources\[0\]"):
        ReplacementByForward([TheirRMSNorm(6), TheirRMSNorm(5)])
    with pytest.raises(ValueError, match=r"own: got bias None, expected \(6,\)"):
        ReplacementByForward([TheirLinear(6)], own=TheirLinear(6, bias=False))
    with pytest.raises(
        ValueError, match=r"granularity: got 'channel', expected 'scalar' for .*TheirLinear: its parameters"
    ):
        ReplacementByForward([TheirLinear(6)], granularity="channel")
    with pytest.raises(TypeError, match=r"sources\[0\]: got int; expected a plain layer"):
        ReplacementByForward([3])  # type: ignore[list-item]


def test_what_can_be_wrapped_and_what_it_stores() -> None:
    assert all(why_not_wrapped(make()) == "" for make, _ in KINDS.values())
    stored = {kind: numbers_stored(make()) for kind, (make, _) in KINDS.items()}
    assert stored["rms"] == stored["batch norm"] == stored["prelu"] == 0
    assert stored["linear"] == 36 and stored["conv"] == 6 * 3 * 9


@pytest.mark.parametrize("kind", ["rms", "conv"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_what_is_merged_is_trained_where_it_was(kind: str, frozen: bool) -> None:
    layer = replaced(kind)
    for module in (layer, *layer.sources):
        module.requires_grad_(not frozen)
    assert {parameter.requires_grad for parameter in layer.merged().parameters()} == {not frozen}
