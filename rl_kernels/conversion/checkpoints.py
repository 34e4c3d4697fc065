"""Plain checkpoints for replaced models."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rl_kernels.nn import Coefficients, ReplacementLayer


@dataclass(frozen=True)
class Loaded:
    """What ``load_plain_state_dict`` did not copy.

    Attributes:
        unused: keys of the state_dict that have no place, because their layers are replaced.
        kept: keys of the model that the state_dict does not have, and whose values are kept: the coefficients.
    """

    unused: tuple[str, ...]
    kept: tuple[str, ...]


def load_plain_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> Loaded:
    """Load the state_dict of a plain model, pretrained for instance, into its replaced twin.

    As strict as ``load_state_dict`` but for two things: the weights of replaced layers have no place, and the
    coefficients are in no plain state_dict. Both are named in what is returned.

    Raises:
        RuntimeError: other missing or unknown keys, or other shapes, in the words of ``load_state_dict``. Nothing has
            been written then.
    """
    missing, unknown = rehearse(model, state_dict)
    coefficients, replaced = _coefficient_keys(model), _replaced_keys(model)
    lacking = [key for key in missing if key not in coefficients]
    unexpected = [key for key in unknown if key not in replaced]
    problems = (("Missing", lacking), ("Unexpected", unexpected))
    if lacking or unexpected:
        lines = [
            f"\n\t{problem} key(s) in state_dict: " + ", ".join(f'"{key}"' for key in keys) + "."
            for problem, keys in problems
            if keys
        ]
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:" + "".join(lines))
    model.load_state_dict(state_dict, strict=False)
    return Loaded(
        unused=tuple(key for key in unknown if key in replaced),
        kept=tuple(key for key in missing if key in coefficients),
    )


def rehearse(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Missing and unknown keys, found by loading into a twin without data: modules may rename keys as they load."""
    twins = {id(tensor): _on_meta(tensor) for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, twins)
    tensors: Any = OrderedDict(
        (key, value.to("meta") if isinstance(value, Tensor) else value) for key, value in state_dict.items()
    )
    tensors._metadata = getattr(state_dict, "_metadata", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That nothing is copied to the meta device; what matters comes again.
        found = twin.load_state_dict(tensors, strict=False)
    return found.missing_keys, found.unexpected_keys


def _on_meta(tensor: Tensor) -> Tensor:
    twin = tensor.detach().to("meta")
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _coefficient_keys(model: nn.Module) -> set[str]:
    return {
        key
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Coefficients)
        for key in module.state_dict(prefix=f"{path}.")
    }


def _replaced_keys(model: nn.Module) -> set[str]:
    """The keys that replaced layers had as plain ones."""
    return {
        key
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ReplacementLayer)
        for key in module.sources[0].state_dict(prefix=f"{path}.")
    }
