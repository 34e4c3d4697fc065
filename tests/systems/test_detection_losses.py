"""What a batch is trained by: by hand, what it reaches, where it is least; and a small detector that learns by it."""

import math

import pytest
import torch
from torch import nn

from rl_kernels.systems.detection.assigning import Assignment, TaskAligned, batch_targets
from rl_kernels.systems.detection.boxes import BOX_LOSSES, pairwise_iou, to_distances
from rl_kernels.systems.detection.losses import DetectionLoss, distribution_loss
from rl_kernels.systems.detection.modules import SteadyWeights
from rl_kernels.systems.detection.network import BINS, STRIDES, Detector, cells, read_levels
from rl_kernels.systems.detection.suppression import detections


def zero_levels(size=32, classes=2, images=1):
    return [torch.zeros(images, 4 * BINS + classes, size // stride, size // stride) for stride in STRIDES]


def targets_of(*boxes, labels=None):
    labels = [0] * len(boxes) if labels is None else labels
    return batch_targets([torch.tensor(boxes).float().reshape(-1, 4)], [torch.tensor(labels, dtype=torch.int64)])


def test_by_hand():
    """Logits of zero: scores of a half; distances of 7.5 strides, so the cell at (4, 4) has a box of 120 x 120."""
    outputs = read_levels(zero_levels())
    targets = targets_of((-26, -26, 34, 34), labels=[1])
    box, weight = torch.full((1, 21), -1), torch.zeros(1, 21)
    box[0, 0], weight[0, 0] = 0, 0.5
    found = DetectionLoss("iou").of_assigned(outputs, outputs.boxes(), targets, Assignment(box, weight))
    assert found.box.item() == pytest.approx(7.5 * 0.5 * (1 - 60**2 / 120**2)), "a sum of weights below 1 counts as 1"
    assert found.classes.item() == pytest.approx(0.5 * 21 * 2 * math.log(2))
    assert found.distribution.item() == pytest.approx(1.5 * 0.5 * math.log(16))
    assert found.total.item() == pytest.approx(sum(each.item() for each in found[1:]))
    box[0, 1], weight[0, 1] = 0, 1.5
    found = DetectionLoss("iou", 1.0, 2.0, 3.0).of_assigned(outputs, outputs.boxes(), targets, Assignment(box, weight))
    # The box of the cell at (12, 4) is (-48, -56, 72, 64) and has all of the target inside of it.
    assert found.box.item() == pytest.approx(1 - 60**2 / 120**2), "a mean with weights"
    assert found.classes.item() == pytest.approx(2 * 21 * 2 * math.log(2) / 2)
    assert found.distribution.item() == pytest.approx(3 * math.log(16))


def test_the_scores_that_are_learnt():
    """The gradient of BCE is the score less the one wanted, which is the weight at the box's class and 0 elsewhere."""
    levels = [level.requires_grad_() for level in zero_levels()]
    outputs = read_levels(levels)
    targets = targets_of((0, 0, 8, 8), (8, 8, 30, 30), labels=[1, 0])
    box, weight = torch.full((1, 21), -1), torch.zeros(1, 21)
    box[0, 3], weight[0, 3], box[0, 20], weight[0, 20] = 1, 0.75, 0, 0.25
    loss = DetectionLoss("iou", 0.0, 1.0, 0.0)
    loss.of_assigned(outputs, outputs.boxes(), targets, Assignment(box, weight)).total.backward()
    gradients = torch.cat([level.grad.flatten(2) for level in levels], 2)[0, 4 * BINS :].T
    expected = torch.full((21, 2), 0.5)
    expected[3, 0], expected[20, 1] = 0.5 - 0.75, 0.5 - 0.25
    torch.testing.assert_close(gradients, expected)


def test_distribution_loss_by_hand():
    logits = torch.randn(5, BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = logits.log_softmax(-1)
    distances = torch.tensor([3.25, 0.0, 15.0, -2.0, 99.0], dtype=torch.float64)
    by_hand = [-0.75 * logs[0, 3] - 0.25 * logs[0, 4], -logs[1, 0], -logs[2, 15], -logs[3, 0], -logs[4, 15]]
    torch.testing.assert_close(distribution_loss(logits, distances), torch.stack(by_hand))
    # Least where the two bins have the shares that lie on either side.
    best = torch.full((BINS,), -50.0, dtype=torch.float64)
    best[3], best[4] = math.log(0.75), math.log(0.25)
    logits = best.clone().requires_grad_()
    distribution_loss(logits, distances[0]).backward()
    assert logits.grad.abs().max() < 1e-12


def perfect_levels(targets, classes=2, size=64, sure=12.0):
    """Levels in which every cell inside of a box predicts it, and its class; the others predict no class."""
    centres, strides = cells(
        [(size // stride, size // stride) for stride in STRIDES], torch.float32, torch.device("cpu")
    )
    columns = torch.full((len(centres), 4 * BINS + classes), -sure)
    for box, label in zip(targets.boxes[0], targets.labels[0], strict=True):
        distances = to_distances(box, centres) / strides[:, None]
        for cell in (distances.amin(1) > 0).nonzero()[:, 0].tolist():
            columns[cell, 4 * BINS + label] = sure
            for side, distance in enumerate(distances[cell].tolist()):
                low, share = int(distance), distance % 1
                columns[cell, side * BINS + low] = sure + math.log(max(1 - share, 1e-6))
                columns[cell, side * BINS + low + 1] = sure + math.log(max(share, 1e-6))
    parts = columns.T[None].split([(size // stride) ** 2 for stride in STRIDES], 2)
    return [part.unflatten(2, (size // stride,) * 2) for part, stride in zip(parts, STRIDES, strict=True)]


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_perfect_predictions_have_the_least_loss(kind):
    targets = targets_of((5, 6, 27, 30), (33, 20, 60, 62), labels=[0, 1])
    # All cells inside, none of which is wrong here, so that none that is sure counts as background.
    loss = DetectionLoss(kind, assigner=TaskAligned(top=100))
    levels = perfect_levels(targets)
    least = loss(levels, targets)
    assert least.box < 0.01 and least.classes < 0.02
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        noisy = [level + 2 * torch.randn(level.shape, generator=generator) for level in levels]
        found = loss(noisy, targets)
        assert all(worse > best for worse, best in zip(found, least, strict=True))
    apart = [level.clone() for level in levels]
    for level in apart:
        level[:, : 4 * BINS] = level[:, : 4 * BINS].roll(1, 1)
    assert loss(apart, targets).total > 3 * least.total


OPTIONS = [
    {},
    {"gom": True, "scm": "feature"},
    {"gom": "control", "scm": "weights"},
    {"gom": True, "gom_groups": 4, "scm": "attention"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_reach_every_parameter(options):
    """Boxes of 15 strides of each level, as big as an untrained one predicts; two are bigger than the image."""
    model = Detector(3, "pico", image_size=64, **options)
    if isinstance(model.backbone.steady, SteadyWeights):
        nn.init.zeros_(model.backbone.steady.average)  # While it equals the weight, their shares make no difference.
    boxes = [torch.tensor([[32.0 - half, 32 - half, 32 + half, 32 + half] for half in (60, 120, 240)])] * 2
    targets = batch_targets(boxes, [torch.tensor([0, 1, 2])] * 2)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss = DetectionLoss("mean", assigner=TaskAligned(top=100))(model(images), targets)
    loss.total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_images_without_boxes(kind):
    model = Detector(3, "pico", image_size=64)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    none, one = torch.zeros(0, 4), torch.tensor([[10.0, 10, 40, 50]])
    for boxes in ((none, none), (none, one)):
        targets = batch_targets(boxes, [torch.zeros(len(each), dtype=torch.int64) for each in boxes])
        model.zero_grad()
        loss = DetectionLoss(kind)(model(images), targets)
        loss.total.backward()
        assert all(each.isfinite() for each in loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), "zero, not missing"
    assert loss.box > 0
    assert DetectionLoss(kind)(zero_levels(images=2), batch_targets([none] * 2, [none[:, 0].long()] * 2)).box == 0


def test_half_precision_is_judged_in_float32():
    levels = [torch.randn(1, 4 * BINS + 2, 64 // s, 64 // s, dtype=torch.bfloat16).requires_grad_() for s in STRIDES]
    targets = targets_of((5, 6, 27, 30))
    loss = DetectionLoss()(levels, targets)
    torch.testing.assert_close(loss.total, DetectionLoss()([level.float() for level in levels], targets).total)
    loss.total.backward()
    assert all(level.grad.dtype == torch.bfloat16 for level in levels)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="box: got 'siou', expected one of 'iou'"):
        DetectionLoss("siou")
    with pytest.raises(ValueError, match="classes_gain: got -1, expected no less than 0"):
        DetectionLoss(classes_gain=-1)
    with pytest.raises(ValueError, match=r"targets\.labels: got 2, expected 0 to 1"):
        DetectionLoss()(zero_levels(), targets_of((0, 0, 9, 9), labels=[2]))
    with pytest.raises(ValueError, match=r"targets: got shapes .*, B 2"):
        DetectionLoss()(zero_levels(images=2), targets_of((0, 0, 9, 9)))
    with pytest.raises(ValueError, match=r"logits, distances: got shapes \(2, 4\) and \(2,\)"):
        distribution_loss(torch.zeros(2, 4), torch.zeros(2))


# Learning.


def scene(generator, size=64):
    """Noise, and in three quarters of it a rectangle that is red (class 0) or green (class 1)."""
    image, half = 0.2 * torch.rand(3, size, size, generator=generator), size // 2
    boxes, labels = [], []
    for left, top in ((0, 0), (half, 0), (0, half)):
        width, height, x, y, label = torch.rand(5, generator=generator).tolist()
        width, height = 12 + int(17 * width), 12 + int(17 * height)
        x, y, label = left + int(x * (half - width)), top + int(y * (half - height)), int(2 * label)
        image[label, y : y + height, x : x + width] += 0.7
        boxes.append([x, y, x + width, y + height])
        labels.append(label)
    return image, torch.tensor(boxes).float(), torch.tensor(labels)


def learn(steps, box, **options):
    """Train on eight scenes; return the highest IoU of a sure detection of its class for each box, and all of these."""
    generator = torch.Generator().manual_seed(3)
    images, boxes, labels = zip(*(scene(generator) for _ in range(8)), strict=True)
    batch, targets = torch.stack(images), batch_targets(boxes, labels)
    model = Detector(2, "pico", image_size=64, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # So few steps are too few for running statistics of 0.03.
    loss, rate = DetectionLoss(box), 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(batch), targets).total.backward()
        optimizer.step()
        schedule.step()
        model.follow()
    with torch.no_grad():
        found = detections(*model.eval()(batch), confidence=0.4)
    overlaps = []
    for detected, its_boxes, its_labels in zip(found, boxes, labels, strict=True):
        alike = detected.labels[:, None] == its_labels
        overlap = torch.where(alike, pairwise_iou(detected.boxes, its_boxes), 0)
        overlaps.append(torch.cat((overlap, torch.zeros(1, len(its_boxes)))).amax(0))
    return torch.cat(overlaps), found


def test_a_detector_learns_eight_images_by_heart():
    overlaps, found = learn(80, "ciou")
    assert len(overlaps) == 24 and overlaps.mean() > 0.9 and overlaps.min() > 0.8, overlaps
    assert sum(len(each.boxes) for each in found) < 2 * 24


@pytest.mark.slow
@pytest.mark.parametrize(("box", "options"), list(zip(("mean", "penalties", "adaptive"), OPTIONS[1:], strict=True)))
def test_every_option_learns_them(box, options):
    overlaps, _ = learn(160, box, **options)
    assert overlaps.mean() > 0.9 and overlaps.min() > 0.8, overlaps
