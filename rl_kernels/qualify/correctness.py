"""Whether a backend's kernels are right on this machine: odd shapes, every gradient, every configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends import Backend, Case, reference
from rl_kernels.backends.gpu.operands import TF32, arithmetic
from rl_kernels.ops.values import Call
from rl_kernels.qualify.problems import Problem, checks, grid, make_call
from rl_kernels.testing import compare, poisoned

FORCED_PROBLEMS = 3
"""On how many of the odd shapes every further configuration is checked."""

Into = Sequence[Tensor | None]


class Trial(NamedTuple):
    """One layer in one configuration of a kernel."""

    problem: Problem
    name: str
    context: Callable[[], AbstractContextManager[Any]]


def trials_of(backend: Backend, case: Case) -> list[Trial]:
    """All odd shapes and some that are timed as the kernel runs by itself, then a few in every other configuration."""
    (usual, *forced), problems = backend.variants(case.op, case.dtype), checks(case.op)
    half = case.dtype in (torch.bfloat16, torch.float16)
    large = grid(case.op, case.device, quick=True)  # A kernel may choose otherwise where there is much to do.
    found = [Trial(problem, *usual) for problem in (*problems, *large) if half or not problem.halved]
    return found + [Trial(problem, *variant) for variant in forced for problem in problems[:FORCED_PROBLEMS]]


def check(backend: Backend, trial: Trial, case: Case, device: torch.device) -> list[str]:
    """Hold one call against the float64 reference, and two runs against each other; what is wrong, in words.

    What the backend says of its kernels' machine code comes first: a race need not show in a run.
    Where the backend's wgrads add to what is there, the same call is made so too.
    """
    call = make_call(trial.problem, case.op, case.dtype, device)
    if backend.why_not_call(call) is not None:
        return []
    run, plain, truth = backend.kernel(case.op), _run_reference(call), _run_reference(_doubled(call))
    # Every result is multilinear: on squared arguments it sums the squares of the products that it sums here.
    squares = _run_reference(_doubled(call, squared=True))
    spread = {name: value.sqrt() for name, value in squares.items()}
    into = _into(call) if backend.accumulates and call.wanted is not None else None
    with trial.context(), poisoned(deterministic=False), backend.watched() as unsafe:
        found, again = (_named(run(*call.operands)) for _ in range(2))
        if into is not None:
            added, added_again = (_run_into(run, call, into) for _ in range(2))
            found, again = found | added, again | added_again
    if into is not None:
        for j, buffer in enumerate(into):
            if buffer is not None:
                name, gradient = f"into[{j}]", f"dweights[{j}]"
                plain[name] = (buffer + plain[gradient]).to(buffer.dtype)
                truth[name] = buffer.double() + truth[gradient]
                spread[name] = (buffer.double().square() + squares[gradient]).sqrt()
    tf32 = device.type == "cuda" and arithmetic(case.dtype, call.geometry is not None) == TF32
    rows = compare(found, plain, truth, spread, case.dtype, tf32=tf32)
    wrong = [str(row) for row in rows if not row.passes]
    wrong = unsafe + wrong
    return wrong + [
        f"{name}: two runs differ in their bits"
        for name, value in found.items()
        if not torch.equal(value.nan_to_num(), again[name].nan_to_num())
    ]


def failures(backend: Backend, trials: Iterable[Trial], case: Case, device: torch.device) -> Iterator[str]:
    """What is wrong, and where; one trial that raises does not end the others."""
    for trial in trials:
        try:
            wrong = check(backend, trial, case, device)
        except Exception as error:  # Whatever breaks is what is looked for.
            wrong = [in_a_line(error)]
        if wrong:
            yield f"{trial.name or 'default configuration'}, {trial.problem}: {'; '.join(wrong)}"


def in_a_line(error: Exception) -> str:
    """An error's class and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _into(call: Call) -> Into:
    """What the sources' gradients are added to: in the sources' dtype and, as main_grad, in float32, by turns."""
    assert call.wanted is not None
    generator = torch.Generator(call.activation.device).manual_seed(1)
    buffers: list[Tensor | None] = []
    for j, (weight, wanted) in enumerate(zip(call.recipe.weights, call.wanted.weights, strict=True)):
        values = torch.randn(weight.shape, generator=generator, device=weight.device)
        dtype = torch.float32 if j % 2 and weight.dtype != torch.float64 else weight.dtype
        buffers.append(torch.empty_like(weight, dtype=dtype).copy_(values) if wanted else None)
    return buffers


def _run_into(run: Callable[..., Any], call: Call, into: Into) -> dict[str, Tensor]:
    buffers = [None if buffer is None else buffer.clone() for buffer in into]
    run(*call.operands, into=buffers)
    return {f"into[{j}]": buffer for j, buffer in enumerate(buffers) if buffer is not None}


def _run_reference(call: Call) -> dict[str, Tensor]:
    return _named(reference.BACKEND.kernel(call.op)(*call.operands))


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"result": result}
    weights, coefficients, biases = result
    found = {f"dweights[{j}]": gradient for j, gradient in enumerate(weights)}
    return found | {"dcoefficients": coefficients} | {f"dbiases[{j}]": g for j, g in enumerate(biases)}


def _doubled(call: Call, squared: bool = False) -> Call:
    """The same call in float64."""

    def doubled(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double().square() if squared else value.double()
        return type(value)(map(doubled, value)) if isinstance(value, list | tuple) else value

    return Call.of(call.op, [doubled(argument) for argument in call.arguments()])
