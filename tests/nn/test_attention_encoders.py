"""The layer in torch's transformer encoders and decoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rl_kernels.nn import ReplacementLinear, ReplacementMultiheadAttention
from tests.nn.attention import BATCH, DOUBLE, EMBED, HEADS, SOURCE, TARGET, attentions, inputs, leaf, padding_mask

# Inside torch's transformer layers.


class Recorder:
    """Stands for a submodule's forward and counts its calls."""

    def __init__(self, layer: nn.Module) -> None:
        self.calls = 0
        layer.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1


def encoders(**settings: Any) -> tuple[nn.TransformerEncoderLayer, nn.TransformerEncoderLayer]:
    """A layer with a replaced attention, and the plain one that it must equal."""
    sources = attentions(batch_first=settings.get("batch_first", False), bias=settings.get("bias", True), dropout=0.1)
    plain = nn.TransformerEncoderLayer(EMBED, HEADS, 16, **settings, **DOUBLE)
    layer = copy.deepcopy(plain)
    layer.self_attn = ReplacementMultiheadAttention(sources, init=(0.3, -0.9))
    plain.self_attn = layer.self_attn.merged()
    return layer, plain


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("settings", [{"batch_first": True}, {}, {"batch_first": True, "norm_first": True}], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "padding", "mask and padding"])
def test_in_an_encoder_layer(training: bool, grad: bool, settings: dict[str, Any], mask: str) -> None:
    layer, plain = encoders(**settings)
    layer.train(training)
    plain.train(training)
    x = leaf(*((BATCH, TARGET) if settings else (TARGET, BATCH)), EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET, **DOUBLE)
    padding = padding_mask("bool", True, TARGET)
    options: dict[str, Any] = {
        "none": {},
        "bool": {"src_mask": causal.isinf()},
        "float": {"src_mask": causal},
        "causal": {"src_mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "mask and padding": {"src_mask": causal.isinf(), "src_key_padding_mask": padding},
    }[mask]
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        found = layer(x, **options)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.manual_seed(3)
            expected = plain(x, **options)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert found.requires_grad == grad


def test_the_fused_inference_path_stays_off() -> None:
    layer, _ = encoders(batch_first=True)
    recorder = Recorder(layer.linear1)
    layer._forward_hooks.clear()
    with torch.no_grad():
        layer.eval()(torch.randn(BATCH, TARGET, EMBED, **DOUBLE))
    assert recorder.calls == 1


def test_a_fused_encoder_layer_reads_the_mixed_weight_of_a_linear_layer() -> None:
    _, plain = encoders(batch_first=True)
    sources = [nn.Linear(EMBED, 16, **DOUBLE) for _ in range(2)]
    layer = copy.deepcopy(plain)
    layer.linear1 = ReplacementLinear(sources)
    plain.linear1 = layer.linear1.merged()
    x = torch.randn(BATCH, TARGET, EMBED, **DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_in_a_decoder_layer() -> None:
    plain = nn.TransformerDecoderLayer(EMBED, HEADS, 16, batch_first=True, **DOUBLE)
    layer = copy.deepcopy(plain)
    layer.self_attn = ReplacementMultiheadAttention(attentions(batch_first=True))
    layer.multihead_attn = ReplacementMultiheadAttention(attentions(batch_first=True))
    plain.self_attn, plain.multihead_attn = layer.self_attn.merged(), layer.multihead_attn.merged()
    target, memory = leaf(BATCH, TARGET, EMBED), leaf(BATCH, SOURCE, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET, **DOUBLE)
    options = {"tgt_mask": causal, "tgt_is_causal": True}
    torch.testing.assert_close(layer.eval()(target, memory, **options), plain.eval()(target, memory, **options))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_in_an_encoder(training: bool, grad: bool) -> None:
    block = nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True, dropout=0.0, **DOUBLE)
    plain = nn.TransformerEncoder(block, 3).train(training)
    model = copy.deepcopy(plain)
    model.layers[1].self_attn = ReplacementMultiheadAttention.from_neighbours(
        model.layers[0].self_attn, model.layers[2].self_attn, init=(0.3, 0.9)
    )
    plain.layers[1].self_attn = model.layers[1].self_attn.merged()
    model.use_nested_tensor = plain.use_nested_tensor = False
    x = leaf(BATCH, TARGET, EMBED)
    padding = padding_mask("bool", True, TARGET)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding), rtol=1e-9, atol=1e-10
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_an_encoder_are_refused_with_advice() -> None:
    block = nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True, **DOUBLE)
    model = nn.TransformerEncoder(block, 3).eval()
    model.layers[1].self_attn = ReplacementMultiheadAttention.from_neighbours(
        model.layers[0].self_attn, model.layers[2].self_attn
    )
    x, padding = torch.randn(BATCH, TARGET, EMBED, **DOUBLE), padding_mask("bool", True, TARGET)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"got a nested tensor.*unless its use_nested_tensor is False"):
            model(x, src_key_padding_mask=padding)
        model.use_nested_tensor = False
        assert model(x, src_key_padding_mask=padding).shape == x.shape


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("kind", ["self", "memory"])
def test_compiles_in_one_graph(kind: str, need_weights: bool) -> None:
    sources = attentions(batch_first=True)
    layer = ReplacementMultiheadAttention(sources, granularity="channel")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = inputs(layer, kind)
    torch.testing.assert_close(compiled(*given, need_weights=need_weights), layer(*given, need_weights=need_weights))
    parameters = [sources[0].in_proj_weight, sources[1].out_proj.weight, layer.mixing.coefficients]
    found = torch.autograd.grad(compiled(*given, need_weights=need_weights)[0].square().sum(), parameters)
    expected = torch.autograd.grad(layer(*given, need_weights=need_weights)[0].square().sum(), parameters)
    torch.testing.assert_close(found, expected)
