"""From replaced layers back to plain ones."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rl_kernels.conversion import encoder_fast_path
from rl_kernels.conversion.carrying import give_back
from rl_kernels.nn import ReplacementLayer

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Turn every replaced layer into the plain torch layer that computes the same, in place: for deployment.

    The merged layers have parameters of their own, in the memory that the plain model had; what they learned from the
    neighbours they no longer share. They are trainable unless all that they are mixed from was frozen. They are of the
    class, and have the attributes, of the layers that were replaced.

    Returns:
        ``model``, of plain torch layers only; torch's inference fast path is on again where it was.

    Raises:
        ValueError: no layer of the model is replaced, or the model is itself one replaced layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if isinstance(model, ReplacementLayer):
        raise ValueError(f"model: got a {type(model).__name__} alone, expected a model; call its merged()")
    layers = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ReplacementLayer)
    }
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without replaced layers, expected one after replace")
    merged = {layer: layer.merged() for layer in dict.fromkeys(layers.values())}
    for layer, plain in merged.items():
        give_back(layer, plain)
    for path, layer in layers.items():
        model.set_submodule(path, merged[layer])
    encoder_fast_path.restore(model)
    return model
