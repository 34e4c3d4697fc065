"""ReplacementTransposedLinear, on a stand-in for transformers' Conv1D, registered as that is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.nn import ReplacementLinear, ReplacementTransposedLinear, foreign
from rl_kernels.nn.coefficients import fit
from rl_kernels.testing import peak_memory
from tests.nn.common import assert_accurate, assert_as_by_hand


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Subclass(Conv1D):
    pass


class Other(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_kinds", dict(foreign._kinds))
    foreign.register(f"{__name__}.Conv1D", ReplacementTransposedLinear)


def convs(n: int = 2, dtype: torch.dtype = torch.float64, nf: int = 3, nx: int = 5) -> list[Conv1D]:
    torch.manual_seed(0)
    return [Conv1D(nf, nx).to(dtype) for _ in range(n)]


def given(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def by_last_dimension(name: str, coefficients: Tensor, parameter: Tensor) -> Tensor:
    return coefficients  # (out,) broadcasts over (in, out).


def coefficients(n: int, granularity: str) -> Tensor:
    values = torch.linspace(-0.7, 1.1, n) + 0.05
    return values if granularity == "scalar" else values[:, None] * torch.linspace(0.5, 1.5, 3)


@pytest.mark.parametrize("shape", [(4, 2, 5), (5,), (0, 5)], ids=str)
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_as_by_hand(n: int, granularity: str, shape: tuple[int, ...]) -> None:
    layer = ReplacementTransposedLinear(convs(n), init=coefficients(n, granularity), granularity=granularity)
    assert layer.coefficients.shape == ((n,) if granularity == "scalar" else (n, 3))
    assert_as_by_hand(layer, given(*shape), factor=by_last_dimension)


@pytest.mark.parametrize("backend", ["reference", "streamed", "auto"])
def test_gradients_come_back_as_the_weights_are_stored(backend: str) -> None:
    layer = ReplacementTransposedLinear(convs(), init=(0.3, -0.9))
    x, dy = given(7, 5), torch.randn(7, 3, dtype=torch.float64)
    with rl.use_backend(backend):
        layer(x).backward(dy)
    for source, factor in zip(layer.sources, (0.3, -0.9), strict=True):
        assert source.weight.grad is not None and source.weight.grad.is_contiguous()
        torch.testing.assert_close(source.weight.grad, factor * x.detach().t() @ dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = ReplacementTransposedLinear(convs(2, dtype, 30, 40), init=(0.3, -0.9))
    assert layer.coefficients.dtype == torch.float32
    assert_accurate(layer, given(16, 40, dtype=dtype))


@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_merged(granularity: str) -> None:
    layer = ReplacementTransposedLinear(convs(), init=coefficients(2, granularity), granularity=granularity).eval()
    merged, x = layer.merged(), given(4, 5)
    assert type(merged) is Conv1D and not merged.training
    assert merged.weight.shape == (5, 3) and merged.weight.is_contiguous() and merged.weight.dtype == torch.float64
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_weight_is_the_mixed_one(granularity: str) -> None:
    c = coefficients(2, granularity).double()
    prev, after = convs()
    layer = ReplacementTransposedLinear((prev, after), init=c, granularity=granularity)
    torch.testing.assert_close(layer.weight, c[0] * prev.weight + c[1] * after.weight)
    torch.testing.assert_close(layer.bias, c[0] * prev.bias + c[1] * after.bias)


def test_fit_by_output_channel_finds_the_coefficients_of_a_mix() -> None:
    prev, after, own = convs(3)
    c = coefficients(2, "channel").double()
    with torch.no_grad():
        own.weight.copy_(c[0] * prev.weight + c[1] * after.weight)
    layer = ReplacementTransposedLinear((prev, after), own=own, init="fit", granularity="channel")
    torch.testing.assert_close(layer.coefficients, c)
    layer = ReplacementTransposedLinear((prev, after), own=own, init="fit")
    torch.testing.assert_close(layer.coefficients, fit([(own.weight, [prev.weight, after.weight])]))


def test_state_and_copies() -> None:
    prev, after = convs()
    model = nn.Sequential(prev, ReplacementTransposedLinear((prev, after), init=(0.2, 0.3)), after)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "1.mixing.coefficients", "2.bias", "2.weight"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[1].sources == (twin[0], twin[2])
    assert "nf=3, nx=5, sources=2" in repr(model[1])


def test_no_mixed_weight_is_allocated() -> None:
    layer = ReplacementTransposedLinear(convs(2, torch.float32, 1024, 2048))
    x = torch.randn(1, 2048)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), "cpu") < layer.sources[0].weight.nbytes / 2


def test_wrong_sources() -> None:
    name = rf"{__name__}.Conv1D".replace(".", r"\.")
    expected = rf"expected transformers\.pytorch_utils\.Conv1D or {name}$"
    with pytest.raises(TypeError, match=rf"^sources\[1\]: got torch\.nn\.modules\.linear\.Linear, {expected}"):
        ReplacementTransposedLinear((convs(1)[0], nn.Linear(5, 3)))
    replaced = ReplacementTransposedLinear(convs())
    with pytest.raises(TypeError, match=rf"^sources\[0\]: got .*Linear, which is itself replaced, {expected}"):
        ReplacementTransposedLinear((replaced,))
    with pytest.raises(TypeError, match=r"^sources\[0\]: got Conv1D, expected Linear"):
        ReplacementLinear(convs())
    with pytest.raises(ValueError, match=r"^sources\[1\]: got bias \(4,\), expected \(3,\) as sources\[0\]"):
        ReplacementTransposedLinear((*convs(1), *convs(1, nf=4)))


# In whole models.


class Mlp(nn.Module):
    def __init__(self, made: type[Conv1D] = Conv1D):
        super().__init__()
        self.c_fc, self.c_proj = made(16, 8), made(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(self.c_fc(x).relu())


@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("made", [Conv1D, Subclass])
def test_a_model_of_such_layers_is_replaced_and_merged(made: type[Conv1D], granularity: str) -> None:
    model = nn.Sequential(*(Mlp(made) for _ in range(5))).double()
    plan = rl.plan(model, every=4, granularity=granularity, init="fit")
    assert [layer.path for layer in plan.replaced[0].layers] == ["c_fc", "c_proj"]
    assert plan.replaced[0].coefficients == (2 if granularity == "scalar" else 2 * (16 + 8))
    rl.replace(model, plan)
    assert plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    x = given(3, 8)
    expected = model(x)
    rl.merge(model)
    assert isinstance(model[3].c_fc, Conv1D)
    torch.testing.assert_close(model(x), expected)


def test_targets_know_it_as_linear() -> None:
    model = nn.Sequential(*(nn.Sequential(Conv1D(8, 8), nn.Conv1d(8, 8, 1)) for _ in range(3)))
    for targets in ("linear", "mlp"):
        plan = rl.plan(model, every=2, targets=targets)
        assert [layer.class_name for layer in plan.replaced[0].layers] == ["Conv1D"]
    plan = rl.plan(model, every=2, targets="conv")
    assert [layer.class_name for layer in plan.replaced[0].layers] == ["Conv1d"]


def test_a_subclass_with_a_forward_of_its_own_runs_that() -> None:
    plan = rl.plan(nn.Sequential(*(Mlp(Other) for _ in range(5))))
    assert {layer.kind for layer in plan.replaced[0].layers} == {"ReplacementByForward"}
