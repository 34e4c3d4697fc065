"""The detector: a backbone, a neck that joins its three levels both ways, and a head without anchors for each.

Its shape is YOLOv8's as publicly documented; the scale ``pico`` and the options ``gom`` and ``scm`` are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.systems.detection.boxes import from_distances
from rl_kernels.systems.detection.modules import (
    GAM,
    SCM,
    SCMS,
    SPPF,
    C2f,
    ConvNormAct,
    SteadyWeights,
    steady_capture,
)

STRIDES = (8, 16, 32)
"""Pixels from one cell to the next, of each level."""
BINS = 16
"""Distances, in strides, over which the head says how likely each is."""

Gom = bool | Literal["control"]


class Scale(NamedTuple):
    """Factors of the depths and the widths, and the most channels before the factor."""

    depth: float
    width: float
    max_channels: int

    def channels(self, channels: int) -> int:
        """Channels of a layer: scaled, and rounded up to a multiple of 8."""
        return math.ceil(min(channels, self.max_channels) * self.width / 8) * 8

    def blocks(self, depth: int) -> int:
        """Bottlenecks of a C2f."""
        return max(1, round(depth * self.depth))


SCALES = {
    "pico": Scale(0.33, 0.125, 1024),
    "n": Scale(0.33, 0.25, 1024),
    "s": Scale(0.33, 0.5, 1024),
    "m": Scale(0.67, 0.75, 768),
    "l": Scale(1.0, 1.0, 512),
}


class Outputs(NamedTuple):
    """What the head says of all cells, level by level, row by row; float32, or float64 of a float64 network.

    Attributes:
        distributions: logits of the distances of a box's edges from the cell's centre, ``(B, A, 4, BINS)``, ltrb.
        logits: of the classes, ``(B, A, classes)``.
        centres: of the cells in pixels, ``(A, 2)``.
        strides: ``(A,)``.
    """

    distributions: Tensor
    logits: Tensor
    centres: Tensor
    strides: Tensor

    def boxes(self) -> Tensor:
        """The boxes that are expected, xyxy in pixels, ``(B, A, 4)``."""
        distances = torch.arange(BINS, dtype=self.distributions.dtype, device=self.distributions.device)
        expected = (self.distributions.softmax(-1) * distances).sum(-1)
        return from_distances(expected * self.strides[:, None], self.centres)


class Predictions(NamedTuple):
    """Boxes and scores of all cells: what :func:`rl_kernels.systems.detection.suppression.detections` takes.

    Attributes:
        boxes: ``(B, A, 4)``, xyxy in pixels; they may reach out of the image.
        scores: ``(B, A, classes)``, from 0 to 1.
    """

    boxes: Tensor
    scores: Tensor


def read_levels(levels: Sequence[Tensor]) -> Outputs:
    """Join the levels of the head, ``(B, 4 * BINS + classes, H, W)`` each, at the strides ``STRIDES``.

    Raises:
        ValueError: another number of levels.
    """
    if len(levels) != len(STRIDES):
        raise ValueError(f"levels: got {len(levels)}, expected {len(STRIDES)}")
    joined = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
    if joined.dtype != torch.float64:  # Half precision has no more than 8 bits for a place in the image.
        joined = joined.float()
    distributions, logits = joined.split((4 * BINS, joined.shape[2] - 4 * BINS), 2)
    centres, strides = cells([level.shape[2:] for level in levels], joined.dtype, joined.device)
    return Outputs(distributions.unflatten(2, (4, BINS)), logits, centres, strides)


def cells(sizes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the centres ``(A, 2)`` of the cells of levels of ``(height, width)``, in pixels, and strides ``(A,)``."""
    centres, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y, x = ((torch.arange(size, dtype=dtype, device=device) + 0.5) * stride for size in (height, width))
        centres.append(torch.cartesian_prod(y, x).flip(1))
        strides.append(torch.full((height * width,), stride, dtype=dtype, device=device))
    return torch.cat(centres), torch.cat(strides)


class Backbone(nn.Module):
    """Five halvings of the image, four of them with a C2f, and SPPF at the end.

    Args:
        scale: of depths and widths.
        in_channels: of the images.

    Shapes: ``(B, in_channels, H, W)`` -> three levels at H / 8, H / 16 and H / 32, of ``channels``.
    """

    def __init__(self, scale: Scale, in_channels: int) -> None:
        super().__init__()
        widths = [scale.channels(width) for width in (64, 128, 256, 512, 1024)]
        self.channels = widths[2:]
        self.stem = ConvNormAct(in_channels, widths[0], 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvNormAct(before, width, 3, 2), C2f(width, width, scale.blocks(depth)))
            for before, width, depth in zip(widths, widths[1:], (3, 6, 6, 3), strict=False)
        )
        self.attend: nn.Module = nn.Identity()
        self.pool = SPPF(widths[-1], widths[-1])
        self.steady: nn.Module = nn.Identity()

    def add(self, gom: Gom, groups: int, scm: SCM) -> None:
        """Add what GSO-YOLO has: GAM before SPPF, or as many parameters in the last C2f, and a module after SPPF."""
        channels = self.channels[-1]
        if gom == "control":
            with torch.device("meta"):
                wanted = sum(parameter.numel() for parameter in GAM(channels, groups).parameters())
            last = self.stages[-1].get_submodule("1")
            assert isinstance(last, C2f)
            last.lengthen(wanted)
        elif gom:
            self.attend = GAM(channels, groups)
        self.steady = steady_capture(scm, channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        levels[-1] = self.steady(self.pool(self.attend(x)))
        return levels[1:]


class Neck(nn.Module):
    """A path from the coarsest level to the finest, and one back (PAN).

    Args:
        channels: of the three levels, the finest first.
        depth: bottlenecks of a C2f.

    Shapes: three levels -> three of the same shapes.
    """

    def __init__(self, channels: Sequence[int], depth: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.up = nn.Upsample(scale_factor=2)
        self.to_middle = C2f(coarse + middle, middle, depth, shortcut=False)
        self.to_fine = C2f(middle + fine, fine, depth, shortcut=False)
        self.down_fine = ConvNormAct(fine, fine, 3, 2)
        self.back_to_middle = C2f(fine + middle, middle, depth, shortcut=False)
        self.down_middle = ConvNormAct(middle, middle, 3, 2)
        self.back_to_coarse = C2f(middle + coarse, coarse, depth, shortcut=False)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        fine, middle, coarse = levels
        middle = self.to_middle(torch.cat((self.up(coarse), middle), 1))
        fine = self.to_fine(torch.cat((self.up(middle), fine), 1))
        middle = self.back_to_middle(torch.cat((self.down_fine(fine), middle), 1))
        coarse = self.back_to_coarse(torch.cat((self.down_middle(middle), coarse), 1))
        return [fine, middle, coarse]


class Head(nn.Module):
    """Two branches a level: how far a box's edges are, as distributions, and which class it is.

    Args:
        channels: of the levels.
        classes: number of classes.
        image_size: for which the classes' biases start at five objects an image, evenly over classes and cells.

    Shapes: ``(B, channels[i], H, W)`` -> ``(B, 4 * BINS + classes, H, W)`` for each level.
    """

    def __init__(self, channels: Sequence[int], classes: int, image_size: int) -> None:
        super().__init__()
        box_width = max(16, channels[0] // 4, 4 * BINS)
        class_width = max(channels[0], min(classes, 100))
        self.boxes = nn.ModuleList(_branch(each, box_width, 4 * BINS) for each in channels)
        self.classes = nn.ModuleList(_branch(each, class_width, classes) for each in channels)
        for box, kind, stride in zip(self.boxes, self.classes, STRIDES, strict=True):
            nn.init.ones_(box.get_parameter("2.bias"))
            nn.init.constant_(kind.get_parameter("2.bias"), math.log(5 / classes / (image_size / stride) ** 2))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        branches = zip(self.boxes, self.classes, levels, strict=True)
        return [torch.cat((box(level), kind(level)), 1) for box, kind, level in branches]


def _branch(channels: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(channels, width, 3), ConvNormAct(width, width, 3), nn.Conv2d(width, outputs, 1))


class Detector(nn.Module):
    """Finds boxes of classes in images.

    Options add layers to a network that is drawn before them: with one seed, all variants start from the same weights.

    Args:
        classes: number of classes.
        scale: a key of ``SCALES``.
        in_channels: of the images.
        gom: the Global Optimization Module (GAM); ``"control"`` puts as many parameters into plain bottlenecks of the
            backbone's last C2f instead, without which a gain by GAM may be one by size.
        gom_groups: of GAM's 7x7 convolutions, and of those that the control is measured by.
        scm: the Steady Capture Module.
        image_size: that is trained on, for the classes' first biases; any multiple of 32 is taken later.

    Shapes: ``(B, in_channels, H, W)`` -> in training the levels of the head, ``(B, 4 * BINS + classes, H / s, W / s)``
    for each s of ``STRIDES``, which :func:`read_levels` joins; otherwise :class:`Predictions`.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: an option that there is not, or a size that does not go with it.
    """

    def __init__(
        self,
        classes: int = 80,
        scale: str = "n",
        in_channels: int = 3,
        *,
        gom: Gom = False,
        gom_groups: int = 1,
        scm: SCM = "off",
        image_size: int = 640,
    ) -> None:
        super().__init__()
        at_least("classes", classes, 1)
        one_of("scale", scale, SCALES)
        at_least("in_channels", in_channels, 1)
        one_of("gom", gom, (False, True, "control"))
        at_least("gom_groups", gom_groups, 1)
        one_of("scm", scm, SCMS)
        at_least("image_size", image_size, STRIDES[-1])
        self.in_channels, self.classes = in_channels, classes
        chosen = SCALES[scale]
        self.backbone = Backbone(chosen, in_channels)
        self.neck = Neck(self.backbone.channels, chosen.blocks(3))
        self.head = Head(self.backbone.channels, classes, image_size)
        self.backbone.add(gom, gom_groups, scm)

    def levels(self, images: Tensor) -> list[Tensor]:
        """What the head says, in training or not: as :meth:`forward` in training.

        Raises:
            ValueError: images of another shape than ``(B, in_channels, H, W)``, or sizes that are no multiple of 32.
        """
        expected = f"(B, {self.in_channels}, H, W), H and W multiples of {STRIDES[-1]}"
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {expected}")
        if any(size == 0 or size % STRIDES[-1] for size in images.shape[2:]):
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {expected}")
        return self.head(self.neck(self.backbone(images)))

    def forward(self, images: Tensor) -> list[Tensor] | Predictions:
        levels = self.levels(images)
        return levels if self.training else predictions(levels)

    def follow(self) -> None:
        """Move the moving averages of weights (``scm="weights"``): after every update."""
        for module in self.modules():
            if isinstance(module, SteadyWeights):
                module.follow()


def predictions(levels: Sequence[Tensor]) -> Predictions:
    """Decode what the head says: boxes in pixels, and a probability of each class."""
    outputs = read_levels(levels)
    return Predictions(outputs.boxes(), outputs.logits.sigmoid())
