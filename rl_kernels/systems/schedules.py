"""How long, and how fast, papers train: parts of the systems' presets."""

from __future__ import annotations

from typing import Any

CIFAR: dict[str, Any] = {
    "optimizer": {"name": "sgd", "learning_rate": 0.8, "weight_decay": 1e-4},
    "schedule": {"warmup": 0.025},
    "epochs": 400,
    "batch_size": 1024,
}
"""SGD for 400 epochs, ten of them warm-up: public code of MAN++, by the group of Replacement Learning and MLAAN."""

IMAGENET: dict[str, Any] = {
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 1e-4},
    "schedule": {"warmup": 0.0},
    "runtime": {"precision": "bf16-mixed", "channels_last": True},
    "epochs": 90,
    "batch_size": 256,
}
"""SGD for 90 epochs."""

IMAGENET_DATA: dict[str, Any] = {"name": "imagenet", "size": 224, "augmentation": "resized-crop", "workers": 8}
"""At 224 pixels."""
