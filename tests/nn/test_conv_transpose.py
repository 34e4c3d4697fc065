import copy
from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import (
    Coefficients,
    ReplacementConvTranspose1d,
    ReplacementConvTranspose2d,
    ReplacementConvTranspose3d,
    ReplacementLayer,
)
from tests.nn.common import assert_accurate, assert_as_by_hand
from tests.nn.convolutions import DIMS, Convolutions, named

PLAIN = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
REPLACED = {1: ReplacementConvTranspose1d, 2: ReplacementConvTranspose2d, 3: ReplacementConvTranspose3d}
SIZES = {1: (5,), 2: (4, 3), 3: (2, 3, 4)}
KIND = Convolutions(PLAIN, REPLACED, SIZES)
convolutions, given, replaced = KIND.sources, KIND.given, KIND.replaced


@DIMS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2, "padding": 2, "stride": 3},
        {"groups": 2, "padding": 1},
        {"dilation": 3, "output_padding": 2, "stride": 2},
    ],
    ids=named,
)
def test_as_by_hand(dim: int, settings: dict[str, Any]) -> None:
    assert_as_by_hand(replaced(dim, convolutions(dim, **settings)), given(dim))


@pytest.mark.parametrize("n", [1, 3])
def test_other_numbers_of_sources(n: int) -> None:
    assert_as_by_hand(replaced(2, convolutions(2, n), init=[0.3 - j for j in range(n)]), given(2))


@DIMS
def test_output_size(dim: int) -> None:
    """As the plain layer's: the spatial size or the whole, between what a stride leaves open."""
    settings = {"stride": 3, "padding": 1, "dilation": 2}
    layer, x = replaced(dim, convolutions(dim, **settings)), given(dim)
    least = layer(x).shape
    for size in (least, least[2:], [size + 2 for size in least[2:]]):
        assert layer(x, size).shape[2:] == layer(x, output_size=size).shape[2:] == torch.Size(size)[-dim:]
        assert_as_by_hand(layer, x, output_size=list(size))
    unbatched = layer(x[0], [size + 1 for size in least[2:]])
    assert unbatched.shape[1:] == torch.Size([size + 1 for size in least[2:]])
    for size, message in (
        ((*least[2:], 1, 1, 1), "expected . or . sizes"),
        ([size + 3 for size in least[2:]], "expected from"),
    ):
        for module in (layer, layer.sources[0]):
            with pytest.raises(ValueError, match=message if module is layer else None):
                module(x, size)


def test_channels_last() -> None:
    layer = replaced(2, convolutions(2))
    x = given(2).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert_as_by_hand(layer, x)


@DIMS
def test_settings_are_those_of_own(dim: int) -> None:
    (own,) = convolutions(dim, 1, stride=2, padding=1, dilation=2, output_padding=1)
    assert_as_by_hand(replaced(dim, convolutions(dim), own=own), given(dim), plain=own)


@DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dim: int, dtype: torch.dtype) -> None:
    layer = replaced(dim, convolutions(dim, dtype=dtype, stride=2))
    assert layer.coefficients.dtype == torch.float32
    assert_accurate(layer, given(dim, dtype))


@DIMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_source_alone_is_the_plain_layer(dim: int, dtype: torch.dtype) -> None:
    sources = convolutions(dim, dtype=dtype, padding=1)
    x = given(dim, dtype)
    with rl.use_backend("reference"):
        for pick in (0, 1):
            layer = replaced(dim, sources, init=[float(j == pick) for j in range(2)])
            torch.testing.assert_close(layer(x), sources[pick](x))


@DIMS
def test_merged(dim: int) -> None:
    settings = {"stride": 3, "padding": 1, "groups": 2, "output_padding": 1, "dilation": 2}
    for bias in (True, False):
        layer = replaced(dim, convolutions(dim, **settings, bias=bias)).eval()
        merged = layer.merged()
        x = given(dim)
        assert type(merged) is PLAIN[dim]
        assert not merged.training and (merged.bias is None) != bias
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-13)


def test_fit_freezing_and_shared_coefficients() -> None:
    sources = convolutions(2, 3)
    with torch.no_grad():
        sources[2].weight.copy_(0.2 * sources[0].weight + 0.7 * sources[1].weight)
    fitted = replaced(2, sources[:2], own=sources[2], init="fit")
    torch.testing.assert_close(fitted.coefficients.detach(), torch.tensor([0.2, 0.7], dtype=torch.float64))
    shared = Coefficients(torch.tensor([0.3, 0.7], dtype=torch.float64))
    layer = replaced(2, sources[:2], init=None, coefficients=shared, detach=[0])
    sources[1].bias.requires_grad_(False)
    assert_as_by_hand(layer, given(2))
    x = given(2)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_one_coefficient_per_output_channel_is_refused() -> None:
    message = r"granularity: got 'channel', expected 'scalar' for .*ConvTranspose2d: its output channels"
    with pytest.raises(ValueError, match=message):
        ReplacementConvTranspose2d(convolutions(2), granularity="channel")
    with pytest.raises(ValueError, match=r"granularity: got 'row', expected one of"):
        ReplacementConvTranspose2d(convolutions(2), granularity="row")


def test_repr_and_kinds() -> None:
    text = repr(replaced(2, convolutions(2, stride=2, output_padding=1)))
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0)" in text and "sources=2" in text
    assert "output_padding=(1, 1)" in text
    with pytest.raises(TypeError, match=r"sources\[0\]: got Conv2d, expected ConvTranspose2d"):
        ReplacementConvTranspose2d([nn.Conv2d(4, 4, 3)])
    one, other = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 3, 3)
    with pytest.raises(ValueError, match=r"sources\[1\]: got bias \(3,\), expected \(6,\) as sources\[0\]"):
        ReplacementConvTranspose2d((one, other))


def test_a_decoder_planned_replaced_compiled_and_merged() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ReLU())

    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Sequential(*(block() for _ in range(5))))
    plan = rl.plan(model, every=2)
    rl.replace(model, plan)
    found = [type(module).__name__ for module in model.modules() if isinstance(module, ReplacementLayer)]
    assert found and set(found) == {"ReplacementConvTranspose2d"}
    x = torch.randn(2, 3, 5, 4)
    y = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes={"input": {0: batch}}).module()
    other = torch.cat([x, -x, x])
    torch.testing.assert_close(exported(other), model(other))
    torch.testing.assert_close(rl.merge(model)(x), y)
