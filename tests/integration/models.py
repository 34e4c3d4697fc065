"""Other libraries' models, made small and converted, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.conversion.zoo import import_timm, import_torchvision, import_transformers
from tests.conversion.common import spread_out


class Hidden(nn.Module):
    """A transformers model that returns a tensor, for what knows of tensors only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model(tokens).last_hidden_state
        return hidden


def resnet() -> nn.Module:
    """Basic blocks of which first convolutions are replaced."""
    return import_torchvision().models.resnet18(num_classes=5)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    """Blocks replaced whole: packed projections, and norms of their own."""
    settings: dict[str, Any] = dict(img_size=16, patch_size=8, embed_dim=24, depth=5, num_heads=3, num_classes=5)
    return import_timm().create_model("vit_tiny_patch16_224", **settings)  # type: ignore[no-any-return]


# What transformers' configurations have in common.
SMALL: dict[str, Any] = dict(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def bert(layers: int = 9) -> nn.Module:
    """Blocks replaced whole: a layer a projection."""
    transformers = import_transformers()
    config = transformers.BertConfig(vocab_size=30, num_hidden_layers=layers, **SMALL)
    return transformers.BertModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def huggingface_vit(layers: int = 9) -> nn.Module:
    """The same of images."""
    transformers = import_transformers()
    config = transformers.ViTConfig(num_hidden_layers=layers, image_size=16, patch_size=8, **SMALL)
    return transformers.ViTModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def image(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, 16, 16, dtype=dtype)


def large_image(batch: int, dtype: torch.dtype) -> Tensor:
    """For networks that halve it four times: at one pixel, torch's own strided convolutions may go wrong in bfloat16
    (docs/compatibility.md, images smaller than the filter)."""
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


def tokens(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(30, (batch, 7))


class Made(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], Tensor]


MODELS = {"resnet": Made(resnet, large_image), "vit": Made(vit, image), "bert": Made(lambda: Hidden(bert(5)), tokens)}


def converted(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, rl.Plan]:
    """The model in evaluation mode, with nothing equal by chance, and batch norms that know their inputs."""
    torch.manual_seed(0)
    model = MODELS[name].build().to(dtype)
    plan = rl.plan(model, every=4)
    assert plan.replaced
    rl.replace(model, plan)
    spread_out(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # One batch's statistics, whole.
    with torch.no_grad():
        model.train()(MODELS[name].inputs(8, dtype))
    return model.eval(), plan
