"""Which blocks a plan finds, which of them it replaces, and what it says about the others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rl_kernels as rl
from rl_kernels.conversion.blocks import composite_blocks, leaf_blocks
from tests.conversion.common import fingerprint
from tests.conversion.toys import BasicBlock, Block, LinearAttention, ResNet, ViT, encoder, sequential, vgg


def replaced(plan: rl.Plan) -> list[tuple[int, str, tuple[str, ...]]]:
    return [(block.number, block.path, block.sources) for block in plan.replaced]


def skipped(plan: rl.Plan) -> list[tuple[int, str]]:
    return [(block.number, block.reason) for block in plan.skipped]


def layers(plan: rl.Plan) -> list[str]:
    return [layer.path for layer in plan.replaced[0].layers]


def own(plan: rl.Plan) -> dict[str, str]:
    return {part.path: part.reason for part in plan.replaced[0].kept}


# Finding blocks.


def paths(model: nn.Module) -> list[str]:
    return [block.path for block in composite_blocks(model)]


def test_every_block_of_a_resnet_counts_also_the_first_of_a_stage():
    assert paths(ResNet((3, 4))) == [f"layer1.{i}" for i in range(3)] + [f"layer2.{i}" for i in range(4)]
    assert paths(ResNet((1, 3))) == ["layer1.0", "layer2.0", "layer2.1", "layer2.2"]


def test_no_stage_is_searched_inside_a_block_nor_a_container_of_unlike_children():
    assert paths(ViT(3)) == ["blocks.0", "blocks.1", "blocks.2"]
    stages = nn.Sequential(nn.Sequential(Block(4), Block(4)), nn.Sequential(Block(8), Block(8)))
    assert paths(stages) == ["0.0", "0.1", "1.0", "1.1"]


def test_bare_containers_of_blocks_are_stages_also_where_they_are_alike():
    stages = nn.Sequential(nn.Sequential(Block(4), Block(4)), nn.Sequential(Block(4), Block(4)))
    assert paths(stages) == ["0.0", "0.1", "1.0", "1.1"]


def test_bare_containers_of_unlike_layers_are_blocks():
    model = nn.ModuleList(nn.ModuleList([LinearAttention(4, 2), nn.Linear(4, 4)]) for _ in range(3))
    assert paths(model) == ["0", "1", "2"]


def test_children_without_parameters_and_norms_do_not_separate_blocks():
    parts = [BasicBlock(4, 4), nn.ReLU(), BasicBlock(4, 4), nn.BatchNorm2d(4), BasicBlock(4, 4), nn.Conv2d(4, 4, 1)]
    assert paths(nn.Sequential(*parts)) == ["0", "2", "4"]


def test_layers_in_a_container_are_blocks():
    assert [block.path for block in leaf_blocks(sequential(3))] == ["0", "2", "5", "8", "11"]
    assert [block.path for block in leaf_blocks(vgg())] == ["0.0", "0.3", "0.7", "0.10", "0.13", "0.16"]


def test_layers_inside_a_block_are_no_blocks():
    model = ViT(3)
    for block in model.blocks:
        block.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert leaf_blocks(model) == []


def test_a_bare_container_is_a_block_only_beside_its_like():
    def pair() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))

    model = nn.ModuleDict({"body": nn.Sequential(pair(), pair(), pair()), "head": nn.Sequential(nn.Flatten(), pair())})
    assert paths(model) == ["body.0", "body.1", "body.2"]


def test_blocks_without_a_layer_that_can_be_replaced_do_not_count():
    embeddings = nn.ModuleList(nn.Embedding(5, 4) for _ in range(3))
    assert paths(nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4), nn.LSTM(4, 4))) == []
    assert leaf_blocks(embeddings) == []


# The walk.


def test_resnet_34_replaces_the_first_block_that_can_be_once_one_is_due():
    plan = rl.plan(ResNet(), every=4)
    expected = [(6, "layer2.2", ("layer2.1", "layer2.3")), (10, "layer3.2", ("layer3.1", "layer3.3"))]
    assert replaced(plan) == expected
    edge, shape = "stage boundary", "shape mismatch"
    assert skipped(plan) == [(4, edge), (5, shape), (14, edge), (15, shape), (16, "last")]
    details = [block.detail for block in plan.skipped]
    assert details[0] == "first block of layer2"
    assert details[1] == "layer2.0.conv1.weight is (8, 4, 3, 3), layer2.1.conv1.weight (8, 8, 3, 3)"
    assert (plan.blocks, plan.offset, plan.level, plan.fell_back) == (16, 4, "block", False)


def test_strict_skips_what_is_due_and_cannot_be_replaced():
    plan = rl.plan(ResNet(), every=4, offset=6, strict=True)
    assert [block.number for block in plan.replaced] == [6, 10]
    assert skipped(plan) == [(14, "stage boundary")]
    with pytest.raises(ValueError, match=r"^every: got 4, but nothing due can be replaced: layer2.0: stage boundary"):
        rl.plan(ResNet((3, 4, 4)), every=4, strict=True)


@pytest.mark.parametrize(
    ("every", "offset", "numbers"),
    [(2, None, [2, 4, 6, 8]), (3, None, [3, 6]), (4, None, [4, 8]), (2, 3, [3, 5, 7]), (4, 1, [2, 6]), (9, 8, [8])],
)
def test_replacements_fall_due_at_offset_and_then_every_few_blocks(every, offset, numbers):
    plan = rl.plan(ViT(9), every=every, offset=offset)
    assert [block.number for block in plan.replaced] == numbers
    assert replaced(plan)[0][1:] == (f"blocks.{numbers[0] - 1}", (f"blocks.{numbers[0] - 2}", f"blocks.{numbers[0]}"))


def test_the_first_block_is_named_as_such():
    assert skipped(rl.plan(ViT(9), every=4, offset=1)) == [(1, "first")]


def test_a_chain_of_layers():
    assert replaced(rl.plan(sequential(6), every=4)) == [(4, "8", ("5", "11"))]
    plan = rl.plan(vgg(), every=3)
    # 3 to 6 have 8 channels; 3 has 4 inputs.
    assert replaced(plan) == [(5, "0.13", ("0.10", "0.16"))]
    assert plan.level == "block" and not plan.fell_back


def test_single_layers_where_no_block_has_neighbours_of_its_shape():
    plan = rl.plan(ResNet((2, 2, 2)), every=4)
    assert plan.level == "layer" and plan.fell_back
    # 1 conv1; 2, 3, 4, 5 of layer1; 6, 7 of layer2.0 and 8 its shortcut; 9, 10 of layer2.1; ...
    expected = [
        (4, "layer1.1.conv1", ("layer1.0.conv2", "layer1.1.conv2")),
        (9, "layer2.1.conv1", ("layer2.0.conv2", "layer2.1.conv2")),
        (14, "layer3.1.conv1", ("layer3.0.conv2", "layer3.1.conv2")),
    ]
    assert replaced(plan) == expected
    assert "No block was found between two of its shape" in str(plan)
    assert plan.siblings == () and "may not follow" not in str(plan)  # conv1 and conv2 are numbered.
    assert plan.options.share == "block" and plan.replaced[0].coefficients == 2


def test_the_level_can_be_forced():
    plan = rl.plan(ResNet(), every=4, level="layer", targets="conv")
    assert plan.level == "layer" and not plan.fell_back
    assert replaced(plan)[:2] == [
        (4, "layer1.1.conv1", ("layer1.0.conv2", "layer1.1.conv2")),
        (11, "layer2.1.conv1", ("layer2.0.conv2", "layer2.1.conv2")),
    ]
    with pytest.raises(ValueError, match=r"nothing can be replaced .* or another level than 'block'"):
        rl.plan(ResNet((2, 2)), level="block")


def test_a_layer_that_another_is_mixed_from_is_kept():
    conv, linear = (lambda: nn.Conv2d(4, 4, 3)), (lambda: nn.Linear(4, 4))
    model = nn.Sequential(conv(), conv(), linear(), linear(), conv(), conv(), linear(), conv())
    plan = rl.plan(model, every=2, level="layer")
    # 2 is mixed from 1 and 5; 4 from 3 and 7; then 5 and 7 are taken, and 6 lies between 5 and 8.
    assert replaced(plan) == [(2, "1", ("0", "4")), (4, "3", ("2", "6")), (6, "5", ("4", "7"))]
    plan = rl.plan(model, every=3, offset=2, level="layer")
    assert skipped(plan)[0] == (5, "neighbour replaced")
    assert plan.skipped[0].detail == "1 is replaced"
    model = nn.Sequential(conv(), conv(), linear(), linear(), conv(), linear(), conv(), linear())
    plan = rl.plan(model, every=2, offset=4, level="layer")
    assert replaced(plan)[0] == (4, "3", ("2", "5"))
    assert (plan.skipped[0].number, plan.skipped[0].detail) == (6, "3 is replaced")


# What is replaced in a block.


def test_everything_that_can_be_replaced_is_and_the_rest_is_named():
    plan = rl.plan(ViT())
    assert layers(plan) == ["norm1", "attn", "norm2", "mlp.0", "mlp.2"]
    assert own(plan) == {"gamma": "a parameter of no layer"}
    assert plan.replaced[0].layers[3].shapes == {"weight": (16, 8), "bias": (16,)}
    assert plan.replaced[0].parameters == sum(p.numel() for p in ViT().blocks[0].parameters())
    assert plan.replaced[0].saved == plan.replaced[0].parameters - 8 - 2


@pytest.mark.parametrize("torch_attention", [True, False])
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", ["attn"]),
        ("mlp", ["mlp.0", "mlp.2"]),
        ("linear", ["mlp.0", "mlp.2"]),
        (["attention", "norm"], ["norm1", "attn", "norm2"]),
        (nn.Linear, ["mlp.0", "mlp.2"]),
        (nn.Sequential, ["mlp.0", "mlp.2"]),
        (lambda path, layer: path == "blocks.3.mlp.0", ["mlp.0"]),
    ],
)
def test_targets_narrow_a_block(targets, expected, torch_attention):
    if not torch_attention:
        inner = {
            "attention": ["attn.qkv", "attn.proj"],
            "linear": ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"],
            nn.Linear: ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"],
        }
        both = ["norm1", "attn.qkv", "attn.norm", "attn.proj", "norm2"]
        expected = both if isinstance(targets, list) else inner.get(targets, expected)
    plan = rl.plan(ViT(torch_attention=torch_attention), targets=targets)
    assert layers(plan) == expected
    if targets == "attention":
        assert own(plan)["norm1"] == "not a target"
        assert plan.targets == ("attention",) and "attention only" in str(plan)


class AttentionBlock(LinearAttention):
    pass


def test_a_block_is_attention_where_its_name_ends_so():
    plan = rl.plan(nn.ModuleList(LinearAttention(4, 2) for _ in range(5)), targets="attention")
    assert layers(plan) == ["qkv", "proj"]
    with pytest.raises(ValueError, match=r"^targets: got attention, which match no layer"):
        rl.plan(nn.ModuleList(AttentionBlock(4, 2) for _ in range(5)), targets="attention")


def test_a_block_without_a_target_is_skipped():
    model = ViT(9)
    model.blocks[3].attn = nn.Linear(8, 8)
    assert skipped(rl.plan(model, targets="attention"))[0] == (4, "nothing to replace")


def test_only_what_is_replaced_needs_neighbours_of_its_shape():
    model = ViT(9)
    model.blocks[4].mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    assert [block.number for block in rl.plan(model, targets="attention").replaced] == [4, 8]
    plan = rl.plan(model)
    assert [block.number for block in plan.replaced] == [7]
    assert skipped(plan)[:3] == [(4, "shape mismatch"), (5, "shape mismatch"), (6, "shape mismatch")]
    model.blocks[4].mlp = nn.Identity()
    assert rl.plan(model).skipped[0].detail == "blocks.4 has no mlp.0"
    model.blocks[4].mlp = nn.ModuleList([nn.Conv1d(8, 16, 1)])
    assert rl.plan(model).skipped[0].detail == "blocks.4.mlp.0 is Conv1d, blocks.3.mlp.0 Linear"


def test_convolutions_only_and_norms_of_their_own():
    plan = rl.plan(ResNet(), targets="conv")
    assert layers(plan) == ["conv1", "conv2"] and own(plan) == {"bn1": "not a target", "bn2": "not a target"}
    plan = rl.plan(ResNet(), norms="own")
    assert layers(plan) == ["conv1", "conv2"] and own(plan) == {"bn1": "norms='own'", "bn2": "norms='own'"}


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.weight * x


def test_what_has_no_replacement_stays_own():
    model = ViT(5)
    for block in model.blocks:
        block.norm1, block.norm2 = Doubled(8), Scale()
        block.norm1.inner = nn.Linear(8, 8)
        block.mlp[0].forward = block.mlp[0].forward
        prune.random_unstructured(block.mlp[2], "weight", 0.5)
    plan = rl.plan(model)
    assert layers(plan) == ["attn"]
    reasons = own(plan)
    assert reasons["norm1"].endswith("Doubled has a forward of its own, and modules in it have parameters")
    assert reasons["norm2"].startswith("it is Scale (")
    assert reasons["norm2"].endswith("there is no replacement unless its class is a target")
    assert "forward of its own" in reasons["mlp.0"]
    assert reasons["mlp.2"] == "it has no parameter named weight"


def test_a_neighbour_that_cannot_be_mixed_is_named():
    model = ViT(6)
    model.blocks[2].norm2 = nn.LayerNorm(8, elementwise_affine=False)
    plan = rl.plan(model, every=2)
    assert plan.skipped[0].detail == "blocks.2.norm2 cannot be mixed: it has no parameter named weight"
    model = ViT(8)
    model.blocks[4].norm1 = Doubled(8)
    skipped = rl.plan(model, offset=4).skipped[0]
    assert skipped.detail.startswith("blocks.4.norm1 is tests.conversion.test_plan.Doubled, blocks.3.norm1 torch.nn.")
    model.blocks[4].norm1.inner = nn.Linear(8, 8)
    skipped = rl.plan(model, offset=4).skipped[0]
    assert skipped.detail.endswith("Doubled has a forward of its own, and modules in it have parameters")


def test_norms_alone_are_replaced_only_when_asked_for():
    model = ViT(5)
    for block in model.blocks:
        block.attn, block.mlp = nn.Linear(8, 8), Scale()
    assert layers(rl.plan(model, targets="norm")) == ["norm1", "norm2"]
    for block in model.blocks:
        block.attn = Scale()
    with pytest.raises(ValueError, match="nothing can be replaced"):
        rl.plan(model)


def test_shared_parameters_are_not_replaced():
    model = ViT(9)
    model.blocks[3].mlp[2].weight = model.blocks[0].mlp[2].weight
    plan = rl.plan(model)
    assert plan.skipped[0].reason == "shared parameters"
    assert plan.skipped[0].detail == "blocks.3.mlp.2.weight is also blocks.0.mlp.2.weight"
    assert [block.number for block in plan.replaced] == [5]
    assert [block.number for block in rl.plan(model, targets="attention").replaced] == [4, 8]
    twice = nn.Sequential(*[Block(8)] * 6)
    with pytest.raises(ValueError, match=r"nothing can be replaced .*0.norm1.weight is also 1.norm1.weight"):
        rl.plan(twice, level="block")


def test_lazy_layers_must_know_their_shapes():
    with pytest.raises(ValueError, match=r"^model: got 1.weight uninitialised"):
        rl.plan(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)))


def test_parametrised_layers_are_sources_and_can_be_replaced():
    model = sequential(6)
    for index in (5, 8, 11):
        parametrizations.weight_norm(model[index])
    plan = rl.plan(model, every=4)
    assert replaced(plan) == [(4, "8", ("5", "11"))]
    rl.replace(model, plan)
    model(torch.randn(2, 3)).sum().backward()
    assert model[5].parametrizations.weight.original0.grad is not None


def test_meta_models_can_be_planned():
    with torch.device("meta"):
        model = ResNet()
    assert replaced(rl.plan(model)) == replaced(rl.plan(ResNet()))


def test_torch_encoders_are_planned():
    plan = rl.plan(encoder(5))
    assert layers(plan) == ["self_attn", "linear1", "linear2", "norm1", "norm2"] and own(plan) == {}
    assert layers(rl.plan(encoder(5), targets="mlp")) == ["linear1", "linear2"]


# What a plan says.


def test_a_plan_prints_as_a_table():
    text = str(rl.plan(ResNet(), every=4))
    lines = text.splitlines()
    assert lines[0].startswith("Plan for ResNet: 16 blocks: 3 BasicBlock in layer1; 4 BasicBlock in layer2; 6 ")
    row = next(line for line in lines if " layer2.2 " in line).split()
    assert row == ["6", "layer2.2", "layer2.1", "2", "Conv2d", "1,184", "2"]
    assert any(line.split() == ["layer2.3", "2", "BatchNorm2d"] for line in lines)
    assert "stage boundary   first block of layer2" in text
    assert "2 of 16 blocks replaced; one pair of coefficients a block, free, starting from 0.5 each." in text
    plan = rl.plan(ResNet(), every=4)
    assert f"Parameters: {plan.parameters:,} -> {plan.parameters_after:,} ({plan.saved:,} saved" in text
    options = {"granularity": "channel", "init": (0.25, 0.75), "constraint": "convex", "detach": (0,)}
    text = str(rl.plan(ViT(), strict=True, targets="attention", **options))
    assert "one pair of coefficients a layer and channel, convex, starting from (0.25, 0.75)" in text
    assert "no gradient to the previous" in text and "Targets: attention only." in text
    assert "is skipped" in text and "not a target" in text


def test_plans_are_saved_and_loaded(tmp_path):
    options = {"init": (0.25, 0.75), "constraint": "convex", "detach": [1], "share": "layer"}
    for plan in (rl.plan(ResNet()), rl.plan(ViT(), targets=["attention", nn.Linear], **options)):
        assert rl.Plan.from_json(plan.to_json()) == plan
        plan.save(tmp_path / "plan.json")
        assert rl.Plan.load(tmp_path / "plan.json") == plan
        assert str(rl.Plan.load(tmp_path / "plan.json")) == str(plan)


def test_what_is_no_plan_does_not_load():
    fields = json.loads(rl.plan(ResNet()).to_json())
    for text, message in (
        ("{", "no JSON"),
        ("[]", "got format None"),
        (json.dumps({**fields, "format": 5}), "got format 5, expected a plan of format 4, 3, 2 or 1"),
        (json.dumps({key: value for key, value in fields.items() if key != "replaced"}), "does not read"),
        (json.dumps({**fields, "surplus": 1}), "does not read"),
        (json.dumps({**fields, "options": {"norms": "none"}}), "norms: got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            rl.Plan.from_json(text)


# Bad arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 1}, ValueError, "every: got 1, expected at least 2"),
        ({"every": 2.0}, TypeError, "every: got 2.0, expected an integer"),
        ({"every": True}, TypeError, "every: got True, expected an integer"),
        ({"every": 10}, ValueError, "every: got 10, expected at most 9"),
        ({"offset": 0}, ValueError, "offset: got 0, expected at least 1"),
        ({"offset": 10}, ValueError, "offset: got 10, expected at most 9"),
        ({"offset": 9}, ValueError, r"offset: got 9, but nothing due can be replaced: blocks.8: last"),
        ({"offset": "4"}, TypeError, "offset: got '4', expected an integer"),
        ({"level": "blocks"}, ValueError, "level: got 'blocks', expected one of 'auto', 'block', 'layer'"),
        ({"targets": "attn"}, ValueError, "targets: got 'attn', expected one of 'attention', 'mlp', 'conv'"),
        ({"targets": []}, ValueError, "targets: got an empty sequence"),
        ({"targets": 3}, TypeError, "targets: got 3, expected a name, a class or a function"),
        ({"targets": nn.Conv1d}, ValueError, "targets: got Conv1d, which match no layer of ViT"),
        ({"targets": "norm", "norms": "own"}, ValueError, "norms: got 'own' with 'norm' among the targets"),
        ({"norms": "shared"}, ValueError, "norms: got 'shared', expected one of 'mixed', 'own'"),
        ({"share": "model"}, ValueError, "share: got 'model', expected one of 'block', 'layer'"),
        ({"granularity": "row"}, ValueError, "granularity: got 'row'"),
        ({"granularity": "channel", "share": "block"}, ValueError, "share: got 'block' with granularity 'channel'"),
        ({"constraint": "sum"}, ValueError, "constraint: got 'sum'"),
        ({"init": "best"}, ValueError, "init: got 'best', expected None, 'fit' or two numbers"),
        ({"init": (1, 2, 3)}, ValueError, "init: got .* expected None, 'fit' or two numbers"),
        ({"init": (0.5, 0.6), "constraint": "convex"}, ValueError, "init: got .* expected positive"),
        ({"detach": (2,)}, ValueError, r"detach: got \(2,\), expected indices"),
        ({"detach": 0}, ValueError, "detach: got 0, expected indices"),
    ],
)
def test_bad_arguments_name_the_argument(options, error, message):
    model = ViT(9)
    before = fingerprint(model)
    with pytest.raises(error, match=f"^{message}"):
        rl.plan(model, **options)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.Sequential(), nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), nn.LSTM(3, 3, 4)],
)
def test_a_model_without_a_chain_is_refused(model):
    with pytest.raises(ValueError, match=r"^model: got \w+, in which nothing can be replaced"):
        rl.plan(model)


def test_models_are_planned_once():
    model = rl.replace(ViT(), rl.plan(ViT()))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"^model: got one with replaced layers \(blocks.3.norm1\)"):
        rl.plan(model)
    assert fingerprint(model) == before
    with pytest.raises(TypeError, match=r"^model: got str"):
        rl.plan("resnet34")  # type: ignore[arg-type]


def test_planning_leaves_the_model_as_it_is():
    for model in (ResNet(), ResNet((2, 2)), ViT(), sequential()):
        before = fingerprint(model)
        rl.plan(model)
        assert fingerprint(model) == before
