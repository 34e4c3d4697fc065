"""GPT-2 and its kin, whose linear layers are transformers' Conv1D."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.conversion.zoo import build, import_transformers
from rl_kernels.nn import ReplacementTransposedLinear
from tests.conversion.common import check_replaced

pytestmark = pytest.mark.integration


def gpt2(layers: int = 9) -> nn.Module:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=layers, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


ATTENTION, MLP = ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["ln_1", *ATTENTION, "ln_2", *MLP]),
        ({"targets": "attention"}, ATTENTION),
        ({"targets": "mlp", "init": "fit"}, MLP),
        ({"targets": "linear", "share": "layer"}, [*ATTENTION, *MLP]),
    ],
    ids=str,
)
def test_gpt2(options, expected):
    model = gpt2()
    plan = rl.plan(model, **options)
    assert [block.path for block in plan.replaced] == ["transformer.h.3", "transformer.h.7"]
    assert [layer.path for layer in plan.replaced[0].layers] == expected
    check_replaced(model, (torch.randint(30, (2, 7)),), lambda found: found.logits, **options)


def test_a_fit_by_channel_of_a_mixed_block_gives_the_same_outputs():
    model = gpt2(5).double().eval()
    tokens = torch.randint(30, (2, 7))
    with torch.no_grad():
        before, own, after = (model.transformer.h[i].mlp.c_fc for i in (2, 3, 4))
        channels = torch.randn(2, own.nf, dtype=torch.float64)
        own.weight.copy_(channels[0] * before.weight + channels[1] * after.weight)
        own.bias.copy_(channels[0] * before.bias + channels[1] * after.bias)
    expected = model(tokens).logits
    plan = rl.plan(model, init="fit", granularity="channel", targets=lambda path, layer: path.endswith("c_fc"))
    rl.replace(model, plan)
    assert isinstance(model.transformer.h[3].mlp.c_fc, ReplacementTransposedLinear)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_merged_model_is_gpt2_again():
    model = rl.merge(rl.replace(gpt2(5), rl.plan(gpt2(5)))).eval()
    plain = gpt2(5).eval()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(30, (1, 5))
    assert type(model.transformer.h[3].attn.c_attn) is type(plain.transformer.h[3].attn.c_attn)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    rl.plan(model)


def test_generation_is_the_same_after_merging():
    model = rl.replace(gpt2(5), rl.plan(gpt2(5))).eval()
    tokens = torch.randint(30, (1, 4))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    assert torch.equal(rl.merge(model).generate(tokens, **options), expected)


@pytest.mark.parametrize("name", ["openai-gpt", "imagegpt", "decision_transformer"])
def test_kin_are_planned(name):
    plan = rl.plan(build(f"transformers/{name}"), every=2)
    assert plan.level == "block" and not plan.fell_back
    assert "Conv1D" in {layer.class_name for layer in plan.replaced[0].layers}


def test_transformers_is_not_imported_for_it():
    code = "import sys, rl_kernels as rl; from torch import nn; "
    code += "rl.plan(nn.Sequential(*(nn.Linear(2, 2) for _ in '123')), 2); "
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lora_around_other_layers_and_a_source():
    peft = pytest.importorskip("peft")
    model = rl.replace(gpt2(5), rl.plan(gpt2(5)))
    targets = r".*h\.[24]\.attn\.c_attn"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=True))
    with pytest.raises(RuntimeError, match="with adapters"):
        wrapped(torch.randint(30, (2, 7)))
    merged = wrapped.merge_and_unload()
    assert merged(torch.randint(30, (2, 7))).logits.isfinite().all()
