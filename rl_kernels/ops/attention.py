"""Multi-head attention whose projections run on mixed weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels.ops.arguments import CoefficientsLike, as_coefficients
from rl_kernels.ops.autograd import LINEAR, mixed_forward
from rl_kernels.ops.checks import check_sources
from rl_kernels.ops.mix import mix
from rl_kernels.ops.values import Outer, Recipe
from rl_kernels.ops.ways import autocast_dtype

Sources = Sequence[Tensor]


def mixed_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weights: Sources | None,
    in_proj_biases: Sources | None,
    bias_ks: Sources | None,
    bias_vs: Sources | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weights: Sources,
    out_proj_biases: Sources | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weights: Sources | None = None,
    k_proj_weights: Sources | None = None,
    v_proj_weights: Sources | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    coefficients: CoefficientsLike,
    out_coefficients: CoefficientsLike | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` on mixed weights: torch's arguments in torch's order.

    With E the embedding dimension, L and S the lengths of target and source, and B the batch size:

    Args:
        query: ``(L, B, E)``, or ``(L, E)`` unbatched. Where ``query``, ``key`` and ``value`` are one object, one
            product makes all three projections.
        key: ``(S, B, E)`` or ``(S, E)``; with separate weights of any number of features, as ``k_proj_weights``.
        value: as ``key``, by ``v_proj_weights``.
        embed_dim_to_check: E.
        num_heads: a divisor of E.
        in_proj_weights: N tensors ``(3E, E)``, the rows of query, key and value; unused with separate weights.
        in_proj_biases: None, or N vectors ``(3E,)``, with separate weights as well.
        bias_ks: None, or N tensors of E elements, ``(E,)`` or ``(1, 1, E)``: one more key, the same for all.
        bias_vs: as ``bias_ks``, for the values.
        add_zero_attn: append a zero key and value.
        dropout_p: of the attention weights, where ``training``.
        out_proj_weights: N tensors ``(out, E)``.
        out_proj_biases: None, or N vectors ``(out,)``.
        training: whether to drop out.
        key_padding_mask: ``(B, S)`` or ``(S,)``: bool, True where a key is ignored; or floating-point, added.
        need_weights: return the attention weights; without them torch's fused attention runs.
        attn_mask: ``(L, S)`` or ``(B * num_heads, L, S)``: bool, True where attention is forbidden; or
            floating-point, added.
        use_separate_proj_weight: take ``q_proj_weights``, ``k_proj_weights`` and ``v_proj_weights``.
        q_proj_weights: N tensors ``(E, E)``.
        k_proj_weights: N tensors ``(E, key features)``.
        v_proj_weights: N tensors ``(E, value features)``.
        static_k: ``(B * num_heads, S, E / num_heads)``, in place of the projected key.
        static_v: as ``static_k``, in place of the projected value.
        average_attn_weights: return the weights' mean over heads.
        is_causal: a hint that ``attn_mask``, which it needs, is the causal mask: where nothing else needs the mask
            (no ``key_padding_mask``, no ``need_weights``) it is not read.
        coefficients: as everywhere in ``rl_kernels.functional``, and they mix the biases alike. One per output channel
            is ``(N, 3E)``, for query, key and value in this order, however their weights are held; ``bias_ks`` and
            ``bias_vs`` take the parts of key and value.
        out_coefficients: of the output projection, ``(N, out)`` for one per channel. By default ``coefficients``,
            where these are scalars.

    Returns:
        The output, ``(L, B, out)`` or ``(L, out)``; and the attention weights, ``(B, L, S)``, or ``(B, num_heads, L,
        S)`` where not averaged (unbatched without B), with a column more for each key appended. None without
        ``need_weights``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or arguments that exclude each other.
        TypeError: an argument of a wrong kind.
        ValueError: ``dropout_p`` is no probability.
    """
    separate = {"q_proj_weights": q_proj_weights, "k_proj_weights": k_proj_weights, "v_proj_weights": v_proj_weights}
    inputs = {"query": query, "key": key, "value": value}
    _check_inputs(inputs, embed_dim_to_check, num_heads, not use_separate_proj_weight)
    named = separate if use_separate_proj_weight else {"in_proj_weights": in_proj_weights}
    stacks = _check_in_weights(inputs, named, use_separate_proj_weight)
    first_name, first = next(iter(stacks.items()))
    _refuse_outer(coefficients, out_coefficients)
    mixing = as_coefficients(coefficients, first, first_name)
    _check_coefficients("coefficients", mixing, first, 3 * embed_dim_to_check)
    out_mixing = _out_coefficients(mixing, out_coefficients, out_proj_weights)
    _check_stack("out_proj_weights", out_proj_weights, (None, embed_dim_to_check), first, first_name)
    _check_coefficients("out_coefficients", out_mixing, first, out_proj_weights[0].shape[0])
    _check_vectors("in_proj_biases", in_proj_biases, 3 * embed_dim_to_check, first, first_name)
    _check_vectors("out_proj_biases", out_proj_biases, out_proj_weights[0].shape[0], first, first_name)
    _check_appended(bias_ks, bias_vs, static_k, static_v, embed_dim_to_check, first, first_name)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability")
    length = _check_static(query, key, num_heads, static_k, static_v)
    _check_masks(query, num_heads, length, key_padding_mask, attn_mask, is_causal)

    batched = query.dim() == 3
    needed = (True, static_k is None, static_v is None)
    projection = _Projection(list(stacks.values()), in_proj_biases, mixing)
    q, k, v = (
        projected if projected is None or batched else projected.unsqueeze(1)
        for projected in projection.apply(query, key, value, needed)
    )
    assert q is not None
    batch = q.shape[1]
    if bias_ks is not None and bias_vs is not None:
        k, v = (_append_bias(x, projection, j, b) for x, j, b in ((k, 1, bias_ks), (v, 2, bias_vs)))
    q = _split_heads(q, num_heads)
    k = _split_heads(k, num_heads) if static_k is None else static_k
    v = _split_heads(v, num_heads) if static_v is None else static_v
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1) for x in (k, v))
    # As torch's: where the hint can stand for the mask, the keys appended above are causal too.
    hint = is_causal and key_padding_mask is None and not need_weights
    appended = k.shape[1] - length
    mask = None if hint else _merge_masks(attn_mask, key_padding_mask, query.dtype, num_heads, appended)
    dropped = dropout_p if training else 0.0
    if need_weights:
        attended, weights = _attend(q, k, v, mask, dropped)
    else:
        attended, weights = _attend_fused(q, k, v, mask, dropped, hint, (batch, num_heads)), None

    # (B * heads, L, E / heads) to (L * B, E)
    rows = attended.unflatten(0, (batch, num_heads)).permute(2, 0, 1, 3).flatten(2).flatten(0, 1)
    output = mixed_forward(LINEAR, rows, Recipe(out_proj_weights, out_mixing, out_proj_biases))
    output = output.unflatten(0, (q.shape[1], batch))
    if weights is not None:
        weights = weights.unflatten(0, (batch, num_heads))
        weights = weights.mean(1) if average_attn_weights else weights
    if not batched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output, weights


class _Projection(NamedTuple):
    """The recipe of the projections of query, key and value."""

    weights: list[Sources]
    """One stack of ``(3E, E)`` weights; or three, of query, key and value."""
    biases: Sources | None
    """``(3E,)``."""
    coefficients: Tensor
    """``(N,)``, or ``(N, 3E)``."""

    def part(self, j: int) -> Tensor:
        """The coefficients of the query (0), the key (1) or the value (2)."""
        return self.coefficients if self.coefficients.dim() == 1 else self.coefficients.chunk(3, dim=1)[j]

    def apply(
        self, query: Tensor, key: Tensor, value: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Project what is ``needed``, in as few products as there are different inputs."""
        inputs = [query, key, value]
        if len(self.weights) == 1 and all(needed):
            if query is key and key is value:
                q, k, v = self._products([query], [3])
                return q, k, v
            if key is value:
                q, k, v = self._products([query, key], [1, 2])
                return q, k, v
        wanted = [x if need else None for x, need in zip(inputs, needed, strict=True)]
        q, k, v = self._products(wanted, [1, 1, 1])
        return q, k, v

    def _products(self, inputs: Sequence[Tensor | None], counts: Sequence[int]) -> list[Tensor | None]:
        """Project ``inputs``, the j-th by the weights of ``counts[j]`` of query, key and value; None stays None."""
        embed_dim = self.weights[0][0].shape[0] // (3 if len(self.weights) == 1 else 1)
        rows = [count * embed_dim for count in counts]
        # Tensor.split and not slices: its backward joins the parts' gradients once, where every slice would put its
        # own into zeros of the whole weight's size.
        if len(counts) == 1:
            stacks, biases, mixing = self.weights, [self.biases], [self.coefficients]
        else:
            stacks = self.weights if len(self.weights) > 1 else _split_all(self.weights[0], rows)
            biases = [None] * len(rows) if self.biases is None else list(_split_all(self.biases, rows))
            scalar = self.coefficients.dim() == 1
            mixing = [self.coefficients] * len(rows) if scalar else list(self.coefficients.split(rows, dim=1))
        found: list[Tensor | None] = []
        for x, count, weights, bias, coefficients in zip(inputs, counts, stacks, biases, mixing, strict=True):
            if x is None:
                found += [None] * count
                continue
            y = mixed_forward(LINEAR, x, Recipe(weights, coefficients, bias))
            # torch's layout: each of query, key and value contiguous.
            found += [y] if count == 1 else y.unflatten(-1, (count, embed_dim)).movedim(-2, 0).contiguous().unbind(0)
        return found


def _split_all(tensors: Sources, rows: list[int]) -> list[Sources]:
    """The parts of all ``tensors``, by part."""
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def _append_bias(x: Tensor | None, projection: _Projection, j: int, biases: Sources) -> Tensor:
    assert x is not None
    bias = mix([b.reshape(-1) for b in biases], projection.part(j), x.dtype)
    return torch.cat([x, bias.expand(1, x.shape[1], -1)])


def _split_heads(x: Tensor | None, num_heads: int) -> Tensor:
    """``(L, B, E)`` to ``(B * num_heads, L, E / num_heads)``."""
    assert x is not None
    length, batch, embed_dim = x.shape
    return x.reshape(length, batch * num_heads, embed_dim // num_heads).transpose(0, 1)


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, num_heads: int, appended: int
) -> Tensor | None:
    """What is added to the scores: ``(1 or B * num_heads, 1 or L, S + appended)``."""
    found: list[Tensor] = []
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        found.append(mask if mask.dim() == 3 else mask.unsqueeze(0))
    if key_padding_mask is not None:
        mask = _additive(key_padding_mask, dtype)
        mask = mask if mask.dim() == 2 else mask.unsqueeze(0)
        found.append(mask[:, None, None, :].expand(-1, num_heads, -1, -1).flatten(0, 1))
    if not found:
        return None
    return aten.pad(found[0] if len(found) == 1 else found[0] + found[1], (0, appended))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Attention, and its weights ``(B * num_heads, L, S)``, dropout included as torch returns them."""
    q = q * math.sqrt(1.0 / q.shape[-1])
    keys = k.transpose(-2, -1)
    scores = torch.bmm(q, keys) if mask is None else torch.baddbmm(mask, q, keys)
    weights = aten.softmax(scores, dim=-1)
    if dropout_p > 0:
        weights = aten.dropout(weights, dropout_p)
    return torch.bmm(weights, v), weights


def _attend_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, heads: tuple[int, int]
) -> Tensor:
    """Attention by torch's fused kernels. ``heads`` is ``(B, num_heads)``."""
    q, k, v = (x.unflatten(0, heads) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.unflatten(0, heads)
    return aten.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal).flatten(0, 1)


# Checks, all before anything is computed.


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_like(name: str, tensor: Tensor, other: Tensor, other_name: str, mask: bool = False) -> None:
    """Raise unless ``tensor`` is on the device of ``other`` and in its dtype, which autocast would see to."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.device != other.device:
        raise RuntimeError(f"{name}: got device {tensor.device}, expected {other.device} as {other_name}")
    if mask and tensor.dtype == torch.bool:
        return
    autocast = autocast_dtype(tensor) is not None
    expected = tensor.dtype.is_floating_point if autocast else tensor.dtype == other.dtype
    if not expected:
        wanted = f"bool or {other.dtype}" if mask else f"{other.dtype}"
        raise RuntimeError(f"{name}: got dtype {tensor.dtype}, expected {wanted} as {other_name}")


def _check_inputs(inputs: dict[str, Tensor], embed_dim: int, num_heads: int, packed: bool) -> None:
    query, key, value = inputs.values()
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        if x.is_nested:
            raise RuntimeError(
                f"{name}: got a nested tensor, expected a padded one and key_padding_mask (an nn.TransformerEncoder "
                "makes nested tensors unless its use_nested_tensor is False)"
            )
    if query.dim() not in (2, 3):
        raise RuntimeError(f"query: got shape {_shape(query)}, expected 2 (unbatched) or 3 dimensions")
    for name, x in inputs.items():
        if x.dim() != query.dim():
            raise RuntimeError(f"{name}: got shape {_shape(x)}, expected {query.dim()} dimensions as query")
        if x.dim() == 3 and x.shape[1] != query.shape[1]:
            raise RuntimeError(f"{name}: got batch size {x.shape[1]}, expected {query.shape[1]} as query")
        if (packed or name == "query") and x.shape[-1] != embed_dim:
            raise RuntimeError(f"{name}: got {x.shape[-1]} features, expected embed_dim_to_check = {embed_dim}")
        _check_like(name, x, query, "query")
    if num_heads < 1 or embed_dim % num_heads:
        raise RuntimeError(f"num_heads: got {num_heads}, expected a divisor of embed_dim_to_check = {embed_dim}")
    if value.shape[0] != key.shape[0]:
        raise RuntimeError(f"value: got length {value.shape[0]}, expected {key.shape[0]} as key")


def _check_in_weights(
    inputs: dict[str, Tensor], stacks: dict[str, Sources | None], separate: bool
) -> dict[str, Sources]:
    found: dict[str, Sources] = {}
    query = inputs["query"]
    embed_dim = query.shape[-1]
    features = [x.shape[-1] for x in inputs.values()] if separate else [embed_dim]
    for (name, weights), columns in zip(stacks.items(), features, strict=True):
        if weights is None:
            raise RuntimeError(f"{name}: got None, expected weights as use_separate_proj_weight is {separate}")
        shape = (embed_dim if separate else 3 * embed_dim, columns)
        first = next(iter(found.values()), weights)
        _check_stack(name, weights, shape, first, next(iter(found), name))
        found[name] = weights
    name, weights = next(iter(found.items()))
    halved = query.dtype in (torch.bfloat16, torch.float16) and weights[0].dtype == torch.float32
    if not halved:
        _check_like("query", query, weights[0], f"{name}[0]")
    return found


def _check_stack(name: str, tensors: Sources, shape: tuple[int | None, ...], first: Sources, first_name: str) -> None:
    """Raise unless ``tensors`` are as many as ``first``, in their dtype and place, and of ``shape`` (None: any)."""
    check_sources(name, tensors)
    if len(tensors) != len(first):
        raise RuntimeError(f"{name}: got {len(tensors)} tensors, expected {len(first)} as {first_name}")
    found = _shape(tensors[0])
    if len(found) != len(shape) or any(want not in (None, got) for got, want in zip(found, shape, strict=True)):
        expected = ", ".join("out" if size is None else str(size) for size in shape)
        raise RuntimeError(f"{name}[0]: got shape {found}, expected ({expected}{',' if len(shape) == 1 else ''})")
    _check_like(f"{name}[0]", tensors[0], first[0], f"{first_name}[0]")


def _check_vectors(name: str, tensors: Sources | None, length: int, first: Sources, first_name: str) -> None:
    if tensors is not None:
        _check_stack(name, tensors, (length,), first, first_name)


def _refuse_outer(coefficients: CoefficientsLike, out_coefficients: CoefficientsLike | None) -> None:
    for name, value in (("coefficients", coefficients), ("out_coefficients", out_coefficients)):
        if isinstance(value, Outer):
            raise TypeError(
                f"{name}: got Outer, expected a tensor or a sequence: attention mixes its projections by one "
                "coefficient a source, or one a row"
            )


def _check_coefficients(name: str, coefficients: Tensor, weights: Sources, out: int) -> None:
    n = len(weights)
    if coefficients.shape != (n,) and coefficients.shape != (n, out):
        raise RuntimeError(f"{name}: got shape {_shape(coefficients)}, expected ({n},) or ({n}, {out})")
    if coefficients.device != weights[0].device:
        raise RuntimeError(f"{name}: got device {coefficients.device}, expected {weights[0].device} as the weights")


def _out_coefficients(coefficients: Tensor, out_coefficients: CoefficientsLike | None, weights: Sources) -> Tensor:
    if out_coefficients is not None:
        return as_coefficients(out_coefficients, weights, "out_proj_weights", "out_coefficients")
    if coefficients.dim() != 1:
        raise RuntimeError(
            "out_coefficients: got None, expected those of the output projection, as coefficients are one per channel"
        )
    return coefficients


def _check_appended(
    bias_ks: Sources | None,
    bias_vs: Sources | None,
    static_k: Tensor | None,
    static_v: Tensor | None,
    embed_dim: int,
    first: Sources,
    first_name: str,
) -> None:
    if bias_ks is None and bias_vs is None:
        return
    for name, biases, other in (("bias_ks", bias_ks, "bias_vs"), ("bias_vs", bias_vs, "bias_ks")):
        if biases is None:
            raise RuntimeError(f"{name}: got None, expected tensors as {other} are given")
        check_sources(name, biases)
        leading = (1,) * (biases[0].dim() - 1) if 1 <= biases[0].dim() <= 3 else (1, 1)
        _check_stack(name, biases, (*leading, embed_dim), first, first_name)
    for name, static in (("static_k", static_k), ("static_v", static_v)):
        if static is not None:
            raise RuntimeError(f"{name}: got a tensor, expected None as bias_ks and bias_vs are given")


def _check_static(query: Tensor, key: Tensor, num_heads: int, static_k: Tensor | None, static_v: Tensor | None) -> int:
    """Raise unless the static key and value fit; return how many keys are attended to, before any is appended."""
    batch = query.shape[1] if query.dim() == 3 else 1
    rows, width = batch * num_heads, query.shape[-1] // num_heads
    length = key.shape[0] if static_k is None else static_k.shape[1] if static_k.dim() == 3 else -1
    for name, static in (("static_k", static_k), ("static_v", static_v)):
        if static is not None:
            if _shape(static) != (rows, length, width):
                expected = length if length >= 0 else "S"
                raise RuntimeError(f"{name}: got shape {_shape(static)}, expected ({rows}, {expected}, {width})")
            _check_like(name, static, query, "query")
    if static_v is None and length != key.shape[0]:
        raise RuntimeError(f"static_k: got length {length}, expected {key.shape[0]} as value")
    return length


def _check_masks(
    query: Tensor,
    num_heads: int,
    length: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    target = query.shape[0]
    batch = query.shape[1] if query.dim() == 3 else 1
    if attn_mask is None:
        if is_causal:
            raise RuntimeError("is_causal: got True without attn_mask, expected the causal mask with the hint")
    else:
        _check_like("attn_mask", attn_mask, query, "query", mask=True)
        expected = ((target, length), (batch * num_heads, target, length))
        if _shape(attn_mask) not in expected:
            raise RuntimeError(f"attn_mask: got shape {_shape(attn_mask)}, expected {expected[0]} or {expected[1]}")
    if key_padding_mask is not None:
        _check_like("key_padding_mask", key_padding_mask, query, "query", mask=True)
        shape = (batch, length) if query.dim() == 3 else (length,)
        if _shape(key_padding_mask) != shape:
            raise RuntimeError(f"key_padding_mask: got shape {_shape(key_padding_mask)}, expected {shape}")
