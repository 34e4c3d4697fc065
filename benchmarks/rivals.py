"""Every way to run a layer on a mixed weight: one function each, on the same input, sources and coefficients.

A rival takes what it is :class:`Given` and returns a function without arguments that runs the layer. What it took that
way is what its gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rl_kernels as rl
from benchmarks.problems import COEFFICIENTS, Parameters, Problem

CEILING = "ceiling"
OURS = "rl_kernels"

Forward = Callable[[], Tensor]


class Given:
    """One rival's own leaves on a problem's tensors; the storage is shared, the gradients are not.

    Args:
        problem: whose tensors.
        training: whether gradients will be asked for.
    """

    def __init__(self, problem: Problem, training: bool) -> None:
        self.problem, self.training = problem, training
        self.leaves: dict[str, nn.Parameter] = {}
        """What was taken so far, by name."""

    def _leaf(self, name: str, value: Tensor) -> nn.Parameter:
        self.leaves[name] = nn.Parameter(value.detach(), requires_grad=self.training)
        return self.leaves[name]

    def _source(self, prefix: str, values: Parameters) -> list[nn.Parameter]:
        return [self._leaf(f"{prefix}.{name}", v) for name, v in zip(self.problem.names, values, strict=True)]

    def _number(self, j: int) -> Tensor:
        return torch.tensor(COEFFICIENTS[j], device=self.problem.x.device, dtype=self._mixing_dtype)

    @property
    def _mixing_dtype(self) -> torch.dtype:
        return torch.float64 if self.problem.x.dtype == torch.float64 else torch.float32

    @cached_property
    def x(self) -> nn.Parameter:
        """The input."""
        return self._leaf("x", self.problem.x)

    @cached_property
    def previous(self) -> list[nn.Parameter]:
        """The parameters of the previous neighbour."""
        return self._source("previous", self.problem.sources[0])

    @cached_property
    def following(self) -> list[nn.Parameter]:
        """The parameters of the next neighbour."""
        return self._source("following", self.problem.sources[1])

    @cached_property
    def a(self) -> nn.Parameter:
        """The previous neighbour's coefficient, 0-dimensional."""
        return self._leaf("a", self._number(0))

    @cached_property
    def b(self) -> nn.Parameter:
        """The next neighbour's coefficient, 0-dimensional."""
        return self._leaf("b", self._number(1))

    @cached_property
    def coefficients(self) -> nn.Parameter:
        """Both coefficients, ``(2,)``."""
        return self._leaf("coefficients", torch.stack([self._number(0), self._number(1)]))

    @cached_property
    def mixed(self) -> list[nn.Parameter]:
        """Parameters that were mixed before: what a plain layer owns."""
        return self._source("mixed", premixed(self.problem))


def premixed(problem: Problem) -> list[Tensor]:
    """The mixed parameters, rounded once to the problem's dtype."""
    a, b = COEFFICIENTS
    pairs = zip(*problem.sources, strict=True)
    wide = torch.promote_types(problem.x.dtype, torch.float32)
    return [(a * p.to(wide) + b * q.to(wide)).to(p.dtype) for p, q in pairs]


@dataclass(frozen=True)
class Rival:
    """One way to run the layer.

    Attributes:
        name: as in ``--rivals``.
        summary: what it does, in a line.
        make: given a problem's leaves, the function to time.
        sources: how many weights it has to read.
        context: in force while it runs.
    """

    name: str
    summary: str
    make: Callable[[Given], Forward]
    sources: int = 2
    context: Callable[[], AbstractContextManager[None]] = nullcontext


RIVALS: dict[str, Rival] = {}


def rival(
    name: str, summary: str, sources: int = 2
) -> Callable[[Callable[[Given], Forward]], Callable[[Given], Forward]]:
    """Register a rival by name, with its summary and the number of weights that it has to read."""

    def register(make: Callable[[Given], Forward]) -> Callable[[Given], Forward]:
        RIVALS[name] = Rival(name, summary, make, sources)
        return make

    return register


@rival(CEILING, "torch's own layer on a weight mixed before; its backward is a plain layer's", sources=1)
def ceiling(given: Given) -> Forward:
    """What no layer that mixes can be expected to beat."""
    return partial(given.problem.plain, given.x, given.mixed)


@rival("naive", "W = a*W1 + b*W2 in every call, eager autograd")
def naive(given: Given) -> Forward:
    """The paper's equation as written."""
    plain, x, a, b, previous, following = _taken(given)

    def forward() -> Tensor:
        return plain(x, [a * p + b * q for p, q in zip(previous, following, strict=True)])

    return forward


@rival("add", "torch.add(a*W1, W2, alpha=b); torch.addcmul where b is learned, which alpha cannot be")
def add(given: Given) -> Forward:
    """The naive mix in one temporary and one pass less."""
    plain, x, a, b, previous, following = _taken(given)
    alpha = COEFFICIENTS[1]

    def inference() -> Tensor:
        return plain(x, [torch.add(a * p, q, alpha=alpha) for p, q in zip(previous, following, strict=True)])

    def training() -> Tensor:
        return plain(x, [torch.addcmul(a * p, q, b) for p, q in zip(previous, following, strict=True)])

    return training if given.training else inference


@rival("compile", "torch.compile of naive; on a GPU with max-autotune")
def compiled(given: Given) -> Forward:
    """The naive mix, fused by inductor. Without CUDA graphs, which no other rival has."""
    mode = "max-autotune-no-cudagraphs" if given.problem.x.is_cuda else None
    plain, x, a, b, previous, following = _taken(given)

    def mix_and_run(x: Tensor, a: Tensor, b: Tensor, previous: list[Tensor], following: list[Tensor]) -> Tensor:
        return plain(x, [a * p + b * q for p, q in zip(previous, following, strict=True)])

    return partial(torch.compile(mix_and_run, mode=mode, dynamic=False), x, a, b, previous, following)


@rival("two_products", "a*(x@W1) + b*(x@W2): no mixed weight, twice the products")
def two_products(given: Given) -> Forward:
    """Linearity used the other way round."""
    return partial(given.problem.two_products, given.x, given.previous, given.following, given.a, given.b)


class _Mixture(nn.Module):
    """The parametrization ``a * own + b * neighbour``."""

    def __init__(self, neighbour: nn.Parameter, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.neighbour, self.a, self.b = neighbour, a, b

    def forward(self, own: Tensor) -> Tensor:
        return self.a * own + self.b * self.neighbour


class _Layer(nn.Module):
    """A layer with named parameters, for torch.nn.utils.parametrize."""

    def __init__(self, given: Given) -> None:
        super().__init__()
        self.plain = given.problem.plain
        self.names = [name.replace(".", "_") for name in given.problem.names]
        for name, value in zip(self.names, given.previous, strict=True):
            self.register_parameter(name, nn.Parameter(value, requires_grad=given.training))

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x, [getattr(self, name) for name in self.names])


@rival("parametrize", "torch.nn.utils.parametrize on the layer's parameters")
def parametrized(given: Given) -> Forward:
    """The mix as torch's own mechanism would have it."""
    layer = _Layer(given)
    for j, name in enumerate(layer.names):
        parametrize.register_parametrization(layer, name, _Mixture(given.following[j], given.a, given.b))
        own = layer.get_parameter(f"parametrizations.{name}.original")
        given.leaves[f"previous.{given.problem.names[j]}"] = own
    return partial(layer, given.x)


def ours(backend: str) -> Rival:
    """This package's layer on one backend (``"auto"`` for the one that it chooses)."""

    def make(given: Given) -> Forward:
        return partial(given.problem.mixed, given.x, given.previous, given.following, given.coefficients)

    return Rival(
        name_of(backend),
        f"the mix inside the product, backend {backend}",
        make,
        context=partial(rl.use_backend, backend),
    )


def name_of(backend: str) -> str:
    """How this package on a backend is called among the rivals."""
    return f"{OURS}[{backend}]"


def is_ours(name: str) -> bool:
    """Whether a rival's name is this package's."""
    return name.startswith(f"{OURS}[")


def chosen(names: list[str], backends: list[str]) -> Iterator[Rival]:
    """The ceiling first, then the rivals named, then this package on each backend."""
    yield RIVALS[CEILING]
    yield from (found for name, found in RIVALS.items() if name in names and name != CEILING)
    yield from (ours(backend) for backend in backends)


def _taken(
    given: Given,
) -> tuple[Callable[[Tensor, Parameters], Tensor], Tensor, Tensor, Tensor, Parameters, Parameters]:
    """What every rival that mixes takes."""
    return given.problem.plain, given.x, given.a, given.b, given.previous, given.following
