"""How a frozen kernel may be modulated; each way is the identity before it has learnt anything.

W is a kernel as a matrix ``(out, K)``, ``K = in / groups * taps``. The formulas are options: that of arXiv 2203.15297
could not be read. ``outer`` is near to KML (NeurIPS 2021) and AdAM (2022), ``gate`` to arXiv 2602.06245.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as aten
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rl_kernels.functional as F
from rl_kernels.nn.conv import padded
from rl_kernels.ops.mix import accumulate_dtype
from rl_kernels.ops.values import Outer

Kind = Literal["channel", "outer", "gate", "mixout", "mlp"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
"""What can be modulated: these very classes, since others may read a weight in ways of their own."""


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer that can be modulated is a convolution."""
    return isinstance(layer, CONVOLUTIONS)


class Modulator(nn.Module, ABC):
    """What a task has of its own of a layer: a change of its weight, and a bias where the layer has one.

    Args:
        layer: that is modulated; it is not held.
        rank: of what has one.
    """

    kind: ClassVar[Kind]
    convolutions_only: ClassVar[bool] = False

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__()
        given: Any = layer
        self.bias = None if given.bias is None else nn.Parameter(given.bias.detach().clone())

    @abstractmethod
    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """What ``layer`` computes, its weight modulated and with this bias."""

    @abstractmethod
    def weight_of(self, layer: nn.Module) -> Tensor:
        """The modulated weight as a whole, shaped as the layer's and in its dtype."""

    def bias_of(self, layer: nn.Module) -> Tensor | None:
        """The bias that goes with it."""
        return self.bias

    @property
    def rank(self) -> int | None:
        """Of what has one."""
        return None


class _Mixed(Modulator):
    """On the fused ops: one source and coefficients."""

    @abstractmethod
    def coefficients(self) -> Tensor | Outer: ...

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        given: Any = layer
        sources, biases = (given.weight,), None if self.bias is None else (self.bias,)
        if not is_convolution(layer):
            return F.mixed_linear(x, sources, self.coefficients(), biases)
        x, padding = padded(x, given)
        convolution: Any = (F.mixed_conv1d, F.mixed_conv2d, F.mixed_conv3d)[len(given.kernel_size) - 1]
        geometry = (given.stride, padding, given.dilation, given.groups)
        return convolution(x, sources, self.coefficients(), biases, *geometry)

    def weight_of(self, layer: nn.Module) -> Tensor:
        return F.mix((layer.weight,), self.coefficients())  # type: ignore[arg-type]


class Channel(_Mixed):
    """``(1 + scale_o) W``: ``out`` numbers a layer; the bias is scaled with it."""

    kind = "channel"

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__(layer, rank)
        weight: Any = layer.weight
        self.scale = nn.Parameter(weight.new_zeros(weight.shape[0], dtype=accumulate_dtype(weight.dtype)))

    def coefficients(self) -> Tensor:
        return (1 + self.scale).unsqueeze(0)

    def bias_of(self, layer: nn.Module) -> Tensor | None:
        return None if self.bias is None else F.mix((self.bias,), self.coefficients())


class OuterProduct(_Mixed):
    """``W * (1 + sum_r left_r right_r)``, elementwise, of rank R: ``R (out + K)`` numbers a layer."""

    kind = "outer"

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__(layer, rank)
        weight: Any = layer.weight
        out, columns = weight.shape[0], math.prod(weight.shape[1:])
        like = {"dtype": accumulate_dtype(weight.dtype), "device": weight.device}
        self.left = nn.Parameter(torch.zeros(rank, out, **like))
        self.right = nn.Parameter(torch.randn(rank, columns, **like) / math.sqrt(columns))

    def coefficients(self) -> Outer:
        # Of rank R + 1: the first term is the base itself.
        sides = (torch.cat((torch.ones_like(side[:1]), side)) for side in (self.left, self.right))
        return Outer(*(side.unsqueeze(0) for side in sides))

    @property
    def rank(self) -> int | None:
        return len(self.left)


class _Whole(Modulator):
    """In plain torch, by a weight that is made as a whole."""

    convolutions_only = True

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer._conv_forward(x, self.weight_of(layer), self.bias)  # type: ignore[operator]


class Gate(_Whole):
    """``W * (1 + C)``, C one number for each pair of channels: ``out * in / groups`` numbers a layer.

    Over the budget of 1.4 % by far, and weight-sized for 1x1 filters.
    """

    kind = "gate"

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__(layer, rank)
        weight: Any = layer.weight
        self.gate = nn.Parameter(weight.new_zeros(weight.shape[:2]))

    def weight_of(self, layer: nn.Module) -> Tensor:
        weight: Any = layer.weight
        return weight * (1 + self.gate.reshape(*self.gate.shape, *(1,) * (weight.dim() - 2)))


class MixOut(Modulator):
    """``(I + B A) W``: what the layer computes goes through a bottleneck of R channels, and is added.

    ``2 R out`` numbers a layer; of several groups each has a bottleneck of its own. The weight is never made: the plain
    layer runs, and two thin 1x1 ones behind it.
    """

    kind = "mixout"

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__(layer, rank)
        weight: Any = layer.weight
        groups = getattr(layer, "groups", 1)
        out = weight.shape[0] // groups
        self.down = nn.Parameter(weight.new_empty(groups * rank, out).normal_() / math.sqrt(out))
        self.up = nn.Parameter(weight.new_zeros(groups * out, rank))

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        given: Any = layer
        if not is_convolution(layer):
            y = aten.linear(x, given.weight)
            y = y + aten.linear(aten.linear(y, self.down), self.up)
            return y if self.bias is None else y + self.bias
        spatial = len(given.kernel_size)
        pointwise: Any = (aten.conv1d, aten.conv2d, aten.conv3d)[spatial - 1]
        down, up = (side.reshape(*side.shape, *(1,) * spatial) for side in (self.down, self.up))
        y = given._conv_forward(x, given.weight, None)
        return y + pointwise(pointwise(y, down, groups=given.groups), up, self.bias, groups=given.groups)

    def weight_of(self, layer: nn.Module) -> Tensor:
        weight: Any = layer.weight
        groups = getattr(layer, "groups", 1)
        rows, down, up = (each.unflatten(0, (groups, -1)) for each in (weight.flatten(1), self.down, self.up))
        return (rows + up @ (down @ rows)).reshape(weight.shape)

    @property
    def rank(self) -> int | None:
        return self.up.shape[1]


class Perceptron(_Whole):
    """``W + f(W)`` on the taps of each pair of channels, f a perceptron of one hidden layer, one a layer.

    ``2 taps h + h + taps`` numbers a layer, ``h`` = 64. Its hidden values are 64 / taps times as large as the weight,
    and are computed twice so as not to be kept.
    """

    kind = "mlp"
    HIDDEN = 64

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__(layer, rank)
        weight: Any = layer.weight
        taps = math.prod(weight.shape[2:])
        like = {"dtype": weight.dtype, "device": weight.device}
        self.hidden = nn.Linear(taps, self.HIDDEN, **like)
        self.out = nn.Linear(self.HIDDEN, taps, **like)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def weight_of(self, layer: nn.Module) -> Tensor:
        def changed(weight: Tensor) -> Tensor:
            planes = weight.flatten(2)
            return (planes + self.out(aten.gelu(self.hidden(planes)))).reshape(weight.shape)

        return checkpoint(changed, layer.weight, use_reentrant=False)


KINDS: dict[str, type[Modulator]] = {kind.kind: kind for kind in (Channel, OuterProduct, Gate, MixOut, Perceptron)}
"""Ways to modulate a kernel, by name."""
