"""The CUDA kernels for few tokens, executed, against the products of the mixed weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels.backends.gpu.heuristics import cdiv
from tests.emulated.backend import Edit, emulated, multiply
from tests.emulated.exact import assert_near, mixed, operand
from tests.emulated.machine.memory import Fault


class Problem:
    """One product: activation (tokens, reduction), and sources (out, in)."""

    def __init__(
        self,
        tokens: int,
        features: int,
        reduction: int,
        dtype: torch.dtype,
        transposed: bool = False,
        sources: int = 2,
        per_channel: bool = False,
        bias: bool = False,
        rows: str = "contiguous",
    ):
        shape = (reduction, features) if transposed else (features, reduction)
        self.transposed = transposed
        first = "padded" if rows == "uneven" else rows
        self.weights = [self.made(*shape, dtype=dtype, rows=rows if j else first) for j in range(sources)]
        self.biases = [torch.randn(shape[0]).to(dtype) for _ in range(sources)] if bias and not transposed else None
        self.coefficients = torch.randn((sources, shape[0]) if per_channel else (sources,))
        self.activation = self.made(tokens, reduction, dtype=dtype, rows=first)
        self.out = self.made(tokens, features, dtype=dtype, rows=rows).fill_(torch.nan)

    @staticmethod
    def made(count: int, columns: int, dtype: torch.dtype, rows: str) -> Tensor:
        if rows == "padded":  # aligned, with something after each row
            return torch.randn(count, cdiv(columns, 8) * 8 + 8).to(dtype)[:, :columns]
        if rows in ("apart", "uneven"):  # neither aligned nor contiguous
            return torch.randn(count, 2 * columns + 3).to(dtype)[:, 1 : 2 * columns + 1 : 2]
        return torch.randn(count, columns).to(dtype)

    def run(self, splits: int = 1, seed: int = 0, edit: Edit | None = None) -> Tensor:
        """The result, by the kernel that serves the problem."""
        recipe = self.weights, self.coefficients, self.biases
        with emulated(seed, edit=edit) as launched:
            multiply(self.out, self.activation, recipe, self.transposed, None, skinny_splits=splits)
        assert launched[0].startswith("skinny")
        return self.out

    @property
    def expected(self) -> Tensor:
        weight = operand(mixed(self.weights, self.coefficients))
        out = operand(self.activation) @ (weight if self.transposed else weight.t())
        return out if self.biases is None else out + mixed(self.biases, self.coefficients).double()


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.thinned(4)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "reduction", "dtype", "rows", "splits", "options"),
    [
        (1, 40, 1096, BF16, "contiguous", 1, {}),  # every kind of span, and lanes without features
        (16, 72, 1568, BF16, "contiguous", 3, {}),
        (6, 36, 92, BF16, "padded", 1, {}),
        (13, 24, 1048, BF16, "contiguous", 3, {"sources": 4, "bias": True}),
        (8, 37, 101, BF16, "contiguous", 1, {"bias": True}),
        (3, 72, 531, F16, "contiguous", 1, {"sources": 3, "per_channel": True, "bias": True}),
        (9, 35, 75, F16, "apart", 1, {}),
        (4, 20, 196, F16, "uneven", 1, {}),
        (15, 44, 1000, F16, "padded", 1, {"sources": 1}),
        (7, 33, 70, F32, "contiguous", 1, {"sources": 1, "per_channel": True}),
        (16, 36, 300, F32, "contiguous", 1, {"bias": True}),
        (5, 21, 799, F32, "apart", 1, {}),
        (12, 46, 90, F32, "padded", 1, {"sources": 2, "per_channel": True}),
    ],
)
def test_skinny(
    tokens: int,
    features: int,
    reduction: int,
    dtype: torch.dtype,
    rows: str,
    splits: int,
    options: dict[str, Any],
    transposed: bool,
) -> None:
    problem = Problem(tokens, features, reduction, dtype, transposed, rows=rows, **options)
    assert_near(problem.run(splits, seed=tokens), problem.expected)


def infinite(transposed: bool, edit: Edit | None = None) -> None:
    """An infinite coefficient makes everything infinite, and nothing nan."""
    problem = Problem(3, 20, 75, F32, transposed)
    for tensor in (*problem.weights, problem.activation):
        tensor.abs_().add_(0.5)
    problem.coefficients.copy_(torch.tensor([torch.inf, 1.0]))
    assert (problem.run(edit=edit) == torch.inf).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_infinite_coefficients(transposed: bool) -> None:
    infinite(transposed)


def test_repeats() -> None:
    """The result has the same bits, in whatever order warps and blocks run."""
    problem = Problem(11, 40, 1100, F32)
    first = problem.run(splits=1, seed=1).clone()
    assert torch.equal(problem.run(splits=1, seed=2), first)


@pytest.mark.parametrize(
    ("old", "new", "caught"),
    [
        ("sum = {x < depth_ ? sum.x : 0.0f, y < depth_ ? sum.y : 0.0f};", "", AssertionError),
        ("  __syncthreads();\n", "", Fault),
        ("min(8 * across + lane_ / 4, p.pixels - 1)", "(8 * across + lane_ / 4)", Fault),
    ],
)
def test_planted_faults(old: str, new: str, caught: type[Exception]) -> None:
    with pytest.raises(caught):
        infinite(False, ("skinny.cuh", old, new))
