"""Supervised local learning, trained: MLAAN, what it is compared with, and back-propagation beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rl_kernels.conversion.blocks import count
from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.systems.classification import Classification
from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import Batches, Built, Engine, ImageShape, System
from rl_kernels.systems.local.methods import METHODS, Method
from rl_kernels.systems.local.network import LocalNetwork
from rl_kernels.systems.local.probing import probe
from rl_kernels.systems.local.splitting import split
from rl_kernels.systems.replacement import Replacement, build_replaced
from rl_kernels.systems.schedules import CIFAR, IMAGENET, IMAGENET_DATA

OF_MODULES = ("independent", "independent_weight", "cascade_weight", "head", "copies", "mixing")
"""Settings of modules that learn from losses of their own."""


@dataclass(frozen=True)
class Local:
    """How the network is cut, and what its modules learn from.

    Attributes:
        method: ``bp``, ``checkpointing``, ``greedy``, ``dgl``, ``infopro-softmax``, ``infopro-contrast``, ``man``,
            ``man++``, ``hilo`` or ``mlaan``; what follows until ``mixing`` is the method's where it is null.
        span: k, the modules that a loss reaches.
        independent: judge each module alone besides.
        independent_weight, cascade_weight: of the two losses.
        head: ``"linear"``, ``"dgl"`` or ``"infopro"``.
        reconstruction, recognition: two numbers each, InfoPro's weights at the first and at the last head.
        copies: deeper blocks in an auxiliary net.
        mixing: of the first of them with its moving average: ``"sum"``, ``"scaled"`` or ``"weights"``.
        modules: K; 1 is back-propagation.
        cut: ``"blocks"``, ``"flops"`` or ``"memory"``: what each module has as much of.
        copy_momentum: of the moving average. (MAN: 0.995.)
        statistics: its batch statistics: ``"own"`` or ``"copied"`` from the network. (An option: public code has own.)
        patches: parts of an image's height and width that are judged apart. (HPFF: 2.)
        supervise_first: the first k - 1 modules are judged alone as well. (An option: public code does not.)
        head_width: of heads.
        foreign: a replaced layer that runs on another module: ``"detach"`` or ``"refuse"``.
        probe: at the end, fit a linear classifier to what each module returns.
    """

    method: str = "mlaan"
    span: int | None = None
    independent: bool | None = None
    independent_weight: float | None = None
    cascade_weight: float | None = None
    head: Literal["linear", "dgl", "infopro"] | None = None
    reconstruction: tuple[float, ...] | None = None
    recognition: tuple[float, ...] | None = None
    copies: int | None = None
    mixing: Literal["sum", "scaled", "weights"] | None = None
    modules: int = 4
    cut: Literal["blocks", "flops", "memory"] = "blocks"
    copy_momentum: float = 0.995
    statistics: Literal["own", "copied"] = "own"
    patches: int = 1
    supervise_first: bool = False
    head_width: int = 128
    foreign: Literal["detach", "refuse"] = "detach"
    probe: bool = False

    def chosen(self) -> Method:
        """Return the method with what was set of its own."""
        names = {each.name for each in dataclasses.fields(Method)}
        own = {name: value for name, value in vars(self).items() if name in names and value is not None}
        return dataclasses.replace(METHODS[self.method], **own)


@dataclass(frozen=True)
class LocalConfig(Config):
    """A run of local learning; of a replaced network where ``replacement.every`` is a number."""

    local: Local = field(default_factory=Local)
    replacement: Replacement = field(default_factory=lambda: Replacement(every=None))

    def check(self) -> None:
        super().check()
        one_of("local.method", self.local.method, METHODS)
        if self.runtime.strategy == "fsdp2":
            raise ValueError("runtime.strategy: got 'fsdp2', expected 'auto' or 'ddp': modules are wrapped one by one")
        wanted, chosen = self.local, self.local.chosen()
        for name in ("modules", "patches", "head_width"):
            at_least(f"local.{name}", getattr(wanted, name), 1)
        if not 0 <= wanted.copy_momentum < 1:
            raise ValueError(f"local.copy_momentum: got {wanted.copy_momentum}, expected at least 0 and less than 1")
        idle = [name for name in OF_MODULES if getattr(wanted, name) is not None] if chosen.end_to_end else []
        if idle:
            raise ValueError(
                f"local.{idle[0]}: got a value with method={wanted.method}, which has no modules that learn"
            )
        if wanted.mixing is not None and not chosen.copies:
            raise ValueError(f"local.mixing: got {wanted.mixing!r} with copies=0, expected a method with copies")
        if wanted.span is not None and wanted.modules > 1 and wanted.span > wanted.modules:
            raise ValueError(f"local.span: got {wanted.span}, expected at most {wanted.modules}, the modules")
        if chosen.contrastive and (self.data.mixup or self.data.cutmix):
            raise ValueError("data.mixup: got mixed images with a contrastive loss, expected data.mixup=0, cutmix=0")
        if self.local.modules > 1 and self.batch_size // (self.runtime.devices * self.accumulate) < 2:
            raise ValueError(
                "batch_size: got one image at a time in a process, expected at least 2, as statistics are the batch's"
            )


def _preset(model: str, data: str, modules: int, **more: Any) -> dict[str, Any]:
    return {"model": {"name": model}, "data": {"name": data}, "local": {"modules": modules}, **more}


def _cifar(model: str, modules: int) -> dict[str, Any]:
    return _preset(model, "cifar10", modules, **CIFAR) | {"data": {"name": "cifar10", "augmentation": "crop-flip"}}


def _imagenet(model: str) -> dict[str, Any]:
    """Cascades of three modules, as public code has them there."""
    more = {"data": IMAGENET_DATA, "local": {"modules": 4, "span": 3}}
    return _preset(model, "imagenet", 4, **IMAGENET) | more


PRESETS: dict[str, dict[str, Any]] = {
    # A first look.
    "short": _preset("resnet32", "mnist5k", 4, epochs=4) | {"model": {"name": "resnet32", "width": 8}},
    "digits": _preset("digits_resnet", "digits", 4),
    "digits-vit": _preset("digits_vit", "digits", 3, optimizer={"learning_rate": 4e-3}, epochs=8, batch_size=48),
    "animals": _preset("resnet32", "animals", 4, batch_size=128) | {"model": {"name": "resnet32", "width": 8}},
    "paper-like": _cifar("resnet32", 16),
    "paper-like-resnet110": _cifar("resnet110", 32),
    "imagenet-resnet34": _imagenet("torchvision/resnet34"),
    "imagenet-resnet101": _imagenet("torchvision/resnet101"),
    "imagenet-vit-small": _imagenet("timm/vit_small_patch16_224"),
}


class LocalSystem(System[LocalConfig]):
    """Local learning: the config's ``local`` cuts the network, and each module learns for itself."""

    name = "local"
    reading = Classification()
    config = LocalConfig
    presets = PRESETS

    def build(self, config: LocalConfig, shape: ImageShape) -> Built:
        replaced = build_replaced(config.model, config.replacement, shape)
        wanted = config.local
        net = split(
            replaced.model,
            wanted.modules,
            shape=(2, shape.channels, shape.size, shape.size),
            method=wanted.chosen(),
            cut=wanted.cut,
            momentum=wanted.copy_momentum,
            statistics=wanted.statistics,
            patches=wanted.patches,
            supervise_first=wanted.supervise_first,
            head_width=wanted.head_width,
            foreign=wanted.foreign,
        )
        if shape.mean:
            net.read_pixels(shape.mean, shape.std)
        return Built(net, replaced.plan)

    def pieces(self, model: nn.Module) -> Sequence[nn.Module]:
        return _net(model).pieces()

    def wrap(self, model: nn.Module, pieces: Sequence[nn.Module]) -> nn.Module:
        _net(model).wrap(pieces)
        return model

    def step(self, config: LocalConfig, model: nn.Module, images: Tensor, targets: Tensor, engine: Engine) -> Tensor:
        return _net(model).step(images, targets, engine=engine, smoothing=config.label_smoothing)

    def updated(self, model: nn.Module) -> None:
        _net(model).follow()

    def figures(
        self, config: LocalConfig, model: nn.Module, step: Callable[[], None], data: Callable[[bool], Batches]
    ) -> Mapping[str, Any]:
        net = _net(model)
        found: dict[str, Any] = {"parameters": count(net.model), "auxiliary_parameters": net.auxiliary_parameters()}
        if config.local.probe:
            found["probe_accuracies"] = probe(net, data)
        with FlopCounterMode(display=False) as counter:
            step()
        # Of one of the parts in which a process takes its share of a batch.
        return found | {"step_flops": counter.get_total_flops() * config.accumulate}


def _net(model: nn.Module) -> LocalNetwork:
    assert isinstance(model, LocalNetwork)
    return model


SYSTEM = LocalSystem()
