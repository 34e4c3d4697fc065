"""Sources that are parts of layers, and layers repeated: values, gradients, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import rl_kernels as rl
from rl_kernels.nn import (
    ReplacementConv1d,
    ReplacementConv2d,
    ReplacementConv3d,
    ReplacementConvTranspose2d,
    ReplacementLayer,
    ReplacementLayerNorm,
    ReplacementLinear,
    ReplacementMultiheadAttention,
    SourceView,
)
from rl_kernels.testing.memory import peak_memory
from tests.nn.common import assert_as_by_hand

OUT, IN = 8, 4
"""The sizes of the layer; those of its sources are multiples or parts of these."""

Make = Callable[[int, int], nn.Module]


def linear(out: int, in_: int) -> nn.Module:
    return nn.Linear(in_, out, dtype=torch.float64)


def conv(spatial: int, **settings: Any) -> Make:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    return lambda out, in_: kind(in_, out, 3, **{"padding": 1, **settings}, dtype=torch.float64)


KINDS: dict[str, tuple[Make, type[ReplacementLayer], tuple[int, ...]]] = {
    "linear": (linear, ReplacementLinear, (3, 5, IN)),
    "linear, one row": (linear, ReplacementLinear, (IN,)),
    "conv1d": (conv(1, padding="same"), ReplacementConv1d, (2, IN, 6)),
    "conv2d": (conv(2, stride=2), ReplacementConv2d, (2, IN, 6, 5)),
    "conv2d, circular": (conv(2, padding_mode="circular"), ReplacementConv2d, (2, IN, 6, 5)),
    "conv2d, unbatched": (conv(2, bias=False), ReplacementConv2d, (IN, 6, 5)),
    "conv3d": (conv(3, dilation=2, padding=2), ReplacementConv3d, (1, IN, 5, 5, 4)),
}


def blocks(module: nn.Module, rows: int = 1, columns: int = 1) -> list[SourceView]:
    return [SourceView(module, (i, rows), (j, columns)) for i in range(rows) for j in range(columns)]


def views(make: Make, name: str) -> list[Any]:
    """Sources of a layer of ``OUT`` and ``IN``, by what is done to them."""
    return {
        "rows cut": lambda: [make(OUT, IN), *blocks(make(2 * OUT, IN), rows=2)],
        "columns cut": lambda: [make(OUT, IN), *blocks(make(OUT, 2 * IN), columns=2)],
        "quadrants": lambda: [make(OUT, IN), *blocks(make(2 * OUT, 2 * IN), 2, 2)],
        "some of the blocks": lambda: [*blocks(make(3 * OUT, 2 * IN), 3, 2)[1:4], make(OUT, IN)],
        "rows repeated": lambda: [SourceView(make(OUT // 2, IN), repeats=(2, 1)), make(OUT, IN)],
        "all rows repeated": lambda: [SourceView(make(OUT // 4, IN), repeats=(4, 1)) for _ in range(2)],
        "columns repeated": lambda: [make(OUT, IN), SourceView(make(OUT, IN // 2), repeats=(1, 2))],
        "both": lambda: [SourceView(make(OUT // 2, IN // 2), repeats=(2, 2)), *blocks(make(2 * OUT, IN), rows=2)],
        "differently": lambda: [
            SourceView(make(OUT // 4, IN), repeats=(4, 1)),
            SourceView(make(OUT // 2, IN), repeats=(2, 1)),
            SourceView(make(OUT // 2, IN // 4), repeats=(2, 4)),
            make(OUT, IN),
        ],
        "cut and repeated": lambda: [
            make(OUT, IN),
            *(SourceView(make(OUT // 2, 2 * IN), in_=(j, 2), repeats=(2, 1)) for j in range(2)),
        ],
    }[name]()


VIEWS = (
    "rows cut",
    "columns cut",
    "quadrants",
    "some of the blocks",
    "rows repeated",
    "all rows repeated",
    "columns repeated",
    "both",
    "differently",
    "cut and repeated",
)


def replaced(kind: str, view: str, granularity: Any = "scalar", **options: Any) -> tuple[Any, nn.Module, Tensor]:
    make, replacement, shape = KINDS[kind]
    sources, own = views(make, view), make(OUT, IN)
    groups = {"scalar": (), "channel": (OUT,)}.get(granularity, (granularity,))
    init = torch.linspace(-0.7, 1.1, len(sources)).reshape(-1, *(1,) * len(groups)) * torch.ones(groups)
    init = init * torch.linspace(0.5, 1.5, groups[0]) if groups else init
    layer = replacement(sources, own=own, init=init, granularity=granularity, **options)
    return layer, own, torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("granularity", ["scalar", 2, "channel"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_by_hand(kind: str, view: str, granularity: Any) -> None:
    layer, own, x = replaced(kind, view, granularity)
    assert_as_by_hand(layer, x, plain=own)
    merged = layer.merged()
    assert type(merged) is type(own)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "streamed", "cpu"])
@pytest.mark.parametrize("view", VIEWS)
def test_backends(view: str, backend: str) -> None:
    with rl.use_backend(backend):
        for kind in ("linear", "conv2d"):
            layer, own, x = replaced(kind, view, detach=(0,))
            assert_as_by_hand(layer, x, plain=own)


@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("size", [4, 16])
def test_depthwise_convolutions_are_cut_by_channel(size: int, granularity: Any) -> None:
    def make(channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, dtype=torch.float64)

    own, other = make(8), make(size)
    others = blocks(other, rows=2) if size > 8 else [SourceView(other, repeats=(2, 1))]
    layer = ReplacementConv2d([make(8), *others], own=own, granularity=granularity)
    assert layer.groups == 8
    assert_as_by_hand(layer, torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True), plain=own)
    alone = ReplacementConv2d(others)
    assert (alone.groups, alone.in_channels, alone.out_channels) == (8, 8, 8)
    assert_as_by_hand(alone, torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True), plain=own)


@pytest.mark.parametrize("view", VIEWS)
def test_channels_last_and_half_precision(view: str) -> None:
    layer, own, x = replaced("conv2d", view)
    for source in layer.sources:
        source.to(memory_format=torch.channels_last)
    y = layer(x.detach().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, layer(x))
    model = nn.ModuleList([layer, *layer.sources]).bfloat16()
    found = model[0](x.detach().bfloat16())
    torch.testing.assert_close(found.double(), y, rtol=0.1, atol=0.1)
    assert layer.coefficient_module.coefficients.dtype == torch.float32 or own is not None


def test_without_own_a_layer_has_the_sizes_of_its_views() -> None:
    layer = ReplacementLinear(blocks(nn.Linear(4, 6), 3, 2))
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (2, 2, (2, 2))
    layer = ReplacementLinear([SourceView(nn.Linear(4, 6), repeats=(2, 3))])
    assert (layer.in_features, layer.out_features, layer.merged().weight.shape) == (12, 12, (12, 12))
    assert "sources=1, cut" in repr(layer)
    assert layer(torch.randn(3, 12)).shape == (3, 12)


def test_parts_of_one_layer_are_cut_at_once() -> None:
    """One backward of ``unbind`` a layer and a row of blocks, and no slices."""
    source = nn.Linear(8, 16)
    layer = ReplacementLinear(blocks(source, 2, 2))
    names: list[str] = []
    todo, seen = [layer(torch.randn(3, 4)).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            todo += [following for following, _ in node.next_functions]
    assert not any("Slice" in name or "Select" in name or "Narrow" in name for name in names)
    assert names.count("UnbindBackward0") == 1 + 2 + 1  # Of the weight by rows, then by columns; of the bias.


@pytest.mark.parametrize("repeats", [(2, 1), (1, 2), (2, 2)])
def test_no_repeated_weight_is_stored(repeats: tuple[int, int]) -> None:
    source = nn.Linear(512 // repeats[1], 512 // repeats[0])
    layer = ReplacementLinear([SourceView(source, repeats=repeats), SourceView(source, repeats=repeats)])
    x = torch.randn(4, 512)
    with torch.no_grad():
        layer(x)
        assert peak_memory(lambda: layer(x), "cpu") < 4 * source.weight.numel() / 2
    assert layer.weight.shape == (512, 512)


def test_detached_parts_get_no_gradient() -> None:
    source = nn.Linear(4, 8, dtype=torch.float64)
    layer = ReplacementLinear(blocks(source, rows=2), detach=(1,))
    layer(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert source.weight.grad[:4].all() and not source.weight.grad[4:].any()


def test_gradients_into_grad() -> None:
    """Parts are no parameters: their gradients take the usual way inside ``accumulate_into_grad``."""
    source = nn.Linear(4, 8)
    layer = ReplacementLinear(blocks(source, rows=2))
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    expected, source.weight.grad = source.weight.grad, torch.zeros(8, 4)
    with rl.accumulate_into_grad():
        layer(x).sum().backward()
    torch.testing.assert_close(source.weight.grad, expected)


def test_parametrized_sources() -> None:
    source = weight_norm(nn.Linear(4, 8, dtype=torch.float64))
    layer = ReplacementLinear([*blocks(source, rows=2), nn.Linear(4, 4, dtype=torch.float64)])
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.merged()(x))


def test_rebinding() -> None:
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    layer = ReplacementLinear(blocks(first, columns=2))
    x = torch.randn(3, 4)
    layer.rebind(*blocks(second, columns=2))
    assert layer.sources == (second, second) and layer.cuts[1].in_ == (1, 2)
    torch.testing.assert_close(layer(x), ReplacementLinear(blocks(second, columns=2))(x))
    whole = [nn.Linear(4, 4), nn.Linear(4, 4)]
    layer.rebind(*whole)
    assert layer.views == tuple(whole) and layer.cuts == ()
    torch.testing.assert_close(layer(x), ReplacementLinear(whole)(x))
    with pytest.raises(ValueError, match=r"sources\[0\]: got bias \(2,\), expected \(4,\) as the one bound before"):
        layer.rebind(*blocks(nn.Linear(4, 4), rows=2))


def test_a_view_shows_what_it_is() -> None:
    view = SourceView(nn.Conv2d(8, 6, 3, padding=1), (1, 3), (0, 2), repeats=(2, 1))
    assert (view.out_channels, view.in_channels, view.padding, view.training) == (4, 4, (1, 1), True)
    assert view.weight.shape == (4, 4, 3, 3) and view.bias.shape == (4,)
    assert repr(view).endswith("out=(1, 3), in_=(0, 2), repeats=(2, 1))")
    twin = copy.deepcopy(view)
    assert twin.cut == view.cut and twin.module is not view.module
    assert SourceView(nn.Linear(4, 4, bias=False)).bias is None
    with pytest.raises(AttributeError):
        view.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.LayerNorm(4),), TypeError, "module: got torch.nn.modules.normalization.LayerNorm, expected one of Linear"),
        ((nn.Linear(4, 6), (2, 2)), ValueError, r"out: got \(2, 2\), expected a part below .* that divides 6"),
        ((nn.Linear(4, 6), (0, 4)), ValueError, r"out: got \(0, 4\), expected a part below .* that divides 6"),
        ((nn.Linear(4, 6), (0, 1), (0, 3)), ValueError, r"in_: got \(0, 3\), expected a part below .* that divides 4"),
        ((nn.Linear(4, 6), 2), TypeError, "out: got 2, expected two integers"),
        (
            (nn.Conv2d(4, 4, 3, groups=2), (0, 2)),
            ValueError,
            "module: got 2 groups with .*, expected 1, or a depthwise",
        ),
        ((nn.Conv2d(4, 4, 3, groups=4), (0, 1), (0, 1)), None, ""),
    ],
    ids=["kind", "part", "parts", "columns", "number", "groups", "depthwise"],
)
def test_views_that_there_are_not(arguments: tuple[Any, ...], error: type[Exception] | None, message: str) -> None:
    if error is None:
        SourceView(*arguments)
        return
    with pytest.raises(error, match=message):
        SourceView(*arguments)
    with pytest.raises(ValueError, match=r"repeats: got \(0, 1\), expected at least 1"):
        SourceView(nn.Linear(4, 6), repeats=(0, 1))


def test_layers_that_take_no_views() -> None:
    view = SourceView(nn.Linear(4, 4))
    for kind in (ReplacementMultiheadAttention, ReplacementLayerNorm, ReplacementConvTranspose2d):
        with pytest.raises(
            TypeError, match=rf"sources\[0\]: got a SourceView, expected a whole layer: {kind.__name__}"
        ):
            kind([view, view])
    with pytest.raises(TypeError, match=r"sources\[0\]: got Linear, expected Conv2d"):
        ReplacementConv2d([view])


def test_sources_of_other_sizes_need_a_view_that_says_how() -> None:
    with pytest.raises(ValueError, match=r"sources\[1\]: got bias \(8,\), expected \(4,\) as sources\[0\]"):
        ReplacementLinear([nn.Linear(4, 4), nn.Linear(4, 8)])
    with pytest.raises(ValueError, match=r"own: got bias \(8,\), expected \(4,\) as sources\[0\]"):
        ReplacementLinear([SourceView(nn.Linear(4, 8), (0, 2))], own=nn.Linear(4, 8))
