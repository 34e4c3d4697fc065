"""Models of other libraries saved to a folder, and loaded from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.conversion.zoo import import_timm, import_transformers
from tests.conversion.common import spread_out
from tests.integration.models import SMALL

pytestmark = pytest.mark.integration


def gpt2() -> Any:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=5, n_head=2, bos_token_id=0, eos_token_id=29
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=29,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> Any:
    transformers = import_transformers()
    config = transformers.ViTConfig(num_hidden_layers=5, image_size=16, patch_size=8, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


def replaced(model: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    rl.replace(model, rl.plan(model, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return (model if dtype is None else model.to(dtype)).eval()


def generated(model: Any) -> Tensor:
    prompt = torch.arange(1, 5)[None]
    found: Tensor = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_language_model_by_its_folder_alone(make, dtype, tmp_path):
    model = replaced(make(), dtype)
    model.generation_config.repetition_penalty = 1.5
    rl.save_pretrained(model, tmp_path)
    expected = ["config.json", "generation_config.json", "model.safetensors", "rl_kernels.json"]
    assert sorted(os.listdir(tmp_path)) == expected
    loaded = rl.load_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.dtype == dtype
    assert loaded.generation_config.repetition_penalty == 1.5
    found, state = loaded.state_dict(), model.state_dict()
    assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)
    x = torch.randint(30, (2, 7))
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(generated(loaded), generated(model))


def test_tied_weights_are_in_the_file_once(tmp_path):
    rl.save_pretrained(replaced(gpt2()), tmp_path, max_shard_size="10 KB")
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    loaded = rl.load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_the_folder_is_one_that_transformers_reads(tmp_path):
    transformers = import_transformers()
    model = replaced(vit(), torch.bfloat16)
    rl.save_pretrained(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(str(tmp_path))
    assert config.architectures == ["ViTForImageClassification"] and config.dtype == torch.bfloat16
    assert model.config.architectures is None  # It stays as it is.
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "rl_kernels.json"]
    x = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    kinds = transformers.AutoModelForImageClassification, transformers.ViTForImageClassification
    for build in (None, *kinds, lambda: kinds[1](config)):
        loaded = rl.load_pretrained(tmp_path, build).eval()
        assert torch.equal(loaded(x).logits, model(x).logits)
    wide = rl.load_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32


def test_classes_that_transformers_does_not_have(tmp_path):
    rl.save_pretrained(replaced(vit()), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["logging"]}))
    with pytest.raises(ValueError, match=r"transformers has no model logging, which .*config\.json names"):
        rl.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the model saved in"):
        rl.load_pretrained(tmp_path, import_transformers().ViTModel)


def test_a_plain_model_saved_there_leaves_no_configuration_of_the_older(tmp_path):
    rl.save_pretrained(replaced(gpt2()), tmp_path)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    rl.save_pretrained(rl.replace(model, rl.plan(model)), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "rl_kernels.json"]


def test_a_model_of_timm_by_a_function(tmp_path):
    def build() -> nn.Module:
        settings: dict[str, Any] = dict(img_size=16, patch_size=8, embed_dim=24, depth=5, num_heads=3, num_classes=5)
        model: nn.Module = import_timm().create_model("vit_tiny_patch16_224", **settings)
        return model

    model = build()
    rl.replace(model, rl.plan(model, init="fit"))
    spread_out(model)
    rl.save_pretrained(model.eval(), tmp_path)
    x = torch.randn(2, 3, 16, 16)
    loaded = rl.load_pretrained(tmp_path, build).eval()
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(rl.merge(loaded)(x), rl.merge(model)(x))


def test_a_large_model_need_not_be_initialised(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = replaced(llama())
    rl.save_pretrained(model, tmp_path)

    def build() -> nn.Module:
        with accelerate.init_empty_weights(include_buffers=False):
            return llama()

    loaded = rl.load_pretrained(tmp_path, build).eval()
    x = torch.randint(30, (2, 7))
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_offloaded_weights_are_refused(tmp_path):
    model = replaced(gpt2())
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"on the meta device \(accelerate has offloaded it\), expected weights in"):
        rl.save_pretrained(model, tmp_path)


def test_adapters_are_refused_until_they_are_merged(tmp_path: Path):
    model = replaced(gpt2())  # First: peft imports transformers, and that torchvision.
    peft = pytest.importorskip("peft")
    targets = r".*h\.[24]\.attn\.c_attn"
    config = peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"got one with adapters \(peft\..*, expected them merged"):
        rl.save_pretrained(wrapped, tmp_path)
    merged = wrapped.merge_and_unload()
    rl.save_pretrained(merged, tmp_path)
    x = torch.randint(30, (2, 7))
    assert torch.equal(rl.load_pretrained(tmp_path).eval()(x).logits, merged.eval()(x).logits)
