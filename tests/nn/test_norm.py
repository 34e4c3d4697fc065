import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.nn import (
    Coefficients,
    ReplacementBatchNorm1d,
    ReplacementBatchNorm2d,
    ReplacementBatchNorm3d,
    ReplacementGroupNorm,
    ReplacementLayerNorm,
)
from tests.nn.common import assert_accurate, assert_as_by_hand, results

REPLACED: dict[str, Any] = {
    "BatchNorm1d": ReplacementBatchNorm1d,
    "BatchNorm2d": ReplacementBatchNorm2d,
    "BatchNorm3d": ReplacementBatchNorm3d,
    "LayerNorm": ReplacementLayerNorm,
    "GroupNorm": ReplacementGroupNorm,
}
CASES: dict[str, tuple[str, tuple[Any, ...], tuple[int, ...]]] = {
    "BatchNorm1d": ("BatchNorm1d", (6,), (4, 6, 5)),
    "BatchNorm1d of rows": ("BatchNorm1d", (6,), (4, 6)),
    "BatchNorm2d": ("BatchNorm2d", (6,), (4, 6, 3, 2)),
    "BatchNorm3d": ("BatchNorm3d", (6,), (2, 6, 3, 2, 2)),
    "LayerNorm": ("LayerNorm", (6,), (4, 3, 6)),
    "LayerNorm of a plane": ("LayerNorm", ((3, 6),), (4, 3, 6)),
    "GroupNorm": ("GroupNorm", (3, 6), (4, 6, 5)),
}
KINDS = pytest.mark.parametrize("case", CASES)
BATCH_CASES = [name for name in CASES if name.startswith("BatchNorm")]
BATCH_KINDS = pytest.mark.parametrize("case", BATCH_CASES)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def norms(case: str, n: int = 2, dtype: torch.dtype = torch.float64, bias: bool = True, **settings: Any) -> list[Any]:
    """Plain layers with parameters and statistics that all differ."""
    name, arguments, _ = CASES[case]
    torch.manual_seed(0)
    found = []
    for _ in range(n):
        layer = getattr(nn, name)(*arguments, **settings).to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()
        if not bias:
            layer.register_parameter("bias", None)
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            layer.num_batches_tracked.fill_(3)
        found.append(layer)
    return found


def given(case: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*CASES[case][2], dtype=dtype) * 2 + 1).requires_grad_()


def replaced(case: str, sources: list[Any], **options: Any) -> Any:
    options = options if "affine" in options else {"init": (0.3, -0.9), **options}
    return REPLACED[CASES[case][0]](sources, **options)


def set_affine(layer: nn.Module, replaced_layer: Any) -> Any:
    """``layer`` with the affine parameters that ``replaced_layer`` has now."""
    with torch.no_grad():
        layer.weight.copy_(replaced_layer.weight)
        if layer.bias is not None:
            layer.bias.copy_(replaced_layer.bias)
    return layer


# Mixed affine parameters.


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_as_by_hand(case: str, n: int, granularity: Any, bias: bool) -> None:
    sources = norms(case, n, bias=bias)
    init = torch.linspace(-0.7, 1.1, n) + 0.05
    if granularity == "channel":
        init = init[:, None] * torch.linspace(0.5, 1.5, sources[0].weight.shape[0])
    layer = replaced(case, sources, init=init, granularity=granularity)
    assert layer.coefficients.shape == init.shape
    assert_as_by_hand(layer, given(case))


@BATCH_KINDS
@pytest.mark.parametrize("given_own", [True, False], ids=["own", "fresh"])
def test_evaluation_as_by_hand(case: str, given_own: bool) -> None:
    own = norms(case, 3)[2] if given_own else None
    plain = norms(case, 1)[0] if own is None else own
    if own is None:
        plain.reset_running_stats()
    layer = replaced(case, norms(case), own=own).eval()
    assert_as_by_hand(layer, given(case), plain=plain)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case: str, dtype: torch.dtype) -> None:
    layer = replaced(case, norms(case, dtype=dtype))
    assert layer.coefficients.dtype == torch.float32
    assert layer(given(case, dtype)).dtype == dtype
    if dtype == torch.float32:
        assert_accurate(layer, given(case, dtype))
        return
    # Against the plain layer, since torch itself rounds the statistics of a half-precision batch.
    plain = set_affine(norms(case, 1, dtype)[0], layer)
    x = given(case, dtype)
    torch.testing.assert_close(layer(x), plain(x), rtol=2e-2, atol=2e-2)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_source_alone_is_the_plain_layer_bit_for_bit(case: str, dtype: torch.dtype, training: bool) -> None:
    sources = norms(case, dtype=dtype)
    x = given(case, dtype)
    for pick in (0, 1):
        plain = copy.deepcopy(sources[pick]).train(training)
        layer = replaced(case, sources, own=plain, init=[float(j == pick) for j in range(2)])
        with rl.use_backend("reference"):
            assert torch.equal(layer(x), plain(x))
        for name in STATISTICS:
            assert torch.equal(getattr(layer, name, x), getattr(plain, name, x))


def test_layer_norm_by_channel_of_a_plane_is_by_its_first_dimension() -> None:
    layer = replaced("LayerNorm of a plane", norms("LayerNorm of a plane"), granularity="channel")
    assert layer.coefficients.shape == (2, 3)


@KINDS
def test_state_dict_keys_of_mixed(case: str) -> None:
    layer = replaced(case, norms(case))
    statistics = [f"{name}" for name in STATISTICS] if case in BATCH_CASES else []
    assert list(layer.state_dict()) == [*statistics, "mixing.coefficients"]
    assert [name for name, _ in layer.named_parameters()] == ["mixing.coefficients"]


@KINDS
def test_shared_coefficients_and_detach(case: str) -> None:
    shared = Coefficients(torch.tensor([0.3, 0.7], dtype=torch.float64))
    layer = replaced(case, norms(case), init=None, coefficients=shared, detach=[0])
    assert list(layer.parameters()) == []
    assert_as_by_hand(layer, given(case))
    layer(given(case)).square().sum().backward()
    assert layer.sources[0].weight.grad is None
    assert layer.sources[1].weight.grad is not None
    assert shared.coefficients.grad is not None


@KINDS
def test_fit_takes_weight_and_bias(case: str) -> None:
    sources = norms(case)
    own = norms(case, 3)[2]
    with torch.no_grad():
        own.weight.copy_(0.3 * sources[0].weight + 0.6 * sources[1].weight)
        own.bias.copy_(0.3 * sources[0].bias + 0.6 * sources[1].bias)
    expected = torch.tensor([0.3, 0.6], dtype=torch.float64)
    torch.testing.assert_close(replaced(case, sources, own=own, init="fit").coefficients.detach(), expected)
    with torch.no_grad():
        own.bias.add_(1.0)
    assert not torch.allclose(replaced(case, sources, own=own, init="fit").coefficients.detach(), expected)


def test_fit_without_bias() -> None:
    sources = norms("LayerNorm", 3, bias=False)
    layer = replaced("LayerNorm", sources[:2], own=sources[2], init="fit")
    assert bool(torch.isfinite(layer.coefficients).all())


@KINDS
def test_rebind(case: str) -> None:
    layer = replaced(case, norms(case))
    others = norms(case, 4)[2:]
    layer.rebind(*others)
    assert layer.sources == tuple(others)
    assert_as_by_hand(layer, given(case))


# Own affine parameters.


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_own_affine_is_the_plain_layer(case: str, bias: bool, training: bool) -> None:
    *sources, own = norms(case, 3, bias=bias)
    plain = copy.deepcopy(own).train(training)
    layer = replaced(case, sources, own=own.train(training), affine="own")
    x = given(case)
    for _ in range(2):
        leaves = {"x": x, "weight": layer.weight, **({"bias": layer.bias} if bias else {})}
        plain_leaves = {"x": x, "weight": plain.weight, **({"bias": plain.bias} if bias else {})}
        found, expected = results(layer, leaves, [x]), results(plain, plain_leaves, [x])
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    # Copies, not the plain layer's own.
    with torch.no_grad():
        own.weight.zero_()
    assert bool(layer.weight.any())


@KINDS
def test_own_affine_starts_fresh_without_own(case: str) -> None:
    layer = replaced(case, norms(case), affine="own")
    assert bool((layer.weight == 1).all())
    assert not layer.bias.any()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.weight.dtype == torch.float64
    plain = norms(case, 1)[0]
    plain.reset_parameters()
    x = given(case)
    assert torch.equal(layer(x), plain(x))


def test_own_affine_learns_casts_and_loads() -> None:
    layer = replaced("BatchNorm2d", norms("BatchNorm2d"), affine="own")
    before = layer.weight.detach().clone()
    x = given("BatchNorm2d")
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.weight, before)
    assert layer.sources[0].weight.grad is None
    again = replaced("BatchNorm2d", norms("BatchNorm2d"), affine="own")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    again.load_state_dict(norms("BatchNorm2d", 3)[2].state_dict())
    assert torch.equal(again.weight, norms("BatchNorm2d", 3)[2].weight)
    assert again.half().weight.dtype == torch.float16
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)
    layer.weight = nn.Parameter(torch.zeros(6))
    assert not layer.weight.any()


def test_own_affine_keeps_what_is_frozen() -> None:
    *sources, own = norms("LayerNorm", 3)
    own.weight.requires_grad_(False)
    layer = replaced("LayerNorm", sources, own=own, affine="own")
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


@pytest.mark.parametrize("options", [{}, {"coefficients": Coefficients(torch.ones(2))}], ids=["own", "shared"])
def test_own_affine_has_no_coefficients(options: dict[str, Any]) -> None:
    layer = replaced("LayerNorm", norms("LayerNorm"), affine="own", **options)
    for name in ("coefficients", "coefficient_module", "a", "b"):
        assert not hasattr(layer, name)
    assert "affine='own', sources=2" in repr(layer)


def test_mixed_affine_cannot_be_set() -> None:
    layer = replaced("LayerNorm", norms("LayerNorm"))
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(6))


# Running statistics.


@BATCH_KINDS
@pytest.mark.parametrize("momentum", [0.1, 0.7, None], ids=str)
def test_running_statistics_are_torchs(case: str, momentum: float | None) -> None:
    own = norms(case, 3, momentum=momentum)[2]
    layer = replaced(case, norms(case), own=own)
    plain = set_affine(copy.deepcopy(own), layer)
    for step in range(4):
        layer.train(step < 3)
        plain.train(step < 3)
        x = given(case).detach() * (step + 1)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
        for name in STATISTICS:
            assert torch.equal(getattr(layer, name), getattr(plain, name)), name
    assert int(layer.num_batches_tracked) == 6
    # Copies, not the plain layer's own; and the sources' are theirs.
    assert int(own.num_batches_tracked) == int(layer.sources[0].num_batches_tracked) == 3


@BATCH_KINDS
def test_running_statistics_are_fresh_without_own(case: str) -> None:
    layer = replaced(case, norms(case))
    assert not layer.running_mean.any()
    assert bool((layer.running_var == 1).all())
    assert layer.num_batches_tracked.dtype == torch.long
    assert int(layer.num_batches_tracked) == 0
    assert layer.running_mean.dtype == torch.float64


@pytest.mark.parametrize("given_own", [True, False], ids=["own", "first source"])
def test_without_running_statistics(given_own: bool) -> None:
    sources = norms("BatchNorm2d", 3, track_running_stats=False)
    own = sources[2] if given_own else None
    layer = replaced("BatchNorm2d", norms("BatchNorm2d") if given_own else sources[:2], own=own)
    plain = set_affine(copy.deepcopy(sources[2]), layer)
    assert list(layer.state_dict()) == ["mixing.coefficients"]
    x = given("BatchNorm2d")
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    layer.reset_running_stats()


def test_statistics_that_are_no_longer_tracked() -> None:
    """Switched off on a layer that has some: training reads and writes none, evaluation reads them."""
    own = norms("BatchNorm2d", 3)[2]
    own.track_running_stats = False
    layer = replaced("BatchNorm2d", norms("BatchNorm2d"), own=own)
    plain = set_affine(copy.deepcopy(own), layer)
    x = given("BatchNorm2d")
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
        assert torch.equal(layer.running_mean, own.running_mean)
        assert int(layer.num_batches_tracked) == 3


def test_reset_running_stats() -> None:
    layer = replaced("BatchNorm2d", norms("BatchNorm2d"), own=norms("BatchNorm2d", 1)[0])
    assert bool(layer.running_mean.any())
    layer.reset_running_stats()
    fresh = replaced("BatchNorm2d", norms("BatchNorm2d"))
    for name in STATISTICS:
        assert torch.equal(getattr(layer, name), getattr(fresh, name))


def test_statistics_keep_their_dtype() -> None:
    *sources, own = norms("BatchNorm2d", 3, torch.bfloat16)
    own.running_mean, own.running_var = own.running_mean.float(), own.running_var.float()
    layer = replaced("BatchNorm2d", sources, own=own)
    assert layer.running_mean.dtype == layer.merged().running_mean.dtype == torch.float32
    assert layer.half().running_mean.dtype == torch.float16
    assert layer.half().num_batches_tracked.dtype == torch.long


def test_checkpoints_older_than_the_batch_count_load() -> None:
    state = replaced("BatchNorm2d", norms("BatchNorm2d"), own=norms("BatchNorm2d", 1)[0]).state_dict()
    old = {name: value for name, value in state.items() if name != "num_batches_tracked"}
    layer = replaced("BatchNorm2d", norms("BatchNorm2d"))
    layer.load_state_dict(old)
    assert torch.equal(layer.running_mean, state["running_mean"])
    assert int(layer.num_batches_tracked) == 0
    state.pop("num_batches_tracked")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer.load_state_dict(state)


def test_settings_are_those_of_own_or_of_the_first_source() -> None:
    own = norms("BatchNorm2d", 1, eps=0.25, momentum=0.5)[0]
    layer = replaced("BatchNorm2d", norms("BatchNorm2d"), own=own)
    assert (layer.eps, layer.momentum, layer.num_features, layer.affine) == (0.25, 0.5, 6, True)
    layer = replaced("BatchNorm2d", [own, *norms("BatchNorm2d", 1)])
    assert (layer.eps, layer.momentum) == (0.25, 0.5)
    layer = replaced("LayerNorm", norms("LayerNorm"), own=norms("LayerNorm", 1, eps=0.25)[0])
    assert (layer.eps, layer.normalized_shape, layer.elementwise_affine) == (0.25, (6,), True)
    own = nn.GroupNorm(2, 6, eps=0.25).double()
    layer = replaced("GroupNorm", norms("GroupNorm"), own=own)
    assert (layer.eps, layer.num_groups, layer.num_channels, layer.affine) == (0.25, 2, 6, True)
    assert_as_by_hand(layer, given("GroupNorm"), plain=own)


# merged.


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("affine", ["mixed", "own"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_merged(case: str, affine: Any, bias: bool, training: bool) -> None:
    *sources, own = norms(case, 3, bias=bias, eps=0.125)
    layer = replaced(case, sources, own=own.train(training), affine=affine)
    merged = layer.merged()
    assert type(merged) is getattr(nn, CASES[case][0])
    assert merged.training == training
    assert merged.eps == 0.125
    assert (merged.bias is None) == (not bias)
    x = given(case)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-12)
    for name in STATISTICS if case in BATCH_CASES else ():
        assert torch.equal(getattr(merged, name), getattr(layer, name))
        assert getattr(merged, name) is not getattr(layer, name)


@pytest.mark.parametrize("settings", [{"momentum": None}, {"track_running_stats": False}], ids=str)
def test_merged_batch_norm_keeps_its_settings(settings: dict[str, Any]) -> None:
    layer = replaced("BatchNorm2d", norms("BatchNorm2d", **settings))
    merged = layer.merged()
    assert isinstance(merged, nn.BatchNorm2d)
    assert merged.momentum == layer.momentum
    assert (merged.running_mean is None) == (layer.running_mean is None)
    x = given("BatchNorm2d")
    for _ in range(2):
        torch.testing.assert_close(merged(x), layer(x))
    torch.testing.assert_close(merged.eval()(x), layer.eval()(x))


# Errors.


@pytest.mark.parametrize("affine", ["mixed", "own"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "GroupNorm"])
def test_sources_without_affine_parameters(name: str, affine: Any) -> None:
    switch = {"elementwise_affine" if name == "LayerNorm" else "affine": False}
    bare = getattr(nn, name)(*CASES[name][1], **switch).double()
    for sources, own, named in (
        ([bare, bare], None, r"sources\[0\]"),
        ([norms(name)[0], bare], None, r"sources\[1\]"),
        (norms(name), bare, "own"),
    ):
        with pytest.raises(ValueError, match=f"{named}: got {name} without affine parameters, expected a weight"):
            replaced(name, sources, own=own, affine=affine)


def test_unknown_affine() -> None:
    with pytest.raises(ValueError, match="affine: got 'none', expected one of mixed, own"):
        replaced("LayerNorm", norms("LayerNorm"), affine="none")


@pytest.mark.parametrize(
    ("case", "shape", "expected"),
    [
        ("BatchNorm1d", (6,), "2 or 3"),
        ("BatchNorm1d", (2, 6, 3, 3), "2 or 3"),
        ("BatchNorm2d", (2, 6, 3), "4"),
        ("BatchNorm3d", (2, 6, 3, 3), "5"),
    ],
    ids=str,
)
def test_input_dimensions(case: str, shape: tuple[int, ...], expected: str) -> None:
    layer = replaced(case, norms(case))
    with pytest.raises(ValueError, match=rf"x: got shape \({shape[0]},.*\), expected {expected} dimensions"):
        layer(torch.randn(*shape, dtype=torch.float64))
    assert int(layer.num_batches_tracked) == 0


def test_one_value_a_channel_cannot_train() -> None:
    layer = replaced("BatchNorm1d", norms("BatchNorm1d"))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 6, dtype=torch.float64))


def test_sources_of_another_kind_or_size() -> None:
    with pytest.raises(TypeError, match=r"sources\[0\]: got BatchNorm1d, expected BatchNorm2d"):
        ReplacementBatchNorm2d(norms("BatchNorm1d"))
    with pytest.raises(ValueError, match=r"sources\[1\]: got bias \(7,\), expected \(6,\)"):
        ReplacementLayerNorm((nn.LayerNorm(6), nn.LayerNorm(7)))


@KINDS
def test_repr(case: str) -> None:
    text = repr(replaced(case, norms(case)))
    assert text.startswith(f"Replacement{CASES[case][0]}(")
    assert "eps=1e-05, affine='mixed', sources=2, granularity='scalar'" in text


@pytest.mark.parametrize("case", ["BatchNorm2d", "LayerNorm", "GroupNorm"])
@pytest.mark.parametrize("affine", ["mixed", "own"])
def test_compiles_in_one_graph(case: str, affine: Any) -> None:
    layer = replaced(case, norms(case), affine=affine)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = given(case)
    torch.testing.assert_close(compiled(x), plain(x))
    parameters = list(layer.parameters())
    found = torch.autograd.grad(compiled(x).pow(3).sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(layer(x).pow(3).sum(), parameters))
