"""What a system is to the runner: a config, presets, a model, and what a step does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_kernels.conversion import Plan
from rl_kernels.systems.config import Config, Data

C = TypeVar("C", bound=Config)


class ImageShape(NamedTuple):
    """What a network is built for: images of ``channels`` and ``size`` pixels a side, told apart as ``classes``.

    Pixels from 0 to 1 are standardised by ``mean`` and ``std`` of each channel; where these are empty they are not.
    """

    channels: int
    size: int
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Built:
    """A model before its first step.

    Attributes:
        model: maps images ``(B, channels, size, size)`` to logits ``(B, classes)``.
        plan: of what was replaced in it; None for nothing.
    """

    model: nn.Module
    plan: Plan | None = None


Batches = Iterable[tuple[Tensor, Tensor]]
"""Images, standardised and on the device of the run, with their labels."""


class DataSet(Protocol):
    """What is trained on and what is not.

    Attributes:
        name: as the registry has it, or a folder's name.
        classes: their names, in the labels' order.
        train: images with labels, of a type of the reading's.
        test: the same.
        sha256: of everything in it, as hexadecimal text.
    """

    name: str
    classes: tuple[str, ...]
    train: Any
    test: Any
    sha256: str


class Reader(Protocol):
    """Batches of images on the device of a run, for who scores a model.

    Attributes:
        device: there.
        shape: of the images.
    """

    device: torch.device
    shape: ImageShape

    def share(self, pictures: Any) -> Batches:
        """This process's share of all images."""


class Reading(ABC):
    """How the images of a system are read, and how a model is scored on them.

    Pictures are torch data sets whose ``__getitems__`` takes ``(index, seed)`` each and gives a ``loading.Batch``; what
    is drawn for an image follows from both numbers.

    Attributes:
        score: the figure by which the best epoch is chosen; more is better.
    """

    score: str

    @abstractmethod
    def load(self, data: Data) -> Any:
        """Read a :class:`DataSet`.

        Raises:
            FileNotFoundError, ValueError, ImportError: it cannot be had; the message says how it can.
        """

    @abstractmethod
    def split(self, config: Any, data: Any) -> tuple[Any, Any]:
        """Return the images of the set that are trained on, and those held out, or None."""

    @abstractmethod
    def shape(self, config: Any, data: Any, trained: Any) -> ImageShape:
        """Return what the network is built for."""

    @abstractmethod
    def pictures(self, config: Any, images: Any, shape: ImageShape, training: bool) -> Any:
        """Return pictures of the images, augmented if they are trained on."""

    @abstractmethod
    def evaluate(self, reader: Reader, model: nn.Module, pictures: Any) -> dict[str, float]:
        """Return figures of a model by name, ``score`` among them, over all processes; the model is left in eval."""


class Engine(Protocol):
    """What differentiates the losses of a step, in whatever precision and over however many processes."""

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to the parameters', and free its graph."""

    def unsynchronised(self, piece: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        """What runs through ``piece`` within does not average its gradients over processes, if ``wanted``."""


class Plain:
    """The engine of one process: torch's own backward."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unsynchronised(self, piece: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
        return nullcontext()


class System(ABC, Generic[C]):
    """A paper's method of training, which the runner gives data, devices, checkpoints and records.

    Attributes:
        name: on the command line.
        config: the class of its config.
        presets: names of configs, and the values in which each differs from the defaults, nested.
        reading: how its images are read.
    """

    name: str
    reading: Reading
    config: type[C]
    presets: Mapping[str, Mapping[str, Any]]

    @abstractmethod
    def build(self, config: C, shape: ImageShape) -> Built:
        """Make the model from torch's global generator, on the CPU.

        Raises:
            ValueError: a config that no model can have.
        """

    def pieces(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return what is compiled, and wrapped for several processes, one by one: by default the whole model."""
        return (model,)

    def wrap(self, model: nn.Module, pieces: Sequence[nn.Module]) -> nn.Module:
        """Let the model run through these, its pieces wrapped; return what is called from then on."""
        return pieces[0]

    def step(self, config: C, model: nn.Module, images: Tensor, targets: Tensor, engine: Engine) -> Tensor:
        """Differentiate what a batch is trained by, and return the mean loss without its graph.

        Args:
            config: the run's.
            model: what :meth:`wrap` returned, in training mode.
            images: ``(B, channels, size, size)``.
            targets: labels as the system's reading has them; of classes int64 ``(B,)``, or probabilities
                ``(B, classes)`` of mixed images, already smoothed.
            engine: what differentiates.
        """
        smoothing = config.label_smoothing if targets.ndim == 1 else 0.0
        with engine.unsynchronised(model, False):
            loss = F.cross_entropy(model(images), targets, label_smoothing=smoothing)
            engine.backward(loss)
        return loss.detach()

    def updated(self, model: nn.Module) -> None:
        """Do what follows an update of the model's weights: by default nothing."""

    def figures(
        self,
        config: C,
        model: nn.Module,
        step: Callable[[], None],
        data: Callable[[bool], Batches],
    ) -> Mapping[str, Any]:
        """Return final figures besides, or instead of, the runner's.

        Args:
            config: the run's.
            model: as :meth:`build` made it, trained.
            step: does one more step, without an update.
            data: all batches, of training (True) or test.
        """
        return {}
