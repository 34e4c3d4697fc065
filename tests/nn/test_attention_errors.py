"""Wrong arguments of the functional form are named before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl_kernels import functional as F
from tests.nn.attention import BATCH, DOUBLE, EMBED, SOURCE, VDIM, arguments, leaf, stack

# Errors of the functional form.

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "query dimensions": ({"query": torch.randn(EMBED, **DOUBLE)}, r"query: got shape \(8,\), expected 2 .* or 3"),
    "key dimensions": ({"key": torch.randn(5, EMBED, **DOUBLE)}, r"key: got shape \(5, 8\), expected 3 dimensions as"),
    "value dimensions": (
        {"value": torch.randn(5, EMBED, **DOUBLE)},
        r"value: got shape \(5, 8\), expected 3 dimensions as query",
    ),
    "embedding": ({"embed_dim_to_check": 16}, "query: got 8 features, expected embed_dim_to_check = 16"),
    "key features": (
        {"key": torch.randn(SOURCE, BATCH, 6, **DOUBLE)},
        "key: got 6 features, expected embed_dim_to_check = 8",
    ),
    "heads": ({"num_heads": 3}, "num_heads: got 3, expected a divisor of embed_dim_to_check = 8"),
    "no heads": ({"num_heads": 0}, "num_heads: got 0, expected a divisor"),
    "key batch": ({"key": torch.randn(SOURCE, 2, EMBED, **DOUBLE)}, "key: got batch size 2, expected 3 as query"),
    "value length": ({"value": torch.randn(4, BATCH, EMBED, **DOUBLE)}, "value: got length 4, expected 5 as key"),
    "key dtype": ({"key": torch.randn(SOURCE, BATCH, EMBED)}, "key: got dtype torch.float32, expected torch.float64"),
    "key device": (
        {"key": torch.randn(SOURCE, BATCH, EMBED, **DOUBLE, device="meta")},
        "key: got device meta, expected cpu as query",
    ),
    "dtype of all inputs": (
        {name: torch.randn(SOURCE, BATCH, EMBED) for name in ("query", "key", "value")},
        r"query: got dtype torch.float32, expected torch.float64 as in_proj_weights\[0\]",
    ),
    "no weights": (
        {"in_proj_weights": None},
        "in_proj_weights: got None, expected .* use_separate_proj_weight is False",
    ),
    "separate without weights": (
        {"use_separate_proj_weight": True},
        "q_proj_weights: got None, expected weights as use_separate_proj_weight is True",
    ),
    "empty weights": ({"in_proj_weights": []}, "in_proj_weights: got no tensor"),
    "shape of weights": (
        {"in_proj_weights": stack(EMBED, EMBED)},
        r"in_proj_weights\[0\]: got shape \(8, 8\), expected \(24, 8\)",
    ),
    "weights that differ": (
        {"in_proj_weights": [leaf(24, 8), leaf(24, 7)]},
        r"in_proj_weights\[1\]: got shape \(24, 7\), expected \(24, 8\)",
    ),
    "integer weights": (
        {"in_proj_weights": [torch.ones(24, 8, dtype=torch.long)] * 2},
        r"in_proj_weights\[0\]: got dtype torch.int64, expected a floating-point",
    ),
    "number of out weights": (
        {"out_proj_weights": stack(8, 8, n=3)},
        "out_proj_weights: got 3 tensors, expected 2 as in_proj_weights",
    ),
    "shape of out weights": (
        {"out_proj_weights": stack(8, 9)},
        r"out_proj_weights\[0\]: got shape \(8, 9\), expected \(out, 8\)",
    ),
    "dtype of out weights": (
        {"out_proj_weights": [torch.randn(8, 8)] * 2},
        r"out_proj_weights\[0\]: got dtype torch.float32, expected torch.float64 as in_proj_weights\[0\]",
    ),
    "in biases": ({"in_proj_biases": stack(8)}, r"in_proj_biases\[0\]: got shape \(8,\), expected \(24,\)"),
    "number of in biases": ({"in_proj_biases": stack(24, n=1)}, "in_proj_biases: got 1 tensors, expected 2"),
    "out biases": ({"out_proj_biases": stack(9)}, r"out_proj_biases\[0\]: got shape \(9,\), expected \(8,\)"),
    "coefficients": ({"coefficients": leaf(3)}, r"coefficients: got shape \(3,\), expected \(2,\) or \(2, 24\)"),
    "channel coefficients": (
        {"coefficients": leaf(2, 8), "out_coefficients": leaf(2)},
        r"coefficients: got shape \(2, 8\), expected \(2,\) or \(2, 24\)",
    ),
    "number of coefficients": (
        {"coefficients": (1.0,)},
        "coefficients: got 1, expected 2 as there are in_proj_weights",
    ),
    "integer coefficients": ({"coefficients": torch.ones(2, dtype=torch.int)}, "coefficients: got dtype torch.int32"),
    "device of coefficients": (
        {"coefficients": torch.ones(2, device="meta")},
        "coefficients: got device meta, expected cpu as the weights",
    ),
    "no out coefficients": (
        {"coefficients": leaf(2, 24)},
        "out_coefficients: got None, expected those of the output projection",
    ),
    "out coefficients": (
        {"out_coefficients": leaf(2, 24)},
        r"out_coefficients: got shape \(2, 24\), expected \(2,\) or \(2, 8\)",
    ),
    "number of out coefficients": (
        {"out_coefficients": (1.0, 2.0, 3.0)},
        "out_coefficients: got 3, expected 2 as there are out_proj_weights",
    ),
    "bias_k alone": ({"bias_ks": stack(1, 1, 8)}, "bias_vs: got None, expected tensors as bias_ks are given"),
    "bias_v alone": ({"bias_vs": stack(1, 1, 8)}, "bias_ks: got None, expected tensors as bias_vs are given"),
    "shape of bias_k": (
        {"bias_ks": stack(2, 1, 8), "bias_vs": stack(8)},
        r"bias_ks\[0\]: got shape \(2, 1, 8\), expected \(1, 1, 8\)",
    ),
    "bias_k and static_k": (
        {"bias_ks": stack(8), "bias_vs": stack(8), "static_k": leaf(6, 5, 4)},
        "static_k: got a tensor, expected None as bias_ks and bias_vs are given",
    ),
    "bias_k and static_v": (
        {"bias_ks": stack(8), "bias_vs": stack(8), "static_v": leaf(6, 5, 4)},
        "static_v: got a tensor, expected None as bias_ks and bias_vs are given",
    ),
    "static_k rows": ({"static_k": leaf(5, 5, 4)}, r"static_k: got shape \(5, 5, 4\), expected \(6, 5, 4\)"),
    "static_k width": ({"static_k": leaf(6, 5, 8)}, r"static_k: got shape \(6, 5, 8\), expected \(6, 5, 4\)"),
    "static_k dimensions": ({"static_k": leaf(6, 5)}, r"static_k: got shape \(6, 5\), expected \(6, S, 4\)"),
    "static_v shape": ({"static_v": leaf(6, 4, 4)}, r"static_v: got shape \(6, 4, 4\), expected \(6, 5, 4\)"),
    "static_k length": ({"static_k": leaf(6, 7, 4)}, "static_k: got length 7, expected 5 as value"),
    "static_k dtype": ({"static_k": torch.randn(6, 5, 4)}, "static_k: got dtype torch.float32, expected torch.float64"),
    "causal without mask": ({"is_causal": True}, "is_causal: got True without attn_mask, expected the causal mask"),
    "2d mask": (
        {"attn_mask": torch.zeros(5, 4, dtype=torch.bool)},
        r"attn_mask: got shape \(5, 4\), expected \(4, 5\) or \(6, 4, 5\)",
    ),
    "3d mask": (
        {"attn_mask": torch.zeros(3, 4, 5, dtype=torch.bool)},
        r"attn_mask: got shape \(3, 4, 5\), expected \(4, 5\) or \(6, 4, 5\)",
    ),
    "mask dimensions": ({"attn_mask": torch.zeros(5, dtype=torch.bool)}, r"attn_mask: got shape \(5,\), expected"),
    "integer mask": (
        {"attn_mask": torch.zeros(4, 5, dtype=torch.int)},
        "attn_mask: got dtype torch.int32, expected bool or torch.float64",
    ),
    "float32 mask": ({"attn_mask": torch.zeros(4, 5)}, "attn_mask: got dtype torch.float32, expected bool or"),
    "mask device": (
        {"attn_mask": torch.zeros(4, 5, dtype=torch.bool, device="meta")},
        "attn_mask: got device meta, expected cpu",
    ),
    "padding mask": (
        {"key_padding_mask": torch.zeros(5, 3, dtype=torch.bool)},
        r"key_padding_mask: got shape \(5, 3\), expected \(3, 5\)",
    ),
    "integer padding mask": (
        {"key_padding_mask": torch.zeros(3, 5, dtype=torch.long)},
        "key_padding_mask: got dtype torch.int64, expected bool or torch.float64",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(RuntimeError, match=f"^{message}"):
        F.mixed_multi_head_attention(**{**arguments("cross"), **changes})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    query = torch.nested.nested_tensor([torch.randn(2, EMBED, **DOUBLE)])
    with pytest.raises(RuntimeError, match=r"^query: got a nested tensor, expected a padded one and key_padding_mask"):
        F.mixed_multi_head_attention(**{**arguments("cross"), "query": query})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_proj_weights": None}, RuntimeError, "k_proj_weights: got None, expected weights"),
        ({"k_proj_weights": stack(8, 8)}, RuntimeError, r"k_proj_weights\[0\]: got shape \(8, 8\), expected \(8, 6\)"),
        ({"v_proj_weights": stack(8, 7, n=3)}, RuntimeError, "v_proj_weights: got 3 tensors, expected 2 as q_proj"),
        ({"q_proj_weights": stack(9, 8)}, RuntimeError, r"q_proj_weights\[0\]: got shape \(9, 8\), expected \(8, 8\)"),
        ({"value": torch.randn(4, 3, VDIM, **DOUBLE)}, RuntimeError, "value: got length 4, expected 5 as key"),
    ],
    ids=["absent", "key shape", "number", "query shape", "lengths"],
)
def test_wrong_separate_weights(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        F.mixed_multi_head_attention(**{**arguments("separate"), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: got list, expected a tensor"),
        ({"attn_mask": [[1.0]]}, TypeError, "attn_mask: got list, expected a tensor"),
        ({"coefficients": "ab"}, TypeError, "coefficients: got str, expected a tensor or a sequence"),
        ({"out_proj_weights": [1.0, 2.0]}, TypeError, r"out_proj_weights\[0\]: got float, expected a tensor"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5, expected a probability"),
    ],
    ids=["query", "mask", "coefficients", "weights", "dropout"],
)
def test_arguments_of_a_wrong_kind(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        F.mixed_multi_head_attention(**{**arguments("cross"), **changes})


@pytest.mark.parametrize(
    ("mask", "shape", "expected"),
    [("attn_mask", (3, 4, 4), r"\(4, 4\) or \(2, 4, 4\)"), ("key_padding_mask", (3, 4), r"\(4,\)")],
    ids=["3d mask", "padding mask"],
)
def test_wrong_masks_of_unbatched_inputs(mask: str, shape: tuple[int, ...], expected: str) -> None:
    given = arguments(batched=False, **{mask: torch.zeros(shape, dtype=torch.bool)})
    with pytest.raises(RuntimeError, match=rf"{mask}: got shape \({shape[0]}, .*\), expected {expected}"):
        F.mixed_multi_head_attention(**given)
