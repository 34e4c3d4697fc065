"""The layers on which kernels are qualified: odd ones to check them on, and a grid of usual ones to time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_kernels.ops.mix import accumulate_dtype
from rl_kernels.ops.shapes import conv_output_size
from rl_kernels.ops.values import Call, Geometry, Outer, Recipe, Wanted


@dataclass(frozen=True)
class Problem:
    """A layer, and what goes through it.

    Attributes:
        batch: tokens of a linear layer, images of a convolution.
        out: features, or channels a group.
        within: the same of the input.
        kernel: a convolution's; empty for a linear layer.
        size: of an image.
        groups: of a convolution, as are the three that follow.
        stride: in every direction.
        padding: in every direction.
        dilation: in every direction.
        sources: how many are mixed.
        per_channel: whether each output channel has coefficients of its own.
        biased: whether there are biases.
        layout: ``"contiguous"``; ``"channels_last"``, of the activation and the sources; or ``"sliced"``, the
            activation being every other element of a wider tensor.
        halved: whether the sources are float32 under a half-precision activation, as autocast leaves them.
        wanted: the gradients of parameters that are asked for: ``"all"``, ``"last"`` (the last source's and bias's),
            ``"coefficients"`` or ``"biases"``.
        rank: of ``Outer`` coefficients; 0 of others.
    """

    batch: int
    out: int
    within: int
    kernel: tuple[int, ...] = ()
    size: tuple[int, ...] = ()
    groups: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    sources: int = 2
    per_channel: bool = False
    biased: bool = True
    layout: str = "contiguous"
    halved: bool = False
    wanted: str = "all"
    rank: int = 0

    def __str__(self) -> str:
        usual = Problem(0, 0, 0)
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(usual, name)]
        return " ".join(changed).replace("'", "")

    @property
    def multiplications(self) -> int:
        """Of the product, a padded convolution's border included."""
        pixels = math.prod(size // self.stride for size in self.size)
        return self.batch * pixels * self.out * self.groups * self.within * math.prod(self.kernel)


LINEAR_CHECKS = (
    Problem(13, 26, 257),
    Problem(257, 257, 26),
    Problem(257, 13, 257),
    Problem(26, 257, 257, per_channel=True),
    Problem(257, 257, 13, biased=False),
    Problem(26, 257, 13, sources=1, per_channel=True),
    Problem(13, 1, 257, sources=3),
    Problem(26, 13, 1, sources=4, per_channel=True),
    Problem(1, 257, 257, sources=4),
    Problem(0, 13, 26),
    Problem(257, 26, 257, layout="sliced"),
    Problem(26, 257, 26, wanted="last"),
    Problem(26, 26, 257, wanted="coefficients", per_channel=True),
    Problem(257, 26, 13, wanted="biases"),
    Problem(26, 257, 257, halved=True),
    Problem(26, 257, 257, rank=4),
    Problem(257, 26, 13, sources=1, rank=16, wanted="coefficients"),
)
CONV_CHECKS = (
    Problem(2, 13, 26, (3, 3), (13, 9), padding=1),
    Problem(3, 26, 13, (3, 3), (13, 8), stride=2, padding=1, layout="channels_last"),
    Problem(2, 13, 13, (3, 2), (9, 13), groups=2, dilation=2, padding=2),
    Problem(2, 13, 26, (3, 3), (13, 8), stride=2, padding=1, per_channel=True, layout="channels_last"),
    Problem(3, 13, 13, (3, 2), (9, 13), groups=2, dilation=2, padding=2, biased=False),
    Problem(1, 257, 26, (1, 1), (5, 13), layout="channels_last"),
    Problem(2, 26, 257, (1, 1), (13, 5), stride=2, sources=1, per_channel=True),
    Problem(2, 1, 1, (7, 7), (13, 13), groups=26, padding=3),
    Problem(2, 1, 1, (3, 3), (13, 9), groups=37, stride=2, padding=1, sources=3, layout="channels_last"),
    Problem(2, 2, 1, (3, 3), (9, 9), groups=13, dilation=2, per_channel=True),
    Problem(2, 13, 1, (5, 5), (13, 26), stride=3, sources=4),
    Problem(2, 4, 4, (3, 3), (9, 13), groups=13, stride=2, padding=1, per_channel=True, layout="channels_last"),
    Problem(2, 26, 13, (3,), (257,), padding=1),
    Problem(1, 13, 13, (2, 3, 1), (4, 5, 3), stride=2, padding=1, layout="channels_last"),
    Problem(0, 13, 26, (3, 3), (9, 9), padding=1),
    Problem(2, 26, 13, (3, 3), (13, 9), padding=1, layout="sliced"),
    Problem(2, 13, 26, (3, 3), (9, 9), padding=1, wanted="last"),
    Problem(2, 26, 26, (3, 3), (9, 9), padding=1, wanted="coefficients", per_channel=True),
    Problem(2, 26, 13, (3, 3), (9, 9), stride=2, wanted="biases"),
    Problem(2, 13, 26, (3, 3), (9, 13), padding=1, halved=True),
    Problem(2, 26, 26, (3, 3), (13, 9), stride=2, padding=1, rank=4, layout="channels_last"),
    Problem(2, 13, 26, (3, 2), (9, 13), groups=2, padding=1, sources=1, rank=16),
    Problem(2, 1, 1, (3, 3), (13, 9), groups=37, padding=1, rank=3, layout="channels_last"),
    Problem(1, 257, 26, (1, 1), (5, 13), rank=2, layout="channels_last", wanted="coefficients"),
)

TOKENS = (1, 8, 64, 512, 4096)
LINEAR_LAYERS = ((768, 768), (768, 3072), (4096, 4096))
CONV_LAYERS = (
    Problem(1, 64, 64, (3, 3), (56, 56), padding=1),
    Problem(1, 64, 64, (3, 3), (56, 56), stride=2, padding=1),
    Problem(1, 4, 4, (3, 3), (28, 28), groups=32, padding=1),
    Problem(1, 4, 4, (3, 3), (56, 56), groups=32, stride=2, padding=1),
    Problem(1, 1, 1, (7, 7), (56, 56), groups=96, padding=3),
    Problem(1, 1, 1, (3, 3), (56, 56), groups=96, stride=2, padding=1),
    Problem(1, 256, 64, (1, 1), (56, 56)),
    Problem(1, 512, 256, (1, 1), (28, 28), stride=2),
    Problem(1, 256, 256, (3, 3), (14, 14), padding=1),
    Problem(1, 512, 512, (3, 3), (7, 7), padding=1),
    Problem(1, 16, 16, (3, 3), (14, 14), groups=32, padding=1),
    Problem(1, 1, 1, (7, 7), (14, 14), groups=384, padding=3),
    Problem(1, 64, 3, (7, 7), (112, 112), stride=2, padding=3),
    Problem(1, 16, 16, (3, 3), (28, 28), groups=32, stride=2, padding=1),
)
"""One image of a layer of ResNet, ResNeXt or ConvNeXt; the first six are one of each kind."""
IMAGES = {"cpu": (2,), "cuda": (2, 64)}
CPU_MULTIPLICATIONS = 1 << 31
"""The largest product that is timed on a CPU."""


def checks(op: str) -> tuple[Problem, ...]:
    """Odd shapes; the first three are alike in all for which Triton compiles a kernel anew, sizes aside."""
    return LINEAR_CHECKS if "linear" in op else CONV_CHECKS


def grid(op: str, device: str, quick: bool) -> list[Problem]:
    """The layers on which ``op`` is timed on a type of device."""
    if "linear" in op:
        found = [Problem(tokens, *layer) for layer in LINEAR_LAYERS for tokens in TOKENS]
    else:
        found = [
            Problem(**{**vars(layer), "batch": images, "layout": layout})
            for images in IMAGES[device]
            for layout in ("contiguous", "channels_last")
            for layer in CONV_LAYERS[: 6 if quick else None]
        ]
    if device == "cpu":
        found = [problem for problem in found if problem.multiplications <= CPU_MULTIPLICATIONS]
    return found[::3] if quick and "linear" in op else found


def make_call(problem: Problem, op: str, dtype: torch.dtype, device: torch.device) -> Call:
    """A call of ``op`` with random arguments, the same every time."""
    make = _Maker(problem, dtype, device)
    recipe, geometry = make.recipe(), None
    out, within = problem.out * problem.groups, problem.within * problem.groups
    x_shape, y_shape = (problem.batch, within, *problem.size), [problem.batch, out]
    if problem.kernel:
        spatial = len(problem.kernel)
        geometry = Geometry(
            [problem.stride] * spatial, [problem.padding] * spatial, [problem.dilation] * spatial, problem.groups
        )
        y_shape += conv_output_size(problem.size, problem.kernel, geometry)
    if op.endswith("dgrad"):
        dy = make.activation(y_shape)
        return Call(op, dy, recipe._replace(biases=None), geometry, input_size=[*x_shape] if geometry else None)
    x = make.activation(x_shape)
    if not op.endswith("wgrad"):
        return Call(op, x, recipe, geometry)
    return Call(op, make.activation(y_shape), recipe, geometry, x=x, wanted=_wanted(problem))


class _Maker:
    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device):
        self.problem, self.dtype, self.device = problem, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def recipe(self) -> Recipe:
        problem = self.problem
        stored = torch.float32 if problem.halved else self.dtype
        out = problem.out * problem.groups
        scale = 1 / math.sqrt(max(1, problem.within * math.prod(problem.kernel)))
        shape = (out, problem.within, *problem.kernel)
        weights = [self.random(shape, stored) * scale for _ in range(problem.sources)]
        if problem.layout == "channels_last":
            weights = [self.laid_out(weight) for weight in weights]
        biases = [self.random((out,), stored) for _ in range(problem.sources)] if problem.biased else None
        mixing = accumulate_dtype(stored)
        if problem.rank:
            sizes = (out, math.prod(shape[1:]))
            parts = (self.random((problem.sources, problem.rank, size), mixing) for size in sizes)
            return Recipe(weights, Outer(*parts).joined(), biases)
        per_source = (out,) if problem.per_channel else ()
        return Recipe(weights, self.random((problem.sources, *per_source), mixing), biases)

    def activation(self, shape: Sequence[int]) -> Tensor:
        return self.laid_out(self.random(shape, self.dtype))

    def laid_out(self, value: Tensor) -> Tensor:
        if self.problem.layout == "sliced":
            return value.repeat_interleave(2, -1)[..., ::2]
        if self.problem.layout == "channels_last":
            return value.to(memory_format=torch.channels_last if value.dim() == 4 else torch.channels_last_3d)
        return value


def _wanted(problem: Problem) -> Wanted:
    everything, last = problem.wanted == "all", problem.wanted == "last"
    ends = [False] * (problem.sources - 1) + [last]
    return Wanted(
        [everything or end for end in ends],
        everything or problem.wanted == "coefficients",
        [everything or problem.wanted == "biases" or end for end in ends] if problem.biased else [],
    )
