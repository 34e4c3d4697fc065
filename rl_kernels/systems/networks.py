"""Networks by name: those of ``models.py`` in the sizes that papers train, and those of torchvision and timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rl_kernels.conversion.options import one_of
from rl_kernels.conversion.zoo import import_timm, import_torchvision
from rl_kernels.systems.config import Model
from rl_kernels.systems.contract import ImageShape
from rl_kernels.systems.models import DigitsResNet, DigitsViT
from rl_kernels.systems.runner.folder import LAST, read_checkpoint


def _resnet(depth: int) -> Callable[[ImageShape, int | None], nn.Module]:
    """ResNet for CIFAR: three stages of (depth - 2) / 6 blocks, 16 channels in the first, strided 1x1 skips."""
    depths = ((depth - 2) // 6,) * 3

    def build(shape: ImageShape, width: int | None) -> nn.Module:
        return DigitsResNet(width or 16, depths, shape.classes, shape.channels)

    return build


def _digits_resnet(shape: ImageShape, width: int | None) -> nn.Module:
    return DigitsResNet(width or 16, (6, 6), shape.classes, shape.channels)


def _vit(patch: int, dim: int, depth: int, heads: int) -> Callable[[ImageShape, int | None], nn.Module]:
    def build(shape: ImageShape, width: int | None) -> nn.Module:
        if shape.size % patch:
            raise ValueError(f"data.size: got {shape.size}, expected a multiple of {patch}, the model's patch")
        chosen = width or dim
        if chosen % heads:
            raise ValueError(f"model.width: got {chosen}, expected a multiple of {heads}, the model's heads")
        return DigitsViT(shape.size, patch, chosen, depth, heads, shape.classes, shape.channels)

    return build


NETWORKS: dict[str, Callable[[ImageShape, int | None], nn.Module]] = {
    "digits_resnet": _digits_resnet,
    "digits_vit": _vit(patch=2, dim=48, depth=9, heads=4),
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet110": _resnet(110),
    "vit": _vit(patch=4, dim=192, depth=12, heads=3),
}


def build(name: str, shape: ImageShape, width: int | None = None) -> nn.Module:
    """Build a network with random weights from torch's global generator.

    Args:
        name: a key of ``NETWORKS``, or a model of a library: ``torchvision/resnet50``, ``timm/vit_small_patch16_224``.
        shape: of the images, and how many classes.
        width: of the networks here; None for their own. The libraries' have no such number.

    Raises:
        ValueError: an unknown name, a width for a library's model, or images that it cannot take.
        ImportError: the library is missing.
    """
    library, slash, short = name.partition("/")
    if not slash:
        one_of("model.name", name, NETWORKS)
        return NETWORKS[name](shape, width)
    one_of("model.name's library", library, ("torchvision", "timm"))
    if width is not None:
        raise ValueError(f"model.width: got {width}, expected null for {name}")
    if library == "torchvision":
        return _of_torchvision(short, shape)
    timm = import_timm()
    if short not in timm.list_models():
        raise ValueError(f"model.name: timm has no {short!r}")
    # Patches and windows depend on the image's size; convolutional networks do not take it.
    takes_size = "img_size" in inspect.signature(timm.model_entrypoint(short)).parameters or short.startswith("vit")
    options: dict[str, Any] = {"img_size": shape.size} if takes_size else {}
    return timm.create_model(short, num_classes=shape.classes, in_chans=shape.channels, **options)


def make(wanted: Model, shape: ImageShape, fresh: Callable[[nn.Module], str] | None = None) -> nn.Module:
    """Build a run's network: at random, or with the weights that its config names.

    Args:
        wanted: the network.
        shape: of its images.
        fresh: returns the path of a layer that stays at random, as the classifier where these are other classes.

    Raises:
        ValueError: as of :func:`build`; or weights of another network.
        RunError: weights that cannot be read.
    """
    model = build(wanted.name, shape, wanted.width)
    if wanted.weights is None:
        return model
    path = Path(wanted.weights)
    content = read_checkpoint(path / LAST if path.is_dir() else path)
    state = dict(content.get("model", content))
    if fresh is not None:
        kept = fresh(model)
        own = {f"{kept}.{name}": value for name, value in model.get_submodule(kept).state_dict().items()}
        state = {name: value for name, value in state.items() if not name.startswith(f"{kept}.")} | own
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"model.weights: {path} does not fit {wanted.name}: {error}") from error
    return model


def _of_torchvision(name: str, shape: ImageShape) -> nn.Module:
    models = import_torchvision().models
    if name not in models.list_models(module=models):
        raise ValueError(f"model.name: torchvision has no {name!r}")
    if shape.channels != 3:
        raise ValueError(f"model.name: got torchvision/{name}, which takes images of 3 channels, not {shape.channels}")
    options: dict[str, Any] = {"image_size": shape.size} if name.startswith("vit") else {}
    return models.get_model(name, weights=None, num_classes=shape.classes, **options)
