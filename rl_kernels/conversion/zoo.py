"""Named models of torchvision, timm and transformers, with random weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

# torchvision's compiled part declares these, but the part of a wheel made for CUDA does not load beside a CPU torch.
_TORCHVISION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []


def import_torchvision() -> Any:
    """Import torchvision, also where its compiled operators do not load: its models work then, the operators do not."""
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "DEF")
    _declared.append(library)
    for schema in _TORCHVISION_OPS:
        library.define(schema)
    return import_module("torchvision")


def import_timm() -> Any:
    """Import timm, which imports torchvision."""
    import_torchvision()
    return import_module("timm")


def import_transformers() -> Any:
    """Import transformers, of which some models import torchvision where it is installed."""
    if find_spec("torchvision") is not None:
        import_torchvision()
    return import_module("transformers")


def _torchvision_model(name: str) -> nn.Module:
    models = import_torchvision().models
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # A detector's backbone would be downloaded otherwise; and two old models initialise slowly unless told.
    quiet = {"weights_backbone": None, "init_weights": False}
    return models.get_model(name, weights=None, **{key: quiet[key] for key in quiet if key in parameters})


def _transformers_model(name: str) -> nn.Module:
    transformers = import_transformers()
    return transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[name]())


@dataclass(frozen=True)
class _Library:
    names: Callable[[], Sequence[str]]
    make: Callable[[str], nn.Module]
    install: str


LIBRARIES = {
    "torchvision": _Library(
        lambda: import_torchvision().models.list_models(),
        _torchvision_model,
        "torchvision, the release made for the torch at hand",
    ),
    "timm": _Library(
        lambda: import_timm().list_models(), lambda name: import_timm().create_model(name, pretrained=False), "timm"
    ),
    "transformers": _Library(
        lambda: list(import_transformers().CONFIG_MAPPING.keys()), _transformers_model, "transformers"
    ),
}


def build(name: str) -> nn.Module:
    """Build a named model with random weights; without any, on the meta device, where it can be built there.

    Args:
        name: of a torchvision or timm model, or a transformers model type ("bert"), looked for in this order;
            ``"timm/resnet18"`` and the like look in one library only.

    Raises:
        ValueError: no such model in the libraries that are installed; the message names what to install.
    """
    prefix, slash, short = name.partition("/")
    if slash and prefix not in LIBRARIES:
        raise ValueError(f"name: got {name!r}, expected it to begin with {', '.join(f'{key}/' for key in LIBRARIES)}")
    wanted = short if slash else name
    searched: list[str] = []
    absent: list[str] = []
    known: list[str] = []
    for key in [prefix] if slash else LIBRARIES:
        library = LIBRARIES[key]
        if find_spec(key) is None:
            absent.append(f"{key} is not installed: pip install {library.install}")
            continue
        try:
            names = list(library.names())
        except (ImportError, RuntimeError) as error:
            absent.append(f"{key} does not import: {error}")
            continue
        if wanted in names:
            return _without_data(library.make, wanted)
        searched.append(key)
        known += names
    near = dict.fromkeys(difflib.get_close_matches(wanted, known, n=3))
    message = f"name: got {name!r}, expected a model" + (f" of {' or '.join(searched)}" if searched else "")
    message += f"; near it: {', '.join(near)}" if near else ""
    raise ValueError(". ".join([message, *absent]))


def _without_data(make: Callable[[str], nn.Module], name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return make(name)
    except (NotImplementedError, RuntimeError):  # Some models compute with values while they are built.
        return make(name)
