"""Each option of an op turned on, for linear layers and convolutions alike: one that is taken and dropped is seen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels.backends.cuda import kernels
from rl_kernels.backends.gpu.heuristics import use_config
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call, Wanted
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import emulated
from tests.emulated.exact import assert_exact, assert_near, results
from tests.emulated.problems import BF16, SMALL, TF32, call_of, execute, run

WGRADS = ("mixed_linear_wgrad", "mixed_conv_wgrad")
INTO = {
    "returned": (None, None, None, None),
    "as sources": (BF16, BF16, BF16, BF16),
    "float32": (TF32, TF32, TF32, TF32),
    "mixed": (TF32, None, BF16, TF32),
}
"""The type of the buffer that each source's gradient is added to; None where it is returned."""


def problem_of(op: str, **options: Any) -> Problem:
    if "linear" in op:
        return Problem(40, 18, 24, **options)
    return Problem(2, 10, 16, (3, 3), (4, 5), padding=1, layout="channels_last", **options)


def wgrad_of(op: str, into: str = "mixed", **options: Any) -> Call:
    """A wgrad into buffers of something, all of whose gradients are wanted."""
    call = call_of(op, problem_of(op, **options), BF16)
    return call if into == "returned" else call._replace(into=buffers_for(call, INTO[into]))


def buffers_for(call: Call, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Buffers with something in them."""
    weights = zip(call.recipe.weights, dtypes, strict=False)
    return [None if dtype is None else torch.randn_like(weight, dtype=dtype) for weight, dtype in weights]


def assert_added(call: Call, splits: int = 1) -> None:
    """Gradients are added to what there is, or returned, or neither where they are not wanted."""
    assert call.wanted is not None
    into = call.into or [None] * len(call.recipe.weights)
    before = [None if buffer is None else buffer.clone() for buffer in into]
    with use_config(SMALL, splits), emulated() as launched:
        found = execute(call)
    products = [name for name in launched if not name.startswith("finish")]
    assert len(products) == call.wanted.product * (1 + (splits > 1)), "a product that nothing asked for"
    sums = [name for name in launched if name.startswith("finish_sums")]
    assert len(sums) == call.wanted.sums(call.recipe), "a sum that nothing asked for"
    whole = call._replace(wanted=Wanted([True] * len(into), call.wanted.coefficients, call.wanted.biases), into=None)
    expected = results(whole)
    for j, want in enumerate(call.wanted.weights):
        returned, buffer, old = found.weights[j], into[j], before[j]
        if buffer is None or old is None:
            assert_near(returned, expected[j] if want else torch.empty(0))
        elif want:
            assert returned is buffer, "an own tensor for what a buffer was given for"
            assert_near(buffer, old.double() + expected[j])
        else:
            assert torch.equal(buffer, old), "a buffer is written whose gradient is not wanted"
    rest = Wanted([False] * len(into), call.wanted.coefficients, call.wanted.biases)
    assert_exact(call._replace(wanted=rest, into=None), found)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sources", [1, 3, 4])
@pytest.mark.parametrize(("per_channel", "biased"), [(False, True), (True, False), (True, True)])
def test_recipes(op: str, sources: int, per_channel: bool, biased: bool) -> None:
    run(op, problem_of(op, sources=sources, per_channel=per_channel, biased=biased), BF16)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("op", WGRADS)
@pytest.mark.parametrize("into", INTO)
@pytest.mark.parametrize("sources", [1, 2, 4])
@pytest.mark.parametrize(("per_channel", "biased", "splits"), [(False, True, 1), (True, False, 2)])
def test_into(op: str, into: str, sources: int, per_channel: bool, biased: bool, splits: int) -> None:
    assert_added(wgrad_of(op, into, sources=sources, per_channel=per_channel, biased=biased), splits)


@pytest.mark.parametrize("op", WGRADS)
@pytest.mark.parametrize(("layout", "groups"), [("contiguous", 1), ("channels_last", 2)])
def test_into_buffers_element_by_element(op: str, layout: str, groups: int) -> None:
    """Rows that 16 bytes do not divide, or groups."""
    problem = (
        Problem(40, 18, 21)
        if "linear" in op
        else Problem(2, 16, 21, (3, 3), (5, 6), groups=groups, padding=1, layout=layout)
    )
    call = call_of(op, problem, BF16)
    for dtypes in ((BF16, TF32), (TF32, None)):
        assert_added(call._replace(into=buffers_for(call, dtypes)), splits=groups)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("op", WGRADS)
@pytest.mark.parametrize(
    ("number", "wanted"),
    [*enumerate((*flags, *[biases] * 2) for *flags, biases in itertools.product([False, True], repeat=4))],
)
def test_every_combination_of_gradients(op: str, number: int, wanted: tuple[bool, ...]) -> None:
    """With and without buffers, biases, and coefficients a channel, by turns."""
    options = (("returned", False), ("mixed", True), ("as sources", False))
    into, per_channel = options[number % len(options)]
    call = wgrad_of(op, into, per_channel=per_channel)
    assert_added(call._replace(wanted=Wanted(wanted[:2], wanted[2], wanted[3:])))
    if number in (6, 14):
        call = wgrad_of(op, "float32", biased=False)
        assert_added(call._replace(wanted=Wanted(wanted[:2], wanted[2], [])))


# What is dropped is seen.


class WithoutInto:
    """C++ for an op that drops ``into``."""

    def __init__(self, module: Any):
        self.module = module

    def wgrad(self, dy: Tensor, x: Tensor, recipe: Any, wanted: Any, geometry: Any, into: Any, settings: Any) -> Any:
        return self.module.wgrad(dy, x, recipe, wanted, geometry, None, settings)


class WithoutWanted(WithoutInto):
    """C++ for an op that computes all gradients of sources."""

    def wgrad(self, dy: Tensor, x: Tensor, recipe: Any, wanted: Any, geometry: Any, into: Any, settings: Any) -> Any:
        every = wanted._replace(weights=[True] * len(recipe.weights))
        return self.module.wgrad(dy, x, recipe, every, geometry, into, settings)


@pytest.mark.parametrize("op", WGRADS)
@pytest.mark.parametrize("fault", [WithoutInto, WithoutWanted])
def test_a_dropped_option_is_caught(op: str, fault: type[WithoutInto], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_C", fault(kernels._C))
    call = wgrad_of(op)
    with pytest.raises(AssertionError):
        assert_added(call._replace(wanted=Wanted([True, False], True, [True, True])))
