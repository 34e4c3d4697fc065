"""Which cells learn which box: task-aligned assignment (TOOD, arXiv 2108.07755), with YOLOv8's constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.conversion.options import at_least
from rl_kernels.systems.detection.boxes import check_boxes, terms, to_distances


class Targets(NamedTuple):
    """The boxes of a batch of images, of which some have fewer than others.

    Attributes:
        boxes: ``(B, M, 4)``, xyxy in pixels; they may reach out of the image.
        labels: int64 ``(B, M)``, numbers of classes.
        valid: bool ``(B, M)``; elsewhere there is no box, whatever the others say.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """All on a device."""
        return Targets(*(tensor.to(device) for tensor in self))


def batch_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
    """Put the boxes of images together, padded to as many an image.

    Args:
        boxes: of each image, ``(N, 4)``, xyxy in pixels.
        labels: of each image, integers ``(N,)``.

    Raises:
        TypeError: boxes that are no floating-point tensor.
        ValueError: no image, or shapes that do not go together; edges in the wrong order; a negative label.
    """
    if not boxes or len(boxes) != len(labels):
        raise ValueError(
            f"boxes, labels: got those of {len(boxes)} and {len(labels)} images, expected as many, not none"
        )
    for index, (its_boxes, its_labels) in enumerate(zip(boxes, labels, strict=True)):
        check_boxes(f"boxes[{index}]", its_boxes)
        if its_boxes.ndim != 2 or its_labels.shape != its_boxes.shape[:1]:
            shapes = f"{tuple(its_boxes.shape)} and {tuple(its_labels.shape)}"
            raise ValueError(f"boxes[{index}], labels[{index}]: got shapes {shapes}, expected (N, 4) and (N,)")
        if not bool((its_boxes[:, 2:] >= its_boxes[:, :2]).all()):
            raise ValueError(f"boxes[{index}]: got a right or bottom edge before the left or top one, expected xyxy")
        if bool((its_labels < 0).any()):
            raise ValueError(f"labels[{index}]: got {int(its_labels.min())}, expected numbers from 0")
    counts = torch.tensor([len(each) for each in boxes], device=boxes[0].device)
    most = int(counts.max())
    padded = boxes[0].new_zeros(len(boxes), most, 4)
    numbers = torch.zeros(len(boxes), most, dtype=torch.int64, device=boxes[0].device)
    for index, (its_boxes, its_labels) in enumerate(zip(boxes, labels, strict=True)):
        padded[index, : len(its_boxes)] = its_boxes
        numbers[index, : len(its_boxes)] = its_labels
    return Targets(padded, numbers, torch.arange(most, device=counts.device) < counts[:, None])


class Assignment(NamedTuple):
    """What each cell is to learn.

    Attributes:
        box: int64 ``(B, A)``, the number of the cell's box in the image's; -1 for none.
        weight: ``(B, A)``, the score that the cell shall give the box's class; 0 for none.
    """

    box: Tensor
    weight: Tensor

    @property
    def positive(self) -> Tensor:
        """Which cells have a box, bool ``(B, A)``."""
        return self.box >= 0


@dataclass(frozen=True)
class TaskAligned:
    """Gives each box the cells that classify and locate it best.

    A cell is a candidate of the boxes that its centre is inside of. Of a box those ``top`` are chosen that are best
    aligned, ``score ** alpha * CIoU ** beta``; equal ones from the first on. A cell that several boxes choose goes to
    the one that it overlaps most by IoU, or the first of these. A cell's weight is its alignment by the best of its
    box, times the highest IoU of its box.

    Attributes:
        top: cells of a box.
        alpha: exponent of the score.
        beta: exponent of the overlap.
    """

    top: int = 10
    alpha: float = 0.5
    beta: float = 6.0

    def __post_init__(self) -> None:
        at_least("top", self.top, 1)
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not value >= 0:
                raise ValueError(f"{name}: got {value}, expected no less than 0")

    @torch.no_grad()
    def __call__(self, boxes: Tensor, scores: Tensor, centres: Tensor, targets: Targets) -> Assignment:
        """Assign the cells of a batch.

        Args:
            boxes: predicted, ``(B, A, 4)``, xyxy in pixels.
            scores: predicted, ``(B, A, classes)``, from 0 to 1.
            centres: of the cells in pixels, ``(A, 2)``.
            targets: the boxes that there are; takes about twenty numbers for each cell and box of memory.

        Raises:
            TypeError: boxes that are no floating-point tensor.
            ValueError: shapes that do not go together, a label that has no score.
        """
        _check(boxes, scores, centres, targets)
        batch, count = boxes.shape[:2]
        most = targets.boxes.shape[1]
        if most == 0 or count == 0:
            return Assignment(boxes.new_full((batch, count), -1, dtype=torch.int64), boxes.new_zeros(batch, count))
        wanted = targets.boxes.to(boxes.dtype)
        found = terms(boxes[:, None], wanted[:, :, None])  # (B, M, A) each.
        overlap = found.iou
        ciou = (overlap - found.distance - found.aspect_weight * found.aspect).clamp(min=0)
        labels = targets.labels.where(targets.valid, 0)[..., None].expand(-1, -1, count)
        score = scores.transpose(1, 2).gather(1, labels).to(boxes.dtype)
        align = score.pow(self.alpha) * ciou.pow(self.beta)
        inside = to_distances(wanted[:, :, None], centres.to(boxes.dtype)).amin(-1) > 0
        candidate = inside & targets.valid[..., None]

        # Sorted and stable, not topk, which chooses among equal ones as it likes.
        order = align.masked_fill(~candidate, -1).sort(dim=-1, descending=True, stable=True).indices[..., : self.top]
        chosen = torch.zeros_like(candidate).scatter_(-1, order, True) & candidate
        best = overlap.masked_fill(~chosen, -1).argmax(1)  # The first of equal ones.
        box = torch.where(chosen.any(1), best, -1)

        mine = chosen & (torch.arange(most, device=boxes.device)[:, None] == box[:, None])
        its_align, its_overlap = torch.where(mine, align, 0), torch.where(mine, overlap, 0)
        highest = its_align.amax(-1, keepdim=True)
        # A box none of whose cells overlaps it has zeros only, and no weight.
        share = torch.where(highest > 0, its_align / torch.where(highest > 0, highest, 1), 0)
        return Assignment(box, (share * its_overlap.amax(-1, keepdim=True)).sum(1))


def _check(boxes: Tensor, scores: Tensor, centres: Tensor, targets: Targets) -> None:
    check_boxes("boxes", boxes)
    check_boxes("targets.boxes", targets.boxes)
    if boxes.ndim != 3 or scores.ndim != 3 or scores.shape[:2] != boxes.shape[:2]:
        shapes = f"{tuple(boxes.shape)} and {tuple(scores.shape)}"
        raise ValueError(f"boxes, scores: got shapes {shapes}, expected (B, A, 4) and (B, A, classes)")
    if centres.shape != (boxes.shape[1], 2):
        raise ValueError(f"centres: got shape {tuple(centres.shape)}, expected ({boxes.shape[1]}, 2)")
    expected = (boxes.shape[0], *targets.boxes.shape[1:2])
    if targets.boxes.ndim != 3 or targets.labels.shape != expected or targets.valid.shape != expected:
        shapes = ", ".join(str(tuple(each.shape)) for each in targets)
        raise ValueError(f"targets: got shapes {shapes}, expected (B, M, 4), (B, M) and (B, M), B {boxes.shape[0]}")
    wrong = targets.valid & ((targets.labels < 0) | (targets.labels >= scores.shape[2]))
    if bool(wrong.any()):
        raise ValueError(f"targets.labels: got {int(targets.labels[wrong][0])}, expected 0 to {scores.shape[2] - 1}")
