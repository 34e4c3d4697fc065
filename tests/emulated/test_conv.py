"""The CUDA kernels of the convolutions, executed, against products of what they multiply in float64."""

from __future__ import annotations

import pytest
import torch

from rl_kernels.backends.cuda import configs
from rl_kernels.backends.gpu.heuristics import Config
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import emulated
from tests.emulated.exact import assert_exact
from tests.emulated.problems import BF16, F16, SMALL, TF32, call_of, execute, run

OPS = ("mixed_conv", "mixed_conv_dgrad", "mixed_conv_wgrad")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        (Problem(2, 40, 32, (3, 3), (5, 6), padding=1, layout="channels_last"), BF16),
        (Problem(2, 24, 24, (3, 3), (5, 6), stride=2, padding=1, layout="channels_last"), BF16),
        (Problem(2, 12, 20, (3, 3), (5, 6), padding=1, layout="channels_last"), TF32),
        (Problem(2, 9, 7, (3, 3), (5, 6), padding=1), BF16),
        (Problem(2, 16, 16, (3, 2), (6, 7), groups=2, dilation=2, padding=2, layout="channels_last"), F16),
        (Problem(2, 16, 24, (3, 3), (6, 5), groups=3, stride=2, padding=1, per_channel=True, sources=3), BF16),
        (Problem(1, 40, 16, (1, 1), (5, 6), layout="channels_last"), BF16),
        (Problem(1, 16, 20, (1, 1), (5, 6), stride=2, sources=1, per_channel=True), TF32),
        (Problem(2, 24, 16, (4,), (9,), stride=3, padding=2), F16),
        (Problem(1, 16, 8, (2, 3, 1), (4, 5, 3), padding=1, layout="channels_last", sources=4), BF16),
        (Problem(1, 8, 8, (3, 3, 3), (3, 4, 3), stride=2, padding=1, groups=2, layout="channels_last"), F16),
        (Problem(2, 1, 1, (3, 3), (4, 5), groups=5, padding=1), BF16),
        (Problem(1, 16, 16, (3, 3), (2, 2), dilation=3, padding=3, layout="channels_last"), BF16),
        (Problem(2, 16, 16, (3, 3), (5, 6), padding=1, layout="sliced"), BF16),
    ],
    ids=str,
)
def test_odd_shapes_and_recipes(op: str, problem: Problem, dtype: torch.dtype) -> None:
    run(op, problem, dtype)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stages", configs.STAGES)
@pytest.mark.parametrize("late", [False, True])
def test_every_number_of_stages(op: str, stages: int, late: bool) -> None:
    problem = Problem(3, 24, 24, (3, 3), (7, 8), padding=1, layout="channels_last")
    run(op, problem, BF16, SMALL._replace(stages=stages), 1 + 2 * late, seed=stages, late=late)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("config", [config for config in (*configs.PRODUCTS, *configs.WGRADS) if config.rows > 64])
def test_large_tiles(op: str, config: Config) -> None:
    if config in (configs.WGRADS if op.endswith("wgrad") else configs.PRODUCTS):
        problem = Problem(2, 72, 16, (3, 1), (6, 12), padding=1, per_channel=True, layout="channels_last")
        run(op, problem, BF16, config, late=True)


@pytest.mark.parametrize("op", OPS[:2])
def test_few_channels_as_chosen(op: str) -> None:
    """On a device so small that there are pixels enough for it."""
    problem = Problem(2, 24, 24, (3, 3), (16, 15), padding=1, layout="channels_last")
    call = call_of(op, problem, BF16)
    with emulated(facts=(80, 1, 60 << 10)) as launched:
        found = execute(call)
    assert_exact(call, found)
    assert [name.split("_")[0] for name in launched] == ["resident"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(0, 8, 8, (3, 3), (5, 6), padding=1),
        Problem(2, 8, 8, (1, 1), (5, 6), stride=3, padding=2, layout="channels_last"),  # pixels that no tap meets
    ],
    ids=str,
)
def test_nothing(op: str, problem: Problem) -> None:
    run(op, problem, BF16)
