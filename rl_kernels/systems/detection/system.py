"""A detector, trained, with the options of GSO-YOLO (arXiv 2407.00906) and what they must be held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.conversion.options import at_least
from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import Batches, Built, Engine, ImageShape, System
from rl_kernels.systems.detection.boxes import BoxLoss
from rl_kernels.systems.detection.data import targets_of
from rl_kernels.systems.detection.losses import DetectionLoss
from rl_kernels.systems.detection.modules import SCM
from rl_kernels.systems.detection.network import STRIDES, Detector, Gom
from rl_kernels.systems.detection.reading import Boxes, score
from rl_kernels.systems.detection.transforms import Augmentation
from rl_kernels.systems.replacement import Replacement, plan_of

GOMS: dict[str, Gom] = {"off": False, "gam": True, "control": "control"}


@dataclass(frozen=True)
class Detection:
    """The detector and what it is trained by.

    Attributes:
        scale: ``"pico"``, ``"n"``, ``"s"``, ``"m"`` or ``"l"``.
        gom: the Global Optimization Module: ``"off"``, ``"gam"``, or ``"control"``, as many parameters in plain layers.
        gom_groups: of its 7x7 convolutions.
        scm: the Steady Capture Module: ``"off"``, ``"feature"``, ``"weights"`` or ``"attention"``.
        box: the loss of boxes: ``"ciou"``, ``"eiou"``, ``"diou"``, ``"giou"``, ``"iou"``, or an AIoU, ``"mean"``,
            ``"penalties"`` or ``"adaptive"``.
        norm_momentum: of the norms' running statistics. (YOLOv8's 0.03 suits long runs: after 60 steps a sixth of what
            they begin with is left.)
        augment: how training images are changed.
    """

    scale: Literal["pico", "n", "s", "m", "l"] = "pico"
    gom: Literal["off", "gam", "control"] = "off"
    gom_groups: int = 1
    scm: SCM = "off"
    box: BoxLoss = "ciou"
    norm_momentum: float = 0.03
    augment: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class DetectionConfig(Config):
    """A run of a detector; of one with replaced blocks in its backbone where ``replacement.every`` is a number.

    ``model`` is not read: ``detection`` says what the network is.
    """

    detection: Detection = field(default_factory=Detection)
    replacement: Replacement = field(default_factory=lambda: Replacement(every=None))

    def check(self) -> None:
        super().check()
        at_least("detection.gom_groups", self.detection.gom_groups, 1)
        if not 0 < self.detection.norm_momentum <= 1:
            raise ValueError(
                f"detection.norm_momentum: got {self.detection.norm_momentum}, expected above 0, at most 1"
            )
        if self.data.size is not None and self.data.size % STRIDES[-1]:
            raise ValueError(f"data.size: got {self.data.size}, expected a multiple of {STRIDES[-1]}")
        for name, got in (
            ("data.mixup", self.data.mixup),
            ("data.cutmix", self.data.cutmix),
            ("label_smoothing", self.label_smoothing),
        ):
            if got:
                raise ValueError(f"{name}: got {got}, expected 0: it mixes classes of whole images")
        if self.data.augmentation != "none":
            raise ValueError(f"data.augmentation: got {self.data.augmentation!r}, expected detection.augment instead")
        if self.runtime.strategy == "fsdp2":
            raise ValueError("runtime.strategy: got 'fsdp2', expected 'auto' or 'ddp'")
        if self.model.weights is not None:
            raise ValueError("model.weights: got a path, expected null: a detector begins at random")
        if self.replacement.control != "none":
            raise ValueError(f"replacement.control: got {self.replacement.control!r}, expected 'none' in a detector")


_SHORT: dict[str, Any] = {
    "optimizer": {"learning_rate": 2e-3, "weight_decay": 5e-4, "clip": 10.0},
    "schedule": {"warmup": 0.1},
    "detection": {"norm_momentum": 0.1},
}
PRESETS: dict[str, dict[str, Any]] = {
    # A first look.
    "scenes": {"data": {"name": "scenes"}, "epochs": 20, "batch_size": 16, **_SHORT},
    "trees": {"data": {"name": "trees"}, "epochs": 40, "batch_size": 8, **_SHORT},
    **{
        f"yolov8{scale}": {
            "data": {"name": "coco", "size": 640},
            "optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.937, "weight_decay": 5e-4, "clip": 10.0},
            "schedule": {"warmup": 0.03},
            "detection": {"scale": scale},
            "ema": 0.9999,
            "epochs": 100,
            "batch_size": 64,
        }
        for scale in ("n", "s", "m", "l")
    },
}


class DetectionSystem(System[DetectionConfig]):
    """A detector of the YOLOv8 form, as the config's ``detection`` has it."""

    name = "detection"
    reading = Boxes()
    config = DetectionConfig
    presets = PRESETS

    def build(self, config: DetectionConfig, shape: ImageShape) -> Built:
        wanted = config.detection
        model = Detector(
            shape.classes,
            wanted.scale,
            shape.channels,
            gom=GOMS[wanted.gom],
            gom_groups=wanted.gom_groups,
            scm=wanted.scm,
            image_size=shape.size,
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = wanted.norm_momentum
        if config.replacement.every is None:
            return Built(model)
        plan = plan_of(config.replacement, model.backbone)
        rl.replace(model.backbone, plan)
        return Built(model, plan)

    def step(
        self, config: DetectionConfig, model: nn.Module, images: Tensor, targets: Tensor, engine: Engine
    ) -> Tensor:
        with engine.unsynchronised(model, False):
            loss = DetectionLoss(config.detection.box)(model(images), targets_of(targets)).total
            engine.backward(loss)
        return loss.detach()

    def updated(self, model: nn.Module) -> None:
        model.follow()  # type: ignore[operator]

    def figures(
        self, config: DetectionConfig, model: nn.Module, step: Callable[[], None], data: Callable[[bool], Batches]
    ) -> Mapping[str, Any]:
        assert isinstance(model, Detector)
        found = score(model, data(False), model.classes)
        return {"map_50_by_class": [each.map_50 for each in found.classes]}


SYSTEM = DetectionSystem()
