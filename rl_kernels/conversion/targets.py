"""Which layers of a block are to be replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from rl_kernels.conversion.blocks import Part, is_norm, join
from rl_kernels.nn import ReplacementTransposedLinear

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def _within(part: Part, *words: str) -> bool:
    """Whether a module around ``part`` is called so: the outermost, a block, only where its name ends so."""
    names = [type(module).__name__.lower() for module in part.inside]
    return any(name.endswith(words) for name in names[:1]) or any(word in name for name in names[1:] for word in words)


def is_attention(part: Part) -> bool:
    """Whether ``part`` is an attention, or in a module called so."""
    # A block called AttentionBlock holds more than its attention; one called SelfAttention is it.
    return isinstance(part.module, nn.MultiheadAttention) or (_within(part, "attention", "attn") and not _norm(part))


def _mlp(part: Part) -> bool:
    if is_attention(part) or _norm(part):
        return False
    return is_linear(part) or _within(part, "mlp")


def _conv(part: Part) -> bool:
    return isinstance(part.module, nn.modules.conv._ConvNd)


def is_linear(part: Part) -> bool:
    """Whether ``part`` is a linear layer."""
    return isinstance(part.module, nn.Linear) or part.kind is ReplacementTransposedLinear


def _norm(part: Part) -> bool:
    return part.module is not None and is_norm(part.module)


NAMED: dict[str, Callable[[Part], bool]] = {
    "attention": is_attention,
    "mlp": _mlp,
    "conv": _conv,
    "linear": is_linear,
    "norm": _norm,
}


class Targets:
    """The layers that a caller of ``plan`` asked for.

    Args:
        targets: None for every layer that can be replaced; or one or several of: a name of ``NAMED``; a class of
            layers, or of modules that hold them; a function of a layer's path in the model and the layer, True where
            it is to be replaced.
        norms: ``"mixed"`` or ``"own"``.
        granularity: as ``plan``'s.

    Raises:
        ValueError: an unknown name, nothing at all, or ``"norm"`` together with ``norms="own"``.
        TypeError: something else than a name, a class or a function.
    """

    def __init__(self, targets: Target | Sequence[Target] | None, norms: str, granularity: str):
        self.norms = norms
        self.granularity = granularity
        self.targets: tuple[Target, ...] = ()
        if targets is not None:
            single = isinstance(targets, str) or not isinstance(targets, Sequence)
            self.targets = (targets,) if single else tuple(targets)  # type: ignore[assignment, arg-type]
            if not self.targets:
                raise ValueError("targets: got an empty sequence, expected None or one target or more")
        for target in self.targets:
            if isinstance(target, str):
                if target not in NAMED:
                    expected = ", ".join(map(repr, NAMED))
                    raise ValueError(f"targets: got {target!r}, expected one of {expected}, a class or a function")
                if target == "norm" and norms == "own":
                    raise ValueError("norms: got 'own' with 'norm' among the targets, expected 'mixed'")
            elif not callable(target):
                raise TypeError(f"targets: got {target!r}, expected a name, a class or a function")

    @property
    def labels(self) -> tuple[str, ...]:
        """The targets as text."""
        return tuple(
            target if isinstance(target, str) else getattr(target, "__name__", repr(target)) for target in self.targets
        )

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        """The targets that are classes."""
        return tuple(target for target in self.targets if isinstance(target, type))

    def wants(self, block: str, part: Part) -> bool:
        """Whether ``part`` of the block at path ``block`` is to be replaced, if it can."""
        return not self.why_unwanted(block, part)

    def why_unwanted(self, block: str, part: Part) -> str:
        """Why ``part`` of the block at path ``block`` is not to be replaced, if it can; empty where it is."""
        if self.norms == "own" and _norm(part):
            return "norms='own'"
        if self.targets and not any(self._matches(target, block, part) for target in self.targets):
            return "not a target"
        if self.granularity == "channel" and part.module is not None and part.kind is not None:
            why = part.kind.why_not_by_channel(part.module)
            return f"granularity='channel': {why}" if why else ""
        return ""

    def may_want(self, block: str, part: Part) -> bool:
        """As ``wants``, for a part that cannot be replaced: a caller's function is not asked about such."""
        asked = [target for target in self.targets if isinstance(target, (str, type))]
        if self.norms == "own" and _norm(part):
            return False
        return len(asked) < len(self.targets) or self.wants(block, part)

    @staticmethod
    def _matches(target: Target, block: str, part: Part) -> bool:
        if isinstance(target, str):
            return NAMED[target](part)
        if isinstance(target, type):
            return any(isinstance(module, target) for module in (part.module, *part.inside))
        assert part.module is not None
        return bool(target(join(block, part.path), part.module))
