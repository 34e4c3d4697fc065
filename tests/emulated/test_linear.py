"""The CUDA kernels of the linear ops, executed, against products of what they multiply in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rl_kernels.backends.cuda import configs
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import emulated
from tests.emulated.exact import assert_exact
from tests.emulated.problems import BF16, F16, SMALL, TF32, call_of, execute, run

OPS = ("mixed_linear", "mixed_linear_dgrad", "mixed_linear_wgrad")


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """Linear layers multiply float32 as TF32 where they are told to."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.thinned(4)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        (Problem(70, 72, 96), BF16),  # copies of 16 bytes, masked
        (Problem(33, 45, 37), F16),  # element by element
        (Problem(20, 68, 60, sources=3, per_channel=True), TF32),
        (Problem(65, 24, 80, sources=1, per_channel=True, biased=False), BF16),
        (Problem(17, 40, 72, sources=4), F16),
        (Problem(40, 65, 33, sources=1), TF32),
        (Problem(19, 40, 48, layout="sliced"), BF16),
        (Problem(1, 1, 1), BF16),
    ],
    ids=str,
)
def test_odd_shapes_and_recipes(op: str, problem: Problem, dtype: torch.dtype) -> None:
    run(op, problem, dtype)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stages", configs.STAGES)
@pytest.mark.parametrize("late", [False, True, None])
def test_every_number_of_stages(op: str, stages: int, late: bool | None) -> None:
    for seed, splits in ((0, 1), (1, 3)):
        problem = Problem(168, 40, 48) if op.endswith("wgrad") else Problem(24, 48 if "dgrad" not in op else 168, 168)
        run(op, problem, BF16, SMALL._replace(stages=stages), splits, seed=seed, late=late)


@pytest.mark.parametrize(("splits", "dtype"), [(2, TF32), (5, BF16)])
@pytest.mark.parametrize("op", OPS)
def test_split_sums(op: str, splits: int, dtype: torch.dtype) -> None:
    sizes = {"mixed_linear": (12, 24, 161), "mixed_linear_dgrad": (12, 161, 24), "mixed_linear_wgrad": (161, 12, 24)}
    launched = run(op, Problem(*sizes[op], per_channel=splits == 5), dtype, splits=splits)
    products = [name for name in launched if not name.startswith("finish")]
    assert len(products) == 2 and "reduce" in products[1]
    assert len(launched) == (4 if op.endswith("wgrad") else 2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("config", [config for config in (*configs.PRODUCTS, *configs.WGRADS) if config.rows > 64])
def test_large_tiles(op: str, config: Config) -> None:
    if config in (configs.WGRADS if op.endswith("wgrad") else configs.PRODUCTS):
        run(op, Problem(72, 136, 40) if op.endswith("wgrad") else Problem(260, 72, 72), BF16, config, late=True)
        run(op, Problem(33, 70, 40), TF32, config, late=None)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("tokens", "kernel"), [(3, "skinny"), (17, "linear")])
def test_as_chosen(op: str, tokens: int, kernel: str) -> None:
    call = call_of(op, Problem(tokens, 70, 600), BF16)
    with emulated() as launched:
        found = execute(call)
    assert_exact(call, found)
    assert launched[0].startswith("linear_wgrad" if op.endswith("wgrad") else f"{kernel}_")


@pytest.mark.parametrize("op", OPS)
def test_one_coefficient_expanded_to_all_channels(op: str) -> None:
    """Their stride is 0, and each has a gradient of its own."""
    call = call_of(op, Problem(12, 20, 24, per_channel=True), BF16)
    call = call._replace(recipe=call.recipe._replace(coefficients=call.recipe.coefficients[:, :1].expand(-1, 20)))
    with use_config(SMALL), emulated():
        found = execute(call)
    assert_exact(call, found)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sizes", [(0, 5, 6), (5, 0, 6), (5, 6, 0)])
def test_nothing(op: str, sizes: tuple[int, int, int]) -> None:
    run(op, Problem(*sizes), BF16)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("op", OPS[:2])
def test_infinite_coefficients_stay_in_their_place(op: str, per_channel: bool) -> None:
    call = call_of(op, Problem(9, 20, 37, per_channel=per_channel, biased=False), BF16)
    for tensor in (call.activation, *call.recipe.weights):
        tensor.abs_().add_(0.1)
    call.recipe.coefficients.abs_()[0] = torch.inf
    with use_config(SMALL), emulated():
        found = execute(call)
    assert found.isposinf().all(), "what lies past the sum's end is 0, and not 0 * inf"


def rows_with_padding(op: str, **options: Any) -> None:
    """Rows that begin where 16 bytes may be copied and do not end there, and NaN between them."""
    call = call_of(op, Problem(9, 21, 37), BF16)

    def padded(value: torch.Tensor) -> torch.Tensor:
        wide = torch.full((value.shape[0], 48), torch.nan, dtype=value.dtype)
        wide[:, : value.shape[1]] = value
        return wide[:, : value.shape[1]]

    recipe = call.recipe._replace(weights=[padded(weight) for weight in call.recipe.weights])
    x = None if call.x is None else padded(call.x)
    call = call._replace(activation=padded(call.activation), recipe=recipe, x=x)
    with use_config(SMALL), emulated(**options):
        found = execute(call)
    assert_exact(call, found)


@pytest.mark.parametrize("op", OPS)
def test_rows_with_padding(op: str) -> None:
    rows_with_padding(op)


def infinite_gradient(op: str, **options: Any) -> None:
    """An infinity in the last token stays in its output channel."""
    call = call_of(op, Problem(20, 16, 24, biased=False), BF16)
    assert call.x is not None
    call.activation[-1, 3] = torch.inf
    call.x.abs_().add_(0.1)
    with use_config(SMALL), emulated(**options):
        dweights, _, _ = execute(call)
    assert all(gradient[3].isinf().all() and gradient[:3].isfinite().all() for gradient in dweights)


def test_infinite_gradient() -> None:
    infinite_gradient(OPS[2])


def test_the_same_bits_in_any_order() -> None:
    call = call_of(OPS[2], Problem(70, 72, 96), BF16)
    results = []
    for seed, late in ((0, False), (1, True), (2, None)):
        with use_config(SMALL, 2), emulated(seed, late):
            dweights, dcoefficients, _ = execute(call)
        results.append([*dweights, dcoefficients])
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))
