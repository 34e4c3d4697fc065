"""Boxes: their forms, overlaps and losses, by hand, against torchvision's, and where boxes degenerate."""

import math

import pytest
import torch

from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.detection.boxes import (
    BOX_LOSSES,
    area,
    box_loss,
    from_centred,
    from_distances,
    iou,
    pairwise_iou,
    terms,
    to_centred,
    to_distances,
)

OF_TORCHVISION = {
    "giou": "generalized_box_iou_loss",
    "diou": "distance_box_iou_loss",
    "ciou": "complete_box_iou_loss",
}


def box(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def random_boxes(count, seed=0, size=20.0):
    generator = torch.Generator().manual_seed(seed)
    centred = torch.rand(count, 4, generator=generator, dtype=torch.float64) * size + 0.5
    return from_centred(centred)


def test_forms_by_hand():
    given = box(2, 4, 10, 8)
    assert to_centred(given).tolist() == [[6, 6, 8, 4]]
    assert area(given).tolist() == [32]
    assert to_distances(given, box(3, 5, 0, 0)[:, :2]).tolist() == [[1, 1, 7, 3]]
    assert to_distances(given, box(1, 5, 0, 0)[:, :2]).tolist() == [[-1, 1, 9, 3]], "outside"


def test_forms_and_back():
    boxes = random_boxes(50)
    centres = random_boxes(50, seed=1)[:, :2]
    torch.testing.assert_close(from_centred(to_centred(boxes)), boxes)
    torch.testing.assert_close(from_distances(to_distances(boxes, centres), centres), boxes)


def test_iou_by_hand():
    first = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2]])
    second = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [2, 2, 4, 4], [10, 10, 11, 11]])
    expected = torch.tensor([[1, 8 / 24, 4 / 16, 0], [4 / 16, 0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(first, second), expected)
    torch.testing.assert_close(iou(first[0], second), expected[0])
    assert pairwise_iou(first, second[:0]).shape == (2, 0)
    assert pairwise_iou(first.expand(3, 2, 4), second.expand(3, 4, 4)).shape == (3, 2, 4)


def test_pairwise_iou_is_torchvisions():
    first, second = random_boxes(40), random_boxes(30, seed=1)
    torch.testing.assert_close(pairwise_iou(first, second), import_torchvision().ops.box_iou(first, second))


def test_losses_by_hand():
    """Squares of 4 in an enclosing box of 6 x 4, and a square beside a box of half its height."""
    by_hand = {"iou": 1 - 8 / 24, "giou": 1 - 8 / 24, "diou": 1 - 8 / 24 + 4 / 52}
    same = dict.fromkeys(("ciou", "eiou", "mean", "penalties", "adaptive"), by_hand["diou"])
    for kind, expected in {**by_hand, **same}.items():
        assert box_loss(box(0, 0, 4, 4), box(2, 0, 6, 4), kind).item() == pytest.approx(expected), kind
    overlap, distance, sides = 8 / 16, 1 / 32, 4 / 16
    v = 4 / math.pi**2 * (math.atan(4 / 2) - math.atan(1)) ** 2
    ciou = 1 - overlap + distance + v / (1 - overlap + v) * v
    eiou = 1 - overlap + distance + sides
    by_hand = {"giou": 0.5, "diou": 0.5 + distance, "ciou": ciou, "eiou": eiou, "mean": (ciou + eiou) / 2}
    by_hand |= {"penalties": ciou + sides, "adaptive": 0.5 * ciou + 0.5 * eiou, "iou": 0.5}
    assert by_hand.keys() == set(BOX_LOSSES)
    for kind, expected in by_hand.items():
        assert box_loss(box(0, 0, 4, 4), box(0, 0, 4, 2), kind).item() == pytest.approx(expected), kind
    apart = box_loss(box(0, 0, 1, 1), box(3, 0, 4, 1), "giou").item()
    assert apart == pytest.approx(1 + 2 / 4)


@pytest.mark.parametrize("kind", OF_TORCHVISION)
def test_losses_are_torchvisions(kind):
    theirs = getattr(import_torchvision().ops, OF_TORCHVISION[kind])
    predicted, target = random_boxes(200).requires_grad_(), random_boxes(200, seed=1)
    ours, expected = box_loss(predicted, target, kind), theirs(predicted, target)
    assert (iou(predicted, target) > 0).sum() > 50 and (iou(predicted, target) == 0).sum() > 20
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(each.sum(), predicted)[0] for each in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_a_loss_is_zero_at_equal_boxes_and_positive_elsewhere(kind):
    boxes = random_boxes(50)
    assert box_loss(boxes, boxes, kind).abs().max() < 1e-12
    assert (box_loss(boxes, boxes + torch.tensor([0.0, 0, 0.5, 0.25]), kind) > 0.01).all()
    tiny = boxes / 1000
    assert box_loss(tiny, tiny, kind).abs().max() < 1e-12, "in small units"


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_gradients(kind):
    """Alpha and q are constants to the gradient, as the papers have it, so the check holds them fixed."""
    predicted, target = random_boxes(12).requires_grad_(), random_boxes(12, seed=1)
    fixed = terms(predicted, target)
    alpha, q = fixed.aspect_weight, fixed.iou.detach()

    def loss(predicted, target):
        found = terms(predicted, target)
        unlike = 1 - found.iou
        ciou, eiou = (unlike + found.distance + each for each in (alpha * found.aspect, found.sides))
        of = {
            "iou": unlike, "giou": unlike + found.hull, "diou": unlike + found.distance, "ciou": ciou, "eiou": eiou,
            "mean": (ciou + eiou) / 2, "penalties": ciou + found.sides, "adaptive": (1 - q) * ciou + q * eiou,
        }  # fmt: skip
        return of[kind]

    torch.testing.assert_close(box_loss(predicted, target, kind), loss(predicted, target))
    both = (predicted, target.requires_grad_())
    assert torch.autograd.gradcheck(loss, both)
    ours = torch.autograd.grad(box_loss(*both, kind).sum(), both)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(*both).sum(), both))


DEGENERATE = {
    "equal": ((1, 1, 3, 3), (1, 1, 3, 3)),
    "touching": ((0, 0, 2, 2), (2, 0, 4, 2)),
    "touching at a corner": ((0, 0, 2, 2), (2, 2, 4, 4)),
    "nested": ((1, 1, 2, 2), (0, 0, 4, 4)),
    "nested, edges shared": ((0, 0, 2, 4), (0, 0, 4, 4)),
    "disjoint": ((0, 0, 1, 1), (5, 7, 8, 9)),
    "a point": ((1, 1, 1, 1), (0, 0, 2, 2)),
    "a line": ((1, 0, 1, 3), (0, 0, 2, 2)),
    "against a point": ((0, 0, 2, 2), (1, 1, 1, 1)),
    "against a flat line": ((0, 0, 2, 2), (0, 1, 2, 1)),
    "one point": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "two points": ((1, 1, 1, 1), (2, 1, 2, 1)),
    "two lines": ((1, 0, 1, 3), (1, 0, 1, 3)),
    "far away": ((1e6, 1e6, 1e6 + 1, 1e6 + 1), (0, 0, 1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_degenerate_boxes_have_finite_losses_and_gradients(kind, dtype):
    pairs = torch.tensor([*DEGENERATE.values()], dtype=dtype)
    predicted = pairs[:, 0].clone().requires_grad_()
    loss = box_loss(predicted, pairs[:, 1], kind)
    loss.sum().backward()
    for name, value, gradient in zip(DEGENERATE, loss, predicted.grad, strict=True):
        assert 0 <= value < 5, name
        assert gradient.isfinite().all() and gradient.abs().max() < 10, (name, gradient)


def test_half_precision_is_computed_in_float32():
    predicted = torch.tensor([[500.0, 500, 520, 520]], dtype=torch.bfloat16, requires_grad=True)
    loss = box_loss(predicted, torch.tensor([[501.0, 500, 521, 520]]), "ciou")
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert predicted.grad.dtype == torch.bfloat16 and predicted.grad.abs().sum() > 0


def test_what_is_no_box_is_refused():
    boxes = random_boxes(3)
    with pytest.raises(ValueError, match=r"predicted: got shape \(3, 3\), expected \(\.\.\., 4\)"):
        box_loss(boxes[:, :3], boxes)
    with pytest.raises(TypeError, match=r"target: got torch\.int64, expected a floating-point tensor"):
        box_loss(boxes, boxes.long())
    with pytest.raises(TypeError, match="first: got list"):
        iou([0, 0, 1, 1], boxes)
    with pytest.raises(ValueError, match=r"kind: got 'l1', expected one of 'iou', 'giou'"):
        box_loss(boxes, boxes, "l1")
    with pytest.raises(ValueError, match=r"first, second: got shapes \(4,\) and \(3, 4\)"):
        pairwise_iou(boxes[0], boxes)
