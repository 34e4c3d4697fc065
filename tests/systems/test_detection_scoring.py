"""Scores: fixed detections against pycocotools' evaluation, and the cases at the edges."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch

from rl_kernels.systems.detection import scoring
from rl_kernels.systems.detection.scoring import Scorer, precision_recall_picture
from rl_kernels.systems.detection.suppression import Detections

CLASSES = ("ant", "bee", "cat", "dog")
EMPTY = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def labels_of(*images):
    """Labels of a batch, of rows of class and box."""
    most = max([1, *map(len, images)])
    rows = [[*each, *[[-1.0, 0, 0, 0, 0]] * (most - len(each))] for each in images]
    return torch.tensor(rows, dtype=torch.float32)


def random_problem(seed, images, boxes, detections):
    """Boxes of the first three classes; detections near them and elsewhere, of any class."""
    random = np.random.default_rng(seed)
    labels, found = [], []
    for _ in range(images):
        start = random.uniform(0, 300, (random.integers(0, boxes + 1), 2))
        edges = np.concatenate([start, start + random.uniform(5, 90, start.shape)], 1)
        kinds = random.integers(0, 3, len(edges))
        labels.append([[float(kind), *row] for kind, row in zip(kinds, edges.tolist(), strict=True)])
        count = int(random.integers(0, detections + 1))
        chosen = random.integers(0, max(len(edges), 1), count)
        near = edges[chosen] + random.normal(0, 4, (count, 4)) if len(edges) else np.tile([0.0, 0, 9, 9], (count, 1))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kind = np.where(random.random(count) < 0.8, kinds[chosen] if len(edges) else 3, random.integers(0, 4, count))
        # Different scores, so that the order of equal ones does not matter.
        scores = random.permutation(count * 7)[:count] / (count * 7 + 1)
        found.append(Detections(torch.tensor(near).float(), torch.tensor(scores).float(), torch.tensor(kind).long()))
    return labels_of(*labels), found


def by_pycocotools(labels, found, limit):
    """The four means, and the mean of each class."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")

    def rows(boxes, kinds, image, **more):
        for number, (box, kind) in enumerate(zip(boxes.double().tolist(), kinds.tolist(), strict=True)):
            size = [box[2] - box[0], box[3] - box[1]]
            each = {"image_id": image, "category_id": int(kind), "bbox": [*box[:2], *size], "area": size[0] * size[1]}
            yield each | {"iscrowd": 0, **{key: value[number].item() for key, value in more.items()}}

    wanted, given = [], []
    for image, (each, its) in enumerate(zip(found, labels, strict=True)):
        its = its[its[:, 0] >= 0]
        wanted += rows(its[:, 1:], its[:, 0], image)
        given += rows(each.boxes, each.labels, image, score=each.scores.double())
    truth, results = coco.COCO(), coco.COCO()
    for made, annotations in ((truth, wanted), (results, given)):
        made.dataset = {
            "images": [{"id": image} for image in range(len(found))],
            "annotations": [each | {"id": number} for number, each in enumerate(annotations, start=1)],
            "categories": [{"id": number} for number in range(len(CLASSES))],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            made.createIndex()
    with contextlib.redirect_stdout(io.StringIO()):
        run = cocoeval.COCOeval(truth, results, "bbox")
        run.params.maxDets = [1, 100, limit]
        run.evaluate()
        run.accumulate()
    precision, recall = run.eval["precision"][:, :, :, 0, 2], run.eval["recall"][:, :, 0, 1]

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else math.nan

    means = {
        "map_50": mean(precision[0]),
        "map": mean(precision),
        "map_75": mean(precision[5]),
        "mar_100": mean(recall),
    }
    return means, [mean(precision[:, :, kind]) for kind in range(len(CLASSES))]


def scores_of(labels, found, limit=300):
    scorer = Scorer(CLASSES, limit)
    half = len(found) // 2
    for part in (slice(0, half), slice(half, None)):
        scorer.update(found[part], labels[part])
    return scorer.compute()


@pytest.fixture(autouse=True)
def quiet(capfd):
    """Nothing is printed, neither by Python nor by C++."""
    yield
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("problem", "limit"), [((0, 12, 6, 9), 300), ((1, 30, 3, 5), 100), ((2, 3, 150, 280), 300), ((3, 3, 150, 280), 100)]
)
def test_scores_are_those_of_pycocotools(problem, limit):
    labels, found = random_problem(*problem)
    means, classes = by_pycocotools(labels, found, limit)
    scores = scores_of(labels, found, limit)
    assert scores.figures() == pytest.approx(means, abs=1e-5)
    assert [each.map for each in scores.classes] == pytest.approx(classes, abs=1e-5, nan_ok=True)
    assert [each.boxes for each in scores.classes] == [int((labels[..., 0] == kind).sum()) for kind in range(4)]
    assert math.isnan(scores.classes[3].map) and scores.classes[3].boxes == 0
    assert 0 < scores.map < scores.map_50 < 1


def test_more_than_100_detections_of_an_image_count():
    start = torch.stack(torch.meshgrid(torch.arange(15), torch.arange(15), indexing="ij"), -1).reshape(-1, 2) * 20.0
    boxes = torch.cat([start, start + 10], 1)
    found = [Detections(boxes, torch.linspace(0.9, 0.1, len(boxes)), torch.zeros(len(boxes), dtype=torch.int64))]
    labels = torch.cat([torch.zeros(1, len(boxes), 1), boxes[None]], 2)
    scores = scores_of(labels, found)
    assert scores.map == scores.map_50 == 1
    assert scores.mar_100 == pytest.approx(100 / 225)
    # Recalls up to 0.44 are reached, of 101.
    assert scores_of(labels, found, 100).map == pytest.approx(45 / 101)


def test_perfect_detections_have_ones():
    labels, _ = random_problem(0, 8, 6, 0)
    found = []
    for rows in labels:
        rows = rows[rows[:, 0] >= 0]
        found.append(Detections(rows[:, 1:], torch.linspace(0.9, 0.5, len(rows)), rows[:, 0].long()))
    scores = scores_of(labels, found)
    assert scores.figures() == {"map_50": 1, "map": 1, "map_75": 1, "mar_100": 1}
    assert all(each.map == each.map_50 == each.mar_100 == 1 for each in scores.classes[:3])


def test_no_detections_have_zeros():
    labels, _ = random_problem(0, 8, 6, 0)
    scores = scores_of(labels, [EMPTY] * 8)
    assert scores.figures() == {"map_50": 0, "map": 0, "map_75": 0, "mar_100": 0}
    assert [each.map for each in scores.classes[:3]] == [0, 0, 0]


@pytest.mark.parametrize("something", [False, True], ids=["nothing found", "something found"])
def test_images_without_boxes_have_no_scores(something):
    found = [EMPTY, Detections(torch.tensor([[0.0, 0, 5, 5]]), torch.ones(1), torch.ones(1).long())]
    scores = scores_of(labels_of([], []), found if something else [EMPTY] * 2)
    assert all(math.isnan(value) for value in scores.figures().values())
    assert scores.images == 2 and "nan" not in scores.table()
    with pytest.raises(ValueError, match="got none of a class with boxes"):
        precision_recall_picture(scores, "nowhere.png")


def test_an_image_without_boxes_makes_precision_lower():
    labels = labels_of([[0, 0, 0, 9, 9]], [])
    right = Detections(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0.5]), torch.tensor([0]))
    wrong = right._replace(scores=torch.tensor([0.9]))
    assert scores_of(labels, [right, EMPTY]).map_50 == 1
    assert scores_of(labels, [right, wrong]).map_50 == pytest.approx(0.5)


def test_no_images_have_no_scores():
    scores = Scorer(CLASSES).compute()
    assert scores.images == 0 and math.isnan(scores.map)


def test_images_that_are_not_scored_are_passed_over():
    labels, found = random_problem(0, 4, 6, 9)
    more = torch.cat([labels, labels[:1]])
    more[-1, :, 0] = -1
    more[-1, 0, 0] = -2
    assert scores_of(more, [*found, found[0]]) == scores_of(labels, found)


def test_scores_can_be_started_again():
    labels, found = random_problem(0, 4, 6, 9)
    scorer = Scorer(CLASSES)
    scorer.update(found, labels.roll(1, 0))
    scorer.reset()
    scorer.update(found, labels)
    assert scorer.compute().map == scores_of(labels, found).map == scorer.compute().map


def test_processes_put_their_images_together(monkeypatch):
    labels, found = random_problem(0, 7, 6, 9)
    shares = []
    for rank in range(2):  # One of them has an image more.
        scorer = Scorer(CLASSES)
        scorer.update(found[rank::2], labels[rank::2])
        shares.append(scorer._records)

    def gather(into, mine):
        assert mine is shares[1]
        into[:] = shares

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    together = scorer.compute()
    monkeypatch.undo()
    assert together.figures() == scores_of(labels, found).figures() and together.images == 7


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="limit: got 50"):
        Scorer(CLASSES, 50)
    with pytest.raises(ValueError, match="classes: got none"):
        Scorer(())
    scorer = Scorer(CLASSES)
    with pytest.raises(ValueError, match="found: got detections of 2 images, expected 1"):
        scorer.update([EMPTY, EMPTY], labels_of([]))
    with pytest.raises(ValueError, match=r"labels: got shape \(3, 5\), expected \(B, M, 5\)"):
        scorer.update([EMPTY], torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"labels: got classes \[4\], expected 0 to 3"):
        scorer.update([EMPTY], labels_of([[4, 0, 0, 1, 1]]))


def test_a_table_and_a_picture_show_every_class(tmp_path):
    labels, found = random_problem(0, 12, 6, 9)
    scores = scores_of(labels, found)
    lines = scores.table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == [*CLASSES, "all"]
    assert lines[-1].split()[1:] == [
        str(int((labels[..., 0] >= 0).sum())),
        *(f"{value:.3f}" for value in (scores.map_50, scores.map, scores.mar_100)),
    ]
    assert lines[5].split()[1:] == ["0", "-", "-", "-"]
    for suffix in ("png", "svg"):
        precision_recall_picture(scores, tmp_path / f"curve.{suffix}")
        assert (tmp_path / f"curve.{suffix}").stat().st_size > 5000
    curve = scores.classes[0].precision
    assert len(curve) == len(scoring.RECALLS) and list(curve) == sorted(curve, reverse=True)
