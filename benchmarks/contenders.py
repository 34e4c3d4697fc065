"""A rival on a problem, ready to be called, and whether what it computes is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems import COEFFICIENTS, Problem
from benchmarks.rivals import Given, Rival, premixed

FORWARD, BOTH, STEP = "forward", "forward+backward", "training step"

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative error in the 2-norm that one layer may have."""
TF32_TOLERANCE = 5e-3
# A few units of a million, switched, are some thousandths of a gradient's norm.
KINK_TOLERANCE = 1e-2


class Wrong(RuntimeError):
    """A rival computes something else; the message says what and by how much."""


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: of the rival.
        call: one call, everything included; gradients that the one before left behind are dropped first.
        release: drops them.
        context: in force while it runs, entered outside of the timing.
        returned_bytes: outputs and gradients asked for, which do not count as extra memory.
        sources: how many weights it has to read.
        check: raises Wrong where the results are not right, else returns the largest relative error, or None where
            there is nothing to compare with.
        facts: what else the record says of it, such as the number of parameters.
    """

    name: str
    call: Callable[[], Any]
    release: Callable[[], None] = lambda: None
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    returned_bytes: int = 0
    sources: int = 1
    check: Callable[[], float | None] = lambda: None
    facts: Callable[[], Mapping[str, int]] = field(default=dict)


def enter(rival: Rival, problem: Problem, mode: str, truth: Mapping[str, tuple[Tensor, Tensor | float]]) -> Contender:
    """Make a rival ready for ``"forward"`` (no gradients) or ``"forward+backward"`` (all of them, each time new)."""
    given = Given(problem, training=mode == BOTH)
    with rival.context():
        forward = rival.make(given)

    def compare(output: Tensor) -> float:
        found = {"output": output} | (canonical(given) if mode == BOTH else {})
        return largest_error(found, truth, tolerance(problem))

    leaves = list(given.leaves.values())
    return ready(rival.name, forward, leaves, problem.gradient, mode, rival.context, compare, rival.sources)


def ready(
    name: str,
    forward: Callable[[], Tensor],
    leaves: Sequence[nn.Parameter],
    gradient: Tensor,
    mode: str,
    within: Callable[[], AbstractContextManager[None]],
    compare: Callable[[Tensor], float],
    sources: int,
) -> Contender:
    """Make a forward ready for a mode: with backward all gradients of ``leaves`` are asked for.

    ``within`` is in force while it runs; ``compare`` takes an output, whose gradients the leaves then have.
    """

    def release() -> None:
        for leaf in leaves:
            leaf.grad = None

    def training() -> Tensor:
        release()
        output = forward()
        output.backward(gradient)
        return output

    @contextmanager
    def context() -> Iterator[None]:
        # Entered outside of the timing: entering no_grad takes as long as a small layer.
        with within(), torch.set_grad_enabled(mode == BOTH):
            yield

    call = training if mode == BOTH else forward
    returned = gradient.nbytes + (sum(leaf.nbytes for leaf in leaves) if mode == BOTH else 0)
    return Contender(name, call, release, context, returned, sources, lambda: compare(call()))


def canonical(given: Given) -> dict[str, Tensor]:
    """A rival's gradients by the names that all share: of x, of every source's parameter, of the two coefficients.

    The ceiling has one weight: its gradient G is c_j*G for a source, and <G, W_j> for a coefficient.
    """
    gradients = {}
    for name, leaf in given.leaves.items():
        if leaf.grad is None:
            raise Wrong(f"no gradient of {name}")
        gradients[name] = leaf.grad
    if {"a", "b"} <= gradients.keys():
        gradients["coefficients"] = torch.stack([gradients.pop("a"), gradients.pop("b")])
    if any(name.startswith("mixed.") for name in gradients):
        names = given.problem.names
        mixed = [gradients.pop(f"mixed.{name}") for name in names]
        for prefix, c in zip(("previous", "following"), COEFFICIENTS, strict=True):
            gradients |= {f"{prefix}.{name}": c * g for name, g in zip(names, mixed, strict=True)}
        gradients["coefficients"] = torch.stack(
            [
                sum((_dot(g, w) for g, w in zip(mixed, source, strict=True)), start=torch.zeros(()))
                for source in given.problem.sources
            ]
        )
    return gradients


def _dot(g: Tensor, w: Tensor) -> Tensor:
    return (g.double() * w.double()).sum().cpu()


def true_results(problem: Problem, mode: str) -> dict[str, tuple[Tensor, Tensor | float]]:
    """The plain layer's output and gradients in float32 at least, each with the size that errors are measured by.

    That size is the 2-norm; and for a coefficient's gradient, a sum that may cancel, the root of the sum of the squared
    terms where that is more.
    """
    wide = torch.promote_types(problem.x.dtype, torch.float32)
    x = problem.x.detach().to(wide).requires_grad_(mode == BOTH)
    mixed = [p.to(wide).requires_grad_(mode == BOTH) for p in premixed(problem)]
    output = problem.plain(x, mixed)
    truth: dict[str, tuple[Tensor, Tensor | float]] = {"output": _with_norm(output.detach())}
    if mode == FORWARD:
        return truth
    gx, *gs = torch.autograd.grad(output, [x, *mixed], problem.gradient.to(wide))
    truth["x"] = _with_norm(gx)
    sums, spreads = [], []
    for prefix, c, source in zip(("previous", "following"), COEFFICIENTS, problem.sources, strict=True):
        truth |= {f"{prefix}.{name}": _with_norm(c * g) for name, g in zip(problem.names, gs, strict=True)}
        terms = [(g.double() * w.double()).flatten() for g, w in zip(gs, source, strict=True)]
        sums.append(sum(float(t.sum()) for t in terms))
        spreads.append(math.sqrt(sum(float(t.square().sum()) for t in terms)))
    coefficients = torch.tensor(sums, dtype=torch.float64)
    truth["coefficients"] = coefficients, torch.maximum(coefficients.abs(), torch.tensor(spreads, dtype=torch.float64))
    return truth


def _with_norm(tensor: Tensor) -> tuple[Tensor, float]:
    return tensor, float(tensor.double().norm())


def tolerance(problem: Problem) -> float:
    """The relative error allowed, in the 2-norm."""
    switches = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    tf32 = problem.x.is_cuda and problem.x.dtype == torch.float32 and switches
    rounding = problem.depth * (TF32_TOLERANCE if tf32 else TOLERANCE[problem.x.dtype])
    return max(rounding, KINK_TOLERANCE) if problem.kinks else rounding


def largest_error(
    found: Mapping[str, Tensor], truth: Mapping[str, tuple[Tensor, Tensor | float]], allowed: float
) -> float:
    """The largest relative error among ``found``.

    Raises:
        Wrong: one is above ``allowed``, is not finite, is missing or is too many.
    """
    if found.keys() != truth.keys():
        raise Wrong(f"results: got {', '.join(found)}, expected {', '.join(truth)}")
    worst = 0.0
    for name, value in found.items():
        expected, size = truth[name]
        difference = value.detach().to(expected.device).double() - expected.double()
        if isinstance(size, Tensor):  # One number an element.
            error = float((difference.abs() / size.clamp_min(1e-30)).max())
        else:
            error = float(difference.norm()) / max(size, 1e-30)
        if not error <= allowed:  # NaN is wrong as well.
            raise Wrong(f"{name}: relative error {error:.2g}, expected at most {allowed:.2g}")
        worst = max(worst, error)
    return worst
