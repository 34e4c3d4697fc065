"""Kernel Modulation, trained: a frozen network learns a task by small modulators, beside other ways to adapt it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from rl_kernels.conversion.blocks import count
from rl_kernels.conversion.options import at_least
from rl_kernels.systems import networks
from rl_kernels.systems.classification import Classification
from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import Batches, Built, ImageShape, System
from rl_kernels.systems.modulation.files import task_state_dict
from rl_kernels.systems.modulation.modulating import (
    chosen_layers,
    find_classifier,
    layers_of,
    modulate,
    parts_of,
    task_parameters,
)
from rl_kernels.systems.modulation.modulators import KINDS

TASK = "task"
"""What the task of a run is called."""


@dataclass(frozen=True)
class Modulation:
    """What a task may change of the network, which is otherwise frozen. Its classifier is new where weights are given.

    Attributes:
        kind: ``"channel"``, ``"outer"``, ``"gate"``, ``"mixout"``, ``"mlp"`` (see ``rl_kernels.systems.modulation``);
            ``"lora"`` for peft's low-rank sums; ``"none"``; or ``"full"``: the plain network learns as a whole.
        rank: of ``outer``, ``mixout`` and ``lora``.
        targets: ``"conv"``, ``"linear"`` or ``"all"``.
        norms: ``"own"``, ``"affine"`` or ``"frozen"``.
        unfrozen: paths of modules of the network itself that learn as well, as ``[blocks.8]``; no other task has them.
    """

    kind: Literal["channel", "outer", "gate", "mixout", "mlp", "lora", "none", "full"] = "outer"
    rank: int = 4
    targets: Literal["conv", "linear", "all"] = "conv"
    norms: Literal["own", "affine", "frozen"] = "own"
    unfrozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModulationConfig(Config):
    """A run that learns a task."""

    modulation: Modulation = field(default_factory=Modulation)

    def check(self) -> None:
        super().check()
        at_least("modulation.rank", self.modulation.rank, 1)
        if self.modulation.kind == "full" and self.modulation.unfrozen:
            raise ValueError(
                f"modulation.unfrozen: got {self.modulation.unfrozen} with kind='full', of which nothing is frozen"
            )


# Of the modulators' learning rate nothing could be read.
_ADAPTING: dict[str, Any] = {
    "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.0},
    "schedule": {"warmup": 0.1},
    "epochs": 30,
}

PRESETS: dict[str, dict[str, Any]] = {
    # A first look: of a network at random, if model.weights names no other.
    "digits": {"model": {"name": "digits_resnet"}, "data": {"name": "digits"}, **_ADAPTING},
    "mnist5k": {"model": {"name": "resnet20"}, "data": {"name": "mnist5k"}, **_ADAPTING},
    "cifar10": {"model": {"name": "resnet32"}, "data": {"name": "cifar10", "augmentation": "crop-flip"}, **_ADAPTING},
    **{
        f"resnet{depth}": {
            "model": {"name": f"torchvision/resnet{depth}"},
            "data": {"name": "imagenet", "augmentation": "resized-crop"},
            **_ADAPTING,
        }
        for depth in (18, 34, 50)
    },
}


class ModulationSystem(System[ModulationConfig]):
    """Kernel Modulation: the network of ``model.weights``, frozen, learns a task by what ``modulation`` allows."""

    name = "modulation"
    reading = Classification()
    config = ModulationConfig
    presets = PRESETS

    def build(self, config: ModulationConfig, shape: ImageShape) -> Built:
        model = networks.make(config.model, shape, find_classifier)
        wanted = config.modulation
        if wanted.kind == "full":
            return Built(model)
        kind: Any = wanted.kind if wanted.kind in KINDS else None
        modulate(model, kind, wanted.rank, wanted.targets, wanted.norms, shape.classes, TASK)
        if wanted.kind == "lora":
            _add_lora(model, wanted)
        for path in wanted.unfrozen:
            _unfreeze(model, path)
        return Built(model)

    def figures(
        self, config: ModulationConfig, model: nn.Module, step: Callable[[], None], data: Callable[[bool], Batches]
    ) -> Mapping[str, Any]:
        wanted = config.modulation
        parts = {} if wanted.kind == "full" else parts_of(model, TASK)
        path = find_classifier(model)
        classifier = count(parts.get(path, model.get_submodule(path)))
        of_tasks = {parameter for part in parts.values() for parameter in part.parameters()}
        named = dict(model.named_parameters())
        base = sum(p.numel() for name, p in named.items() if p not in of_tasks and "lora_" not in name)
        task = sum(p.numel() for p in named.values() if p.requires_grad) - classifier
        found: dict[str, Any] = {"task_parameters": task, "base_parameters": base, "task_share": task / base}
        if wanted.kind not in ("lora", "full") and not wanted.unfrozen:
            found["task_bytes"] = sum(value.nbytes for value in task_state_dict(model, TASK).values())
        return found


def _unfreeze(model: nn.Module, path: str) -> None:
    try:
        model.get_submodule(path).requires_grad_(True)
    except AttributeError:
        raise ValueError(f"modulation.unfrozen: got {path!r}, which the model has not") from None


def _add_lora(model: nn.Module, wanted: Modulation) -> None:
    """Give the model peft's low-rank sums, beside what a task has."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("modulation.kind='lora' needs the package peft: pip install peft") from error
    targets = list(chosen_layers(dict(layers_of(model)), wanted.targets, find_classifier(model)))
    own = list(task_parameters(model, TASK))
    inject_adapter_in_model(LoraConfig(r=wanted.rank, lora_alpha=wanted.rank, target_modules=targets), model)
    for parameter in own:  # peft freezes what is not its own.
        parameter.requires_grad_(True)


SYSTEM = ModulationSystem()
