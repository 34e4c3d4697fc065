"""Suppression: cases by hand, against a loop over all pairs, and against torchvision's operator where it loads."""

from types import SimpleNamespace

import pytest
import torch

from rl_kernels.systems.detection import suppression
from rl_kernels.systems.detection.boxes import from_centred, pairwise_iou
from rl_kernels.systems.detection.suppression import (
    describe_suppression,
    detections,
    suppress,
    why_not_torchvision,
)


class StandIn:
    """What torchvision's ``batched_nms`` does, where its operator does not load: classes are told apart by a shift."""

    @staticmethod
    def batched_nms(boxes, scores, labels, threshold):
        shifted = boxes + (labels.to(boxes) * (boxes.max() + 1))[:, None]
        kept = torch.tensor(by_loops(shifted, scores, torch.zeros_like(labels), threshold, len(boxes)))
        return kept[scores[kept].flip(0).sort(descending=True).indices.flip(0)]  # Equal scores in another order.


@pytest.fixture(params=["plain torch", "torchvision"])
def way(request, monkeypatch):
    if request.param == "torchvision" and why_not_torchvision() is not None:
        monkeypatch.setattr(suppression, "import_torchvision", lambda: SimpleNamespace(ops=StandIn))
    reason = "asked for" if request.param == "plain torch" else None
    monkeypatch.setattr(suppression, "why_not_torchvision", lambda: reason)


def by_loops(boxes, scores, labels, threshold, limit):
    overlaps = pairwise_iou(boxes.double(), boxes.double()).tolist()
    kept = []
    for index in sorted(range(len(boxes)), key=lambda index: (-scores[index].item(), index)):
        if all(labels[index] != labels[other] or overlaps[index][other] <= threshold for other in kept):
            kept.append(index)
    return kept[:limit]


def tensors(*rows):
    """Rows of left, top, right, bottom, score and label."""
    found = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return found[:, :4], found[:, 4], found[:, 5].long()


BY_HAND = {
    "none": ([], 0.5, []),
    "one": ([(0, 0, 2, 2, 0.1, 0)], 0.5, [0]),
    # IoU of the first and second 3/5, of the second and third 3/5, of the first and third 2/6.
    "a chain": ([(0, 0, 4, 1, 0.9, 0), (1, 0, 5, 1, 0.8, 0), (2, 0, 6, 1, 0.7, 0)], 0.5, [0, 2]),
    "surest last": ([(0, 0, 4, 1, 0.7, 0), (1, 0, 5, 1, 0.8, 0), (2, 0, 6, 1, 0.9, 0)], 0.5, [2, 0]),
    "at the threshold": ([(0, 0, 4, 1, 0.9, 0), (0, 0, 2, 1, 0.8, 0)], 0.5, [0, 1]),
    "above it": ([(0, 0, 4, 1, 0.9, 0), (0, 0, 2.01, 1, 0.8, 0)], 0.5, [0]),
    "two classes": ([(0, 0, 4, 1, 0.9, 0), (0, 0, 4, 1, 0.8, 7)], 0.5, [0, 1]),
    "identical": ([(0, 0, 4, 1, 0.5, 3)] * 4, 0.5, [0]),
    "identical, threshold 1": ([(0, 0, 4, 1, 0.5, 3)] * 3, 1.0, [0, 1, 2]),
    "ties": ([(0, 0, 1, 1, 0.5, 0), (9, 0, 9, 1, 1, 0), (5, 0, 6, 1, 0.5, 0), (5, 0, 6, 1, 0.5, 1)], 0.5, [1, 0, 2, 3]),
    "threshold 0": ([(0, 0, 4, 1, 0.9, 0), (3.9, 0, 5, 1, 0.8, 0), (4, 0, 5, 1, 0.7, 0)], 0.0, [0, 2]),
    "points": ([(1, 1, 1, 1, 0.9, 0), (1, 1, 1, 1, 0.8, 0), (0, 0, 2, 2, 0.7, 0)], 0.5, [0, 1, 2]),
    # A shift by class times the greatest coordinate would lay these two on each other.
    "negative": ([(-4, 0, -2, 2, 0.9, 1), (7, 0, 9, 2, 0.8, 0), (0, 0, 10, 9, 0.7, 0)], 0.5, [0, 1, 2]),
}  # fmt: skip


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    rows, threshold, expected = BY_HAND[name]
    kept = suppress(*tensors(*rows), threshold)
    assert kept.dtype == torch.int64 and kept.tolist() == expected
    assert by_loops(*tensors(*rows), threshold, 300) == expected, "the loop"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("classes", [1, 5])
def test_against_a_loop(classes, threshold):
    generator = torch.Generator().manual_seed(classes)
    centred = torch.rand(300, 4, generator=generator) * torch.tensor([60, 60, 30, 30]) - torch.tensor([9, 9, 0, 0])
    # Scores and boxes that come more than once.
    boxes = from_centred(torch.cat((centred[:250], centred[:50])))
    scores = (torch.rand(300, generator=generator) * 50).floor() / 50
    labels = torch.randint(classes, (300,), generator=generator)
    expected = by_loops(boxes, scores, labels, threshold, 300)
    assert suppress(boxes, scores, labels, threshold).tolist() == expected
    assert suppress(boxes, scores, labels, threshold, limit=7).tolist() == expected[:7]


@pytest.mark.usefixtures("way")
def test_detections_of_a_batch():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 9, 9]]]).repeat(3, 1, 1)
    scores = torch.zeros(3, 3, 2)
    scores[0] = torch.tensor([[0.2, 0.6], [0.3, 0.5], [0.0, 0.4]])
    scores[2, 2, 0] = 0.01
    first, second, third = detections(boxes, scores, confidence=0.01)
    assert first.labels.tolist() == [1, 1, 0] and first.scores.tolist() == pytest.approx([0.6, 0.4, 0.3])
    assert first.boxes.tolist() == [[0, 0, 4, 4], [8, 8, 9, 9], [0, 0, 4, 4]]
    assert second.boxes.shape == (0, 4) and second.scores.shape == second.labels.shape == (0,)
    assert third.boxes.tolist() == [[8, 8, 9, 9]] and third.labels.tolist() == [0]
    assert [len(each.labels) for each in detections(boxes, scores, 0.01, limit=1)] == [1, 0, 1]
    assert detections(boxes, scores, 0.01, candidates=1)[0].scores.tolist() == pytest.approx([0.6])


def test_what_serves_is_said():
    assert describe_suppression() in ("torchvision's operator", f"plain torch: {why_not_torchvision()}")


def test_bad_input_is_refused():
    boxes, scores, labels = tensors((0, 0, 1, 1, 0.5, 0))
    with pytest.raises(ValueError, match=r"scores: got shape \(2,\), expected \(1,\), one of each box"):
        suppress(boxes, scores.repeat(2), labels)
    with pytest.raises(TypeError, match=r"labels: got torch\.float32, expected integers"):
        suppress(boxes, scores, scores)
    with pytest.raises(ValueError, match=r"threshold: got 70, expected 0 to 1"):
        suppress(boxes, scores, labels, threshold=70)
    with pytest.raises(ValueError, match="limit: got 0, expected at least 1"):
        suppress(boxes, scores, labels, limit=0)
    with pytest.raises(ValueError, match=r"boxes, scores: got shapes \(1, 4\) and \(1,\), expected \(B, A, 4\)"):
        detections(boxes, scores)
    with pytest.raises(ValueError, match="confidence: got 2, expected 0 to 1"):
        detections(boxes[None], scores[None, None], confidence=2)
