import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as aten
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.nn import Coefficients, ReplacementLinear, ReplacementMultiheadAttention
from rl_kernels.testing import peak_memory
from tests.nn.common import assert_accurate, assert_as_by_hand, results

EMBED, HEADS, BATCH, TARGET, SOURCE, KDIM, VDIM = 8, 2, 3, 4, 5, 6, 7
HEAD = EMBED // HEADS
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


class Products(TorchDispatchMode):
    """Counts the mixed products."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rl_kernels.mixed_linear.default:
            self.rows.append(args[1][0].shape[0] // EMBED)
        return func(*args, **(kwargs or {}))


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
