"""Which cells learn which box: against loops over everything, and by hand."""

import pytest
import torch

from rl_kernels.systems.detection.assigning import Targets, TaskAligned, batch_targets
from rl_kernels.systems.detection.boxes import box_loss, from_centred, iou
from rl_kernels.systems.detection.network import STRIDES, cells


def by_loops(assigner, boxes, scores, centres, targets):
    """One image after the other, one box after the other, one cell after the other."""
    count = len(centres)
    numbers, weights = torch.full(boxes.shape[:2], -1), torch.zeros(boxes.shape[:2], dtype=boxes.dtype)
    for image in range(len(boxes)):
        align, overlap, choices = {}, {}, {cell: [] for cell in range(count)}
        for number in range(targets.boxes.shape[1]):
            if not targets.valid[image, number]:
                continue
            box, label = targets.boxes[image, number], targets.labels[image, number]
            candidates = []
            for cell, (x, y) in enumerate(centres.tolist()):
                if not (box[0] < x < box[2] and box[1] < y < box[3]):
                    continue
                predicted = boxes[image, cell]
                overlap[number, cell] = iou(predicted, box).item()
                ciou = max(0.0, 1 - box_loss(predicted, box, "ciou").item())
                align[number, cell] = scores[image, cell, label].item() ** assigner.alpha * ciou**assigner.beta
                candidates.append(cell)
            candidates.sort(key=lambda cell: (-align[number, cell], cell))
            for cell in candidates[: assigner.top]:
                choices[cell].append(number)
        for cell, wanting in choices.items():
            if wanting:
                numbers[image, cell] = min(wanting, key=lambda number: (-overlap[number, cell], number))
        for number in set(numbers[image].tolist()) - {-1}:
            mine = (numbers[image] == number).nonzero()[:, 0].tolist()
            highest = max(align[number, cell] for cell in mine)
            most = max(overlap[number, cell] for cell in mine)
            for cell in mine:
                weights[image, cell] = align[number, cell] / highest * most if highest > 0 else 0
    return numbers, weights


def case(seed, images=3, most=6, size=64, classes=4, near=True):
    """Random predictions and boxes, some of which reach out of the image; near: around the cells' centres."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    centres, _ = cells([(size // stride, size // stride) for stride in STRIDES], torch.float64, torch.device("cpu"))
    sizes = 4 + 40 * random(images, len(centres), 2)
    middles = centres + 10 * (random(images, len(centres), 2) - 0.5) if near else size * random(*sizes.shape)
    boxes = from_centred(torch.cat((middles, sizes), -1))
    counts = torch.randint(0, most + 1, (images,), generator=generator).tolist()
    wanted = [from_centred(torch.cat((size * random(n, 2), 2 + 50 * random(n, 2)), 1)) for n in counts]
    labels = [torch.randint(classes, (n,), generator=generator) for n in counts]
    return boxes, random(images, len(centres), classes), centres, batch_targets(wanted, labels)


def same(assigner, *given):
    found = assigner(*given)
    numbers, weights = by_loops(assigner, *given)
    assert torch.equal(found.box, numbers)
    assert torch.equal(found.positive, numbers >= 0)
    torch.testing.assert_close(found.weight, weights)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(seed):
    found = same(TaskAligned(), *case(seed, near=seed % 2 == 0))
    assert found.positive.any() and ((found.weight >= 0) & (found.weight <= 1)).all()


@pytest.mark.parametrize("assigner", [TaskAligned(top=1), TaskAligned(3, 1.0, 2.0), TaskAligned(top=1000)])
def test_options(assigner):
    same(assigner, *case(20, most=10))


def test_more_boxes_than_cells():
    """And so cells that several boxes want: 21 cells, 60 boxes."""
    found = same(TaskAligned(), *case(30, images=2, most=60, size=32))
    assert found.positive.sum() > 20


def one_box(*boxes, size=32, labels=None):
    """Predictions that are all one box of 16 x 16 around their cell, with scores of 0.25."""
    centres, _ = cells([(size // stride, size // stride) for stride in STRIDES], torch.float64, torch.device("cpu"))
    predicted = from_centred(torch.cat((centres, torch.full_like(centres, 16)), 1))[None]
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else labels
    targets = batch_targets([torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)], [labels])
    return predicted, torch.full((1, len(centres), 2), 0.25, dtype=torch.float64), centres, targets


def test_by_hand():
    """Of the cells inside of an exact box the one in its middle is best; the others follow by distance."""
    given = one_box((4, 4, 20, 20))
    found = same(TaskAligned(top=3), *given)
    # The centre (12, 12) is the cell in row 1, column 1 of the first level.
    assert found.box[0, 5] == 0 and found.weight[0, 5] == 1
    # Next are (8, 8) of the second level, and (16, 16) of the third: IoU (12/16)^2 / (2 - (12/16)^2), as far away.
    overlap = (12 / 16) ** 2 / (2 - (12 / 16) ** 2)
    ciou = overlap - (4**2 + 4**2) / (20**2 + 20**2)
    assert found.positive.nonzero()[:, 1].tolist() == [5, 16, 20]
    assert found.weight[0, 16].item() == pytest.approx(ciou**6) == found.weight[0, 20].item()


def test_equal_cells_are_taken_from_the_first_on():
    predicted, scores, centres, targets = one_box((0, 0, 32, 32))
    predicted[:] = torch.tensor([0.0, 0, 16, 32])
    found = same(TaskAligned(top=5), predicted, scores, centres, targets)
    assert found.positive.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4]
    assert found.weight[0, :5].tolist() == [0.5] * 5, "the highest IoU, where all are the best"


def test_a_cell_goes_to_the_box_that_it_overlaps_most():
    predicted, scores, centres, targets = one_box((4, 4, 20, 20), (4, 4, 20, 22), (4, 4, 20, 20))
    found = same(TaskAligned(top=1), predicted, scores, centres, targets)
    assert found.positive.sum() == 1 and found.box[0, 5] == 0, "the first of two equal ones"
    scores[0, 5, 1] = 1
    targets = targets._replace(labels=torch.tensor([[0, 1, 0]]))
    found = same(TaskAligned(top=1), predicted, scores, centres, targets)
    assert found.box[0, 5] == 0, "though it is better aligned with the second"


def test_boxes_without_a_cell_or_an_overlap():
    found = same(TaskAligned(), *one_box((5, 5, 6, 6), (40, 40, 60, 60), (-30, -30, -1, -1), (4, 4, 12, 4)))
    assert not found.positive.any() and not found.weight.any(), "no centre is inside of any"
    found = same(TaskAligned(), *one_box((-20, -20, 20, 20)))
    assert found.positive.sum() == 6 and found.weight.sum() > 0, "reaching out of the image: 4, 1 and 1 cells"
    predicted, scores, centres, targets = one_box((0, 0, 32, 32))
    found = same(TaskAligned(), predicted + 100, scores, centres, targets)
    assert found.positive.sum() == 10 and not found.weight.any(), "no prediction is near: cells, but no weight"


def test_images_without_boxes():
    boxes, scores, centres, _ = case(0, images=2)
    for counts in ((0, 0), (0, 2)):
        wanted = [torch.tensor([[8.0, 8, 30, 30]], dtype=torch.float64).repeat(count, 1) for count in counts]
        targets = batch_targets(wanted, [torch.zeros(count, dtype=torch.int64) for count in counts])
        found = same(TaskAligned(), boxes, scores, centres, targets)
        assert not found.positive[0].any() and bool(found.positive[1].any()) == (counts[1] > 0)


def test_padding_says_nothing():
    boxes, scores, centres, targets = case(3)
    padded = Targets(
        torch.cat((targets.boxes, torch.full((3, 2, 4), torch.nan)), 1),
        torch.cat((targets.labels, torch.full((3, 2), -7)), 1),
        torch.cat((targets.valid, torch.zeros(3, 2, dtype=torch.bool)), 1),
    )
    for ours, theirs in zip(TaskAligned()(boxes, scores, centres, padded), TaskAligned()(
        boxes, scores, centres, targets
    ), strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)


def test_float32_agrees():
    boxes, scores, centres, targets = case(5)
    found = TaskAligned()(boxes.float(), scores.float(), centres.float(), targets)
    expected = TaskAligned()(boxes, scores, centres, targets)
    assert found.weight.dtype == torch.float32 and torch.equal(found.box, expected.box)
    torch.testing.assert_close(found.weight.double(), expected.weight, rtol=1e-3, atol=1e-6)


def test_targets_of_a_batch():
    boxes = [torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]]), torch.zeros(0, 4), torch.tensor([[4.0, 4, 4, 9]])]
    found = batch_targets(boxes, [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([5])])
    assert found.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert found.labels.tolist() == [[1, 2], [0, 0], [5, 0]]
    assert found.boxes[2, 0].tolist() == [4, 4, 4, 9] and found.boxes.shape == (3, 2, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.to("cpu"), found, strict=True))


def test_bad_input_is_refused():
    box, label = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0])
    with pytest.raises(ValueError, match="boxes, labels: got those of 1 and 0 images"):
        batch_targets([box], [])
    with pytest.raises(ValueError, match=r"boxes\[1\], labels\[1\]: got shapes \(1, 4\) and \(2,\)"):
        batch_targets([box, box], [label, label.repeat(2)])
    with pytest.raises(ValueError, match=r"boxes\[0\]: got a right or bottom edge before"):
        batch_targets([box.flip(1)], [label])
    with pytest.raises(ValueError, match=r"labels\[0\]: got -1, expected numbers from 0"):
        batch_targets([box], [label - 1])
    with pytest.raises(TypeError, match=r"boxes\[0\]: got torch\.int64"):
        batch_targets([box.long()], [label])
    with pytest.raises(ValueError, match="top: got 0, expected at least 1"):
        TaskAligned(top=0)
    with pytest.raises(ValueError, match="beta: got -1, expected no less than 0"):
        TaskAligned(beta=-1)
    boxes, scores, centres, targets = case(0)
    with pytest.raises(ValueError, match=r"boxes, scores: got shapes \(3, 84, 4\) and \(3, 80, 4\)"):
        TaskAligned()(boxes, scores[:, :80], centres, targets)
    with pytest.raises(ValueError, match=r"centres: got shape \(80, 2\), expected \(84, 2\)"):
        TaskAligned()(boxes, scores, centres[:80], targets)
    with pytest.raises(ValueError, match=r"targets: got shapes .*, B 3"):
        TaskAligned()(boxes, scores, centres, Targets(*(each[:2] for each in targets)))
    with pytest.raises(ValueError, match=r"targets\.labels: got \d, expected 0 to 0"):
        TaskAligned()(boxes, scores[..., :1], centres, targets)
