"""Whether a replaced model holds everything that it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.standing import paths_of


def check(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise unless all that the model's replaced layers run on is in the model, where it is trained and saved.

    A replaced layer refers to its sources without registering them, so that a model that is cut, sliced or rebuilt
    from copies may leave one behind. Call this once it has its final form, and after each change. It also tells the
    layers where they stand: their calls then notice what leaves ``model`` later, also where they were wired by hand.

    Args:
        model: with or without replaced layers.
        optimizer: one that is to train all of the model: then each of its parameters that requires a gradient must be
            in it.

    Raises:
        TypeError: a model or an optimizer of another type.
        RuntimeError: a source, or coefficients, outside the model; or a parameter that is not in the optimizer. The
            message names all layers and what they miss.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer or None")
    paths = paths_of(model)
    layers = [module for module in model.modules() if isinstance(module, ReplacementLayer)]
    missing = [text for layer in layers for text in _missing(layer, paths)]
    if missing:
        raise RuntimeError(
            f"model: got {type(model).__name__} that does not hold all that its replaced layers run on, which is "
            f"neither trained nor saved then: {'; '.join(missing)}. Call rebind with layers of the model, put what is "
            "missing back, or rl_kernels.merge the model before it is cut"
        )
    if optimizer is not None:
        _check_trained(model, optimizer)
    for layer in layers:
        layer.stand_in(model, paths)


def _missing(layer: ReplacementLayer, paths: Mapping[int, str]) -> Iterator[str]:
    name = f"{paths[id(layer)] or 'the model'} ({type(layer).__name__})"
    for j, module in enumerate(layer.runs_on):
        if id(module) not in paths:
            yield f"{name} misses {layer.role(j)} ({type(module).__name__})"


def _check_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]
    if left:
        raise RuntimeError(
            f"optimizer: got one without {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}, expected all "
            "of the model's parameters that require a gradient: make it after rl_kernels.replace"
        )
