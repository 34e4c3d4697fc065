"""How good detections are: COCO's average precision and recall, a table of the classes, a picture of the curves.

Torchmetrics computes them by faster-coco-eval; with pycocotools it gives -1 where more than 100 detections count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rl_kernels._tables import as_text, simple_table
from rl_kernels.conversion.options import at_least
from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.detection.data import check_labels, scored
from rl_kernels.systems.detection.suppression import Detections

# As COCO has them; torchmetrics' own are rounded to float32.
IOUS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
RECALLS: list[float] = np.linspace(0, 1, 101).tolist()
COUNTED = 100
"""Detections of an image and class of which COCO takes the recall."""
MOST_CURVES = 20
"""Classes that a picture has curves of, the most frequent; it always has their mean."""


@dataclass(frozen=True)
class ClassScores:
    """Scores of a class, NaN where the images have no box of it.

    Attributes:
        name: of the class.
        boxes: that the images have.
        map: average precision, mean over IoUs from 0.5 to 0.95.
        map_50: average precision at an IoU of 0.5.
        mar_100: recall by the surest 100 detections of each image, mean over the same IoUs.
        precision: at 101 recalls from 0 to 1 and an IoU of 0.5.
    """

    name: str
    boxes: int
    map: float
    map_50: float
    mar_100: float
    precision: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """Scores of detections in a set of images: means over classes, NaN where the images have no box at all.

    Attributes:
        map: average precision, mean over IoUs from 0.5 to 0.95.
        map_50: average precision at an IoU of 0.5.
        map_75: average precision at an IoU of 0.75.
        mar_100: recall by the surest 100 detections of each image and class, mean over the same IoUs.
        classes: scores of each.
        images: that were scored.
    """

    map: float
    map_50: float
    map_75: float
    mar_100: float
    classes: tuple[ClassScores, ...]
    images: int

    def figures(self) -> dict[str, float]:
        """Return the four means by their names."""
        return {name: getattr(self, name) for name in ("map_50", "map", "map_75", "mar_100")}

    def table(self) -> str:
        """Return a table of the classes, the means below, as text."""
        numbers = ("boxes", "mAP50", "mAP50-95", "recall")
        table = simple_table("", "class", *numbers, numbers=numbers)
        for each in self.classes:
            table.add_row(each.name, f"{each.boxes:,}", *(_shown(v) for v in (each.map_50, each.map, each.mar_100)))
        total = f"{sum(each.boxes for each in self.classes):,}"
        table.add_row("all", total, *(_shown(v) for v in (self.map_50, self.map, self.mar_100)))
        return as_text(table)


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


class _Record(NamedTuple):
    """An image's detections, and its boxes: ``(N, 4)``, ``(N,)`` and ``(N,)``; ``(M, 4)`` and ``(M,)``."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    wanted: Tensor
    classes: Tensor


class Scorer:
    """Collects detections of images, over all processes, and scores them.

    Args:
        classes: names of the classes.
        limit: the most detections of an image and class that count, the surest; COCO's own figures have 100.

    Raises:
        ImportError: torchmetrics or faster-coco-eval is missing.
        TypeError: a limit that is no integer.
        ValueError: no class, or a limit below 100.
    """

    def __init__(self, classes: Sequence[str], limit: int = 300) -> None:
        at_least("limit", limit, COUNTED)
        if not classes:
            raise ValueError("classes: got none, expected the name of each")
        try:
            import faster_coco_eval  # noqa: F401  (found missing now, not after an epoch)
            import torchmetrics  # noqa: F401
        except ImportError as error:
            raise ImportError("scores of detections need torchmetrics and faster-coco-eval: make systems") from error
        self.classes, self.limit = tuple(classes), limit
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._records: list[_Record] = []

    def update(self, found: Sequence[Detections], labels: Tensor) -> None:
        """Take what was found in a batch.

        Args:
            found: in each image.
            labels: of the batch, ``(B, M, 5)``, as :class:`.data.BoxPictures` gives them; images that are not scored
                are passed over.

        Raises:
            ValueError: other numbers of images, another shape, a class that there is not.
        """
        check_labels(labels)
        if len(found) != len(labels):
            raise ValueError(f"found: got detections of {len(found)} images, expected {len(labels)}")
        for each, rows, counts in zip(found, labels.cpu(), scored(labels).tolist(), strict=True):
            if not counts:
                continue
            rows = rows[rows[:, 0] >= 0].float()
            record = _Record(
                each.boxes.detach().float().cpu(),
                each.scores.detach().float().cpu(),
                each.labels.cpu().long(),
                rows[:, 1:],
                rows[:, 0].long(),
            )
            for name, its in (("found", record.labels), ("labels", record.classes)):
                if len(its) and not 0 <= int(its.min()) <= int(its.max()) < len(self.classes):
                    raise ValueError(
                        f"{name}: got classes {its.unique().tolist()}, expected 0 to {len(self.classes) - 1}"
                    )
            self._records.append(record)

    def compute(self) -> Scores:
        """Score all images so far, those of all processes: each gets the same."""
        records = _of_all_processes(self._records)
        counts = torch.bincount(torch.cat([each.classes for each in records] or [torch.zeros(0).long()]))
        boxes = [*counts.tolist(), *[0] * (len(self.classes) - len(counts))]
        seen, precision, recall = self._evaluated(records)
        none = (math.nan,) * len(RECALLS)
        classes = []
        for number, name in enumerate(self.classes):
            if number not in seen or not boxes[number]:
                classes.append(ClassScores(name, 0, math.nan, math.nan, math.nan, none))
                continue
            mine, its = precision[:, :, seen.index(number)], recall[:, seen.index(number)]
            curve = tuple(mine[0].tolist())
            classes.append(
                ClassScores(name, boxes[number], float(mine.mean()), float(mine[0].mean()), float(its.mean()), curve)
            )
        there = [seen.index(number) for number in seen if boxes[number]]
        means = (math.nan,) * 4
        if there:
            kept = precision[:, :, there]
            means = (float(kept.mean()), float(kept[0].mean()), float(kept[5].mean()), float(recall[:, there].mean()))
        return Scores(*means, tuple(classes), len(records))

    def _evaluated(self, records: Sequence[_Record]) -> tuple[list[int], Tensor, Tensor]:
        """Classes seen, and their precision ``(IoUs, recalls, classes)`` and recall ``(IoUs, classes)``."""
        import_torchvision()
        from torchmetrics.detection import MeanAveragePrecision

        thresholds = [1, 10, COUNTED] if self.limit == COUNTED else [1, COUNTED, self.limit]
        # Processes have gathered by themselves: torchmetrics waits for ever where one has more images than another.
        metric: Any = MeanAveragePrecision(
            iou_thresholds=IOUS,
            rec_thresholds=RECALLS,
            max_detection_thresholds=thresholds,
            extended_summary=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False
        found = [{"boxes": r.boxes, "scores": r.scores, "labels": r.labels} for r in records]
        metric.update(found, [{"boxes": r.wanted, "labels": r.classes} for r in records])
        seen = sorted({int(label) for r in records for each in (r.labels, r.classes) for label in each.unique()})
        if not seen:
            return [], torch.zeros(10, 101, 0), torch.zeros(10, 0)
        result = metric.compute()
        # Of all sizes of boxes; precision with as many detections as count, recall with 100.
        return seen, result["precision"][:, :, :, 0, -1], result["recall"][:, :, 0, thresholds.index(COUNTED)]


def _of_all_processes(records: list[_Record]) -> list[_Record]:
    """Records of all processes, in turns, as images are shared out."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return records
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, records)
    longest = max(len(share) for share in shares)
    return [share[number] for number in range(longest) for share in shares if number < len(share)]


def precision_recall_picture(scores: Scores, path: Path) -> None:
    """Draw precision against recall at an IoU of 0.5, of each class and their mean; the suffix says in what form.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no class has a box.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture of precision needs matplotlib: pip install 'rl_kernels[demo]'") from error
    there = sorted((each for each in scores.classes if each.boxes), key=lambda each: -each.boxes)
    if not there:
        raise ValueError("scores: got none of a class with boxes, expected at least one")
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"]
    for number, each in enumerate(there[:MOST_CURVES]):
        axes.plot(RECALLS, each.precision, color=colors(number), linewidth=1, label=f"{each.name} {each.map_50:.3f}")
    mean = np.mean([each.precision for each in there], axis=0)
    axes.plot(RECALLS, mean, color="black", linewidth=2.5, label=f"all {scores.map_50:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="IoU 0.5")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(path)
