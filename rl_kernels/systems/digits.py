"""Training on scikit-learn's digits: 1797 images of 8x8 pixels that come with the library.

:func:`load_digits` makes the split, :func:`build_model` a model from a seed, whole or with blocks replaced, and
:func:`train` trains it. Everything random follows from the seed, so that two variants of a model start from the same
weights and see the same batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rl_kernels as rl
from rl_kernels._moved import renamed
from rl_kernels.systems.models import DigitsResNet, DigitsViT


class Digits(NamedTuple):
    """A training and a test split; images float32 ``(n, 1, 8, 8)``, labels int64 ``(n,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class System:
    """How a model is built and trained; ``quick_epochs`` is for a first look."""

    build: Callable[[], nn.Module]
    epochs: int
    quick_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05


SYSTEMS = {
    "DigitsResNet": System(DigitsResNet, epochs=10, quick_epochs=3, batch_size=64, learning_rate=5e-3),
    "DigitsViT": System(DigitsViT, epochs=8, quick_epochs=3, batch_size=48, learning_rate=4e-3),
}


@dataclass
class History:
    """What one training run recorded.

    Attributes:
        seed: of the initial weights and of the data's order.
        train_loss: mean cross-entropy over each epoch's steps.
        test_accuracy: fraction of the test images classified rightly after each epoch.
        step_seconds: duration of each step (forward, backward, update).
        optimizer_bytes: size of the optimizer's state.
    """

    seed: int
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_bytes: int = 0


def load_digits(test_fraction: float = 0.2, seed: int = 0) -> Digits:
    """Load the digits, split so that both parts have the same share of every class, and standardise the pixels.

    Args:
        test_fraction: share of the images that is held out.
        seed: of the split. Runs that are to be compared keep it.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'rl_kernels[demo]'") from error

    bunch = datasets.load_digits()
    parts = model_selection.train_test_split(
        bunch.images, bunch.target, test_size=test_fraction, stratify=bunch.target, random_state=seed
    )
    train_images, test_images = (torch.as_tensor(part, dtype=torch.float32).unsqueeze(1) for part in parts[:2])
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.int64) for part in parts[2:])
    mean, std = train_images.mean(), train_images.std()
    return Digits((train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels)


def build_model(system: System, seed: int, every: int | None = None) -> nn.Module:
    """Build a system's model from a seed, whole or with a block in ``every`` replaced.

    What stays has the same initial weights either way. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = system.build()
    return model if every is None else rl.replace(model, rl.plan(model, every=every))


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make the AdamW optimizer of a run; biases, norms and mixing coefficients are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of an optimizer's state; it is empty before the first step."""
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return sum(entry.nbytes for entry in entries if isinstance(entry, Tensor))


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Take one step on one batch and return its cross-entropy; no gradients are left behind."""
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of ``images`` that the model, in evaluation mode, classifies as ``labels`` say."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices 0 .. ``size`` - 1 in random order, int64, ``batch_size`` at a time (the last may be fewer)."""
    yield from torch.randperm(size, generator=generator).split(batch_size)


def steps_per_epoch(data: Digits, batch_size: int) -> int:
    """Return the number of batches that one pass over the training images takes."""
    return math.ceil(len(data.train_labels) / batch_size)


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    on_step: Callable[[], object] | None = None,
) -> History:
    """Train a classifier with AdamW under a one-cycle learning rate.

    Args:
        model: maps images ``(B, 1, 8, 8)`` to logits ``(B, 10)``; trained in place, in its own dtype and on its own
            device. Replace blocks before the call: the optimizer is made here.
        data: the images and labels.
        epochs: passes over the training images.
        seed: of the order in which they come.
        batch_size: images a step; the last step of an epoch may have fewer.
        learning_rate: the highest of the cycle.
        weight_decay: of matrices and convolution kernels.
        on_step: called after every step, for a progress bar.

    Returns:
        The run's record.
    """
    like = next(model.parameters())
    train_images, test_images = (images.to(like) for images in (data.train_images, data.test_images))
    train_labels, test_labels = (labels.to(like.device) for labels in (data.train_labels, data.test_labels))

    optimizer = make_optimizer(model, learning_rate, weight_decay)
    rl.check(model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps_per_epoch(data, batch_size), pct_start=0.2
    )
    generator = torch.Generator().manual_seed(seed)
    history = History(seed)
    for _ in range(epochs):
        model.train()
        losses = []
        for indices in batches(len(train_labels), batch_size, generator):
            images, labels = train_images[indices], train_labels[indices]
            started = time.perf_counter()
            losses.append(training_step(model, optimizer, images, labels))
            history.step_seconds.append(time.perf_counter() - started)
            schedule.step()
            if on_step is not None:
                on_step()
        history.train_loss.append(sum(losses) / len(losses))
        history.test_accuracy.append(accuracy(model, test_images, test_labels))
    history.optimizer_bytes = optimizer_bytes(optimizer)
    return history


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, {"Recipe": ("System", System), "RECIPES": ("SYSTEMS", SYSTEMS)})
