"""What the detector is built of: convolutions, C2f, SPPF, and the modules that GSO-YOLO adds to a YOLOv8.

The shapes of YOLOv8's parts are widely documented. Of GSO-YOLO (arXiv 2407.00906) the paper itself could not be read.
That its Global Optimization Module is the attention GAM (arXiv 2112.05561), before SPPF, and that its Steady Capture
Module smooths by a moving average, after SPPF, is known at second hand; what is smoothed is not: ``SCMS`` are options.

All take and return ``(B, channels, H, W)``, in the dtype of their weights, or in half of it under autocast.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import rl_kernels.functional as F
from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.systems.local.auxiliary import Balance

SCM = Literal["off", "feature", "weights", "attention"]
SCMS: tuple[SCM, ...] = get_args(SCM)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """YOLOv8's: torch's, with an epsilon of 1e-3 and a momentum of 0.03."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


class ConvNormAct(nn.Module):
    """``silu(norm(conv(x)))``, without a bias, padded to keep the size but for the stride.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: odd.
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = batch_norm(out_channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with or without a skip.

    Args:
        channels: of the input and the output.
        width: between the convolutions; None for as many.
        shortcut: add the input.
    """

    def __init__(self, channels: int, width: int | None = None, shortcut: bool = True) -> None:
        super().__init__()
        width = channels if width is None else width
        self.conv1 = ConvNormAct(channels, width, 3)
        self.conv2 = ConvNormAct(width, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """A 1x1 convolution, split in halves; bottlenecks one after the other on the last; all of it fused by a 1x1.

    Args:
        in_channels: of the input.
        out_channels: of the output, even: a bottleneck has half of them.
        depth: number of bottlenecks.
        shortcut: of the bottlenecks.
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, shortcut: bool = True) -> None:
        super().__init__()
        at_least("depth", depth, 1)
        if out_channels % 2:
            raise ValueError(f"out_channels: got {out_channels}, expected an even number")
        self.hidden = out_channels // 2
        self.split = ConvNormAct(in_channels, 2 * self.hidden)
        self.blocks = nn.ModuleList(Bottleneck(self.hidden, shortcut=shortcut) for _ in range(depth))
        self.fuse = ConvNormAct((2 + depth) * self.hidden, out_channels)

    def lengthen(self, parameters: int) -> None:
        """Add bottlenecks with a skip that have, with their part of the last convolution, about so many parameters.

        They are equal; their width between the convolutions is what comes nearest. The last convolution is made anew.
        """
        out_channels = self.fuse.conv.out_channels
        fused = self.hidden * out_channels
        wanted = max(1, round(parameters / (18 * self.hidden**2 + 4 * self.hidden + fused)))
        width = max(1, round((parameters / wanted - fused - 2 * self.hidden) / (18 * self.hidden + 2)))
        self.blocks.extend(Bottleneck(self.hidden, width) for _ in range(wanted))
        self.fuse = ConvNormAct((2 + len(self.blocks)) * self.hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.fuse(torch.cat(parts, 1))


class SPPF(nn.Module):
    """A 1x1 convolution to half the channels, three equal max-poolings in a row, and a 1x1 convolution of all four.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: of the poolings, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 5) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.reduce = ConvNormAct(in_channels, hidden)
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)
        self.fuse = ConvNormAct(4 * hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.fuse(torch.cat(parts, 1))


class GAM(nn.Module):
    """Global attention (arXiv 2112.05561), as it is commonly coded: a gate of channels, then one of places.

    The first is a perceptron ``C -> C/4 -> C`` at every pixel, without pooling; the second two 7x7 convolutions over
    the same widths, with batch norms. Each ends in a sigmoid that its input is multiplied by.

    Args:
        channels: C, a multiple of 4.
        groups: of the two 7x7 convolutions, which have 24.5 C^2 weights together by GAM, with 1; an option of ours.
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        at_least("groups", groups, 1)
        if channels % 4 or (channels // 4) % groups:
            fitting = f"channels that are a multiple of {4 * groups}, four times the groups"
            raise ValueError(f"channels, groups: got {channels} and {groups}, expected {fitting}")
        inner = channels // 4
        self.of_channels = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.ReLU(inplace=True), nn.Conv2d(inner, channels, 1), nn.Sigmoid()
        )
        self.of_places = nn.Sequential(
            nn.Conv2d(channels, inner, 7, padding=3, groups=groups, bias=False), batch_norm(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 7, padding=3, groups=groups, bias=False), batch_norm(channels),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.of_channels(x)
        return x * self.of_places(x)


class SteadyFeatures(nn.Module):
    """SCM ``"feature"``: ``y = a x + (1 - a) s``, s the moving average of each channel's mean, a learned.

    In training ``s <- m s + (1 - m) mean(x)`` comes first, without a gradient. Otherwise it is an affine map of each
    channel, which the next convolution could absorb (:meth:`affine`): expect no effect of it.

    Args:
        channels: of x.
        momentum: m.
        start: a at first; it stays between 0 and 1.
    """

    steady: Tensor

    def __init__(self, channels: int, momentum: float = 0.99, start: float = 0.9) -> None:
        super().__init__()
        for name, value in (("momentum", momentum), ("start", start)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: got {value}, expected more than 0 and less than 1")
        self.momentum = momentum
        self.logit = nn.Parameter(torch.tensor(math.log(start / (1 - start))))
        self.register_buffer("steady", torch.zeros(channels))

    def affine(self) -> tuple[Tensor, Tensor]:
        """What it does without training, ``y = scale x + shift``: the scale ``()``, and the shifts ``(channels,)``."""
        scale = self.logit.sigmoid()
        return scale, (1 - scale) * self.steady

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.steady.lerp_(x.mean((0, 2, 3)).to(self.steady.dtype), 1 - self.momentum)
        scale, shift = self.affine()
        # Autocast's input is half of what the shift is, and shall stay so.
        return scale.to(x.dtype) * x + shift.to(x.dtype)[:, None, None]


class SteadyWeights(nn.Module):
    """SCM ``"weights"``: a 1x1 convolution, norm and SiLU, whose kernel is mixed with its own moving average.

    The kernel is ``t W + (2 - t) E``, t learned from 1 on, mixed while it is multiplied (:func:`mixed_conv2d`);
    ``E <- m E + (1 - m) W`` in :meth:`follow`, after every update. This is how the group's MAN++ mixes a block with an
    average, applied to a kernel. While both are equal, before the first update, t has a gradient of zero.

    Args:
        channels: of input and output.
        momentum: m.
    """

    average: Tensor

    def __init__(self, channels: int, momentum: float = 0.995) -> None:
        super().__init__()
        self.momentum = momentum
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.balance = Balance()
        self.norm = batch_norm(channels)
        self.act = nn.SiLU()
        self.register_buffer("average", self.conv.weight.detach().clone())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the kernel."""
        self.average.lerp_(self.conv.weight, 1 - self.momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(F.mixed_conv2d(x, (self.conv.weight, self.average), self.balance())))


class MultiScaleAttention(nn.Module):
    """SCM ``"attention"``: efficient multi-scale attention (arXiv 2305.13563), which is abbreviated as averages are.

    Of each group of channels one branch is gated by its means along rows and along columns, another is a 3x3
    convolution; each, pooled, says how the other's channels are weighted into a gate of every place.

    Args:
        channels: of input and output.
        groups: divides them; each is attended to by itself, all by the same weights.
    """

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        at_least("groups", groups, 1)
        if channels % groups:
            raise ValueError(f"groups: got {groups}, expected a divisor of the {channels} channels")
        self.groups = groups
        each = channels // groups
        self.along = nn.Conv2d(each, each, 1)
        self.local = nn.Conv2d(each, each, 3, padding=1)
        self.norm = nn.GroupNorm(each, each)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1)).flatten(0, 1)
        height, width = grouped.shape[2:]
        rows, columns = grouped.mean(3, keepdim=True), grouped.mean(2, keepdim=True)
        strips = self.along(torch.cat((rows, columns.transpose(2, 3)), 2)).sigmoid()
        of_rows, of_columns = strips.split((height, width), 2)
        gated = self.norm(grouped * of_rows * of_columns.transpose(2, 3))
        local = self.local(grouped)
        gate = self._weighted(gated, local) + self._weighted(local, gated)
        return (grouped * gate.sigmoid()).view_as(x)

    @staticmethod
    def _weighted(by: Tensor, features: Tensor) -> Tensor:
        """The channels of ``features``, weighted by the pooled ones of ``by`` and summed: ``(B, 1, H, W)``."""
        weights = by.mean((2, 3), keepdim=True).softmax(1)
        return (weights * features).sum(1, keepdim=True)


def steady_capture(kind: SCM, channels: int) -> nn.Module:
    """Make a Steady Capture Module; ``"off"`` is an ``nn.Identity``.

    Raises:
        ValueError: an unknown ``kind``.
    """
    one_of("scm", kind, SCMS)
    if kind == "feature":
        return SteadyFeatures(channels)
    if kind == "weights":
        return SteadyWeights(channels)
    return MultiScaleAttention(channels) if kind == "attention" else nn.Identity()
