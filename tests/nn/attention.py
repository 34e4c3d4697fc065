"""Multi-head attention on small sizes: arguments of the function, layers, and torch's own on weights mixed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as aten
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rl_kernels import functional as F
from tests.nn.common import results

EMBED, HEADS, BATCH, TARGET, SOURCE, KDIM, VDIM = 8, 2, 3, 4, 5, 6, 7
HEAD = EMBED // HEADS
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def stack(*shape: int, n: int = 2) -> list[Tensor]:
    return [leaf(*shape) for _ in range(n)]


# The functional form against torch's, on weights mixed by hand.

LISTS = {
    "in_proj_weights": "in_proj_weight",
    "in_proj_biases": "in_proj_bias",
    "bias_ks": "bias_k",
    "bias_vs": "bias_v",
    "out_proj_weights": "out_proj_weight",
    "out_proj_biases": "out_proj_bias",
    "q_proj_weights": "q_proj_weight",
    "k_proj_weights": "k_proj_weight",
    "v_proj_weights": "v_proj_weight",
}
ROWS = {"q_proj_weights": 0, "k_proj_weights": 1, "v_proj_weights": 2, "bias_ks": 1, "bias_vs": 2}


def arguments(kind: str = "self", batched: bool = True, n: int = 2, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of ``mixed_multi_head_attention``. Kinds: what query, key and value have in common."""
    batch = (BATCH,) if batched else ()
    separate = kind == "separate"
    query = leaf(TARGET, *batch, EMBED)
    key = query if kind == "self" else leaf(SOURCE, *batch, KDIM if separate else EMBED)
    value = key if kind in ("self", "memory") else leaf(SOURCE, *batch, VDIM if separate else EMBED)
    packed: dict[str, Any] = {"in_proj_weights": stack(3 * EMBED, EMBED, n=n)}
    three = {
        "in_proj_weights": None,
        "q_proj_weights": stack(EMBED, EMBED, n=n),
        "k_proj_weights": stack(EMBED, KDIM, n=n),
        "v_proj_weights": stack(EMBED, VDIM, n=n),
        "use_separate_proj_weight": True,
    }
    return {
        "query": query,
        "key": key,
        "value": value,
        "embed_dim_to_check": EMBED,
        "num_heads": HEADS,
        **(three if separate else packed),
        "in_proj_biases": stack(3 * EMBED, n=n),
        "bias_ks": None,
        "bias_vs": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weights": stack(EMBED, EMBED, n=n),
        "out_proj_biases": stack(EMBED, n=n),
        "coefficients": torch.linspace(-0.7, 1.1, n, dtype=torch.float64).add(0.05).requires_grad_(),
        **changes,
    }


def by_hand(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torch's function that mean the same."""
    given = dict(given)
    coefficients, outward = given.pop("coefficients"), given.pop("out_coefficients", None)
    outward = coefficients if outward is None else outward
    for name, plain in LISTS.items():
        tensors = given.pop(name, None)
        c = outward if name.startswith("out") else coefficients
        if isinstance(c, Tensor) and c.dim() == 2 and name in ROWS:
            c = c[:, ROWS[name] * EMBED : (ROWS[name] + 1) * EMBED]
        mixed = None
        for cj, tensor in zip(c, tensors or (), strict=tensors is not None):
            by_row = isinstance(cj, Tensor) and cj.dim() == 1 and name not in ("bias_ks", "bias_vs")
            term = (cj.reshape(-1, *(1,) * (tensor.dim() - 1)) if by_row else cj) * tensor
            mixed = term if mixed is None else mixed + term
        given[plain] = mixed
    return given


def assert_as_torch(given: dict[str, Any], label: str = "", bitwise: bool = False) -> None:
    """Values and all gradients equal those of torch's function on weights mixed by hand."""
    leaves: dict[str, Tensor] = {}
    for name, value in given.items():
        for j, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not any(tensor is t for t in leaves.values()):
                leaves[f"{name}[{j}]"] = tensor
    found = results(lambda: F.mixed_multi_head_attention(**given), leaves, ())
    expected = results(lambda: aten.multi_head_attention_forward(**by_hand(given)), leaves, ())
    assert found.keys() == expected.keys(), label
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{label}: {name}: {m}"
        )
        assert bool(torch.isfinite(value).all())


def attention_mask(kind: str, batched: bool, source: int) -> Tensor | None:
    """No row is masked altogether."""
    if kind == "none":
        return None
    shape = (TARGET, source) if "2d" in kind else ((BATCH if batched else 1) * HEADS, TARGET, source)
    if "bool" in kind:
        mask = torch.rand(shape) > 0.5
        mask[..., 0] = False
        return mask
    return leaf(*shape)


def padding_mask(kind: str, batched: bool, source: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.zeros(BATCH if batched else 1, source, dtype=torch.bool)
    mask[0, -2:] = True
    mask = mask if batched else mask[0]
    return mask if kind == "bool" else leaf(*mask.shape)


def length(kind: str) -> int:
    return TARGET if kind == "self" else SOURCE


KINDS = ["self", "memory", "cross", "separate"]
BATCHED = pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
OUTPUTS = {"fused": (False, True), "mean weights": (True, True), "weights": (True, False)}


class Products(TorchDispatchMode):
    """Counts the mixed products."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rl_kernels.mixed_linear.default:
            self.rows.append(args[1][0].shape[0] // EMBED)
        return func(*args, **(kwargs or {}))


# The layer.


def attentions(n: int = 2, dtype: torch.dtype = torch.float64, **settings: Any) -> list[nn.MultiheadAttention]:
    """Plain layers whose parameters all differ: torch starts its biases at zero."""
    found = [nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **settings) for _ in range(n)]
    with torch.no_grad():
        for layer in found:
            for parameter in layer.parameters():
                parameter.normal_(std=0.5)
    return found


def inputs(layer: Any, kind: str = "self", batched: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    def sequence(size: int, features: int) -> Tensor:
        if not batched:
            return leaf(size, features, dtype=dtype)
        return leaf(*((BATCH, size) if layer.batch_first else (size, BATCH)), features, dtype=dtype)

    query = sequence(TARGET, EMBED)
    key = query if kind == "self" else sequence(SOURCE, layer.kdim)
    value = key if kind in ("self", "memory") else sequence(SOURCE, layer.vdim)
    return [query, key, value]


def factor(name: str, coefficients: Tensor, parameter: Tensor) -> Tensor:
    """By channel: rows of query, key, value, then of the output projection."""
    if coefficients.dim() == 0:
        return coefficients
    first = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "bias_k": 1, "bias_v": 2, "in_pro": 0, "out_pr": 3}[name[:6]]
    count = 3 if name.startswith("in_proj") else 1
    part = coefficients[first * EMBED : (first + count) * EMBED]
    return part.reshape(-1, 1) if parameter.dim() == 2 else part


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "kdim, vdim": {"kdim": KDIM, "vdim": VDIM},
    "kdim": {"kdim": KDIM},
    "everything": {"kdim": KDIM, "vdim": VDIM, "add_bias_kv": True, "add_zero_attn": True, "dropout": 0.3},
    "everything packed": {"bias": False, "add_bias_kv": True, "add_zero_attn": True, "dropout": 0.3},
}


def common_inputs(settings: dict[str, Any]) -> list[str]:
    """What query, key and value can have in common under these settings."""
    return ["cross"] if "kdim" in settings else ["self", "memory", "cross"]
