"""What plans of other libraries' models find, and say of what they leave."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.conversion.zoo import build, import_timm
from tests.conversion.common import coefficients_of
from tests.conversion.toys import image

pytestmark = pytest.mark.integration


def test_the_blocks_of_coat_share_their_position_encodings():
    model = import_timm().create_model("coat_tiny", img_size=32, num_classes=5)
    plan = rl.plan(model, every=4)
    assert plan.level == "block"
    block = next(block for block in plan.replaced if block.path.startswith("parallel_blocks"))
    expected = [f"factoratt_crpe{i}.{name}" for i in (2, 3, 4) for name in ("qkv", "proj")]
    assert [layer.path for layer in block.layers] == expected
    reasons = {part.path: part.reason for part in block.kept}
    assert reasons["factoratt_crpe2.crpe.conv_list.0"] == "shared with crpe2.conv_list.0"
    assert reasons["mlp2.fc1"] == f"shared with {block.path}.mlp3.fc1"  # One for the three scales of a block.
    rl.replace(model, plan)
    model(image(2, 32, torch.float32)).sum().backward()
    assert all(module.coefficients.grad is not None for module in coefficients_of(model, plan).values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm/resnetv2_50x1_bit", r"\.conv: timm\.layers\.std_conv\.StdConv2d has a forward of its own;"),
        ("timm/nf_resnet50", r"\.conv: timm\.layers\.std_conv\.ScaledStdConv2d has a forward of its own;"),
        ("falcon", r"\(h\.0\.self_attention\.query_key_value: transformers\..*\.FalconLinear has a forward of its own"),
        ("albert", r"key: siblings \(.*query is beside it in AlbertAttention, not known to be before or after it\)"),
    ],
)
def test_the_error_names_the_blocks_layers(name, reason):
    with pytest.raises(ValueError, match=rf"in which nothing can be replaced .*{reason}"):
        rl.plan(build(name))


def test_a_dispatched_model_says_so():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\(0\.0 has a forward of its own, set on this instance \(as accelerate's"):
        rl.plan(model)
