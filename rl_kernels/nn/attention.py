"""ReplacementMultiheadAttention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as aten
from torch import Tensor, nn

from rl_kernels import functional as F
from rl_kernels.nn.adapters import parameter_of
from rl_kernels.nn.layer import ReplacementLayer

IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class OutProjection(NamedTuple):
    """The mixed parameters of the output projection."""

    weight: Tensor
    bias: Tensor | None


class ReplacementMultiheadAttention(ReplacementLayer):
    """``nn.MultiheadAttention`` on the mixed projections of other ``nn.MultiheadAttention``; as ``ReplacementLayer``.

    All projections' weights and biases are mixed, ``bias_k`` and ``bias_v`` included. The settings dropout,
    batch_first and add_zero_attn are ``own``'s, else the first source's; the number of heads is the sources'.

    Granularity ``"channel"`` holds ``(N, 4 * embed_dim)`` coefficients: for the output channels of the projections of
    query, key and value (``bias_k`` and ``bias_v`` go with the latter two), then for those of the output projection.
    An integer granularity divides these: 4 has one for each projection, ``4 * num_heads`` one for each head's rows of
    the first three and as many groups of the output projection's.

    ``torch.nn.TransformerEncoderLayer`` runs it in training and evaluation, and keeps off its fused inference path,
    which reads parameters directly. An ``nn.TransformerEncoder`` that was built of plain layers makes nested tensors
    in evaluation, which only that path understands: set its ``use_nested_tensor`` to False.
    """

    source_type = (nn.MultiheadAttention,)

    _qkv_same_embed_dim = False
    """What nn.TransformerEncoderLayer asks before it takes its fused path; the true value is ``packed``."""

    def __init__(self, sources: Any, *, own: nn.Module | None = None, **options: Any):
        super().__init__(sources, own=own, **options)
        settings: Any = sources[0] if own is None else own
        self.embed_dim: int = settings.embed_dim
        self.kdim: int = settings.kdim
        self.vdim: int = settings.vdim
        self.num_heads: int = settings.num_heads
        self.head_dim: int = settings.head_dim
        self.dropout: float = settings.dropout
        self.batch_first: bool = settings.batch_first
        self.add_zero_attn: bool = settings.add_zero_attn
        self.packed: bool = sources[0].in_proj_weight is not None
        """Whether query, key and value have one size, and their weights are held as one ``in_proj_weight``."""

    @staticmethod
    def main_weight(source: nn.Module) -> Tensor:
        """The packed weight of the input projections, or that of the query."""
        weight = source.q_proj_weight if source.in_proj_weight is None else source.in_proj_weight
        assert isinstance(weight, Tensor)
        return weight

    @classmethod
    def out_channels_of(cls, source: nn.Module) -> int:
        """Coefficients of a source at granularity ``"channel"``: of query, key, value and output projection."""
        return 4 * int(source.embed_dim)  # type: ignore[arg-type]

    @classmethod
    def signature(cls, layer: nn.Module) -> dict[str, Any]:
        """Parameter shapes, dtype, device, and the number of heads, by which the rows of the weights are read."""
        return {**super().signature(layer), "num_heads": layer.num_heads}

    @classmethod
    def fit_pairs(cls, own: nn.Module, sources: Sequence[nn.Module]) -> list[tuple[Tensor, list[Tensor]]]:
        """The weights of all projections."""

        def weights(layer: Any) -> list[Tensor]:
            found = [getattr(layer, name) for name in IN_PROJECTIONS] + [layer.out_proj.weight]
            return [weight for weight in found if weight is not None]

        return list(zip(weights(own), map(list, zip(*map(weights, sources), strict=True)), strict=True))

    def _pairs_to_fit(self, own: nn.Module) -> list[tuple[Tensor, list[Tensor]]]:
        pairs = super()._pairs_to_fit(own)
        if self.granularity == "scalar":
            return pairs
        # One matrix with a row for each coefficient of a source; zeros fill the rows of the narrower weights.
        columns = max(weight.shape[1] for weight, _ in pairs)

        def rows(weights: Sequence[Tensor]) -> Tensor:
            return torch.cat([aten.pad(weight.detach(), (0, columns - weight.shape[1])) for weight in weights])

        owns, sources = zip(*pairs, strict=True)
        return [(rows(owns), [rows(weights) for weights in zip(*sources, strict=True)])]

    def _tensors(self, name: str) -> list[Tensor] | None:
        """As ``ReplacementLayer``'s; ``name`` may lead through a submodule."""
        *path, last = name.split(".")
        tensors: list[Any] = []
        for j, source in enumerate(self._sources):
            for step in path:
                source = getattr(source, step)
            tensor = parameter_of(source, last)
            tensors.append(tensor.detach() if tensor is not None and j in self.detach else tensor)
        return None if tensors[0] is None else tensors

    def _coefficients_by_projection(self) -> tuple[Tensor, Tensor]:
        """The coefficients of the input projections, ``(N,)`` or ``(N, 3E)``, and of the output's, or ``(N, E)``."""
        coefficients = self.coefficients
        if coefficients.dim() == 1:
            return coefficients, coefficients
        inward, outward = coefficients.split([3 * self.embed_dim, self.embed_dim], dim=1)
        return inward, outward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as ``nn.MultiheadAttention`` computes it: the same arguments, shapes, masks and results.

        Args:
            query: ``(L, B, E)``, ``(B, L, E)`` where ``batch_first``, or ``(L, E)`` unbatched.
            key: as ``query``, of length S and ``kdim`` features.
            value: as ``key``, of ``vdim`` features.
            key_padding_mask: ``(B, S)`` or ``(S,)``: bool, True where a key is ignored; or floating-point, added.
            need_weights: return the attention weights; without them torch's fused attention runs.
            attn_mask: ``(L, S)`` or ``(B * num_heads, L, S)``: bool, True where attention is forbidden; or
                floating-point, added.
            average_attn_weights: return the weights' mean over heads.
            is_causal: a hint that ``attn_mask``, which it needs, is the causal mask.

        Returns:
            The output, shaped as ``query``; and the attention weights, ``(B, L, S)`` or ``(B, num_heads, L, S)``
            (unbatched without B), or None.
        """
        transposed = self.batch_first and query.dim() == 3 and not query.is_nested
        if transposed:
            query, key, value = _transpose(query, key, value)
        coefficients, out_coefficients = self._coefficients_by_projection()
        out_weights = self._tensors("out_proj.weight")
        assert out_weights is not None
        output, weights = F.mixed_multi_head_attention(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self._tensors("in_proj_weight"),
            self._tensors("in_proj_bias"),
            self._tensors("bias_k"),
            self._tensors("bias_v"),
            self.add_zero_attn,
            self.dropout,
            out_weights,
            self._tensors("out_proj.bias"),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self.packed,
            q_proj_weights=self._tensors("q_proj_weight"),
            k_proj_weights=self._tensors("k_proj_weight"),
            v_proj_weights=self._tensors("v_proj_weight"),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            coefficients=coefficients,
            out_coefficients=out_coefficients,
        )
        return output.transpose(0, 1) if transposed else output, weights

    # The mixed parameters, each evaluated at each access: for export, and for code that reads a layer's parameters.

    def _mixed_rows(self, name: str, first: int, rows: int) -> Tensor | None:
        """The mixed parameter ``name``, by the coefficients of ``rows`` output channels from ``first`` on."""
        self._look_around()
        tensors = self._tensors(name)
        if tensors is None:
            return None
        coefficients = self.coefficients
        if coefficients.dim() == 2:
            coefficients = coefficients[:, first * self.embed_dim : (first + rows) * self.embed_dim]
        if tensors[0].dim() < 3:
            return F.mix(tensors, coefficients)
        return F.mix([tensor.reshape(-1) for tensor in tensors], coefficients).view_as(tensors[0])

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The mixed weight of the input projections; None where they are separate."""
        return self._mixed_rows("in_proj_weight", 0, 3)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The mixed bias of the input projections, or None."""
        return self._mixed_rows("in_proj_bias", 0, 3)

    @property
    def q_proj_weight(self) -> Tensor | None:
        """The mixed weight of a separate query projection, or None."""
        return self._mixed_rows("q_proj_weight", 0, 1)

    @property
    def k_proj_weight(self) -> Tensor | None:
        """The mixed weight of a separate key projection, or None."""
        return self._mixed_rows("k_proj_weight", 1, 1)

    @property
    def v_proj_weight(self) -> Tensor | None:
        """The mixed weight of a separate value projection, or None."""
        return self._mixed_rows("v_proj_weight", 2, 1)

    @property
    def bias_k(self) -> Tensor | None:
        """The mixed bias of the keys, or None."""
        return self._mixed_rows("bias_k", 1, 1)

    @property
    def bias_v(self) -> Tensor | None:
        """The mixed bias of the values, or None."""
        return self._mixed_rows("bias_v", 2, 1)

    @property
    def out_proj(self) -> OutProjection:
        """The mixed weight and bias of the output projection."""
        weight = self._mixed_rows("out_proj.weight", 3, 1)
        assert weight is not None
        return OutProjection(weight, self._mixed_rows("out_proj.bias", 3, 1))

    def merged(self) -> nn.MultiheadAttention:
        """An ``nn.MultiheadAttention`` that computes the same."""
        names = (*IN_PROJECTIONS, "in_proj_bias", "bias_k", "bias_v")
        values = {name: getattr(self, name) for name in names}
        out = self.out_proj
        values |= {"out_proj.weight": out.weight, "out_proj.bias": out.bias}
        layer = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            values["in_proj_bias"] is not None,
            values["bias_k"] is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device="meta",
        )
        return self._filled(layer, values)

    def extra_repr(self) -> str:
        """Sizes, sources and options, for printing."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, kdim={self.kdim}, "
            f"vdim={self.vdim}, batch_first={self.batch_first}, add_zero_attn={self.add_zero_attn}, "
            f"{super().extra_repr()}"
        )


def _transpose(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences first. What was one object stays one: self-attention is told by it."""
    q = query.transpose(0, 1)
    k = q if key is query else _sequence_first(key)
    v = k if value is key else q if value is query else _sequence_first(value)
    return q, k, v


def _sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1) if x.dim() == 3 and not x.is_nested else x
