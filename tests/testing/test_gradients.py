import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

import rl_kernels as rl
from rl_kernels import nn as rnn
from rl_kernels.backends import Case, registered, selection, streamed
from rl_kernels.testing import assert_as_accurate, check_gradients, compare
from tests.backends.planted import Planted


def chain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    first, last = nn.Linear(13, 13), nn.Linear(13, 13)
    return nn.Sequential(
        first, nn.GELU(), rnn.ReplacementLinear.from_neighbours(first, last), nn.Dropout(0.2), last
    ).to(dtype)


def lone_conv() -> nn.Module:
    prev, next = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    return rnn.ReplacementConv2d.from_neighbours(prev, next, granularity="channel", constraint="convex")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_passes(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    model = chain(dtype)
    state = copy.deepcopy(model.state_dict())
    report = check_gradients(model, torch.randn(5, 13, dtype=dtype))
    case = Case("mixed_linear", "cpu", dtype)
    assert set(report.comparisons) == {
        backend.name for backend in registered() if selection.why_not(backend, case) is None
    }
    printed = capsys.readouterr().out
    assert "gradient of 2.mixing.coefficients: RMS ratio" in printed and "gradient of 0.weight" in printed
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_lone_layer_is_checked_by_its_sources_too() -> None:
    report = check_gradients(lone_conv(), torch.randn(2, 4, 5, 5), verbose=False)
    names = {row.name for row in report.comparisons["streamed"]}
    assert {"gradient of sources[0].weight", "gradient of sources[1].bias", "gradient of mixing.logits"} <= names
    assert "output 0" in names and "gradient of input 0" in names


def test_norms_with_affine_parameters_of_their_own() -> None:
    prev, next = nn.LayerNorm(6), nn.LayerNorm(6)
    layer = rnn.ReplacementLayerNorm.from_neighbours(prev, next, affine="own")
    report = check_gradients(layer, torch.randn(3, 6), verbose=False)
    assert "gradient of weight" in {row.name for row in report.comparisons["reference"]}


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = streamed._GradientPanels.finish

    def wrong(self: Any, g: Tensor, *index: slice) -> None:
        right(self, g * 1.001, *index)

    monkeypatch.setattr(streamed._GradientPanels, "finish", wrong)
    with pytest.raises(AssertionError, match=r"backend 'streamed'(.|\n)*gradient of 0.weight.*FAILS"):
        check_gradients(chain(), torch.randn(5, 13), gradcheck=False, verbose=False)


def test_a_wrong_formula_fails_gradcheck() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 1.01 * dy

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain()

        def forward(self, x: Tensor) -> Tensor:
            return Wrong.apply(self.inner(x))

    with pytest.raises(GradcheckError):
        check_gradients(Layer(), torch.randn(5, 13), verbose=False)


def test_backends_can_be_named() -> None:
    report = check_gradients(chain(), torch.randn(5, 13), gradcheck=False, backends=["reference"], verbose=False)
    assert list(report.comparisons) == ["reference"] and not report.gradcheck


def test_a_backend_that_cannot_serve_is_left_out_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    partial = Planted({"mixed_conv": streamed.mixed_conv}, "partial")
    monkeypatch.setattr(selection, "_backends", {**selection._backends, "partial": partial})
    report = check_gradients(chain(), torch.randn(5, 13), gradcheck=False, verbose=False)
    served = [name for name in report.comparisons if name != "cpu"]  # where the extension is built
    assert served == ["streamed", "reference"]
    with pytest.raises(selection.CannotServe, match="no kernel for mixed_linear"):
        check_gradients(chain(), torch.randn(5, 13), gradcheck=False, backends=["partial"], verbose=False)


def test_integer_inputs() -> None:
    model = nn.Sequential(nn.Embedding(7, 13), *chain(torch.bfloat16)).bfloat16()
    report = check_gradients(model, torch.tensor([1, 5, 2]), verbose=False)
    assert {row.name for row in report.comparisons["streamed"]} >= {"gradient of 0.weight", "gradient of 1.weight"}


def as_tf32(tensor: Tensor) -> Tensor:
    """Cut off after 10 bits, as tensor cores may."""
    return (tensor.float().view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_compare_allows_for_tf32_where_told() -> None:
    """Plain torch multiplies small float32 matrices in full, and is no measure of TF32 then."""
    torch.manual_seed(0)
    a, b = torch.randn(40, 64), torch.randn(64, 40)
    truth, plain = {"y": a.double() @ b.double()}, {"y": a @ b}
    spread = {"y": (a.double().square() @ b.double().square()).sqrt()}
    found = {"y": as_tf32(a) @ as_tf32(b)}
    assert_as_accurate(compare(found, plain, truth, spread, torch.float32, tf32=True))
    with pytest.raises(AssertionError, match="FAILS"):
        assert_as_accurate(compare(found, plain, truth, spread, torch.float32))
    with pytest.raises(AssertionError, match="FAILS"):
        assert_as_accurate(compare({"y": found["y"] * 1.01}, plain, truth, spread, torch.float32, tf32=True))


def test_compare_sees_values_names_and_infinities() -> None:
    truth = {"y": torch.linspace(1, 2, 1000, dtype=torch.float64)}
    plain = {"y": truth["y"].to(torch.bfloat16)}
    assert_as_accurate(compare(plain, plain, truth))
    with pytest.raises(AssertionError, match=r"y: RMS ratio .*FAILS"):
        assert_as_accurate(compare({"y": plain["y"] * 1.02}, plain, truth))
    broken = plain["y"].clone()
    broken[7] = torch.nan
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_as_accurate(compare({"y": broken}, plain, truth))
    with pytest.raises(AssertionError, match="tensors: got"):
        compare({"z": broken}, plain, truth)
    with pytest.raises(AssertionError, match="got shape"):
        compare({"y": broken[:5]}, plain, truth)


def test_with_a_backend_forced_outside() -> None:
    with rl.use_backend("reference"):
        check_gradients(chain(), torch.randn(5, 13), gradcheck=False, verbose=False)
