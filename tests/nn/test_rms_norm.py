"""ReplacementRMSNorm: what the tests of the other norms hold, for a norm without a bias, and whose eps may be None."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.nn import Coefficients, ReplacementRMSNorm
from tests.nn.common import assert_accurate, assert_as_by_hand, results

EPSILONS = pytest.mark.parametrize("eps", [None, 1e-3], ids=str)


def norms(n: int = 2, shape: Any = 6, dtype: torch.dtype = torch.float64, eps: float | None = None) -> list[Any]:
    torch.manual_seed(0)
    found = [nn.RMSNorm(shape, eps=eps, dtype=dtype) for _ in range(n)]
    for layer in found:
        nn.init.normal_(layer.weight)
    return found


def given(dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(4, 3, 6, dtype=dtype) * 2 + 1).requires_grad_()


def replaced(sources: list[Any], **options: Any) -> ReplacementRMSNorm:
    return ReplacementRMSNorm(sources, **{"init": (0.3, -0.9), **options})


@EPSILONS
@pytest.mark.parametrize("shape", [6, (3, 6)], ids=str)
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_as_by_hand(n: int, granularity: Any, shape: Any, eps: float | None) -> None:
    sources = norms(n, shape, eps=eps)
    init = torch.linspace(-0.7, 1.1, n) + 0.05
    if granularity == "channel":
        init = init[:, None] * torch.linspace(0.5, 1.5, sources[0].weight.shape[0])
    layer = replaced(sources, init=init, granularity=granularity)
    assert layer.coefficients.shape == init.shape
    assert_as_by_hand(layer, given())


def test_settings_are_those_of_own() -> None:
    (own,) = norms(1, eps=0.5)
    layer = replaced(norms(), own=own)
    assert layer.eps == 0.5 and replaced(norms()).eps is None
    assert_as_by_hand(layer, given(), plain=own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = replaced(norms(dtype=dtype))
    assert layer.coefficients.dtype == torch.float32
    assert layer(given(dtype)).dtype == dtype
    if dtype == torch.float32:
        assert_accurate(layer, given(dtype))
        return
    # Against the plain layer, since torch itself rounds on the way in half precision.
    (plain,) = norms(1, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x = given(dtype)
    assert torch.equal(layer(x), plain(x))


@EPSILONS
def test_a_source_alone_is_the_plain_layer_bit_for_bit(eps: float | None) -> None:
    sources, x = norms(dtype=torch.float32, eps=eps), given(torch.float32)
    for pick in (0, 1):
        layer = replaced(sources, init=[float(j == pick) for j in range(2)])
        assert torch.equal(layer(x), sources[pick](x))


@EPSILONS
@pytest.mark.parametrize("affine", ["mixed", "own"])
def test_merged(affine: Any, eps: float | None) -> None:
    *sources, own = norms(3, eps=eps)
    layer = ReplacementRMSNorm(sources, own=own, affine=affine).eval()
    merged, x = layer.merged(), given()
    assert type(merged) is nn.RMSNorm and not merged.training and merged.eps == eps
    assert layer.bias is None and merged.state_dict().keys() == own.state_dict().keys()
    torch.testing.assert_close(merged(x), layer(x))


def test_own_affine_is_the_plain_layer() -> None:
    *sources, own = norms(3)
    plain, x = copy.deepcopy(own), given()
    layer = ReplacementRMSNorm(sources, own=own, affine="own")
    found = results(layer, {"x": x, "weight": layer.weight}, [x])
    for name, value in results(plain, {"x": x, "weight": plain.weight}, [x]).items():
        assert torch.equal(found[name], value), name
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert not hasattr(layer, "coefficients")
    fresh = ReplacementRMSNorm(sources, affine="own")
    assert bool((fresh.weight == 1).all()) and [name for name, _ in fresh.named_parameters()] == ["weight"]
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


def test_fit_shared_coefficients_and_detach() -> None:
    *sources, own = norms(3)
    with torch.no_grad():
        own.weight.copy_(0.3 * sources[0].weight + 0.6 * sources[1].weight)
    fitted = replaced(sources, own=own, init="fit")
    torch.testing.assert_close(fitted.coefficients.detach(), torch.tensor([0.3, 0.6], dtype=torch.float64))
    shared = Coefficients(torch.tensor([0.3, 0.7], dtype=torch.float64))
    layer = replaced(sources, init=None, coefficients=shared, detach=[0])
    assert list(layer.parameters()) == []
    assert_as_by_hand(layer, given())


def test_without_a_weight() -> None:
    with pytest.raises(ValueError, match=r"sources\[0\]: got RMSNorm without affine parameters, expected a weight"):
        ReplacementRMSNorm([nn.RMSNorm(6, elementwise_affine=False)])
    assert "(6,), eps=None, affine='mixed', sources=2" in repr(replaced(norms()))


def test_planned_replaced_compiled_and_merged() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 6)) for _ in range(4)))
    rl.replace(model, rl.plan(model, every=2))
    assert [type(layer).__name__ for layer in model[1]] == ["ReplacementRMSNorm", "ReplacementLinear"]
    x = torch.randn(3, 6)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)
    torch.testing.assert_close(rl.merge(model)(x), y)
    assert type(model[1][0]) is nn.RMSNorm
