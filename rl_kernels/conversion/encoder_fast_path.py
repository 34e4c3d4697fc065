"""torch's inference fast path for transformer encoders, which reads weights past the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rl_kernels.nn import ReplacementLayer

_REMEMBERED = "_before_replacement"
# An encoder layer whose activation counts as neither relu nor gelu takes its ordinary path; and an encoder whose
# layers do not all take the fast path must not hand them nested tensors.
_SWITCHES: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def switch_off(model: nn.Module) -> None:
    """Switch the fast path off wherever it would pass by a replaced layer, and remember what was set."""
    for module, name, off in _switches(model):
        if any(isinstance(inner, ReplacementLayer) for inner in module.modules()):
            setattr(module, _REMEMBERED, getattr(module, name))
            setattr(module, name, off)


def restore(model: nn.Module) -> None:
    """Undo ``switch_off``."""
    for module, name, _ in _switches(model):
        if hasattr(module, _REMEMBERED):
            setattr(module, name, getattr(module, _REMEMBERED))
            delattr(module, _REMEMBERED)


def _switches(model: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    for module in model.modules():
        for kind, (name, off) in _SWITCHES.items():
            if isinstance(module, kind) and hasattr(module, name):
                yield module, name, off
