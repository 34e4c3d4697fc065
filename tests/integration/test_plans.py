"""What plans of other libraries' models find, and say of what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rl_kernels as rl
from benchmarks.families import TABLE, row
from rl_kernels.conversion.zoo import build, import_timm, import_transformers
from tests.conversion.common import coefficients_of
from tests.conversion.toys import image

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def test_the_blocks_of_coat_share_their_position_encodings():
    model = import_timm().create_model("coat_tiny", img_size=32, num_classes=5)
    plan = rl.plan(model, every=4)
    assert plan.level == "block"
    block = next(block for block in plan.replaced if block.path.startswith("parallel_blocks"))
    expected = [f"factoratt_crpe{i}.{name}" for i in (2, 3, 4) for name in ("qkv", "proj")]
    assert [layer.path for layer in block.layers if layer.class_name == "Linear"] == expected
    reasons = {part.path: part.reason for part in block.kept}
    assert reasons["factoratt_crpe2.crpe.conv_list.0"] == "shared with crpe2.conv_list.0"
    assert reasons["mlp2.fc1"] == f"shared with {block.path}.mlp3.fc1"  # One for the three scales of a block.
    rl.replace(model, plan)
    model(image(2, 32, torch.float32)).sum().backward()
    assert all(module.coefficients.grad is not None for module in coefficients_of(model, plan).values())


def test_the_error_names_the_blocks_layers():
    reason = r"key: siblings \(.*query is beside it in AlbertAttention, not known to be before or after it\)"
    with pytest.raises(ValueError, match=rf"in which nothing can be replaced .*{reason}"):
        rl.plan(build("albert"))


def _falcon() -> nn.Module:
    transformers = import_transformers()
    config = transformers.FalconConfig(vocab_size=16, hidden_size=32, num_hidden_layers=5, num_attention_heads=4)
    return transformers.FalconModel(config)


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (lambda: import_timm().create_model("resnetv2_50x1_bit"), {"StdConv2d", "GroupNormAct"}),
        (lambda: import_timm().create_model("nf_resnet50"), {"ScaledStdConv2d"}),
        (_falcon, {"FalconLinear", "LayerNorm"}),
    ],
    ids=["BiT", "NF-ResNet", "Falcon"],
)
def test_layers_with_a_forward_of_their_own(make, classes):
    model = make()
    plan = rl.plan(model, every=2)
    layers = [layer for block in plan.replaced for layer in block.layers]
    assert {layer.class_name for layer in layers} == classes
    assert all((layer.stored > 0) == (layer.class_name.endswith(("Conv2d", "Linear"))) for layer in layers)
    x = torch.randint(16, (2, 5)) if "FalconLinear" in classes else image(2, 32, torch.float32)
    before = [type(module) for module in model.modules()]
    rl.replace(model, plan).eval()
    out = model(x)[0]  # Of transformers' outputs the hidden state.
    out.square().sum().backward()
    assert all(torch.isfinite(module.coefficients.grad).all() for module in coefficients_of(model, plan).values())
    assert [type(module) for module in rl.merge(model).modules()] == before
    torch.testing.assert_close(model(x)[0], out, rtol=1e-4, atol=1e-5)


def test_a_dispatched_model_says_so():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\(0\.0 has a forward of its own, set on this instance \(as accelerate's"):
        rl.plan(model)


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "vit_b_16"), ("timm", "nf_resnet50"), ("transformers", "llama")]
)
def test_the_table_of_families_is_true(library, name):
    assert row(library, name).line() in (ROOT / TABLE).read_text(encoding="utf-8").splitlines()
