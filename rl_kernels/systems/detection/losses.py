"""What a batch is trained by: the boxes' loss, the classes' and that of the distances' distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_kernels.conversion.options import one_of
from rl_kernels.systems.detection.assigning import Assignment, Targets, TaskAligned
from rl_kernels.systems.detection.boxes import BOX_LOSSES, BoxLoss, box_loss, to_distances
from rl_kernels.systems.detection.network import BINS, Outputs, read_levels


class Losses(NamedTuple):
    """The loss of a batch and its parts, weighted, ``()`` each, in float32 or float64.

    Attributes:
        total: the sum of the others, which is differentiated.
        box: of how the boxes overlap.
        classes: of the scores.
        distribution: of the distances of the edges (DFL).
    """

    total: Tensor
    box: Tensor
    classes: Tensor
    distribution: Tensor


@dataclass(frozen=True)
class DetectionLoss:
    """``7.5 sum w loss(box) / S + 0.5 BCE / S + 1.5 sum w DFL / S`` over all cells of a batch.

    w is a cell's weight by the assignment, the score that it shall give its box's class; S is the sum of them all, or
    1 where that is more. BCE is summed over cells and classes. DFL (arXiv 2006.04388) is the cross-entropy of a
    distance's distribution against the two bins beside the right distance, averaged over the four sides.

    Attributes:
        box: the loss of boxes, a name in ``BOX_LOSSES``.
        box_gain: its factor.
        classes_gain: of BCE.
        distribution_gain: of DFL.
        assigner: what gives boxes to cells.
    """

    box: BoxLoss = "ciou"
    box_gain: float = 7.5
    classes_gain: float = 0.5
    distribution_gain: float = 1.5
    assigner: TaskAligned = field(default_factory=TaskAligned)

    def __post_init__(self) -> None:
        one_of("box", self.box, BOX_LOSSES)
        for name in ("box_gain", "classes_gain", "distribution_gain"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected no less than 0")

    def __call__(self, levels: Sequence[Tensor], targets: Targets) -> Losses:
        """Return the loss of what a detector says of a batch.

        Args:
            levels: as :class:`rl_kernels.systems.detection.network.Detector` returns them in training.
            targets: the boxes that there are, on the same device; images, or all of them, may have none.

        Raises:
            ValueError: targets of another number of images; a label that is no class.
        """
        outputs = read_levels(levels)
        predicted = outputs.boxes()
        assigned = self.assigner(predicted, outputs.logits.sigmoid(), outputs.centres, targets)
        return self.of_assigned(outputs, predicted, targets, assigned)

    def of_assigned(self, outputs: Outputs, predicted: Tensor, targets: Targets, assigned: Assignment) -> Losses:
        """Return the loss, once it is known which cell learns which box.

        Args:
            outputs: of all cells.
            predicted: their boxes, ``(B, A, 4)``.
            targets: the boxes that there are.
            assigned: which of them each cell learns.
        """
        # Cells without a box are left out, not multiplied by zero: where there is none at all the sums are zeros that
        # still have gradients, also zero, of every weight.
        image, cell = assigned.positive.nonzero(as_tuple=True)
        number = assigned.box[image, cell]
        weight = assigned.weight[image, cell].to(predicted.dtype)
        wanted = targets.boxes[image, number].to(predicted.dtype)
        scale = assigned.weight.sum().clamp(min=1)

        scores = torch.zeros_like(outputs.logits)
        scores[image, cell, targets.labels[image, number]] = weight
        classes = F.binary_cross_entropy_with_logits(outputs.logits, scores, reduction="sum") / scale

        box = (weight * box_loss(predicted[image, cell], wanted, self.box)).sum() / scale
        distances = to_distances(wanted, outputs.centres[cell]) / outputs.strides[cell, None]
        spread = distribution_loss(outputs.distributions[image, cell], distances).mean(-1)
        distribution = (weight * spread).sum() / scale
        parts = (self.box_gain * box, self.classes_gain * classes, self.distribution_gain * distribution)
        return Losses(parts[0] + parts[1] + parts[2], *parts)


def distribution_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (arXiv 2006.04388, Eq. 6): cross-entropy against the two bins beside a distance.

    Args:
        logits: ``(..., BINS)``.
        distances: ``(...)``, in bins; those out of 0 to ``BINS - 1`` count as the nearest of these.

    Returns:
        ``(...)``.
    """
    if logits.shape[-1:] != (BINS,) or logits.shape[:-1] != distances.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(distances.shape)}"
        raise ValueError(f"logits, distances: got shapes {shapes}, expected (..., {BINS}) and (...)")
    distances = distances.clamp(0, BINS - 1)
    below = distances.floor().clamp(max=BINS - 2)
    above = distances - below
    both = torch.stack((below, below + 1), -1).long()
    probabilities = logits.log_softmax(-1).gather(-1, both)
    return -(probabilities * torch.stack((1 - above, above), -1)).sum(-1)
