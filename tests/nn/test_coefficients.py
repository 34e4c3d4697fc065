import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels.nn import Coefficients
from rl_kernels.nn.coefficients import fit, initial_coefficients


def objective(pairs: list[tuple[Tensor, list[Tensor]]], c: Tensor) -> float:
    return float(
        sum((own - sum(cj * w for cj, w in zip(c, sources, strict=True))).square().sum() for own, sources in pairs)
    )


def pair(*shape: int, n: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(*shape, dtype=dtype), [torch.randn(*shape, dtype=dtype) for _ in range(n)]


# The module.


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 5)], ids=str)
def test_free_coefficients_are_the_parameter(shape: tuple[int, ...]) -> None:
    initial = torch.randn(*shape)
    module = Coefficients(initial)
    assert module() is module.coefficients
    assert module.shape == shape
    assert torch.equal(module(), initial)
    assert module().data_ptr() != initial.data_ptr()
    assert [name for name, _ in module.named_parameters()] == ["coefficients"]


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 5)], ids=str)
def test_convex_coefficients_start_as_given_and_stay_convex(shape: tuple[int, ...]) -> None:
    initial = torch.rand(*shape).softmax(0)
    module = Coefficients(initial, "convex")
    assert module.shape == shape
    torch.testing.assert_close(module(), initial)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (module() - 2.0 * torch.eye(shape[0])[0].reshape(-1, *(1,) * (len(shape) - 1))).square().sum().backward()
        optimizer.step()
    assert bool((module() > 0).all())
    torch.testing.assert_close(module().sum(0), torch.ones(shape[1:]))
    assert bool((module()[0] > initial[0]).all())


def test_coefficients_of_a_graph_are_leaves() -> None:
    assert Coefficients(torch.ones(2, requires_grad=True) * 0.5).coefficients.is_leaf
    assert Coefficients(torch.ones(2, requires_grad=True) * 0.5, "convex").logits.is_leaf


@pytest.mark.parametrize("initial", [(1.5, -0.5), (0.0, 1.0), (0.6, 0.6)], ids=["negative", "zero", "sum"])
def test_what_is_not_convex(initial: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"init: got \[.*\], expected positive coefficients with sum 1 \(convex\)"):
        Coefficients(torch.tensor(initial), "convex")


def test_unknown_constraint() -> None:
    with pytest.raises(ValueError, match="constraint: got 'unit', expected one of free, convex"):
        Coefficients(torch.ones(2), "unit")  # type: ignore[arg-type]


def test_gradients_keep_their_precision_with_them() -> None:
    module = Coefficients(torch.tensor([0.3, 0.7]))
    module().square().sum().backward()
    module.half()
    assert module.coefficients.grad is not None
    assert module.coefficients.dtype == module.coefficients.grad.dtype == torch.float32


def test_a_cast_also_moves() -> None:
    module = Coefficients(torch.tensor([0.3, 0.7])).to(device="meta", dtype=torch.half)
    assert module.coefficients.is_meta
    assert module.coefficients.dtype == torch.float32


def test_repr() -> None:
    assert repr(Coefficients(torch.full((2,), 0.5), "convex")) == "Coefficients((2,), constraint='convex')"


def test_deepcopy() -> None:
    module = Coefficients(torch.tensor([0.3, 0.7]), "convex")
    assert torch.equal(copy.deepcopy(module)(), module())


# Initial values.


@pytest.mark.parametrize(
    ("init", "n", "out", "expected"),
    [
        (None, 2, None, [0.5, 0.5]),
        (None, 3, None, [1 / 3] * 3),
        (None, 2, 2, [[0.5, 0.5], [0.5, 0.5]]),
        ((0.3, -2.0), 2, None, [0.3, -2.0]),
        (torch.tensor([0.25, 1.0]), 2, None, [0.25, 1.0]),
        ((0.25, 1.0), 2, 3, [[0.25] * 3, [1.0] * 3]),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], 2, 3, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    ],
    ids=["half", "third", "channel half", "numbers", "tensor", "channel scalars", "channel values"],
)
def test_initial_coefficients(init: Any, n: int, out: int | None, expected: Any) -> None:
    found = initial_coefficients(init, n, out, "free", [])
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64))


def test_given_values_are_not_rounded_to_float32() -> None:
    assert initial_coefficients((0.1, 0.7), 2, None, "free", []).tolist() == [0.1, 0.7]


@pytest.mark.parametrize(
    ("init", "out", "message"),
    [
        ("fit", None, "init: got 'fit' without own=..., the plain layer whose weight is to be fitted"),
        ("mean", None, "init: got 'mean', expected 'fit', numbers or None"),
        ((1.0,), None, r"init: got shape \(1,\), expected \(2,\) or \(2,\)"),
        (torch.ones(2, 4), 3, r"init: got shape \(2, 4\), expected \(2, 3\) or \(2,\)"),
    ],
    ids=["nothing to fit", "word", "number", "channels"],
)
def test_wrong_init(init: Any, out: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initial_coefficients(init, 2, out, "free", [])


# The fit.


@pytest.mark.parametrize("shape", [(5,), (4, 6), (4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fit_recovers_an_exact_mix(shape: tuple[int, ...], n: int) -> None:
    _, sources = pair(*shape, n=n)
    c = torch.linspace(-1.0, 2.0, n, dtype=torch.float64) + 0.1
    own = sum(cj * w for cj, w in zip(c, sources, strict=True))
    torch.testing.assert_close(fit([(own, sources)]), c)


@pytest.mark.parametrize("convex", [False, True], ids=["free", "convex"])
def test_fit_of_weights_of_different_shapes_is_one_for_all(convex: bool) -> None:
    """The coefficients of a block serve all its layers."""
    pairs = [pair(4, 6), pair(7, 3), pair(5), pair(2, 3, 3, 3)]
    c = fit(pairs, convex=convex)
    best = objective(pairs, c)
    for step in (1e-3, -1e-3):
        moves = [(step, -step)] if convex else [(step, 0.0), (0.0, step)]
        for move in moves:
            assert objective(pairs, c + torch.tensor(move, dtype=torch.float64)) > best


def test_fit_by_channel_is_a_fit_of_each_row() -> None:
    first, second = pair(4, 6), pair(4, 3)
    c = fit([first, second], groups=4)
    assert c.shape == (2, 4)
    for row in range(4):
        rows = [(own[row : row + 1], [w[row : row + 1] for w in sources]) for own, sources in (first, second)]
        torch.testing.assert_close(c[:, row], fit(rows))


def test_fit_of_vectors_by_channel() -> None:
    """A norm has one weight and one bias a channel: two equations for two unknowns."""
    weight, bias = pair(5), pair(5)
    c = fit([weight, bias], groups=5)
    for own, sources in (weight, bias):
        torch.testing.assert_close(sum(cj * w for cj, w in zip(c, sources, strict=True)), own)


@pytest.mark.parametrize("n", [2, 3])
def test_convex_fit_is_the_best_on_a_grid(n: int) -> None:
    for trial in range(6):
        torch.manual_seed(trial)
        own, sources = pair(3, 4, n=n)
        if trial < 3:  # The best point inside, and not on an edge.
            own = 0.05 * own + sum(w / n for w in sources)
        c = fit([(own, sources)], convex=True)
        assert bool((c > 0).all())
        torch.testing.assert_close(c.sum(), torch.tensor(1.0, dtype=torch.float64))
        steps = torch.linspace(0, 1, 41, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(*[steps] * (n - 1), indexing="ij"), -1).reshape(-1, n - 1)
        grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
        least = min(objective([(own, sources)], point) for point in grid if float(point[-1]) >= -1e-12)
        # A coefficient at an edge is kept from 0, where it would never learn.
        assert objective([(own, sources)], c) <= least * 1.02


def test_convex_fit_at_an_edge_can_still_learn() -> None:
    source = torch.randn(3, 4)
    c = fit([(source, [source, -source])], convex=True)
    assert 0 < float(c[1]) < 0.01
    Coefficients(c, "convex")


def test_convex_fit_by_channel() -> None:
    own, sources = pair(4, 6)
    c = fit([(own, sources)], groups=4, convex=True)
    for row in range(4):
        alone = fit([(own[row : row + 1], [w[row : row + 1] for w in sources])], convex=True)
        torch.testing.assert_close(c[:, row], alone)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("convex", [False, True], ids=["free", "convex"])
def test_fit_of_equal_sources_shares_evenly(convex: bool, n: int) -> None:
    """As the layers of a fresh nn.TransformerEncoder are; rounding must not pick one of them."""
    for trial in range(8):
        torch.manual_seed(trial)
        source = torch.randn(3, 4, dtype=torch.float64)
        own = source + 0.3 * torch.randn(3, 4, dtype=torch.float64)
        c = fit([(own, [source] * n)], convex=convex)
        torch.testing.assert_close(c, c.mean().expand(n))
        assert not convex or float(c.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_fit_is_exact_in_any_dtype(dtype: torch.dtype) -> None:
    _, sources = pair(16, 16, dtype=dtype)
    own = 0.5 * sources[0] + 2.0 * sources[1]
    c = fit([(own, sources)])
    assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(c.double(), torch.tensor([0.5, 2.0], dtype=torch.float64), rtol=2e-3, atol=0)


def test_fit_leaves_no_graph() -> None:
    own, sources = pair(3, 4)
    for tensor in (own, *sources):
        tensor.requires_grad_()
    assert not fit([(own, sources)]).requires_grad
