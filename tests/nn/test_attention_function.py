"""The functional form against torch's, on weights mixed by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels import functional as F
from rl_kernels.nn import ReplacementMultiheadAttention
from rl_kernels.testing import peak_memory
from tests.nn.attention import (
    BATCH,
    BATCHED,
    DOUBLE,
    EMBED,
    HEAD,
    HEADS,
    KINDS,
    LISTS,
    OUTPUTS,
    SOURCE,
    TARGET,
    Products,
    arguments,
    assert_as_torch,
    attention_mask,
    attentions,
    by_hand,
    leaf,
    length,
    padding_mask,
    stack,
)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@BATCHED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", ["none", "bool 2d", "float 2d", "bool 3d", "float 3d"])
@pytest.mark.parametrize("padded", ["none", "bool", "float"])
def test_masks(kind: str, batched: bool, masked: str, padded: str) -> None:
    for (output, (need_weights, average)), biased, zero in itertools.product(
        OUTPUTS.items(), (False, True), (False, True)
    ):
        given = arguments(
            kind,
            batched,
            attn_mask=attention_mask(masked, batched, length(kind)),
            key_padding_mask=padding_mask(padded, batched, length(kind)),
            need_weights=need_weights,
            average_attn_weights=average,
            bias_ks=stack(1, 1, EMBED) if biased else None,
            bias_vs=stack(1, 1, EMBED) if biased else None,
            add_zero_attn=zero,
        )
        assert_as_torch(given, f"{output}, bias_k={biased}, zero={zero}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("granularity", ["scalar", "channel", "channel in, scalar out", "scalar in, channel out"])
def test_granularity_and_number_of_sources(kind: str, n: int, granularity: str) -> None:
    given = arguments(kind, n=n, bias_ks=stack(1, 1, EMBED, n=n), bias_vs=stack(EMBED, n=n))
    if granularity in ("channel", "channel in, scalar out"):
        given["coefficients"] = leaf(n, 3 * EMBED)
        given["out_coefficients"] = leaf(n) if "scalar" in granularity else leaf(n, EMBED)
    elif granularity == "scalar in, channel out":
        given["out_coefficients"] = leaf(n, EMBED)
    assert_as_torch(given)


@pytest.mark.parametrize("kind", KINDS)
def test_without_biases(kind: str) -> None:
    assert_as_torch(arguments(kind, in_proj_biases=None, out_proj_biases=None))
    assert_as_torch(arguments(kind, in_proj_biases=None))


@pytest.mark.parametrize("kind", ["memory", "cross", "separate"])
@pytest.mark.parametrize("static", ["k", "v", "both"])
@pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_static_key_and_value(kind: str, static: str, zero: bool, need_weights: bool) -> None:
    given = arguments(kind, add_zero_attn=zero, need_weights=need_weights)
    given["attn_mask"] = attention_mask("bool 2d", True, SOURCE)
    given["key_padding_mask"] = padding_mask("bool", True, SOURCE)
    if static in ("k", "both"):
        given["static_k"] = leaf(BATCH * HEADS, SOURCE, HEAD)
    if static in ("v", "both"):
        given["static_v"] = leaf(BATCH * HEADS, SOURCE, HEAD)
    assert_as_torch(given)


def test_static_key_and_value_of_another_length() -> None:
    statics = {name: leaf(BATCH * HEADS, SOURCE + 3, HEAD) for name in ("static_k", "static_v")}
    assert_as_torch(arguments("cross", **statics))
    mask = torch.rand(TARGET, SOURCE + 3) > 0.9
    _, weights = F.mixed_multi_head_attention(**arguments("cross", **statics, attn_mask=mask))
    assert weights is not None
    assert weights.shape == (BATCH, TARGET, SOURCE + 3)
    assert bool((weights[:, mask] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("padded", ["none", "bool"])
@pytest.mark.parametrize("appended", [False, True], ids=["plain", "appended"])
def test_is_causal(kind: str, need_weights: bool, padded: str, appended: bool) -> None:
    causal = torch.ones(TARGET, length(kind), dtype=torch.bool).triu(1)
    given = arguments(
        kind,
        attn_mask=causal,
        is_causal=True,
        need_weights=need_weights,
        key_padding_mask=padding_mask(padded, True, length(kind)),
        add_zero_attn=appended,
        bias_ks=stack(1, 1, EMBED) if appended else None,
        bias_vs=stack(1, 1, EMBED) if appended else None,
    )
    assert_as_torch(given)


def test_the_causal_hint_stands_for_the_mask() -> None:
    causal = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
    given = arguments(need_weights=False)
    hinted, _ = F.mixed_multi_head_attention(**given, attn_mask=causal, is_causal=True)
    masked, _ = F.mixed_multi_head_attention(**given, attn_mask=causal)
    torch.testing.assert_close(hinted, masked)
    free, _ = F.mixed_multi_head_attention(**given)
    assert not torch.allclose(free, masked)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout(need_weights: bool, training: bool) -> None:
    given = arguments(dropout_p=0.4, training=training, need_weights=need_weights)
    assert_as_torch(given)
    y, _ = F.mixed_multi_head_attention(**given)
    again, _ = F.mixed_multi_head_attention(**given)
    assert torch.equal(y, again) != training


def test_output_of_another_size() -> None:
    given = arguments(out_proj_weights=stack(3, EMBED), out_proj_biases=stack(3), out_coefficients=leaf(2, 3))
    assert_as_torch(given)


@pytest.mark.parametrize(
    "coefficients",
    [(0.3, -0.9), [torch.tensor(0.3), torch.tensor([-0.9])], torch.tensor([0.3, -0.9])],
    ids=["floats", "one-element tensors", "float32 tensor"],
)
def test_forms_of_coefficients(coefficients: Any) -> None:
    given = arguments()
    y, _ = F.mixed_multi_head_attention(**{**given, "coefficients": coefficients})
    exact = [float(c) for c in coefficients]
    expected, _ = aten.multi_head_attention_forward(**by_hand({**given, "coefficients": exact}))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("sizes", [(0, 3, 5), (4, 0, 5)], ids=["no target", "no batch"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_empty_inputs(sizes: tuple[int, int, int], need_weights: bool) -> None:
    target, batch, source = sizes
    query, key = leaf(target, batch, EMBED), leaf(source, batch, EMBED)
    mask = torch.zeros(batch, source, dtype=torch.bool)
    given = arguments(query=query, key=key, value=key, need_weights=need_weights, key_padding_mask=mask)
    y, weights = F.mixed_multi_head_attention(**given)
    assert y.shape == (target, batch, EMBED)
    assert weights is None or weights.shape == (batch, target, source)
    y.sum().backward()
    assert query.grad is not None


def test_torchs_sample_inputs() -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.multi_head_attention_forward"]
    count = 0
    for requires_grad in (True, False):
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=requires_grad):
            plain = dict(zip(TORCH_ORDER, (sample.input, *sample.args), strict=False)) | sample.kwargs
            lists = {plain_name: name for name, plain_name in LISTS.items()}
            given: dict[str, Any] = {"coefficients": leaf(2)}
            for name, value in plain.items():
                if name in lists:
                    given[lists[name]] = None if value is None else [value, torch.randn_like(value).requires_grad_()]
                else:
                    given[name] = value
            assert_as_torch(given, f"sample {count}")
            count += 1
    assert count > 100


TORCH_ORDER = (
    "query",
    "key",
    "value",
    "embed_dim_to_check",
    "num_heads",
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "dropout_p",
    "out_proj_weight",
    "out_proj_bias",
)


def test_the_order_of_arguments_is_torchs() -> None:
    import inspect

    names = [LISTS.get(name, name) for name in inspect.signature(F.mixed_multi_head_attention).parameters]
    plain = inspect.signature(aten.multi_head_attention_forward)
    assert names == [*plain.parameters, "coefficients", "out_coefficients"]
    for name, parameter in inspect.signature(F.mixed_multi_head_attention).parameters.items():
        if LISTS.get(name, name) in plain.parameters:
            assert parameter.default == plain.parameters[LISTS.get(name, name)].default, name


@pytest.mark.parametrize(
    ("kind", "statics", "rows"),
    [
        ("self", (), [3, 1]),
        ("memory", (), [1, 2, 1]),
        ("cross", (), [1, 1, 1, 1]),
        ("separate", (), [1, 1, 1, 1]),
        ("memory", ("static_k",), [1, 1, 1]),
        ("memory", ("static_k", "static_v"), [1, 1]),
    ],
    ids=lambda value: str(value),
)
@BATCHED
def test_products(kind: str, statics: tuple[str, ...], rows: list[int], batched: bool) -> None:
    """As few products as there are different inputs, and none whose result is not used."""
    given = arguments(
        kind, batched, **{name: leaf((BATCH if batched else 1) * HEADS, SOURCE, HEAD) for name in statics}
    )
    with Products() as products:
        F.mixed_multi_head_attention(**given)
    assert products.rows == rows


def large(kind: str) -> dict[str, Any]:
    size = 768
    query = torch.randn(2, 1, size, requires_grad=True)
    key = query if kind == "self" else torch.randn(3, 1, size)
    value = key if kind != "cross" else torch.randn(3, 1, size)
    return {
        "query": query,
        "key": key,
        "value": value,
        "embed_dim_to_check": size,
        "num_heads": 2,
        "in_proj_weights": [torch.randn(3 * size, size, requires_grad=True) for _ in range(2)],
        "in_proj_biases": None,
        "bias_ks": None,
        "bias_vs": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weights": [torch.randn(size, size, requires_grad=True) for _ in range(2)],
        "out_proj_biases": None,
        "coefficients": torch.tensor([0.3, 0.7]),
    }


@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
def test_no_mixed_weight_is_allocated(kind: str) -> None:
    given = large(kind)
    weight = given["in_proj_weights"][0]
    assert peak_memory(lambda: F.mixed_multi_head_attention(**given), "cpu") < weight.nbytes / 2
    frozen = {name: [w.detach() for w in given[name]] for name in ("in_proj_weights", "out_proj_weights")}
    y, _ = F.mixed_multi_head_attention(**{**given, **frozen})
    assert peak_memory(lambda: torch.autograd.grad(y.sum(), given["query"]), "cpu") < weight.nbytes / 2


@pytest.mark.parametrize(("kind", "extra"), [("self", 0.1), ("memory", 1.1), ("cross", 1.1)], ids=str)
def test_memory_of_the_gradients(kind: str, extra: float) -> None:
    """Parts of a packed weight cost one weight more, while their gradients are joined, and no zeros."""
    given = large(kind)
    weights = [*given["in_proj_weights"], *given["out_proj_weights"]]
    y, _ = F.mixed_multi_head_attention(**given)
    peak = peak_memory(lambda: torch.autograd.grad(y.sum(), weights), "cpu")
    gradients = sum(weight.nbytes for weight in weights)
    assert gradients <= peak < gradients + extra * weights[0].nbytes


# Gradients and transforms.


def functional_of(given: dict[str, Any], names: list[str]) -> tuple[Any, list[Tensor]]:
    """The output and attention weights as a function of the tensors of ``names``."""
    tensors = [t for name in names for t in (given[name] if isinstance(given[name], list) else [given[name]])]

    def run(*values: Tensor) -> tuple[Tensor, Tensor | None]:
        changed, rest = dict(given), list(values)
        for name in names:
            old = given[name]
            changed[name] = [rest.pop(0) for _ in old] if isinstance(old, list) else rest.pop(0)
        if given["value"] is given["key"]:
            changed["value"] = changed["key"]
        return F.mixed_multi_head_attention(**changed)

    return run, tensors


WITH_GRADIENTS = ["query", "key", "in_proj_weights", "in_proj_biases", "out_proj_weights", "coefficients"]


@pytest.mark.parametrize("kind", ["memory", "cross"])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_gradcheck_and_gradgradcheck(kind: str, granularity: str) -> None:
    given = arguments(kind)
    if granularity == "channel":
        given |= {"coefficients": leaf(2, 3 * EMBED), "out_coefficients": leaf(2, EMBED)}
    run, tensors = functional_of(given, WITH_GRADIENTS)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_functorch() -> None:
    given = arguments("memory")
    run, tensors = functional_of(given, WITH_GRADIENTS)
    expected = torch.autograd.grad(run(*tensors)[0].square().sum(), tensors)
    detached = [tensor.detach() for tensor in tensors]
    found = torch.func.grad(lambda *values: run(*values)[0].square().sum(), argnums=tuple(range(len(tensors))))(
        *detached
    )
    torch.testing.assert_close(found, expected)
    queries = torch.randn(3, *detached[0].shape, **DOUBLE)
    batched = torch.func.vmap(lambda query: run(query, *detached[1:])[0])(queries)
    torch.testing.assert_close(batched, torch.stack([run(query, *detached[1:])[0] for query in queries]))


def test_autocast() -> None:
    plain = attentions(dtype=torch.float32)
    layer = ReplacementMultiheadAttention(plain, init=(0.3, 0.7))
    merged = layer.merged()
    x = leaf(TARGET, BATCH, EMBED, dtype=torch.float32)
    mask = torch.zeros(TARGET, TARGET).masked_fill(torch.ones(TARGET, TARGET).triu(1).bool(), -torch.inf)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x, x, x, attn_mask=mask, need_weights=need_weights)
            expected, _ = merged(x, x, x, attn_mask=mask, need_weights=need_weights)
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_autocast_takes_what_it_casts() -> None:
    layer = ReplacementMultiheadAttention(attentions(dtype=torch.bfloat16))
    merged = layer.merged()
    query, key = (leaf(TARGET, BATCH, EMBED, dtype=torch.float32) for _ in range(2))
    mask = torch.zeros(TARGET, TARGET, dtype=torch.bfloat16)
    for given in ((query, query, query), (query, key.bfloat16(), key.bfloat16())):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = layer(*given, attn_mask=mask), merged(*given, attn_mask=mask)
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    with pytest.raises(RuntimeError, match=r"query: got dtype torch.float32, expected torch.bfloat16"):
        layer(query, query, query)


def test_half_activations_of_float32_weights() -> None:
    layer = ReplacementMultiheadAttention(attentions(dtype=torch.float32, add_bias_kv=True))
    x = leaf(TARGET, BATCH, EMBED, dtype=torch.float32)
    for need_weights in (True, False):
        y, _ = layer(*[x.bfloat16()] * 3, need_weights=need_weights)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x, x, x)[0], rtol=3e-2, atol=3e-2)
