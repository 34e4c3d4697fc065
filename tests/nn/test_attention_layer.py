"""The layer against ``nn.MultiheadAttention`` on weights mixed by hand."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import Coefficients, ReplacementMultiheadAttention
from tests.nn.attention import (
    BATCH,
    BATCHED,
    DOUBLE,
    EMBED,
    OUTPUTS,
    SETTINGS,
    TARGET,
    Products,
    attention_mask,
    attentions,
    common_inputs,
    factor,
    inputs,
    leaf,
    length,
    padding_mask,
)
from tests.nn.common import assert_accurate, assert_as_by_hand


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@BATCHED
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_as_by_hand(settings: str, batch_first: bool, batched: bool, granularity: Any) -> None:
    sources = attentions(**SETTINGS[settings], batch_first=batch_first)
    init = torch.tensor([0.3, -0.9]) if granularity == "scalar" else torch.randn(2, 4 * EMBED)
    layer = ReplacementMultiheadAttention(sources, init=init, granularity=granularity)
    for kind, (need_weights, average) in itertools.product(common_inputs(SETTINGS[settings]), OUTPUTS.values()):
        options = {"need_weights": need_weights, "average_attn_weights": average}
        assert_as_by_hand(layer, *inputs(layer, kind, batched), factor=factor, **options)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("settings", ["plain", "everything"])
def test_number_of_sources(n: int, granularity: Any, settings: str) -> None:
    sources = attentions(n, **SETTINGS[settings])
    init = torch.randn(n) if granularity == "scalar" else torch.randn(n, 4 * EMBED)
    layer = ReplacementMultiheadAttention(sources, init=init, granularity=granularity)
    assert layer.coefficients.shape == ((n,) if granularity == "scalar" else (n, 4 * EMBED))
    assert_as_by_hand(layer, *inputs(layer, "cross"), factor=factor)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@BATCHED
@pytest.mark.parametrize("masked", ["none", "bool 2d", "float 2d", "bool 3d", "float 3d"])
@pytest.mark.parametrize("padded", ["none", "bool", "float"])
def test_masks_of_the_layer(batch_first: bool, batched: bool, masked: str, padded: str) -> None:
    layer = ReplacementMultiheadAttention(attentions(batch_first=batch_first, add_bias_kv=True), init=(0.3, -0.9))
    for kind, (need_weights, average) in itertools.product(("self", "memory"), OUTPUTS.values()):
        mask, padding = attention_mask(masked, batched, length(kind)), padding_mask(padded, batched, length(kind))
        options = {"need_weights": need_weights, "average_attn_weights": average}
        assert_as_by_hand(layer, *inputs(layer, kind, batched), padding, attn_mask=mask, **options)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_causal_hint_of_the_layer(need_weights: bool) -> None:
    layer = ReplacementMultiheadAttention(attentions(batch_first=True))
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=torch.float64)
    # A mask that is not what the hint says shows which of the two is heard.
    for mask in (causal, torch.zeros_like(causal)):
        assert_as_by_hand(layer, *inputs(layer), attn_mask=mask, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize(("kind", "rows"), [("self", [3, 1]), ("memory", [1, 2, 1]), ("cross", [1, 1, 1, 1])], ids=str)
def test_products_of_the_layer(kind: str, rows: list[int], batch_first: bool) -> None:
    layer = ReplacementMultiheadAttention(attentions(batch_first=batch_first))
    with Products() as products:
        layer(*inputs(layer, kind))
    assert products.rows == rows


def test_query_and_value_alone_in_common() -> None:
    layer = ReplacementMultiheadAttention(attentions(batch_first=True))
    query, key = leaf(BATCH, TARGET, EMBED), leaf(BATCH, TARGET, EMBED)
    assert_as_by_hand(layer, query, key, query)


def test_dropout_in_training_only() -> None:
    layer = ReplacementMultiheadAttention(attentions(dropout=0.5))
    given = inputs(layer)
    assert_as_by_hand(layer, *given)
    assert not torch.equal(layer(*given)[0], layer(*given)[0])
    layer.eval()
    assert_as_by_hand(layer, *given)
    assert torch.equal(layer(*given)[0], layer(*given)[0])


def beside_a_source(layer: ReplacementMultiheadAttention, kind: str, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Results on the reference backend with all weight on one source, and that source's."""
    for pick, need_weights in itertools.product((0, 1), (True, False)):
        with torch.no_grad():
            layer.mixing.coefficients.copy_(torch.eye(2)[pick])
        given = inputs(layer, kind, dtype=dtype)
        with rl.use_backend("reference"):
            torch.manual_seed(5)
            found = layer(*given, need_weights=need_weights)
        torch.manual_seed(5)
        yield found, layer.sources[pick](*given, need_weights=need_weights)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_source_alone_is_the_plain_layer_bit_for_bit(dtype: torch.dtype, batch_first: bool, settings: str) -> None:
    layer = ReplacementMultiheadAttention(attentions(dtype=dtype, **SETTINGS[settings], batch_first=batch_first))
    for kind in common_inputs(SETTINGS[settings]):
        for found, expected in beside_a_source(layer, kind, dtype):
            assert torch.equal(found[0], expected[0])
            assert found[1] is expected[1] is None or torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_dtypes(dtype: torch.dtype, need_weights: bool) -> None:
    layer = ReplacementMultiheadAttention(attentions(dtype=dtype, add_bias_kv=True), init=(0.3, 0.5))
    assert layer.coefficients.dtype == torch.float32
    assert_accurate(layer, *inputs(layer, "memory", dtype=dtype), need_weights=need_weights)


def test_settings_are_those_of_own_or_of_the_first_source() -> None:
    sources = attentions(batch_first=True, dropout=0.25)
    layer = ReplacementMultiheadAttention(sources)
    assert (layer.batch_first, layer.dropout, layer.add_zero_attn) == (True, 0.25, False)
    (own,) = attentions(1, add_zero_attn=True)
    layer = ReplacementMultiheadAttention(sources, own=own.eval())
    assert (layer.batch_first, layer.dropout, layer.add_zero_attn, layer.training) == (False, 0.0, True, False)
    assert_as_by_hand(layer, *inputs(layer), plain=own)


@pytest.mark.parametrize("settings", ["plain", "kdim, vdim"])
def test_attributes(settings: str) -> None:
    (plain, _), layer = (sources := attentions(**SETTINGS[settings])), ReplacementMultiheadAttention(sources)
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "batch_first", "dropout"):
        assert getattr(layer, name) == getattr(plain, name), name
    assert layer.packed == plain._qkv_same_embed_dim
    assert layer._qkv_same_embed_dim is False
    for name in ("weight", "bias"):
        assert not hasattr(layer, name)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_merged(settings: str, granularity: Any, training: bool) -> None:
    sources = attentions(**SETTINGS[settings], batch_first=True)
    init = torch.randn(2) if granularity == "scalar" else torch.randn(2, 4 * EMBED)
    layer = ReplacementMultiheadAttention(sources, init=init, granularity=granularity).train(training)
    merged = layer.merged()
    assert type(merged) is nn.MultiheadAttention
    assert merged.training == training
    given = inputs(layer, common_inputs(SETTINGS[settings])[0])
    for need_weights in (True, False):
        torch.manual_seed(5)
        expected = layer(*given, need_weights=need_weights)
        torch.manual_seed(5)
        found = merged(*given, need_weights=need_weights)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    # The layer's own view of its parameters.
    for name in (
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "bias_k",
        "bias_v",
    ):
        view, parameter = getattr(layer, name), getattr(merged, name)
        assert view is parameter is None or torch.equal(view, parameter), name
    assert torch.equal(layer.out_proj.weight, merged.out_proj.weight)
    assert layer.out_proj.bias is merged.out_proj.bias is None or torch.equal(layer.out_proj.bias, merged.out_proj.bias)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_fit_takes_all_projections(settings: str, granularity: Any) -> None:
    sources = attentions(**SETTINGS[settings])
    (own,) = attentions(1, **SETTINGS[settings])
    expected = torch.randn(2, **DOUBLE) if granularity == "scalar" else torch.randn(2, 4 * EMBED, **DOUBLE)
    exact = ReplacementMultiheadAttention(sources, init=expected, granularity=granularity)
    own.load_state_dict(exact.merged().state_dict())
    layer = ReplacementMultiheadAttention(sources, own=own, init="fit", granularity=granularity)
    torch.testing.assert_close(layer.coefficients.detach(), expected)
    names = [name for name, p in own.named_parameters() if p.dim() == 2]
    assert len(names) == (2 if own._qkv_same_embed_dim else 4)
    for name in names:
        changed = copy.deepcopy(own)
        with torch.no_grad():
            changed.get_parameter(name).add_(1.0)
        other = ReplacementMultiheadAttention(sources, own=changed, init="fit", granularity=granularity)
        assert not torch.allclose(other.coefficients, layer.coefficients), name


def test_own_parameters_are_the_coefficients_alone() -> None:
    layer = ReplacementMultiheadAttention(attentions(add_bias_kv=True))
    assert list(layer.state_dict()) == ["mixing.coefficients"]
    assert [name for name, _ in layer.named_parameters()] == ["mixing.coefficients"]
    assert [name for name, _ in layer.named_modules()] == ["", "mixing"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_wiring(copied: Any) -> None:
    prev, after = attentions()
    model = copied(nn.ModuleList([prev, ReplacementMultiheadAttention((prev, after)), after]))
    assert model[1].sources == (model[0], model[2])
    assert model[0] is not prev
    assert_as_by_hand(model[1], *inputs(model[1]))


def test_shared_coefficients_detach_and_rebind() -> None:
    shared = Coefficients(torch.tensor([0.3, 0.7], **DOUBLE))
    layer = ReplacementMultiheadAttention(attentions(add_bias_kv=True), coefficients=shared, detach=[1])
    assert list(layer.parameters()) == []
    assert_as_by_hand(layer, *inputs(layer))
    layer(*inputs(layer))[0].sum().backward()
    assert shared.coefficients.grad is not None
    assert all(p.grad is not None for p in layer.sources[0].parameters())
    assert all(p.grad is None for p in layer.sources[1].parameters())
    others = attentions(add_bias_kv=True)
    layer.rebind(*others)
    assert layer.sources == tuple(others)
    assert_as_by_hand(layer, *inputs(layer))


def test_repr() -> None:
    text = repr(ReplacementMultiheadAttention(attentions(batch_first=True)))
    assert "embed_dim=8, num_heads=2, dropout=0.0, kdim=8, vdim=8, batch_first=True, add_zero_attn=False" in text
    assert "sources=2, granularity='scalar'" in text


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: nn.Linear(8, 8), TypeError, "got Linear, expected MultiheadAttention"),
        (lambda: nn.MultiheadAttention(8, 4), ValueError, r"got num_heads 4, expected 2 as sources\[0\]"),
        (lambda: nn.MultiheadAttention(6, 2), ValueError, r"got in_proj_bias \(18,\), expected \(24,\)"),
        (lambda: nn.MultiheadAttention(8, 2, kdim=6), ValueError, r"got in_proj_weight None, expected \(24, 8\)"),
        (lambda: nn.MultiheadAttention(8, 2, bias=False), ValueError, r"got in_proj_bias None, expected \(24,\)"),
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), ValueError, r"got bias_k \(1, 1, 8\), expected None"),
        (lambda: nn.MultiheadAttention(8, 2, dtype=torch.half), ValueError, "got dtype torch.float16"),
    ],
    ids=["kind", "heads", "size", "kdim", "bias", "bias_kv", "dtype"],
)
def test_sources_that_do_not_fit(other: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"sources\[1\]: " + message):
        ReplacementMultiheadAttention((nn.MultiheadAttention(8, 2), other()))
