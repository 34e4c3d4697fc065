from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import ReplacementConv1d, ReplacementConv2d, ReplacementConv3d
from tests.nn.common import assert_accurate, assert_as_by_hand
from tests.nn.convolutions import DIMS, Convolutions, named

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
REPLACED = {1: ReplacementConv1d, 2: ReplacementConv2d, 3: ReplacementConv3d}
SIZES = {1: (11,), 2: (9, 8), 3: (5, 6, 7)}
KIND = Convolutions(PLAIN, REPLACED, SIZES)
convolutions, given, replaced = KIND.sources, KIND.given, KIND.replaced


@DIMS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2},
        {"groups": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "kernel_size": 4, "dilation": 2},
        {"padding": "valid", "stride": 2},
    ],
    ids=named,
)
def test_as_by_hand(dim: int, settings: dict[str, Any]) -> None:
    assert_as_by_hand(replaced(dim, convolutions(dim, **settings)), given(dim))


@DIMS
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", "valid"], ids=str)
def test_padding_modes(dim: int, mode: str, padding: int | str) -> None:
    for settings in ({"kernel_size": 4}, {"kernel_size": 2, "dilation": 3}):
        sources = convolutions(dim, **settings, padding=padding, padding_mode=mode)
        assert_as_by_hand(replaced(dim, sources), given(dim))


def test_settings_that_differ_by_dimension() -> None:
    settings = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    assert_as_by_hand(replaced(2, convolutions(2, **settings)), given(2))
    assert_as_by_hand(replaced(2, convolutions(2, **settings, padding_mode="reflect")), given(2))


@DIMS
@pytest.mark.parametrize("n", [1, 2, 3])
def test_channel_granularity(dim: int, n: int) -> None:
    init = torch.linspace(-0.7, 1.1, n)[:, None] * torch.linspace(0.5, 1.5, 6)
    layer = REPLACED[dim](convolutions(dim, n, groups=2), init=init, granularity="channel")
    assert layer.coefficients.shape == (n, 6)
    assert_as_by_hand(layer, given(dim))


@DIMS
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_unbatched(dim: int, mode: str) -> None:
    layer = replaced(dim, convolutions(dim, padding=1, padding_mode=mode))
    x = given(dim)[0].detach().requires_grad_()
    assert layer(x).dim() == dim + 1
    assert_as_by_hand(layer, x)


def test_channels_last() -> None:
    layer = replaced(2, convolutions(2))
    x = given(2).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert_as_by_hand(layer, x)


@DIMS
def test_settings_are_those_of_own(dim: int) -> None:
    sources = convolutions(dim)
    (own,) = convolutions(dim, 1, stride=2, padding=1, dilation=2, padding_mode="circular")
    assert_as_by_hand(replaced(dim, sources, own=own), given(dim), plain=own)


@DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dim: int, dtype: torch.dtype) -> None:
    layer = replaced(dim, convolutions(dim, dtype=dtype, padding=1))
    assert layer.coefficients.dtype == torch.float32
    assert_accurate(layer, given(dim, dtype))


@DIMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_source_alone_is_the_plain_layer_bit_for_bit(dim: int, dtype: torch.dtype, mode: str) -> None:
    sources = convolutions(dim, dtype=dtype, padding=1, padding_mode=mode)
    x = given(dim, dtype)
    with rl.use_backend("reference"):
        for pick in (0, 1):
            layer = replaced(dim, sources, init=[float(j == pick) for j in range(2)])
            assert torch.equal(layer(x), sources[pick](x))


@DIMS
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_merged(dim: int, granularity: str) -> None:
    settings = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect", "dilation": 2}
    layer = replaced(dim, convolutions(dim, **settings), granularity=granularity).eval()
    merged = layer.merged()
    x = given(dim)
    assert type(merged) is PLAIN[dim]
    assert not merged.training
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-13)


def test_merged_keeps_named_padding_and_no_bias() -> None:
    layer = replaced(2, convolutions(2, padding="same", bias=False))
    merged = layer.merged()
    assert isinstance(merged, nn.Conv2d)
    assert merged.padding == "same"
    assert merged.bias is None
    x = given(2)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-13)


def test_repr() -> None:
    text = repr(replaced(2, convolutions(2, stride=2, padding_mode="circular")))
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0)" in text
    assert "padding_mode='circular', sources=2" in text


def test_sources_of_other_groups() -> None:
    # The same shape of the weight, read by other input channels.
    one = nn.Conv2d(4, 6, 3, groups=2)
    other = nn.Conv2d(2, 6, 3)
    assert one.weight.shape == other.weight.shape
    with pytest.raises(ValueError, match=r"sources\[1\]: got groups 1, expected 2 as sources\[0\]"):
        ReplacementConv2d((one, other))


def test_sources_of_another_dimension() -> None:
    with pytest.raises(TypeError, match=r"sources\[0\]: got Conv1d, expected Conv2d"):
        ReplacementConv2d(convolutions(1))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 9, 8), r"x: got 5 channels .*expected 4"),
        ((4, 9), r"x: got shape \(4, 9\), expected 3 \(unbatched\) or 4 dimensions"),
    ],
    ids=["channels", "dimensions"],
)
def test_wrong_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        replaced(2, convolutions(2))(torch.randn(*shape, dtype=torch.float64))
