import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_kernels.nn import Coefficients, ReplacementConv2d, ReplacementLayer, ReplacementLinear
from tests.nn.common import assert_as_by_hand


class Chain(nn.Module):
    """Three layers of one shape, the middle one replaced."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle = ReplacementLinear.from_neighbours(self.first, self.last, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()).tanh())


NAMES = ["first.weight", "first.bias", "last.weight", "last.bias", "middle.mixing.coefficients"]


def assert_wired(model: Chain) -> None:
    """The middle layer refers to its own model's neighbours, and to none other."""
    assert model.middle.sources == (model.first, model.last)
    x = torch.randn(3, 4)
    before = model(x)
    with torch.no_grad():
        model.last.weight.add_(1.0)
        hidden = model.first(x).tanh()
        expected = torch.nn.functional.linear(
            hidden,
            0.5 * (model.first.weight + model.last.weight),
            0.5 * (model.first.bias + model.last.bias),
        )
        torch.testing.assert_close(model.middle(hidden), expected)
    assert not torch.equal(model(x), before)


# What the layer registers.


def test_own_parameters_are_the_coefficients_alone() -> None:
    model = Chain()
    assert [name for name, _ in model.middle.named_parameters()] == ["mixing.coefficients"]
    assert list(model.middle.children()) == [model.middle.mixing]
    assert sorted(name for name, _ in model.named_parameters()) == sorted(NAMES)
    assert sorted(model.state_dict()) == sorted(NAMES)
    assert len({id(p) for p in model.parameters()}) == len(NAMES)
    assert sum(p.numel() for p in model.middle.parameters()) == 2


def test_convex_coefficients_are_logits() -> None:
    layer = Chain(constraint="convex").middle
    assert list(layer.state_dict()) == ["mixing.logits"]


def test_shared_coefficients_are_not_registered() -> None:
    shared = Coefficients(torch.tensor([0.3, 0.7]))
    layer = ReplacementLinear(neighbours(), coefficients=shared)
    assert list(layer.parameters()) == []
    assert layer.coefficient_module is shared
    assert layer.coefficients is shared.coefficients
    assert "coefficients shared" in repr(layer)


def neighbours(**settings: Any) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(4, 4, **settings) for _ in range(2)]


def test_shared_coefficients_sum_their_gradients() -> None:
    shared = Coefficients(torch.tensor([0.3, 0.7]))
    pair = [ReplacementLinear(neighbours(), coefficients=shared), ReplacementLinear(neighbours(), coefficients=shared)]
    x = torch.randn(3, 4)
    parts = [torch.autograd.grad(layer(x).square().sum(), shared.coefficients)[0] for layer in pair]
    (together,) = torch.autograd.grad(sum(layer(x).square().sum() for layer in pair), shared.coefficients)
    assert float(parts[0].abs().min()) > 0
    torch.testing.assert_close(together, parts[0] + parts[1])


# Copies.


def test_deepcopy_keeps_the_wiring() -> None:
    assert_wired(copy.deepcopy(Chain()))


def test_deepcopy_keeps_shared_coefficients() -> None:
    shared = Coefficients(torch.tensor([0.3, 0.7]))
    model = nn.ModuleDict({"chain": Chain(coefficients=shared), "shared": shared})
    again = copy.deepcopy(model)
    assert again["chain"].middle.coefficient_module is again["shared"]
    assert again["shared"] is not shared


def test_pickle_keeps_the_wiring() -> None:
    model = Chain()
    again = pickle.loads(pickle.dumps(model))
    assert_wired(again)
    assert again.first is not model.first


def test_save_of_the_whole_model_keeps_the_wiring() -> None:
    buffer = io.BytesIO()
    torch.save(Chain(), buffer)
    buffer.seek(0)
    assert_wired(torch.load(buffer, weights_only=False))


def test_deepcopy_of_a_lone_layer_copies_its_sources() -> None:
    layer = Chain().middle
    again = copy.deepcopy(layer)
    assert all(a is not b for a, b in zip(again.sources, layer.sources, strict=True))
    x = torch.randn(3, 4)
    assert torch.equal(again(x), layer(x))


def test_state_dict_round_trip() -> None:
    model = Chain(init=(0.2, 0.9))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = Chain()
    again.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Chain(init=(0.2, 0.9))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    again = Chain()
    assert safetensors.load_model(again, str(tmp_path / "model.safetensors")) == (set(), [])
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))


def test_load_state_dict_by_assignment_is_seen() -> None:
    model, other = Chain(), Chain(init=(0.2, 0.9))
    model.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), other(x))


def test_a_parameter_replaced_in_a_source_is_seen() -> None:
    model = Chain()
    model.first.weight = nn.Parameter(torch.zeros(4, 4))
    torch.testing.assert_close(model.middle.weight, 0.5 * model.last.weight)


def test_functional_call_reaches_the_sources() -> None:
    model = Chain()
    parameters = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    x = torch.randn(3, 4)
    assert not torch.func.functional_call(model, parameters, (x,)).any()


def test_meta_then_to_empty_then_load() -> None:
    with torch.device("meta"):
        model = Chain()
    assert model(torch.randn(3, 4, device="meta")).shape == (3, 4)
    source = Chain(init=(0.2, 0.9))
    model = model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        (lambda m: m.half(), torch.float32),
        (lambda m: m.bfloat16(), torch.float32),
        (lambda m: m.to(torch.bfloat16), torch.float32),
        (lambda m: m.bfloat16().float(), torch.float32),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.double().float(), torch.float32),
    ],
    ids=["half", "bfloat16", "to bfloat16", "bfloat16 and back", "double", "double and back"],
)
@pytest.mark.parametrize("constraint", ["free", "convex"])
def test_coefficients_keep_their_precision(cast: Any, expected: torch.dtype, constraint: Any) -> None:
    model = Chain(constraint=constraint, init=(0.3, 0.7))
    before = model.middle.coefficients.detach().clone()
    cast(model)
    assert model.middle.coefficients.dtype == expected
    torch.testing.assert_close(model.middle.coefficients.detach(), before.to(expected), rtol=0, atol=1e-7)
    x = torch.randn(3, 4, dtype=model.first.weight.dtype)
    assert model(x).dtype == model.first.weight.dtype


# Options.


def test_from_neighbours_is_the_pair() -> None:
    prev, after = neighbours()
    layer = ReplacementLinear.from_neighbours(prev, after, init=(0.2, 0.9))
    assert layer.sources == (prev, after)
    assert layer.a.item() == pytest.approx(0.2)
    assert layer.b.item() == pytest.approx(0.9)
    assert layer.a.data_ptr() == layer.mixing.coefficients.data_ptr()


@pytest.mark.parametrize(("detach", "indices"), [((), ()), ([0], (0,)), ([1], (1,)), ([1, 0, 1], (0, 1))], ids=str)
def test_detach(detach: Any, indices: tuple[int, ...]) -> None:
    layer = ReplacementLinear(neighbours(dtype=torch.float64), detach=detach)
    assert layer.detach == indices
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert_as_by_hand(layer, x)
    layer(x).sum().backward()
    for j, source in enumerate(layer.sources):
        assert (source.weight.grad is None) == (source.bias.grad is None) == (j in indices)
    assert layer.mixing.coefficients.grad is not None


def test_a_frozen_source_gets_no_gradient() -> None:
    layer = ReplacementLinear(neighbours())
    layer.sources[0].requires_grad_(False)
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.sources[0].weight.grad is None
    assert layer.sources[1].weight.grad is not None


def test_training_mode_is_taken_over() -> None:
    prev, after = neighbours()
    own = nn.Linear(4, 4).eval()
    assert ReplacementLinear((prev, after)).training
    assert not ReplacementLinear((prev, after), own=own).training
    prev.eval()
    assert not ReplacementLinear((prev, after)).training


def test_fit_finds_the_mix_that_own_is() -> None:
    prev, after = neighbours(dtype=torch.float64)
    own = nn.Linear(4, 4, dtype=torch.float64)
    with torch.no_grad():
        own.weight.copy_(0.3 * prev.weight - 1.2 * after.weight)
    layer = ReplacementLinear((prev, after), own=own, init="fit")
    expected = torch.tensor([0.3, -1.2], dtype=torch.float64)
    torch.testing.assert_close(layer.coefficients.detach(), expected)


def test_own_weights_are_read_only_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(ReplacementLinear, "fit_pairs", refuse)
    ReplacementLinear(neighbours(), own=nn.Linear(4, 4))
    ReplacementLinear(neighbours(), own=nn.Linear(4, 4), init=torch.tensor([0.1, 0.2]))
    with pytest.raises(AssertionError, match="read"):
        ReplacementLinear(neighbours(), own=nn.Linear(4, 4), init="fit")


def test_a_subclass_may_be_a_source() -> None:
    class Named(nn.Linear):
        pass

    torch.manual_seed(0)
    assert_as_by_hand(ReplacementLinear((Named(4, 4).double(), nn.Linear(4, 4).double())), torch.randn(3, 4).double())


# rebind.


def test_rebind() -> None:
    model = Chain()
    model.last = nn.Linear(4, 4)
    model.middle.rebind(model.first, model.last)
    assert_wired(model)


def test_rebind_after_the_model_was_cast() -> None:
    # The source bound before is out of the model, and stayed in float32.
    model = Chain()
    model.first, model.last = nn.Linear(4, 4), nn.Linear(4, 4)
    model.double()
    model.middle.rebind(model.first, model.last)
    assert model.middle.sources == (model.first, model.last)
    assert model(torch.randn(3, 4).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (lambda: [nn.Linear(4, 4)], ValueError, "sources: got 1 layers, expected 2"),
        (lambda: [nn.Linear(4, 4), nn.ReLU()], TypeError, r"sources\[1\]: got ReLU, expected Linear"),
        (lambda: [nn.Linear(4, 5)] * 2, ValueError, r"sources\[0\]: got bias \(5,\), expected \(4,\) as the one bound"),
        (
            lambda: [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)],
            ValueError,
            r"sources\[1\]: got bias None, expected \(4,\) as sources\[0\]",
        ),
    ],
    ids=["number", "kind", "shape", "each other"],
)
def test_rebind_to_what_does_not_fit(sources: Any, error: type[Exception], message: str) -> None:
    model = Chain()
    with pytest.raises(error, match=message):
        model.middle.rebind(*sources())
    assert model.middle.sources == (model.first, model.last)


# What is put around a source.


class Adapted(nn.Module):
    """A wrapper by the protocol of peft's: a layer whose weight it may have merged its own into, or not use at all."""

    adapter_layer_names = ("adapter",)

    def __init__(self, base_layer: nn.Module, merged: bool = False, disable_adapters: bool = False):
        super().__init__()
        self.base_layer, self.adapter = base_layer, nn.Linear(4, 4)
        self.merged, self.disable_adapters = merged, disable_adapters


def placed() -> Chain:
    """A chain whose layer knows where its sources stand, as ``replace`` leaves it."""
    model = Chain()
    model.middle.place_sources((model, "first"), (model, "last"))
    return model


@pytest.mark.parametrize(("merged", "disabled"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["first", "last"])
def test_adapters_around_a_source_are_refused(name: str, merged: bool, disabled: bool) -> None:
    """Neither merged nor disabled, or merged and about to be taken out again: the mix would leave them out."""
    model = placed()
    setattr(model, name, Adapted(getattr(model, name), merged, disabled))
    message = rf"^sources: got a Linear \({name} of Chain\) with adapters \(tests\.nn\.test_sources\.Adapted\), "
    for layer in (model.middle, copy.deepcopy(model).middle):
        for use in (lambda layer=layer: layer(torch.randn(2, 4)), lambda layer=layer: layer.bias, layer.merged):
            with pytest.raises(RuntimeError, match=message):
                use()


@pytest.mark.parametrize(("merged", "disabled"), [(True, False), (False, True)])
def test_adapters_that_are_merged_or_disabled_leave_a_source_as_it_is(merged: bool, disabled: bool) -> None:
    model, x = placed(), torch.randn(2, 4)
    expected = model.middle(x)
    model.first = Adapted(model.first, merged, disabled)
    torch.testing.assert_close(model.middle(x), expected)


def test_a_source_that_was_rebound_is_looked_for_no_more() -> None:
    """Where it stood before is not where the new one stands."""
    model, other = placed(), nn.Linear(4, 4)
    model.middle.rebind(other, model.last)
    model.first = Adapted(model.first)
    assert model.middle(torch.randn(2, 4)).shape == (2, 4)


def test_adapters_are_no_source() -> None:
    with pytest.raises(TypeError, match=r"^sources\[0\]: got Adapted, expected Linear"):
        ReplacementLinear((Adapted(nn.Linear(4, 4)), nn.Linear(4, 4)))


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sources": []}, ValueError, "sources: got none, expected one or more"),
        ({"granularity": "row"}, ValueError, "granularity: got 'row', expected one of scalar, channel"),
        ({"constraint": "positive"}, ValueError, "constraint: got 'positive', expected one of free, convex"),
        ({"init": "half"}, ValueError, "init: got 'half', expected 'fit'"),
        ({"init": "fit"}, ValueError, "init: got 'fit' without own"),
        ({"init": (1.0, 2.0, 3.0)}, ValueError, r"init: got shape \(3,\), expected \(2,\)"),
        ({"init": (1.5, -0.5), "constraint": "convex"}, ValueError, "init: .* expected positive coefficients with sum"),
        ({"detach": [2]}, ValueError, r"detach: got \[2\], expected indices of the 2 sources"),
        ({"own": nn.ReLU()}, TypeError, "own: got ReLU, expected Linear"),
        ({"own": nn.Linear(4, 5)}, ValueError, r"own: got bias \(5,\), expected \(4,\) as sources\[0\]"),
        ({"own": Chain().middle}, TypeError, "own: got ReplacementLinear, which is itself replaced"),
        ({"coefficients": torch.ones(2)}, TypeError, "coefficients: got Tensor, expected a Coefficients module"),
        (
            {"coefficients": Coefficients(torch.ones(3))},
            ValueError,
            r"coefficients: got shape \(3,\), expected \(2,\) as sources",
        ),
        (
            {"coefficients": Coefficients(torch.ones(2)), "granularity": "channel"},
            ValueError,
            "granularity: got 'channel' with shared coefficients",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReplacementLinear(**{"sources": neighbours(), **options})


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: nn.Conv1d(4, 4, 1), TypeError, "got Conv1d, expected Linear"),
        (lambda: Chain().middle, TypeError, "got ReplacementLinear, which is itself replaced; expected Linear"),
        (lambda: nn.Linear(5, 4), ValueError, r"got weight \(4, 5\), expected \(4, 4\) as sources\[0\]"),
        (lambda: nn.Linear(4, 4, bias=False), ValueError, r"got bias None, expected \(4,\)"),
        (lambda: nn.Linear(4, 4).double(), ValueError, r"got dtype torch.float64, expected torch.float32"),
        (lambda: nn.Linear(4, 4, device="meta"), ValueError, "got device meta, expected cpu"),
    ],
    ids=["kind", "replaced", "shape", "bias", "dtype", "device"],
)
def test_sources_that_do_not_fit(other: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"sources\[1\]: " + message):
        ReplacementLinear((nn.Linear(4, 4), other()))


def test_the_base_class_merges_nothing() -> None:
    class Bare(ReplacementLayer):
        source_type = (nn.Linear,)

    with pytest.raises(NotImplementedError):
        Bare(neighbours()).merged()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compiles_in_one_graph(kind: str) -> None:
    torch.manual_seed(0)
    sources: list[Any]
    if kind == "linear":
        sources, layer_type, x = neighbours(), ReplacementLinear, torch.randn(3, 4)
    else:
        sources, layer_type, x = [nn.Conv2d(2, 2, 3) for _ in range(2)], ReplacementConv2d, torch.randn(1, 2, 5, 5)
    layer = layer_type(sources)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    parameters = [sources[0].weight, layer.mixing.coefficients]
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.testing.assert_close(found, expected)
