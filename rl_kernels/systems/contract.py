"""What a system is to the runner: a config, presets, a model, and the loss of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from rl_kernels.conversion import Plan
from rl_kernels.systems.config import Config
from rl_kernels.systems.networks import ImageShape

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Built:
    """A model before its first step.

    Attributes:
        model: maps images ``(B, channels, size, size)`` to logits ``(B, classes)``.
        plan: of what was replaced in it; None for nothing.
    """

    model: nn.Module
    plan: Plan | None = None


class System(ABC, Generic[C]):
    """A paper's method of training, which the runner gives data, devices, checkpoints and records.

    Attributes:
        name: on the command line.
        config: the class of its config.
        presets: names of configs, and the values in which each differs from the defaults, nested.
    """

    name: str
    config: type[C]
    presets: Mapping[str, Mapping[str, Any]]

    @abstractmethod
    def build(self, config: C, shape: ImageShape) -> Built:
        """Make the model from torch's global generator, on the CPU.

        Raises:
            ValueError: a config that no model can have.
        """

    def loss(self, config: C, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, to be differentiated.

        Args:
            config: the run's.
            model: in training mode.
            images: ``(B, channels, size, size)``.
            targets: int64 ``(B,)``, or probabilities ``(B, classes)`` of mixed images, already smoothed.
        """
        smoothing = config.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(model(images), targets, label_smoothing=smoothing)
