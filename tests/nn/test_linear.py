import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.nn import ReplacementLinear
from rl_kernels.testing import peak_memory
from tests.nn.common import assert_accurate, assert_as_by_hand


def linears(n: int = 2, dtype: torch.dtype = torch.float64, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(5, 3, bias=bias, dtype=dtype) for _ in range(n)]


def given(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def coefficients(n: int, granularity: str) -> Tensor:
    values = torch.linspace(-0.7, 1.1, n) + 0.05
    return values if granularity == "scalar" else values[:, None] * torch.linspace(0.5, 1.5, 3)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_as_by_hand(n: int, granularity: str, bias: bool) -> None:
    layer = ReplacementLinear(linears(n, bias=bias), init=coefficients(n, granularity), granularity=granularity)
    assert_as_by_hand(layer, given(4, 2, 5))


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)], ids=str)
def test_input_shapes(shape: tuple[int, ...]) -> None:
    layer = ReplacementLinear(linears(), init=(0.3, -0.9))
    assert layer(given(*shape)).shape == (*shape[:-1], 3)
    assert_as_by_hand(layer, given(*shape))


def test_convex_as_by_hand() -> None:
    layer = ReplacementLinear(linears(), init=(0.3, 0.7), constraint="convex")
    torch.testing.assert_close(layer.coefficients, torch.tensor([0.3, 0.7], dtype=torch.float64))
    assert_as_by_hand(layer, given(4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = ReplacementLinear([nn.Linear(40, 30, dtype=dtype) for _ in range(2)], init=(0.3, -0.9))
    assert layer.coefficients.dtype == torch.float32
    assert_accurate(layer, given(16, 40, dtype=dtype))


@pytest.mark.parametrize("pick", [0, 1], ids=["(1, 0)", "(0, 1)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_source_alone_is_the_plain_layer_bit_for_bit(dtype: torch.dtype, pick: int) -> None:
    sources = linears(dtype=dtype)
    layer = ReplacementLinear(sources, init=[float(j == pick) for j in range(2)])
    x = given(4, 5, dtype=dtype)
    with rl.use_backend("reference"):
        assert torch.equal(layer(x), sources[pick](x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_merged(granularity: str, bias: bool) -> None:
    layer = ReplacementLinear(linears(bias=bias), init=coefficients(2, granularity), granularity=granularity).eval()
    merged = layer.merged()
    x = given(4, 5)
    assert type(merged) is nn.Linear
    assert not merged.training
    assert (merged.bias is None) == (not bias)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-13)
    before = merged(x)
    with torch.no_grad():
        layer.sources[0].weight.zero_()
    assert torch.equal(merged(x), before)


def test_weight_and_bias_are_the_mixed_ones() -> None:
    prev, after = linears()
    layer = ReplacementLinear((prev, after), init=(0.25, -0.5))
    torch.testing.assert_close(layer.weight, 0.25 * prev.weight - 0.5 * after.weight)
    torch.testing.assert_close(layer.bias, 0.25 * prev.bias - 0.5 * after.bias)
    assert ReplacementLinear(linears(bias=False)).bias is None


def test_no_mixed_weight_is_allocated() -> None:
    layer = ReplacementLinear([nn.Linear(2048, 1024, bias=False) for _ in range(2)])
    x = torch.randn(1, 2048)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), "cpu") < layer.sources[0].weight.nbytes / 2


def test_repr() -> None:
    text = repr(ReplacementLinear(linears(), detach=[1]))
    assert "in_features=5, out_features=3, sources=2, granularity='scalar', detach=(1,)" in text


def test_wrong_input() -> None:
    with pytest.raises(RuntimeError, match=r"x: got shape \(4, 6\), expected \(\*, 5\)"):
        ReplacementLinear(linears())(given(4, 6))


def test_wrong_sources() -> None:
    with pytest.raises(TypeError, match=r"sources\[1\]: got Conv1d, expected Linear"):
        ReplacementLinear((linears(1)[0], nn.Conv1d(5, 3, 1)))
