"""What a plan mixes beyond the paper's two scalars a block: finer coefficients, more neighbours, others of other sizes.

One body for all: gradients against a mix by hand, and all that is done with a replaced model.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import rl_kernels as rl
from rl_kernels.nn import ReplacementLayer, ReplacementLinear, SourceView
from rl_kernels.nn.coefficients import GroupedCoefficients
from tests.conversion.common import check_replaced, relative_error, spread_out
from tests.conversion.toys import ResNet, ViT, image, sequential


class ConvNeXtBlock(nn.Module):
    """As ConvNeXt's, its shortcut left out."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.GroupNorm(1, dim)
        self.pwconv1 = nn.Linear(dim, 2 * dim)
        self.pwconv2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x)).movedim(1, -1)
        return x + self.pwconv2(nn.functional.gelu(self.pwconv1(y))).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Stages of equal blocks, with what changes the width between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(2))) for dim in (4, 8, 16))
        self.wider = nn.ModuleList(nn.Conv2d(dim, 2 * dim, 1) for dim in (4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        for wider, stage in zip(self.wider, self.stages[1:], strict=True):
            x = stage(wider(x))
        return x.mean((2, 3))


def by_linear_layers() -> nn.Module:
    return ViT(torch_attention=False)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "projection": (ViT, {"granularity": "projection"}),
    "projection, linear": (by_linear_layers, {"granularity": "projection", "constraint": "convex"}),
    "head": (ViT, {"granularity": "head", "detach": (1,)}),
    "head, linear": (by_linear_layers, {"granularity": "head", "targets": "attention"}),
    "window": (ViT, {"window": 2}),
    "window, convex": (ViT, {"window": 2, "every": 3, "constraint": "convex", "share": "layer", "detach": (0, 3)}),
    "window, head": (ViT, {"window": 3, "granularity": "head", "init": (0.5, 0.4, 0.3, 0.2, 0.1, -0.1)}),
    "window, layers": (lambda: sequential(9), {"window": 2, "every": 3}),
    "blocks": (ResNet, {"boundaries": "blocks"}),
    "blocks, every second": (ResNet, {"boundaries": "blocks", "every": 2, "offset": 3, "init": (0.6, 0.3)}),
    "blocks, channel": (ResNet, {"boundaries": "blocks", "granularity": "channel", "detach": (0,)}),
    "blocks, convex": (ResNet, {"boundaries": "blocks", "constraint": "convex", "targets": "conv"}),
    "blocks, window": (ResNet, {"boundaries": "blocks", "every": 3, "window": 2, "detach": (1,)}),
    "blocks, ConvNeXt": (ConvNeXt, {"boundaries": "blocks", "every": 3, "offset": 3}),
    "blocks, ConvNeXt, last": (ConvNeXt, {"boundaries": "blocks", "every": 3, "offset": 2, "granularity": "channel"}),
}

families = pytest.mark.parametrize("family", FAMILIES)


def replaced(family: str, **more: Any) -> tuple[nn.Module, rl.Plan, nn.Module, Tensor]:
    """The model in float64, its plan, the model that it was, and an input."""
    make, options = FAMILIES[family]
    plain = make().double().eval()
    spread_out(plain)
    model = copy.deepcopy(plain)
    plan = rl.plan(model, **{**options, **more})
    rl.replace(model, plan)
    return model, plan, plain, given(plain)


def given(model: nn.Module) -> Tensor:
    return torch.randn(3, 3, dtype=torch.float64) if isinstance(model, nn.Sequential) else image()


# One body for all.


@families
def test_values_gradients_merge_and_states_are_those_of_a_mix_by_hand(family: str) -> None:
    make, options = FAMILIES[family]
    model = make()
    check_replaced(model, (given(model),), **options)


@families
def test_all_that_is_done_with_a_replaced_model(family: str, tmp_path: Path) -> None:
    model, plan, plain, x = replaced(family)
    spread_out(model)
    expected = model(x)
    rl.check(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert str(plan).count("replaced") >= 1

    rl.save_pretrained(model, tmp_path)
    newer = any(layer.cuts or isinstance(layer.granularity, int) for block in plan.replaced for layer in block.layers)
    assert json.loads((tmp_path / "rl_kernels.json").read_text())["format"] == 1 + newer
    again = rl.load_pretrained(tmp_path, copy.deepcopy(plain))
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(twin(x), expected) < 1e-12
        loss = twin(x).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
        changed = next(layer for layer in twin.modules() if isinstance(layer, ReplacementLayer)).sources[0]
        with torch.no_grad():
            next(iter(changed.parameters())).mul_(1.5)  # A source of the twin's own, which it follows.
        assert relative_error(twin(x), expected) > 1e-6
        assert relative_error(model(x), expected) < 1e-12

    for layer in (module for module in model.modules() if isinstance(module, ReplacementLayer)):
        layer.rebind(*layer.views)
        views = [view for view in layer.views if isinstance(view, SourceView)]
        assert bool(views) == bool(layer.cuts)
    assert relative_error(model(x), expected) < 1e-12
    loaded = rl.load_plain_state_dict(model, plain.state_dict())
    assert set(loaded.kept) == {name for name, _ in model.named_parameters() if ".mixing." in name}
    model.state_dict()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: ViT(3), {"granularity": "head", "targets": "attention"}),
        (lambda: sequential(5), {"window": 2, "constraint": "convex"}),
        (lambda: ResNet((2, 1)), {"boundaries": "blocks", "targets": "conv"}),
        (lambda: ResNet((1, 2)), {"boundaries": "blocks", "targets": "conv", "granularity": "channel"}),
    ],
    ids=["groups", "window", "cut", "repeated"],
)
def test_compiled(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = make().double().eval()
    rl.replace(model, rl.plan(model, every=2, **options))
    spread_out(model)
    x = given(model)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert relative_error(y, expected) < 1e-12
    parameters = list(model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(y.square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (found is None) == (wanted is None)
        assert found is None or relative_error(found, wanted, 1e-12) < 1e-9


@families
def test_the_fit_of_an_exact_mix_is_that_mix(family: str) -> None:
    """Layer by layer, with coefficients of its own: the layer that was is made the mix by other coefficients."""
    model, plan, _, _ = replaced(family, share="layer", constraint="free", init=None)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, ReplacementLayer):
                parameter = layer.coefficient_module.coefficients
                parameter.add_(torch.linspace(-0.2, 0.3, parameter.numel(), dtype=torch.float64).view_as(parameter))
    merged = rl.merge(copy.deepcopy(model))
    fitted = rl.plan(merged, **{**FAMILIES[family][1], "share": "layer", "constraint": "free", "init": "fit"})
    assert [block.path for block in fitted.replaced] == [block.path for block in plan.replaced]
    rl.replace(merged, fitted)
    for layer, expected in zip(merged.modules(), model.modules(), strict=True):
        if isinstance(layer, ReplacementLayer):
            for one, other in zip(layer.merged().parameters(), expected.merged().parameters(), strict=True):
                assert one.dim() < 2 or relative_error(one, other) < 1e-6


# Groups of output rows.


def test_what_has_groups_and_how_many() -> None:
    def found(torch_attention: bool, granularity: Any) -> dict[str, Any]:
        plan = rl.plan(ViT(torch_attention=torch_attention), granularity=granularity, norms="own")
        return {layer.path: (layer.granularity, layer.coefficients) for layer in plan.replaced[0].layers}

    mlp = {"mlp.0": ("scalar", 2), "mlp.2": ("scalar", 2)}
    assert found(True, "projection") == {"attn": (4, 8), **mlp}
    assert found(True, "head") == {"attn": (8, 16), **mlp}
    assert found(False, "projection") == {"attn.qkv": (3, 6), "attn.proj": ("scalar", 2), **mlp}
    assert found(False, "head") == {"attn.qkv": (6, 12), "attn.proj": ("scalar", 2), **mlp}


class SelfAttention(nn.Module):
    """Projections by names, with fewer heads of keys and values, as Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_attention_heads": 4, "num_key_value_heads": 2})()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.query_key_value = nn.Linear(8, 24)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [("projection", ["scalar"] * 4), ("head", [4, 2, "scalar", 12])],
)
def test_heads_by_the_names_of_layers(granularity: Any, expected: list[Any]) -> None:
    plan = rl.plan(nn.Sequential(*(WithAttention() for _ in range(5))), granularity=granularity)
    assert [layer.granularity for layer in plan.replaced[0].layers] == expected


def test_a_group_is_a_pair_for_its_rows() -> None:
    prev, after = nn.Linear(4, 6), nn.Linear(4, 6)
    layer = ReplacementLinear.from_neighbours(prev, after, granularity=3, init=[[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]])
    assert isinstance(layer.coefficient_module, GroupedCoefficients)
    assert layer.coefficient_module.shape == (2, 3)
    c = torch.tensor([[1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]])
    assert torch.equal(layer.coefficients, c)
    torch.testing.assert_close(layer.weight, c[0, :, None] * prev.weight + c[1, :, None] * after.weight)
    layer.reset_parameters()
    assert torch.equal(layer.coefficients, c)


@pytest.mark.parametrize("granularity", [4, 0, True, "rows"])
def test_granularities_that_there_are_not(granularity: Any) -> None:
    expected = "a divisor of 6" if granularity == 4 else "one of scalar, channel, or a number of groups"
    with pytest.raises(ValueError, match=rf"granularity: got {granularity!r}, expected {expected}"):
        ReplacementLinear([nn.Linear(4, 6)], granularity=granularity)


@pytest.mark.parametrize("granularity", ["projection", "head"])
def test_groups_are_no_blocks(granularity: Any) -> None:
    with pytest.raises(ValueError, match=f"share: got 'block' with granularity '{granularity}', expected 'layer'"):
        rl.plan(ViT(), granularity=granularity, share="block")


# The window.


def test_the_neighbours_of_a_window_and_where_they_start() -> None:
    plan = rl.plan(ViT(6), every=2, window=2)
    assert [(block.number, block.sources, block.distances) for block in plan.replaced] == [
        (2, ("blocks.0", "blocks.2", "blocks.3"), (-1, 1, 2)),
        (5, ("blocks.3", "blocks.5", "blocks.2"), (-1, 1, -2)),
    ]
    assert [(block.number, block.reason, block.detail) for block in plan.skipped] == [
        (4, "neighbour replaced", "blocks.1 is mixed from it")
    ]
    assert [block.coefficients for block in plan.replaced] == [3, 3]
    assert "one coefficient for each source a block" in str(plan) and "0.5 each for the nearest two and 0" in str(plan)
    model = rl.replace(ViT(6), plan)
    assert model.blocks[1].norm1.coefficients.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"constraint": "convex"}, [1 / 3] * 3),
        ({"init": (0.4, 0.3, 0.2, 0.1)}, [0.4, 0.3, 0.1]),
        ({"init": (0.4, 0.3, 0.2, 0.1), "constraint": "convex"}, [0.5, 0.375, 0.125]),
    ],
    ids=["convex", "numbers", "convex numbers"],
)
def test_starts_where_a_neighbour_is_lacking(options: dict[str, Any], start: list[float]) -> None:
    model = ViT(5)
    rl.replace(model, rl.plan(model, every=2, window=2, **options))
    torch.testing.assert_close(model.blocks[1].norm1.coefficients, torch.tensor(start))


def test_a_window_ends_where_shapes_differ() -> None:
    plan = rl.plan(ResNet((3, 5)), every=5, window=2)
    (block,) = plan.replaced
    assert (block.path, block.sources) == ("layer2.2", ("layer2.1", "layer2.3", "layer2.4"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window: got 0, expected at least 1"),
        ({"window": 1.5}, TypeError, "window: got 1.5, expected an integer"),
        ({"window": 2, "init": (0.5, 0.5)}, ValueError, r"init: got \(0.5, 0.5\), expected None, 'fit' or 4 numbers"),
        ({"window": 2, "detach": (4,)}, ValueError, r"detach: got \(4,\), expected indices out of 0 .* below 4"),
        ({"boundaries": "cut"}, ValueError, "boundaries: got 'cut', expected one of 'skipped', 'blocks'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rl.plan(ViT(), **options)


# Blocks of other sizes.


def test_the_first_and_the_last_block_of_a_stage() -> None:
    plan = rl.plan(ResNet((3, 3, 3)), every=2, offset=3, boundaries="blocks", targets="conv")
    cuts = {
        f"{block.path}.{layer.path}": [(c.neighbour, c.out, c.in_, c.repeats) for c in layer.cuts]
        for block in plan.replaced
        for layer in block.layers
    }
    assert plan.replaced[0].sources == ("layer1.1", "layer2.0")
    all_, one = (0, 1), (1, 1)
    assert cuts["layer1.2.conv1"] == [(0, all_, all_, one), (1, (0, 2), all_, one), (1, (1, 2), all_, one)]
    quadrants = [(1, (i, 2), (j, 2), one) for i in range(2) for j in range(2)]
    assert cuts["layer1.2.conv2"] == [(0, all_, all_, one), *quadrants]
    plan = rl.plan(ResNet((3, 3, 3)), every=4, boundaries="blocks", targets="conv")
    (block,) = (block for block in plan.replaced if block.path == "layer2.0")
    assert [layer.path for layer in block.layers] == ["conv1", "conv2"]
    assert [(c.neighbour, c.out, c.in_, c.repeats) for c in block.layers[0].cuts] == [
        (0, all_, all_, (2, 1)),
        (1, all_, (0, 2), one),
        (1, all_, (1, 2), one),
    ]
    assert [(c.neighbour, c.repeats) for c in block.layers[1].cuts] == [(0, (2, 2)), (1, (1, 1))]
    kept = {part.path: part.reason for part in block.kept}
    assert kept["downsample.0"] == "layer1.2 has no downsample.0"
    assert "layer2.0.conv1 from 3, layer2.0.conv2 from 2" in " ".join(str(plan).split())


def kernels(other: Callable[[], nn.Module]) -> nn.Module:
    def block(conv: nn.Module) -> nn.Module:
        return nn.Sequential(conv, nn.Conv2d(4, 4, 1))

    return nn.Sequential(*(block(make()) for make in [lambda: nn.Conv2d(4, 4, 3)] * 3 + [other] + [other]))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: nn.Conv2d(4, 4, 5), r"3.0.weight is \(4, 4, 5, 5\), 2.0.weight \(4, 4, 3, 3\)"),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), r"3.0.weight is \(4, 1, 3, 3\), 2.0.weight \(4, 4, 3, 3\)"),
        (lambda: nn.Conv2d(6, 6, 3), r"3.0.weight is \(6, 6, 3, 3\), 2.0.weight \(4, 4, 3, 3\)"),
        (lambda: nn.Conv2d(8, 8, 3, bias=False), r"3.0.weight is \(8, 8, 3, 3\), 2.0.weight \(4, 4, 3, 3\)"),
    ],
    ids=["kernel size", "depthwise", "ratio", "bias"],
)
def test_what_cannot_be_cut_is_kept_and_named(other: Callable[[], nn.Module], reason: str) -> None:
    plan = rl.plan(kernels(other), every=2, offset=3, boundaries="blocks", level="block")
    (block,) = plan.replaced
    assert [layer.path for layer in block.layers] == ["1"]
    assert [part.path for part in block.kept] == ["0"]
    assert re.match(reason, block.kept[0].reason)


def test_stages_that_do_not_follow_one_another_stay_apart() -> None:
    towers = nn.ModuleDict({"left": ResNet((2, 2)), "right": ResNet((2, 2))})
    plan = rl.plan(towers, every=2, offset=2, boundaries="blocks", targets="conv", level="block")
    assert [block.path for block in plan.replaced] == ["left.layer1.1", "right.layer1.1"]
    skipped = {block.path: block.reason for block in plan.skipped}
    assert skipped["left.layer2.1"] == "stage boundary"
    with pytest.raises(ValueError, match="nothing can be replaced"):
        rl.plan(towers, every=2, targets="conv", level="block")


def test_parametrized_layers_of_other_sizes() -> None:
    model = ResNet((2, 2)).double().eval()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            weight_norm(module)
    plan = rl.plan(model, every=2, boundaries="blocks", targets="conv")
    rl.replace(model, plan)
    spread_out(model)
    x = image()
    expected = model(x)
    assert plan.replaced[0].is_cut
    assert relative_error(rl.merge(model)(x), expected) < 1e-12


SIZES = {
    "equal": ((8, 8), (8, 8)),
    "rows cut": ((8, 8), (16, 8)),
    "columns cut": ((8, 8), (8, 16)),
    "quadrants": ((8, 8), (16, 16)),
    "rows repeated": ((8, 8), (4, 8)),
    "columns repeated": ((8, 8), (8, 4)),
    "both repeated": ((8, 8), (4, 4)),
    "cut and repeated": ((8, 8), (16, 4)),
    "repeated and cut": ((8, 8), (2, 32)),
}


@pytest.mark.parametrize("sizes", SIZES)
def test_the_output_starts_with_the_variance_of_the_papers_start(sizes: str) -> None:
    """A half of what a layer of its own has, whose weights start by their number of inputs."""
    own, other = SIZES[sizes]
    model = nn.ModuleList(nn.Linear(32 * size[1], 32 * size[0], bias=False) for size in (own, own, other))
    x = torch.randn(64, 32 * own[1])
    before = model[1](x).var()
    rl.replace(model, rl.plan(model, every=2, boundaries="blocks", level="layer"))
    ratio = (model[1](x).var() / before).item()
    assert 0.45 < ratio < 0.55, ratio
