"""Replacement Learning, trained (arXiv 2410.01239): whole networks, replaced ones, and the controls beside them.

What its successor RepL (arXiv 2605.19533) may mean by transformations of the neighbours is in ``granularity``,
``window`` and ``boundaries``, none of which is claimed to be that paper's.

What the paper's abstract and public reviews say is the default: every fourth block, two scalars a block, neighbours
that learn from the replaced block as well. Initial coefficients, their learning rate, constraints, norms and biases are
options: the paper could not be read. No figure of the paper is claimed to be reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.conversion.blocks import count
from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.systems import networks
from rl_kernels.systems.classification import Classification
from rl_kernels.systems.config import Config, Model
from rl_kernels.systems.contract import Built, ImageShape, System
from rl_kernels.systems.schedules import CIFAR, IMAGENET, IMAGENET_DATA


@dataclass(frozen=True)
class Replacement:
    """What is replaced, as ``rl_kernels.plan`` has it, and what stands in for that in a control.

    Attributes:
        every: a block in this many; null for the whole network, as it was built.
        offset: number of the block at which the first falls due; null for ``every``.
        level: ``"auto"``, ``"block"`` or ``"layer"``.
        targets: kinds of layers, as ``["attention"]``; null for all.
        init: null for the paper-like start, two numbers, or ``"fit"``.
        constraint: ``"free"`` or ``"convex"``.
        granularity: ``"scalar"``, ``"projection"``, ``"head"`` or ``"channel"``.
        detach: neighbours without gradient from replaced blocks: 0 the previous, 1 the next, as far as ``window`` goes.
        share: ``"block"``, ``"layer"``, or null for the plan's own default.
        norms: ``"mixed"`` or ``"own"``.
        window: neighbours on each side.
        boundaries: ``"skipped"``, or ``"blocks"``: where stages meet, neighbours of other sizes are cut or repeated.
        control: what is done with the blocks that are due instead of replacing them. ``"removed"``: they go.
            ``"tied"``: they run on the previous block's weights. ``"frozen"``: their layers stay at random.
            ``"narrowed"``: they stay, and the whole network is narrowed to the replaced one's number of parameters.
    """

    every: int | None = 4
    offset: int | None = None
    level: Literal["auto", "block", "layer"] = "auto"
    targets: tuple[str, ...] | None = None
    init: Literal["fit"] | tuple[float, ...] | None = None
    constraint: Literal["free", "convex"] = "free"
    granularity: Literal["scalar", "projection", "head", "channel"] = "scalar"
    detach: tuple[int, ...] = ()
    share: Literal["block", "layer"] | None = None
    norms: Literal["mixed", "own"] = "mixed"
    window: int = 1
    boundaries: Literal["skipped", "blocks"] = "skipped"
    control: Literal["none", "removed", "tied", "frozen", "narrowed"] = "none"


@dataclass(frozen=True)
class ReplacementConfig(Config):
    """A run of Replacement Learning."""

    replacement: Replacement = field(default_factory=Replacement)

    def check(self) -> None:
        super().check()
        if self.replacement.every is None and self.replacement.control != "none":
            raise ValueError(
                f"replacement.control: got {self.replacement.control!r} with replacement.every=null, which makes no "
                f"block due"
            )
        if self.replacement.control == "tied" and (self.replacement.window, self.replacement.boundaries) != (
            1,
            "skipped",
        ):
            raise ValueError(
                "replacement.control: got 'tied' with a window or boundaries, expected window=1 and 'skipped'"
            )
        if self.replacement.control == "tied" and self.replacement.init is not None:
            raise ValueError("replacement.init: got a value for control='tied', which starts at (1, 0) and stays there")


def _cifar(model: str) -> dict[str, Any]:
    return {"model": {"name": model}, "data": {"name": "cifar10", "augmentation": "crop-flip"}, **CIFAR}


def _imagenet(model: str, **more: Any) -> dict[str, Any]:
    return {"model": {"name": model}, "data": IMAGENET_DATA, **IMAGENET, **more}


def _imagenet_vit(model: str) -> dict[str, Any]:
    """300 epochs of AdamW with strong augmentation, attention replaced only."""
    return _imagenet(
        model,
        data={**IMAGENET_DATA, "mixup": 0.8, "cutmix": 1.0},
        optimizer={"learning_rate": 1e-3, "clip": 1.0},
        schedule={"warmup": 0.05},
        label_smoothing=0.1,
        ema=0.9999,
        epochs=300,
        batch_size=1024,
        replacement={"targets": ["attention"]},
    )


PRESETS: dict[str, dict[str, Any]] = {
    # A first look.
    "short": {
        "model": {"name": "resnet32", "width": 8},
        "data": {"name": "mnist5k"},
        "epochs": 4,
    },
    "digits": {"model": {"name": "digits_resnet"}, "data": {"name": "digits"}},
    "digits-vit": {
        "model": {"name": "digits_vit"},
        "data": {"name": "digits"},
        "optimizer": {"learning_rate": 4e-3},
        "epochs": 8,
        "batch_size": 48,
    },
    "animals": {
        "model": {"name": "resnet32", "width": 8},
        "data": {"name": "animals"},
        "batch_size": 128,
    },
    "patches": {"model": {"name": "resnet32"}, "data": {"name": "patches", "augmentation": "crop-flip"}},
    "paper-like": _cifar("resnet32"),
    "paper-like-resnet110": _cifar("resnet110"),
    "paper-like-vit": {
        "model": {"name": "vit"},
        "data": {"name": "cifar10", "augmentation": "trivial"},
        "optimizer": {"learning_rate": 1e-3, "clip": 1.0},
        "schedule": {"warmup": 0.05},
        "epochs": 400,
        "batch_size": 512,
        "label_smoothing": 0.1,
        "replacement": {"targets": ["attention"]},
    },
    **{f"imagenet-resnet{depth}": _imagenet(f"torchvision/resnet{depth}") for depth in (34, 50, 101, 152)},
    **{
        f"imagenet-vit-{size}": _imagenet_vit(f"timm/vit_{size}_patch16_224")
        for size in ("tiny", "small", "base", "large")
    },
}


class ReplacementSystem(System[ReplacementConfig]):
    """Replacement Learning: what the config's ``replacement`` says, and training as of any network."""

    name = "replacement"
    reading = Classification()
    config = ReplacementConfig
    presets = PRESETS

    def build(self, config: ReplacementConfig, shape: ImageShape) -> Built:
        return build_replaced(config.model, config.replacement, shape)


def build_replaced(network: Model, wanted: Replacement, shape: ImageShape) -> Built:
    """Make a network, and replace blocks of it or do with them what the control says.

    Raises:
        ValueError: as of ``networks.make`` and ``rl_kernels.plan``.
    """
    model = networks.make(network, shape)
    if wanted.every is None:
        return Built(model)
    made = plan_of(wanted, model)
    if wanted.control == "none":
        return Built(rl.replace(model, made), made)
    if wanted.control == "tied":
        rl.replace(model, made)
        for module in model.modules():
            if isinstance(module, Coefficients):
                module.requires_grad_(False)
        return Built(model, made)
    if wanted.control == "narrowed":
        rl.replace(model, made)
        return Built(_narrowed(network.name, shape, count(model)))
    for block in made.replaced:
        if wanted.control == "removed":
            parent, _, name = block.path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
        for layer in block.layers if wanted.control == "frozen" else ():
            model.get_submodule(f"{block.path}.{layer.path}").requires_grad_(False)
    return Built(model)


def plan_of(wanted: Replacement, model: nn.Module) -> rl.Plan:
    """What ``rl_kernels.plan`` makes of a model by these options."""
    return rl.plan(
        model,
        every=wanted.every,
        targets=wanted.targets,
        offset=wanted.offset,
        level=wanted.level,
        init=(1.0, 0.0) if wanted.control == "tied" else wanted.init,
        constraint=wanted.constraint,
        granularity=wanted.granularity,
        detach=wanted.detach,
        share=wanted.share,
        norms=wanted.norms,
        window=wanted.window,
        boundaries=wanted.boundaries,
    )


def _narrowed(name: str, shape: ImageShape, parameters: int) -> nn.Module:
    """The whole network, as wide as comes nearest to ``parameters``."""
    if name not in networks.NETWORKS:
        raise ValueError(f"replacement.control: got 'narrowed' for {name}, expected a network that has a width")
    counts: dict[int, int] = {}
    for width in range(1, 4096):
        with torch.device("meta"):
            try:
                counts[width] = count(networks.build(name, shape, width))
            except ValueError:  # Not a multiple of the heads.
                continue
        if counts[width] >= parameters:
            break
    nearest = min(counts, key=lambda width: abs(counts[width] - parameters))
    return networks.build(name, shape, nearest)


SYSTEM = ReplacementSystem()
