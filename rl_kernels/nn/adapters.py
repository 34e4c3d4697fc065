"""What stands between a source and its parameters: parametrizations, hooks, and other libraries' adapters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where a module keeps its hooks."""


def hook_that_makes(module: nn.Module) -> Any:
    """A hook of torch's that makes a parameter of ``module`` in each of its calls, or None."""
    makers = (WeightNorm, SpectralNorm, BasePruningMethod)
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, makers)), None)


def parameter_of(source: nn.Module, name: str) -> Any:
    """The parameter ``name`` of ``source``, or what torch's parametrizations make of it, as it is now.

    Raises:
        RuntimeError: one that a hook makes in the source's own forward, and that is out of date before.
    """
    parameter = source._parameters.get(name)
    if parameter is not None:  # The usual case, without the search of nn.Module.__getattr__.
        return _fetched(source, name, parameter) if parameter.is_meta else parameter
    hook = hook_that_makes(source) if name in vars(source) else None
    if hook is not None:
        raise RuntimeError(
            f"sources: got a {type(source).__name__} whose {name} is made by {type(hook).__name__} of "
            f"{type(hook).__module__} in its own forward, out of date in other layers; expected a parameter, "
            "or torch.nn.utils.parametrizations"
        )
    return getattr(source, name)


def _fetched(source: nn.Module, name: str, parameter: Any) -> Any:
    """What accelerate's offloading has put in the place of a parameter, from where it is; else the parameter.

    Told by its hooks, which fetch a module's parameters for the module's own call: accelerate is never imported.
    """
    hook: Any = vars(source).get("_hf_hook")
    each: Any
    for each in getattr(hook, "hooks", (hook,)):
        stored = getattr(each, "weights_map", None)
        if stored is not None:
            return stored[name].to(each.execution_device)
    return parameter


def has_adapters(module: nn.Module | None) -> bool:
    """Whether ``module`` is one of peft's wrappers around a layer, told by their protocol: peft is never imported."""
    return hasattr(type(module), "adapter_layer_names")


def check_adapters(source: nn.Module, parent: nn.Module, name: str) -> None:
    """Raise if what stands in the place of ``source`` computes with ``source``'s weight and adapters beside it.

    Raises:
        RuntimeError: adapters that are neither merged into the source's own weight nor disabled.
    """
    wrapper: Any = parent._modules.get(name)
    if not has_adapters(wrapper):
        return
    # Merged and disabled at once: the wrapper takes them out of the weight when it runs, too late for the mix.
    plain = getattr(wrapper, "base_layer", None) is source and wrapper.merged != wrapper.disable_adapters
    if not plain:
        raise RuntimeError(
            f"sources: got a {type(source).__name__} ({name} of {type(parent).__name__}) with adapters "
            f"({full_name(wrapper)}), which the mix of its weight would leave out; expected them merged "
            "(merge_adapter, merge_and_unload) or disabled"
        )


def full_name(module: nn.Module) -> str:
    """The class of ``module`` with where it is from."""
    return full_class_name(type(module))


def full_class_name(kind: type) -> str:
    """A class with where it is from."""
    return f"{kind.__module__}.{kind.__qualname__}"
