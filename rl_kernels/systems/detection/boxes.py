"""Boxes: their forms, how far they overlap, and the losses of boxes that are matched one to one.

A box is four numbers in the last dimension. ``xyxy``: its left, top, right and bottom edges, with right >= left and
bottom >= top. ``cxcywh``: its centre, width and height. ``ltrb``: how far its edges are from a point inside.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rl_kernels.conversion.options import one_of

BoxLoss = Literal["iou", "giou", "diou", "ciou", "eiou", "mean", "penalties", "adaptive"]
BOX_LOSSES: tuple[BoxLoss, ...] = get_args(BoxLoss)

EPSILON = 1e-7
"""Areas and squares that are no greater divide nothing: boxes without an area have small losses and gradients."""


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raise unless these are floating-point tensors of four numbers a box.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: of another shape than ``(..., 4)``.
    """
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        found = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name}: got {found}, expected a floating-point tensor")
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name}: got shape {tuple(boxes.shape)}, expected (..., 4)")


def to_centred(boxes: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` from xyxy to cxcywh."""
    check_boxes("boxes", boxes)
    start, end = boxes.split(2, -1)
    return torch.cat(((start + end) / 2, end - start), -1)


def from_centred(boxes: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` from cxcywh to xyxy."""
    check_boxes("boxes", boxes)
    centre, size = boxes.split(2, -1)
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def to_distances(boxes: Tensor, centres: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` from xyxy to ltrb of points ``(..., 2)``; negative where a point is outside."""
    check_boxes("boxes", boxes)
    start, end = boxes.split(2, -1)
    return torch.cat((centres - start, end - centres), -1)


def from_distances(distances: Tensor, centres: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` from ltrb of points ``(..., 2)`` to xyxy."""
    check_boxes("distances", distances)
    before, after = distances.split(2, -1)
    return torch.cat((centres - before, centres + after), -1)


def area(boxes: Tensor) -> Tensor:
    """Areas ``(...)`` of boxes ``(..., 4)``, xyxy; zero where an edge lies on the wrong side."""
    check_boxes("boxes", boxes)
    return _sizes(boxes).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of matched boxes, xyxy: ``(..., 4)`` and ``(..., 4)`` that broadcast -> ``(...)``.

    Boxes whose union has no more than ``EPSILON`` have none, not even with themselves.
    """
    check_boxes("first", first)
    check_boxes("second", second)
    inside, union = _overlap(first, second)
    return _share(inside, union)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of each with each, xyxy: ``(..., N, 4)`` and ``(..., M, 4)`` -> ``(..., N, M)``."""
    check_boxes("first", first)
    check_boxes("second", second)
    if first.ndim < 2 or second.ndim < 2:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"first, second: got shapes {shapes}, expected (..., N, 4) and (..., M, 4)")
    return iou(first[..., :, None, :], second[..., None, :, :])


class Terms(NamedTuple):
    """What the losses are sums of, ``(...)`` each; all but ``iou`` are zero at equal boxes, where it is one.

    Attributes:
        iou: intersection over union.
        hull: share of the smallest enclosing box that neither box covers (GIoU).
        distance: of the centres, squared, by the enclosing box's diagonal, squared (DIoU).
        aspect: v, the squared difference of the angles of the diagonals by that of a right angle (CIoU).
        sides: squared differences of the widths and of the heights, each by the enclosing box's, summed (EIoU).
    """

    iou: Tensor
    hull: Tensor
    distance: Tensor
    aspect: Tensor
    sides: Tensor

    @property
    def aspect_weight(self) -> Tensor:
        """CIoU's alpha, ``v / (1 - IoU + v)``, a constant to the gradient."""
        iou, v = self.iou.detach(), self.aspect.detach()
        return _share(v, 1 - iou + v)


def terms(predicted: Tensor, target: Tensor) -> Terms:
    """Return the terms of matched boxes, xyxy, ``(..., 4)`` that broadcast."""
    check_boxes("predicted", predicted)
    check_boxes("target", target)
    inside, union = _overlap(predicted, target)
    sizes, others = _sizes(predicted), _sizes(target)
    start = torch.minimum(predicted[..., :2], target[..., :2])
    hull = torch.maximum(predicted[..., 2:], target[..., 2:]) - start
    hull_area, hull_squares = hull.prod(-1), hull.square()
    between = (predicted[..., :2] + predicted[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    return Terms(
        iou=_share(inside, union),
        hull=_share(hull_area - union, hull_area),
        distance=_share(between.square().sum(-1), hull_squares.sum(-1)),
        aspect=(4 / math.pi**2) * (_angle(others) - _angle(sizes)).square(),
        sides=_share((sizes - others).square(), hull_squares).sum(-1),
    )


def box_loss(predicted: Tensor, target: Tensor, kind: BoxLoss = "ciou") -> Tensor:
    """Return the loss of each of the predicted boxes against the box that it is matched with.

    ``iou``: 1 - IoU. ``giou`` (arXiv 1902.09630), ``diou`` and ``ciou`` (1911.08287) and ``eiou`` (2101.08158) are the
    papers'. The last three combine CIoU and EIoU, as arXiv 2407.00906 does; in which way could not be read, so each is
    an option of this library, and none is claimed to be that paper's AIoU:

    * ``mean``: (CIoU + EIoU) / 2.
    * ``penalties``: 1 - IoU and the penalties of both: centres, alpha v, sides.
    * ``adaptive``: (1 - q) CIoU + q EIoU, where q is the IoU, a constant to the gradient.

    Args:
        predicted: ``(..., 4)``, xyxy.
        target: ``(..., 4)``, xyxy, in the same units; broadcasts.
        kind: of loss.

    Returns:
        ``(...)``: 0 at equal boxes that have an area, finite for all. Half precision is computed, and returned, in
        float32.

    Raises:
        TypeError: no floating-point tensors.
        ValueError: other shapes, an unknown ``kind``.
    """
    one_of("kind", kind, BOX_LOSSES)
    check_boxes("predicted", predicted)
    check_boxes("target", target)
    if predicted.dtype in (torch.float16, torch.bfloat16):
        predicted = predicted.float()
    found = terms(predicted, target.to(predicted.dtype))
    unlike = 1 - found.iou
    if kind == "iou":
        return unlike
    if kind == "giou":
        return unlike + found.hull
    if kind == "diou":
        return unlike + found.distance
    aspect = found.aspect_weight * found.aspect
    ciou, eiou = unlike + found.distance + aspect, unlike + found.distance + found.sides
    if kind == "ciou":
        return ciou
    if kind == "eiou":
        return eiou
    if kind == "mean":
        return (ciou + eiou) / 2
    if kind == "penalties":
        return ciou + found.sides
    return torch.lerp(ciou, eiou, found.iou.detach())


def _sizes(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The areas of intersections and unions."""
    start = torch.maximum(first[..., :2], second[..., :2])
    inside = (torch.minimum(first[..., 2:], second[..., 2:]) - start).clamp(min=0).prod(-1)
    return inside, _sizes(first).prod(-1) + _sizes(second).prod(-1) - inside


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, or a constant zero where there is hardly a whole."""
    enough = whole > EPSILON
    return torch.where(enough, part / torch.where(enough, whole, 1), 0)


def _angle(sizes: Tensor) -> Tensor:
    """``atan(width / height)``; where both are zero it is zero, and its gradient finite."""
    width, height = sizes.unbind(-1)
    return torch.atan2(width, torch.where((width == 0) & (height == 0), 1, height))
