"""How many coefficients a layer has at a plan's granularity: the groups of output rows that its kind has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from rl_kernels.conversion.blocks import Part
from rl_kernels.conversion.targets import is_attention, is_linear
from rl_kernels.nn.coefficients import Granularity as LayerGranularity

Granularity = Literal["scalar", "projection", "head", "channel"]

THIRDS = ("qkv", "qkv_proj", "c_attn", "in_proj", "to_qkv", "Wqkv")
"""What libraries call a linear layer whose output rows are those of the query, then the key, then the value."""

BY_HEAD = ("query_key_value",)
"""The same, where each head has the rows of its query, its key and its value together (BLOOM, GPT-NeoX)."""

QUERIES = ("q", "q_proj", "query", "to_q", "q_lin", "Wq")
KEYS_AND_VALUES = ("k", "k_proj", "key", "to_k", "k_lin", "Wk", "v", "v_proj", "value", "to_v", "v_lin", "Wv")

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", *_HEADS)


def granularity_of(part: Part, granularity: Granularity) -> LayerGranularity:
    """The granularity of the layer that takes the place of ``part``.

    ``"projection"``: 4 of ``nn.MultiheadAttention``, the query's, the key's, the value's and the output's rows; 3 of a
    linear layer of an attention that is named as one of all three and has three times as many outputs as inputs; else
    one pair. ``"head"``: the groups of each head in these, and in linear layers named as a query, a key or a value,
    where a module around the layer says how many heads it has; else as ``"projection"``.
    """
    if granularity in ("scalar", "channel"):
        return granularity
    assert part.kind is not None and part.module is not None
    heads = granularity == "head"
    if isinstance(part.module, nn.MultiheadAttention):
        return 4 * part.module.num_heads if heads else 4
    name, out = part.path.rpartition(".")[2], part.kind.out_channels_of(part.module)
    if not (is_linear(part) and is_attention(part)) or part.kind.why_not_by_channel(part.module):
        return "scalar"
    packed = out == 3 * (part.kind.main_weight(part.module).numel() // out)
    groups = 3 if packed and name in THIRDS else 1
    if heads:
        known = next(_numbers(part, _KEY_HEADS if name in KEYS_AND_VALUES else _HEADS), 1)
        each = 3 if packed and name in (*THIRDS, *BY_HEAD) else int(name in (*QUERIES, *KEYS_AND_VALUES))
        if each and out % (each * known) == 0:
            groups = each * known
    return "scalar" if groups == 1 else groups


def _numbers(part: Part, names: tuple[str, ...]) -> Iterator[int]:
    """What the modules around ``part``, and their configurations, have under these names; the innermost first."""
    for module in reversed(part.inside):
        for holder in (module, getattr(module, "config", None)):
            found: list[Any] = [getattr(holder, name, None) for name in names]
            yield from (number for number in found if isinstance(number, int) and number > 0)
