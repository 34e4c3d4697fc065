"""Where blocks stand, which layers are neighbours, and what several blocks share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.conversion.blocks import composite_blocks, stem
from tests.conversion.common import check_replaced
from tests.conversion.toys import BasicBlock, Block, ResNet, ViT


def paths(model: nn.Module) -> list[str]:
    return [block.path for block in composite_blocks(model)]


def replaced(plan: rl.Plan) -> list[tuple[str, tuple[str, ...]]]:
    return [(block.path, block.sources) for block in plan.replaced]


class Named(nn.Module):
    """Modules under given names, run one after the other."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.order = list(modules)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


def conv_blocks(n: int, width: int = 4) -> list[BasicBlock]:
    return [BasicBlock(width, width) for _ in range(n)]


# Blocks outside a sequence.


def test_numbers_at_the_end_of_names():
    found = [stem(name) for name in ("block3", "layer_10", "7", "query", "conv2d", "")]
    assert found == ["block", "layer_", "", None, None, None]


@pytest.mark.parametrize("name", ["block{}", "layer_{}", "enc{}_"])
def test_blocks_under_numbered_names_are_a_stage(name):
    model = Named({"stem": nn.Conv2d(4, 4, 1), **{name.format(i): block for i, block in enumerate(conv_blocks(5))}})
    if name == "enc{}_":  # The number is inside.
        assert paths(model) == []
        return
    assert paths(model) == [name.format(i) for i in range(5)]
    plan = rl.plan(model, every=4)
    assert replaced(plan) == [(name.format(3), (name.format(2), name.format(4)))]
    assert plan.level == "block" and not plan.fell_back
    stage = name.format("*")
    assert str(plan).startswith(f"Plan for Named: 5 blocks: 5 BasicBlock in {stage}\n")
    assert rl.plan(model, every=2, offset=1).skipped[0].reason == "first"
    check_replaced(model, (torch.randn(2, 4, 6, 6, dtype=torch.float64),), every=4)


def test_blocks_under_numbered_names_of_a_part_of_the_model():
    inner = Named({f"block{i}": block for i, block in enumerate(conv_blocks(3))})
    other = Named({f"block{i}": block for i, block in enumerate(conv_blocks(3, 2))})
    model = nn.ModuleDict({"body": inner, "other": other})
    assert [block.stage for block in composite_blocks(model)] == ["body.block*"] * 3 + ["other.block*"] * 3
    plan = rl.plan(model, every=2)
    assert [path for path, _ in replaced(plan)] == ["body.block1", "other.block1"]
    skipped = rl.plan(model, every=3).skipped[0]
    assert (skipped.path, skipped.detail) == ("body.block2", "last block of body.block*")


def test_what_stands_between_numbered_blocks_does_not_part_them():
    down, up = conv_blocks(3), conv_blocks(3)
    modules: dict[str, nn.Module] = {}
    for i in range(3):
        modules |= {f"down{i}": down[i], f"pool{i}": nn.MaxPool2d(1), f"up{i}": up[i]}
    assert {block.stage for block in composite_blocks(Named(modules))} == {"down*", "up*"}
    # In the order of registration: 1 down0, 2 up0, 3 down1, 4 up1, 5 down2, 6 up2.
    assert replaced(rl.plan(Named(modules), every=2)) == [("down1", ("down0", "down2"))]
    assert replaced(rl.plan(Named(modules), every=4)) == [("up1", ("up0", "up2"))]


@pytest.mark.parametrize(
    "modules",
    [
        lambda: {f"block{i}": block for i, block in enumerate(conv_blocks(2))},
        lambda: dict(zip(("query", "key", "value"), conv_blocks(3), strict=True)),
        lambda: {f"block{i}": BasicBlock(4, 4 * (i + 1)) for i in range(3)},
        lambda: {f"fc{i}": nn.Linear(4, 4) for i in range(3)},
        lambda: {f"norm{i}": nn.BatchNorm2d(4) for i in range(3)},
    ],
    ids=["two", "no numbers", "other shapes", "single layers", "norms"],
)
def test_what_is_no_stage_outside_a_sequence(modules: Callable[[], dict[str, nn.Module]]):
    assert paths(Named(modules())) == []


def test_the_stages_of_a_network_are_no_blocks():
    assert [path.split(".")[0] for path in paths(ResNet((3, 3)))] == ["layer1"] * 3 + ["layer2"] * 3
    alike = Named({f"layer{i}": nn.Sequential(*conv_blocks(3)) for i in range(3)})
    assert paths(alike) == [f"layer{i}.{j}" for i in range(3) for j in range(3)]
    towers = Named({f"tower{i}": ViT(3) for i in range(3)})
    assert paths(towers) == [f"tower{i}.blocks.{j}" for i in range(3) for j in range(3)]
    rows = Named({f"mlp{i}": nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for i in range(3)})
    assert paths(rows) == []
    assert rl.plan(rows, every=2).replaced[0].path == "mlp0.1"
    # Two blocks inside are no stage that anything could be replaced in.
    pairs = Named({f"layer{i}": Named({"body": nn.ModuleList(conv_blocks(2))}) for i in range(3)})
    assert paths(pairs) == ["layer0", "layer1", "layer2"]


def test_blocks_in_a_dictionary_are_a_stage():
    model = nn.ModuleDict({name: Block(8) for name in ("first", "second", "third", "last")})
    assert paths(model) == ["first", "second", "third", "last"]
    assert replaced(rl.plan(model, every=2)) == [("second", ("first", "third"))]
    heads = nn.ModuleDict({"a": ViT(3), "b": ViT(3), "c": ViT(3)})
    assert paths(heads) == [f"{tower}.blocks.{j}" for tower in "abc" for j in range(3)]


# Single layers.


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.head = nn.Linear(8, 8)


def test_siblings_are_no_neighbours_unasked():
    beside = (
        r"attention\.key: siblings \(attention\.query is beside it in Attention, not known to be before or after it\)"
    )
    with pytest.raises(ValueError, match=rf"^model: got Net, in which nothing can be replaced .*{beside}"):
        rl.plan(Net(), every=2)


def test_siblings_are_neighbours_where_single_layers_are_asked_for_and_the_plan_says_so():
    plan = rl.plan(Net(), every=2, level="layer")
    expected = [("attention.key", ("attention.query", "attention.value"))]
    assert replaced(plan) == [*expected, ("attention.out", ("attention.value", "head"))]
    assert plan.siblings == ("attention.key", "attention.out")
    lines = str(plan).splitlines()
    assert lines[1] == "A layer's neighbours are the previous and the next of its kind, as the model registers them."
    assert lines[2].startswith("These stand beside their neighbours in one module, and may not follow one another: ")
    assert lines[2].endswith(": attention.key, attention.out.")
    assert rl.Plan.from_json(plan.to_json()) == plan


def test_a_due_sibling_is_skipped_by_name():
    body = [nn.Sequential(nn.Linear(8, 8)), Net(), nn.Sequential(nn.Linear(8, 8))]
    plan = rl.plan(nn.ModuleDict({"body": nn.ModuleList(body)}), every=2)
    # 1 the first; 2, 3, 4, 5 of the attention; 6 its head, 7 after it.
    assert plan.fell_back and replaced(plan) == [("body.1.head", ("body.1.attention.out", "body.2.0"))]
    found = [(block.path, block.reason) for block in plan.skipped]
    names = ("query", "key", "value", "out")
    assert found == [(f"body.1.attention.{name}", "siblings") for name in names]


@pytest.mark.parametrize(
    "make",
    [
        lambda made: Named({f"fc{i}": layer for i, layer in enumerate(made, start=1)}),
        lambda made: nn.Sequential(OrderedDict(zip("abc", made, strict=True))),
        lambda made: nn.ModuleList(made),
    ],
    ids=["numbered", "named in a sequence", "a list"],
)
def test_layers_in_an_order_are_neighbours(make):
    model = make([nn.Linear(8, 8) for _ in range(3)])
    names = [name for name, _ in model.named_children()]
    assert replaced(rl.plan(model, every=2)) == [(names[1], (names[0], names[2]))]
    assert rl.plan(model, every=2, level="layer").siblings == ()


def test_layers_in_a_dictionary_are_not():
    heads = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("cls", "box", "mask")})
    with pytest.raises(ValueError, match=r"box: siblings \(cls is beside it in ModuleDict"):
        rl.plan(heads, every=2)


def test_gates_of_a_cell_are_siblings():
    cell = nn.ModuleDict({name: nn.Conv2d(4, 4, 3) for name in ("convz", "convr", "convq")})
    with pytest.raises(ValueError, match="convr: siblings"):
        rl.plan(cell, every=2)


# What several blocks share.


class Encoded(nn.Module):
    """A block around a position encoding that is all blocks', as timm's CoaT has it."""

    def __init__(self, encoding: nn.Module):
        super().__init__()
        self.encoding = encoding
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(self.encoding(x)))


def shared(encoding: nn.Module | None = None, depth: int = 5) -> nn.Sequential:
    encoding = encoding or nn.Linear(8, 8)
    return nn.Sequential(*(Encoded(encoding) for _ in range(depth)))


def test_what_blocks_share_stays_and_the_rest_is_replaced():
    plan = rl.plan(shared(), every=4)
    assert replaced(plan) == [("3", ("2", "4"))]
    assert [layer.path for layer in plan.replaced[0].layers] == ["norm", "fc"]
    (kept,) = plan.replaced[0].kept
    assert (kept.path, kept.parameters, kept.reason) == ("encoding", 72, "shared with 0.encoding")
    assert "shared with 0.encoding" in str(plan)
    model = shared()
    encoding = model[0].encoding
    check_replaced(model, (torch.randn(2, 8, dtype=torch.float64),), every=4)
    assert all(block.encoding is encoding for block in model)


def test_a_layer_inside_what_blocks_share_stays_too():
    plan = rl.plan(shared(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))), every=2)
    reasons = {part.path: part.reason for part in plan.replaced[0].kept}
    assert reasons == {"encoding.0": "shared with 0.encoding.0", "encoding.2": "shared with 0.encoding.2"}


def test_a_module_twice_in_one_block_counts_once():
    class Twice(Encoded):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8))
            self.again = self.encoding

    model = nn.Sequential(*(Twice() for _ in range(3)))
    (block,) = rl.plan(model, every=2).replaced
    assert [layer.path for layer in block.layers] == ["norm", "fc"]
    assert [(part.path, part.reason) for part in block.kept] == [("encoding", "shared with 1.again")]
    assert block.parameters == sum(parameter.numel() for parameter in model[1].parameters())
    rl.replace(model, rl.plan(model, every=2))


def test_tied_weights_of_what_is_wanted_prevent():
    model = shared()
    model[3].fc.weight = model[0].fc.weight
    plan = rl.plan(model, every=2)
    assert replaced(plan) == [("1", ("0", "2"))]
    assert (plan.skipped[0].path, plan.skipped[0].reason) == ("3", "shared parameters")
    assert plan.skipped[0].detail == "3.fc.weight is also 0.fc.weight"


def test_blocks_that_are_one_module_are_not_replaced():
    with pytest.raises(ValueError, match=r"\(0: shared parameters \(0\.0\.weight is also 1\.0\.weight\); 1: shared"):
        rl.plan(nn.Sequential(*[nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))] * 5))


def test_a_shared_layer_is_skipped_and_still_a_source():
    linear = [nn.Linear(8, 8) for _ in range(5)]
    model = nn.Sequential(*linear, linear[1])
    plan = rl.plan(model, every=2, level="layer")
    assert plan.skipped[0].path == "1" and plan.skipped[0].reason == "shared parameters"
    assert plan.skipped[0].detail == "1.weight is also 5.weight"
    assert replaced(plan) == [("2", ("1", "3"))]
    rl.replace(copy.deepcopy(model), plan)


# What cannot be mixed.


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_complex_layers_stay_with_a_reason(kind, dtype):
    def layer(**options) -> nn.Module:
        return kind(8, 8, **({} if kind is nn.Linear else {"kernel_size": 3}), **options)

    reason = rf"its dtype is {dtype}, expected a real floating-point one".replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"\(0: {reason}\)"):
        rl.plan(nn.Sequential(*(layer(dtype=dtype) for _ in range(5))), every=2)
    model = nn.Sequential(*(nn.Sequential(layer(), layer(dtype=dtype)) for _ in range(5)))
    plan = rl.plan(model, every=2)
    assert [[layer.path for layer in block.layers] for block in plan.replaced] == [["0"], ["0"]]
    assert [(part.path, part.reason) for part in plan.replaced[0].kept] == [("1", reason.replace("\\", ""))]


def test_integer_weights_stay_and_are_no_sources():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(7)))
    model[2][0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    reason = "its dtype is torch.int8, expected a real floating-point one"
    plan = rl.plan(model, every=2)
    assert (plan.skipped[0].path, plan.skipped[0].detail) == ("1", f"2.0 cannot be mixed: {reason}")
    (block, *_) = plan.replaced
    assert (block.path, [layer.path for layer in block.layers]) == ("2", ["1"])
    assert [(part.path, part.reason) for part in block.kept] == [("0", reason)]


def test_quantised_weights_stay():
    class Int8Tensor(torch.Tensor):
        """It shows the dtype of what it stands for, as torchao's."""

    Int8Tensor.__module__ = "torchao.quantization.quantize_"
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)))
    for pair in model:
        pair[0].weight = nn.Parameter(pair[0].weight.detach().as_subclass(Int8Tensor))
    (block,) = rl.plan(model, every=2).replaced
    assert [layer.path for layer in block.layers] == ["1"]
    (kept,) = block.kept
    assert kept.reason.startswith("its weight is quantised (torchao.quantization.quantize_.") and kept.path == "0"


# Compiled models.


def test_a_plan_of_the_plain_model_on_the_compiled_one_says_what_to_pass():
    model = ViT(5)
    plan = rl.plan(model)
    compiled = torch.compile(model, backend="eager")
    said = r"^model: got OptimizedModule, which torch.compile made, expected the model inside it: plan and replace that"
    with pytest.raises(ValueError, match=said):
        rl.replace(compiled, plan)
    with pytest.raises(ValueError, match=said):
        rl.plan(compiled)
    rl.replace(model, plan)
