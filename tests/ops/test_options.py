"""Each option of a call turned on by itself, on every backend: one that is taken and dropped shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rl_kernels as rl
from rl_kernels.backends import Case, reference, registered, selection
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call, Wanted
from rl_kernels.qualify.problems import Problem, make_call

CPU = torch.device("cpu")
BASES = (
    Problem(7, 6, 5),
    Problem(2, 6, 4, (3, 3), (6, 5), padding=1),
    Problem(2, 1, 1, (3, 3), (6, 5), groups=6, padding=1),
    Problem(2, 6, 4, (1, 1), (6, 5)),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"sources": 1},
    {"sources": 4},
    {"per_channel": True},
    {"biased": False},
    {"layout": "sliced"},
    {"halved": True},
)
CONV_OPTIONS: tuple[dict[str, Any], ...] = (
    {"stride": 2},
    {"padding": 0},
    {"dilation": 2, "padding": 2},
    {"layout": "channels_last"},
)


def options_of(problem: Problem) -> list[Problem]:
    """The problem with each option turned on by itself."""
    options = OPTIONS + (CONV_OPTIONS if problem.kernel else ())
    return [Problem(**{**vars(problem), **option}) for option in options]


def name(problem: Problem) -> str:
    """As tests are selected by: ``-k linear``."""
    return f"{'conv' if problem.kernel else 'linear'} {problem}"


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results[0], results[1], *results[2]]


def check(call: Call, backend: str) -> None:
    """Every result, and every tensor that gradients were added to, is the reference's of float64 arguments."""
    before = [None if buffer is None else buffer.double() for buffer in call.into or ()]
    with rl.use_backend(backend):
        found = flat(selection.run(call))
    doubled = [_doubled(argument) for argument in call.arguments()]
    truth = flat(reference.BACKEND.kernel(call.op)(*Call.of(call.op, doubled).operands))
    for j, (buffer, old) in enumerate(zip(call.into or (), before, strict=True)):
        if buffer is not None and old is not None:
            assert found[j].numel() == 0, "what was added is returned as well"
            found[j], truth[j] = buffer, old + truth[j]
    for one, other in zip(found, truth, strict=True):
        # A float32 gradient of half-precision activations may be rounded as those on the way.
        half = torch.bfloat16 in (one.dtype, call.activation.dtype)
        tolerance = 2e-2 if half else 1e-4
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * 4)


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return [_doubled(entry) for entry in value] if isinstance(value, list | tuple) else value


def serving(op: str, dtype: torch.dtype) -> list[str]:
    case = Case(op, "cpu", dtype)
    return [backend.name for backend in registered() if op in backend.kernels and backend.why_not(case) is None]


@pytest.mark.parametrize("problem", [p for base in BASES for p in options_of(base)], ids=name)
@pytest.mark.parametrize("kind", ["", "_dgrad", "_wgrad"])
def test_each_option(problem: Problem, kind: str) -> None:
    op = ("mixed_conv" if problem.kernel else "mixed_linear") + kind
    dtype = torch.bfloat16 if problem.halved else torch.float32
    for backend in serving(op, dtype):
        check(make_call(problem, op, dtype, CPU), backend)


@pytest.mark.parametrize("problem", BASES, ids=name)
def test_each_gradient(problem: Problem) -> None:
    op = "mixed_conv_wgrad" if problem.kernel else "mixed_linear_wgrad"
    for backend in serving(op, torch.float32):
        for flags in itertools.product([False, True], repeat=5):
            wanted = Wanted([*flags[:2]], flags[2], [*flags[3:]])
            check(make_call(problem, op, torch.float32, CPU)._replace(wanted=wanted), backend)


@pytest.mark.parametrize("problem", BASES, ids=name)
@pytest.mark.parametrize("dtypes", [*itertools.product([None, torch.bfloat16, torch.float32], repeat=2)], ids=str)
def test_gradients_added_to_what_is_there(problem: Problem, dtypes: Sequence[torch.dtype | None]) -> None:
    """In the sources' dtype, in float32 as main_grad is, or returned; and not of a source that wants none."""
    op = "mixed_conv_wgrad" if problem.kernel else "mixed_linear_wgrad"
    for backend in serving(op, torch.bfloat16):
        call = make_call(problem, op, torch.bfloat16, CPU)
        into = [
            None if dtype is None else torch.randn_like(weight, dtype=dtype)
            for weight, dtype in zip(call.recipe.weights, dtypes, strict=True)
        ]
        check(call._replace(into=into), backend)


def test_every_op_is_turned_on_here() -> None:
    assert {*OPS} == {f"mixed_{layer}{kind}" for layer in ("linear", "conv") for kind in ("", "_dgrad", "_wgrad")}


def test_a_backend_that_accumulates_takes_into_in_every_wgrad() -> None:
    for backend in registered():
        for op in (op for op in backend.kernels if op.endswith("wgrad")):
            if backend.name == "triton" and backend.why_not(Case(op, "cuda", torch.float32)) not in (
                None,
                "interpreted (TRITON_INTERPRET=1), on CPUs only",
            ):
                continue  # It cannot be imported here.
            code = backend.kernel(op).__code__
            taken = "into" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            assert taken == backend.accumulates, f"{backend.name}: {op}"
