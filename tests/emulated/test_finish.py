"""The kernels that end a wgrad, executed: gradients of biases and coefficients, summed over many pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl_kernels.ops.values import Call
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import H100_FACTS, emulated
from tests.emulated.exact import assert_exact
from tests.emulated.machine.memory import Fault
from tests.emulated.problems import BF16, F16, TF32, call_of, execute

LINEAR, CONV = "mixed_linear_wgrad", "mixed_conv_wgrad"
ROWS = Problem(700, 300, 8)
"""More channels than one block sums, and rows for several splits."""


SMALL_DEVICE = (80, 1, 163 << 10)
"""Of one multiprocessor, so that one block goes over all pixels."""


def of_biases(op: str, problem: Problem, dtype: torch.dtype) -> Call:
    """A call that asks for the biases' gradients only, and so runs no product."""
    call = call_of(op, problem, dtype)
    assert call.wanted is not None
    return call._replace(wanted=call.wanted._replace(weights=[False] * problem.sources, coefficients=False))


def check(call: Call, **options: Any) -> list[str]:
    with emulated(**options) as launched:
        found = execute(call)
    assert_exact(call, found)
    return launched


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("op", "problem", "dtype"),
    [
        (LINEAR, ROWS, BF16),
        (LINEAR, Problem(130, 37, 8, sources=4, per_channel=True), F16),
        (LINEAR, Problem(140, 141, 8, sources=1, layout="sliced"), TF32),
        (LINEAR, Problem(1, 1, 1), BF16),
        (CONV, Problem(3, 24, 8, (3, 3), (9, 11), padding=1, layout="channels_last"), BF16),
        (CONV, Problem(2, 7, 5, (3,), (90,), groups=3, stride=2, per_channel=True), F16),
        (CONV, Problem(1, 9, 4, (1, 1, 1), (5, 6, 7)), TF32),
    ],
    ids=str,
)
def test_sums_over_pixels(op: str, problem: Problem, dtype: torch.dtype, seed: int) -> None:
    launched = check(of_biases(op, problem, dtype), seed=seed, facts=SMALL_DEVICE if seed else H100_FACTS)
    assert [name.rsplit("_", 1)[0] for name in launched] == ["finish_sums", "finish_gradients"]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_coefficients_of_many_parts(per_channel: bool, biased: bool) -> None:
    """More tiles of G than the last kernel has threads, or of a row; what it adds is given here."""
    call = call_of(LINEAR, Problem(3, 130, 200, per_channel=per_channel, biased=biased), BF16)
    assert call.wanted is not None
    launched = check(call._replace(wanted=call.wanted._replace(weights=[False] * 2)))
    assert launched[0].startswith("linear_wgrad") and launched[-1] == "finish_gradients_bf16"
    assert any(name.startswith("finish_sums") for name in launched) == biased


def test_cancelling_sums_keep_their_small_part() -> None:
    """What float32 alone would lose."""
    call = of_biases(LINEAR, Problem(384, 8, 8, sources=1), TF32)
    call.activation[:128], call.activation[128:256], call.activation[256:] = 2.0**24, 1.0, -(2.0**24)
    call.recipe.coefficients.fill_(1.0)
    with emulated():
        (bias,) = execute(call).biases
    assert bias.tolist() == [128.0] * 8


def test_no_tokens_and_no_features() -> None:
    for sizes in ((0, 5, 6), (5, 0, 6), (5, 6, 0)):
        check(call_of(LINEAR, Problem(*sizes), BF16))


def test_the_same_bits_in_any_order() -> None:
    call = call_of(LINEAR, Problem(200, 40, 24), BF16)
    found = []
    for seed in range(3):
        with emulated(seed):
            _, dcoefficients, dbiases = execute(call)
        found.append([dcoefficients, *dbiases])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


FAULTS = {
    "barrier of the sums removed": ("__syncthreads();\n    for (int column", "for (int column"),
    "barrier of the totals removed": ("__syncthreads(); // what is added was written", ";"),
    "pixels past the split's": ("if (pixel >= end || inside == 0)", "if (inside == 0)"),
    "pixels left out": ("pixel += WARPS * AT_ONCE", "pixel += WARPS * AT_ONCE * 2"),
    "channels past the last": ("max(0, min(E::IN_CHUNK, p.channels - channel))", "E::IN_CHUNK"),
    "a split left out": ("split < p.splits", "split + 1 < p.splits"),
    "the wrong source's bias": ("sum_of(p, channel) * bias(p, j, channel)", "sum_of(p, channel) * bias(p, 0, channel)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    edit = ("finish.cuh", *FAULTS[fault])
    biases, many = (of_biases(LINEAR, Problem(tokens, 37, 8), BF16) for tokens in (140, 300))
    coefficients = call_of(LINEAR, Problem(140, 37, 8, wanted="coefficients"), BF16)
    with pytest.raises((Fault, AssertionError)):
        for seed in range(3):
            check(biases, seed=seed, edit=edit)
            check(many, seed=seed, edit=edit, facts=SMALL_DEVICE)
            check(coefficients, seed=seed, edit=edit)
