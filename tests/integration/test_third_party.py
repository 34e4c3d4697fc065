"""Third-party models, converted: plans, values, gradients, merging, checkpoints."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.conversion.zoo import LIBRARIES, build, import_timm, import_torchvision, import_transformers
from tests.conversion.common import check_replaced, coefficients_of
from tests.conversion.toys import image
from tests.integration.models import bert, huggingface_vit

pytestmark = pytest.mark.integration


def paths(plan: rl.Plan) -> list[tuple[int, str]]:
    return [(block.number, block.path) for block in plan.replaced]


def own_classes(plan: rl.Plan) -> set[str]:
    return {part.class_name for block in plan.replaced for part in block.kept}


# torchvision.

RESNET18 = [(4, "layer1.1.conv1"), (9, "layer2.1.conv1"), (14, "layer3.1.conv1"), (19, "layer4.1.conv1")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", RESNET18),
        ("resnet34", [(6, "layer2.2"), (10, "layer3.2")]),
        ("resnet50", [(6, "layer2.2"), (10, "layer3.2")]),
        ("resnet101", [(6, "layer2.2"), *((n, f"layer3.{n - 8}") for n in range(10, 30, 4))]),
    ],
)
def test_torchvision_resnets(name, expected):
    model = import_torchvision().models.get_model(name, num_classes=7)
    assert paths(rl.plan(model, every=4)) == expected
    check_replaced(model, (image(4, 64),), every=4)


@pytest.mark.parametrize("targets", [None, "attention"])
def test_torchvision_vit(targets):
    vision = import_torchvision().models.VisionTransformer
    model = vision(image_size=16, patch_size=8, num_layers=9, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    plan = rl.plan(model, targets=targets)
    assert paths(plan) == [(4, "encoder.layers.encoder_layer_3"), (8, "encoder.layers.encoder_layer_7")]
    layers = [layer.path for layer in plan.replaced[0].layers]
    assert layers == (["self_attention"] if targets else ["ln_1", "self_attention", "ln_2", "mlp.0", "mlp.3"])
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero.
    check_replaced(model, (image(2, 16),), targets=targets)


def test_torchvisions_old_checkpoints_load():
    vision = import_torchvision().models.VisionTransformer
    settings = dict(image_size=16, patch_size=8, num_layers=5, num_heads=2, hidden_dim=16, mlp_dim=32)
    model, plain = vision(**settings), vision(**settings)
    state = plain.state_dict()
    del state._metadata
    for key in [key for key in state if ".mlp." in key]:
        state[key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")] = state.pop(key)
    rl.replace(model, rl.plan(model))
    report = rl.load_plain_state_dict(model, state)
    assert "encoder.layers.encoder_layer_3.mlp.0.weight" in report.unused
    kept = "encoder.layers.encoder_layer_2.mlp.0.weight"
    assert torch.equal(model.get_parameter(kept), plain.get_parameter(kept))


@pytest.mark.parametrize(
    "name", ["swin_t", "convnext_tiny", "mobilenet_v2", "vgg11_bn", "efficientnet_b0", "regnet_y_400mf"]
)
def test_other_torchvision_models_run(name):
    model = import_torchvision().models.get_model(name, num_classes=7)
    plan = rl.plan(model, every=2)
    rl.replace(model, plan)
    model(image(2, 64, torch.float32)).sum().backward()
    for module in coefficients_of(model, plan).values():
        assert module.coefficients.grad is not None
    rl.merge(model)


# timm.


def test_timm_vit():
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, num_classes=5)
    plan = rl.plan(model)
    assert paths(plan) == [(4, "blocks.3"), (8, "blocks.7")]
    expected = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]  # Norms of timm's own class.
    assert [layer.path for layer in plan.replaced[0].layers] == expected
    assert own_classes(plan) == set()
    check_replaced(model, (image(2, 32),))
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, num_classes=5)
    assert [layer.path for layer in rl.plan(model, targets="attention").replaced[0].layers] == ["attn.qkv", "attn.proj"]
    check_replaced(model, (image(2, 32),), targets="attention", share="layer")


def test_timm_convnext():
    model = import_timm().create_model("convnext_atto", depths=(2, 3, 5, 2), dims=(8, 16, 24, 32), num_classes=5)
    plan = rl.plan(model)
    assert paths(plan) == [(4, "stages.1.blocks.1"), (8, "stages.2.blocks.2")]
    assert own_classes(plan) == {"Parameter"}
    check_replaced(model, (image(2, 64),))


def test_timm_resnets():
    model = import_timm().create_model("resnet18", num_classes=5)
    plan = rl.plan(model, every=4)
    assert plan.fell_back and paths(plan) == RESNET18
    check_replaced(model, (image(4, 64),), every=4)
    with pytest.raises(ValueError, match=r"^model: got ResNet, in which nothing can be replaced"):
        rl.plan(import_timm().create_model("resnet26"))  # Stages of two blocks, of unlike layers.


# transformers.


@pytest.mark.parametrize("options", [{}, {"targets": "attention"}, {"share": "layer", "norms": "own"}], ids=str)
def test_a_hugging_face_vit(options):
    model = huggingface_vit()
    plan = rl.plan(model, **options)
    assert [number for number, _ in paths(plan)] == [4, 8]
    linear = [layer for layer in plan.replaced[0].layers if layer.class_name == "Linear"]
    assert len(linear) == (4 if "targets" in options else 6)
    check_replaced(model, (image(2, 16),), lambda found: found.last_hidden_state, **options)


@pytest.mark.parametrize("options", [{}, {"targets": "attention"}, {"targets": "mlp"}, {"init": "fit"}], ids=str)
def test_a_hugging_face_bert(options):
    model = bert()
    plan = rl.plan(model, **options)
    assert paths(plan) == [(4, "encoder.layer.3"), (8, "encoder.layer.7")]
    attention = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    mlp = ["intermediate.dense", "output.dense"]
    expected = {"attention": attention, "mlp": mlp, None: [*attention, *mlp]}[options.get("targets")]
    assert [layer.path for layer in plan.replaced[0].layers if layer.class_name == "Linear"] == expected
    tokens = torch.randint(30, (2, 7))
    call = {"attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    check_replaced(model, (tokens,), lambda found: found.last_hidden_state, call, **options)


def test_shared_layers_of_albert_are_refused():
    transformers = import_transformers()
    config = transformers.AlbertConfig(
        vocab_size=30, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match=r"^model: got AlbertModel"):
        rl.plan(transformers.AlbertModel(config), level="block")


# Named models.


@pytest.mark.parametrize(
    ("name", "class_name", "blocks"),
    [
        ("resnet34", "torchvision.models.resnet.ResNet", 16),
        ("timm/resnet34", "timm.models.resnet.ResNet", 16),
        ("vit_b_16", "torchvision.models.vision_transformer.VisionTransformer", 12),
        ("vit_base_patch16_224", "timm.models.vision_transformer.VisionTransformer", 12),
        ("bert", "transformers.models.bert.modeling_bert.BertModel", 12),
        ("vit", "transformers.models.vit.modeling_vit.ViTModel", 12),
    ],
)
def test_named_models_are_built_and_planned_at_once(name, class_name, blocks):
    build(name)
    started = time.perf_counter()
    model = build(name)
    plan = rl.plan(model)
    assert time.perf_counter() - started < 5
    assert f"{type(model).__module__}.{type(model).__name__}" == class_name
    assert plan.blocks == blocks and all(parameter.is_meta for parameter in model.parameters())


def test_unknown_models_are_named_with_what_is_near():
    with pytest.raises(ValueError, match=r"expected a model of torchvision or timm or transformers; near it: resnet34"):
        build("resnet3")
    assert set(LIBRARIES) == {"torchvision", "timm", "transformers"}


def test_the_command_prints_a_plan():
    command = [sys.executable, "-m", "rl_kernels", "plan", "resnet34", "--every", "4"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    with torch.device("meta"):
        model = import_torchvision().models.resnet34()
    assert found.stdout == f"{rl.plan(model, every=4)}\n"
    assert "layer2.2" in found.stdout and "layer3.2" in found.stdout
