"""From what a detector says of every cell to detections: non-maximum suppression within each class.

Torchvision's operator serves where it loads. Elsewhere plain torch does, with the same results: torchvision's wheel for
CUDA, beside a torch for CPUs, has models and losses but no operators.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.conversion.options import at_least
from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.detection.boxes import check_boxes

BLOCK = 512
"""Boxes of a class that are held against one another at once, in plain torch."""


class Detections(NamedTuple):
    """What was found in one image, the surest first.

    Attributes:
        boxes: ``(N, 4)``, xyxy in pixels.
        scores: ``(N,)``.
        labels: int64 ``(N,)``, numbers of classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@functools.cache
def why_not_torchvision() -> str | None:
    """Why torchvision's operator does not serve; None where it does. Imports torchvision, which takes seconds."""
    try:
        torchvision = import_torchvision()
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except ImportError as error:
        return f"torchvision does not import: {error}"
    except RuntimeError:  # NotImplementedError is one.
        return "torchvision's operators do not load beside this torch"
    return None


def describe_suppression() -> str:
    """What suppresses, in a line: torchvision's operator, or plain torch and why."""
    reason = why_not_torchvision()
    return "torchvision's operator" if reason is None else f"plain torch: {reason}"


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float = 0.7, limit: int = 300) -> Tensor:
    """Leave out boxes that overlap a surer one of their class.

    Boxes are taken from the highest score to the lowest, of equal scores the first; a box is kept unless its IoU with
    one that was kept, of the same label, is above the threshold. Overlaps are computed in float64; two boxes without an
    area do not overlap.

    Args:
        boxes: ``(N, 4)``, xyxy.
        scores: ``(N,)``.
        labels: integers ``(N,)``, not negative.
        threshold: from 0 to 1.
        limit: the most that are kept.

    Returns:
        int64 ``(K,)``: which are kept, the surest first.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: other shapes, or a threshold or limit out of range.
    """
    check_boxes("boxes", boxes)
    _check_options(threshold, limit)
    if boxes.ndim != 2:
        raise ValueError(f"boxes: got shape {tuple(boxes.shape)}, expected (N, 4)")
    for name, tensor in (("scores", scores), ("labels", labels)):
        if tensor.shape != boxes.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected ({len(boxes)},), one of each box")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: got {labels.dtype}, expected integers")
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    serves = _by_plain_torch if why_not_torchvision() is not None else _by_torchvision
    return serves(boxes.detach().double(), scores.detach(), labels, threshold, limit)


def detections(
    boxes: Tensor,
    scores: Tensor,
    confidence: float = 0.001,
    threshold: float = 0.7,
    limit: int = 300,
    candidates: int = 8192,
) -> list[Detections]:
    """Return what a detector finds in each image; a box may be found as several classes.

    Args:
        boxes: ``(B, A, 4)``, xyxy.
        scores: ``(B, A, classes)``, from 0 to 1.
        confidence: scores below it are no detections.
        threshold: the IoU above which a less sure box of the same class is left out.
        limit: the most detections of an image.
        candidates: the most pairs of box and class of an image that are looked at, the surest.

    Raises:
        ValueError: other shapes, or an option out of range.
    """
    check_boxes("boxes", boxes)
    _check_options(threshold, limit)
    at_least("candidates", candidates, 1)
    if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape[:2] != scores.shape[:2]:
        shapes = f"{tuple(boxes.shape)} and {tuple(scores.shape)}"
        raise ValueError(f"boxes, scores: got shapes {shapes}, expected (B, A, 4) and (B, A, classes)")
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence: got {confidence}, expected 0 to 1")
    found = []
    for its_boxes, its_scores in zip(boxes.detach(), scores.detach(), strict=True):
        cells, labels = (its_scores >= confidence).nonzero(as_tuple=True)
        values = its_scores[cells, labels]
        if len(values) > candidates:
            chosen = values.sort(descending=True, stable=True).indices[:candidates]
            cells, labels, values = cells[chosen], labels[chosen], values[chosen]
        kept = suppress(its_boxes[cells], values, labels, threshold, limit)
        found.append(Detections(its_boxes[cells[kept]], values[kept], labels[kept]))
    return found


def _check_options(threshold: float, limit: int) -> None:
    at_least("limit", limit, 1)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected 0 to 1")


def _by_torchvision(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, limit: int) -> Tensor:
    # It tells classes apart by shifting them to the right, which needs coordinates that are not negative.
    kept = import_torchvision().ops.batched_nms(boxes - boxes.min(), scores.double(), labels, threshold)
    # Its order of equal scores is not always the first one first.
    kept = kept.sort().values
    return kept[scores[kept].sort(descending=True, stable=True).indices[:limit]]


def _by_plain_torch(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, limit: int) -> Tensor:
    order = scores.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(order, dtype=torch.bool)
    for label in labels.unique():
        mine = (labels[order] == label).nonzero().squeeze(1)
        kept[mine[_kept_of_a_class(boxes[order[mine]], threshold, limit)]] = True
    return order[kept][:limit]


def _kept_of_a_class(boxes: Tensor, threshold: float, limit: int) -> Tensor:
    """Which of boxes in falling order of their scores no kept one before them overlaps, the first ``limit`` or more."""
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for first in range(0, len(boxes), BLOCK):
        block = boxes[first : first + BLOCK]
        possible = ~(_overlaps(boxes[:first][kept[:first]], block) > threshold).any(0)
        kept[first : first + BLOCK] = _one_by_one(possible, _overlaps(block, block) > threshold)
        if int(kept.sum()) >= limit:
            break
    return kept.nonzero().squeeze(1)


def _one_by_one(possible: Tensor, over: Tensor) -> Tensor:
    """Which of these, in turn, no kept one before overlaps: in numpy, where a step takes a microsecond or two."""
    alive, rows = possible.cpu().numpy().copy(), over.cpu().numpy()
    for number, row in enumerate(rows):
        if alive[number]:
            alive[number + 1 :] &= ~row[number + 1 :]
    return torch.from_numpy(alive).to(possible.device)


def _overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU of each with each; NaN, which is above nothing, of two boxes without an area."""
    left, right = first.unsqueeze(1), second.unsqueeze(0)
    size = torch.minimum(left[..., 2:], right[..., 2:]) - torch.maximum(left[..., :2], right[..., :2])
    inside = size.clamp(min=0).prod(-1)
    return inside / (_area(left) + _area(right) - inside)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
