"""What hangs on a layer beside its parameters: carried over to the replaced layer, and given back by ``merge``."""

from __future__ import annotations

from typing import Any

from torch import nn

from rl_kernels.conversion.blocks import class_of
from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.adapters import HOOKS
from rl_kernels.nn.belongings import Belongings

_INTERNAL = frozenset(vars(nn.Module()))


def what_would_be_lost(own: nn.Module, kind: type[ReplacementLayer], path: str) -> str:
    """What hangs on ``own``, at ``path``, that a replaced layer of that kind cannot carry; empty for nothing."""
    for module in own.modules():
        for name in HOOKS:
            if any(not _is_torchs(hook) for hook in (getattr(module, name, None) or {}).values()):
                return f"hooks at {path} ({name.strip('_')})"
    for name, parameter in own.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"hooks at {path} (on its {name})"
    if not kind.keeps_belongings:
        known = {"parametrizations", "out_proj", "running_mean", "running_var", "num_batches_tracked"}
        for name in (*own._parameters, *own._buffers, *own._modules):
            if name not in known and not hasattr(kind, name):
                return f"{name} at {path}, for which {kind.__name__} has no place"
    return ""


def _is_torchs(hook: Any) -> bool:
    """Whether it is one of torch's parametrizations', which goes with the parameter that it keeps."""
    return getattr(hook, "__module__", "").startswith("torch.nn.utils.")


def carry(own: nn.Module, layer: ReplacementLayer) -> None:
    """Give ``layer`` the attributes of the layer that it replaces, and let it remember those that it has itself."""
    ours = {name for base in type(layer).__mro__ if issubclass(base, ReplacementLayer) for name in vars(base)}
    ours |= vars(layer).keys()
    found = {name: value for name, value in vars(own).items() if name not in _INTERNAL}
    hidden = {name: value for name, value in found.items() if name in ours}
    shown = {name: value for name, value in found.items() if name not in ours}
    if layer.keeps_belongings:  # It has them already, and its forward reads its own.
        hidden, shown = {}, {}
    vars(layer).update(shown)
    marks = {name: dict(vars(parameter)) for name, parameter in own.named_parameters() if vars(parameter)}
    layer.belongings = Belongings(class_of(own), tuple(shown), hidden, marks)


def give_back(layer: ReplacementLayer, merged: nn.Module) -> None:
    """Let the plain layer that ``layer`` is merged into have them again, as they are now."""
    had = layer.belongings
    if had is None:
        return
    shown = {name: vars(layer)[name] for name in had.shown if name in vars(layer)}
    for name, value in {**shown, **had.hidden}.items():
        vars(merged).setdefault(name, value)
    if issubclass(had.class_before, type(merged)):
        merged.__class__ = had.class_before
    for name, parameter in merged.named_parameters():
        vars(parameter).update(had.marks.get(name, {}))
