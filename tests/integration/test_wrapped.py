"""ReplacementByForward in the place of layers of timm and transformers, which this package knows nothing of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rl_kernels.conversion.zoo import import_timm, import_transformers
from rl_kernels.nn import ReplacementByForward
from rl_kernels.nn.wrapped import numbers_stored, why_not_wrapped
from tests.nn.common import assert_as_by_hand

pytestmark = pytest.mark.integration


def _timm(name: str, *arguments: Any, **options: Any) -> nn.Module:
    import_timm()
    from timm import layers

    made: nn.Module = getattr(layers, name)(*arguments, **options)
    return made


def _transformers(family: str, name: str, *arguments: Any) -> nn.Module:
    import_transformers()
    from importlib import import_module

    module = import_module(
        f"transformers.models.{family}.modeling_{family}" if family else "transformers.pytorch_utils"
    )
    made: nn.Module = getattr(module, name)(*arguments)
    return made


IMAGE, TOKENS = (2, 8, 6, 5), (2, 3, 8)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "timm StdConv2d": (lambda: _timm("StdConv2d", 8, 8, 3), IMAGE),
    "timm StdConv2dSame": (lambda: _timm("StdConv2dSame", 8, 8, 3, bias=True), IMAGE),
    "timm ScaledStdConv2d": (lambda: _timm("ScaledStdConv2d", 8, 8, 3), IMAGE),
    "timm Conv2dSame": (lambda: _timm("Conv2dSame", 8, 8, 3, stride=2), IMAGE),
    "timm BatchNormAct2d": (lambda: _timm("BatchNormAct2d", 8), IMAGE),
    "timm LayerNorm2d": (lambda: _timm("LayerNorm2d", 8), IMAGE),
    "timm RmsNorm": (lambda: _timm("RmsNorm", 8), TOKENS),
    "timm SimpleNorm": (lambda: _timm("SimpleNorm", 8), TOKENS),
    "llama": (lambda: _transformers("llama", "LlamaRMSNorm", 8), TOKENS),
    "gemma": (lambda: _transformers("gemma", "GemmaRMSNorm", 8), TOKENS),
    "t5": (lambda: _transformers("t5", "T5LayerNorm", 8), TOKENS),
    "falcon": (lambda: _transformers("falcon", "FalconLinear", 8, 8), TOKENS),
    "gpt2": (lambda: _transformers("", "Conv1D", 8, 8), TOKENS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """Values and gradients, in training and not; merged."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    sources = [make() for _ in range(2)]
    for source in sources:
        assert why_not_wrapped(source) == ""
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    layer = ReplacementByForward(sources, own=copy.deepcopy(sources[1]), init=(0.3, 0.5))
    x = torch.randn(shape, requires_grad=True)
    for mode in (True, False):
        assert_as_by_hand(layer.train(mode), x, plain=layer.merged(), rtol=1e-4, atol=1e-4)
        assert type(layer.merged()) is type(sources[0])
        torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-4, atol=1e-5)
    matrices = {"timm StdConv2d", "timm StdConv2dSame", "timm ScaledStdConv2d", "timm Conv2dSame", "falcon", "gpt2"}
    assert (numbers_stored(sources[0]) > 0) == (name in matrices)
