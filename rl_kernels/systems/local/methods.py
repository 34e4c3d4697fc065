"""Methods of local learning as settings of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl_kernels.conversion.options import at_least, one_of
from rl_kernels.systems.local.auxiliary import MIXINGS, Mixing
from rl_kernels.systems.local.heads import HEADS, HeadName


@dataclass(frozen=True)
class Method:
    """What modules learn from.

    Attributes:
        end_to_end: the loss of the whole network alone: back-propagation.
        checkpoint: of back-propagation, the modules but the last are computed again in its backward.
        span: k: a loss reaches the module that it judges, and the k - 1 before it. Each module runs k times a step
            (k + 1 with ``independent``), and its norms' running statistics follow each time, as in public code.
        independent: besides the cascades of k modules, each module alone is judged as well, by a head of its own.
        independent_weight: of the loss of a module alone.
        cascade_weight: of the loss of a cascade.
        head: see ``rl_kernels.systems.local.heads``.
        contrastive: modules but the last have a contrastive loss instead of the cross-entropy.
        reconstruction: weights of InfoPro's reconstruction of the image, of the first module and of the last with a
            head; those between are in line with them. Empty for none.
        recognition: weights of the loss beside it, likewise.
        copies: deeper blocks in the auxiliary net before a cascade's head; 0 for none.
        mixing: of the first of them with its moving average.
    """

    end_to_end: bool = False
    checkpoint: bool = False
    span: int = 1
    independent: bool = False
    independent_weight: float = 0.001
    cascade_weight: float = 1.0
    head: HeadName = "linear"
    contrastive: bool = False
    reconstruction: tuple[float, ...] = ()
    recognition: tuple[float, ...] = (1.0, 1.0)
    copies: int = 0
    mixing: Mixing = "sum"

    def __post_init__(self) -> None:
        one_of("method.head", self.head, HEADS)
        one_of("method.mixing", self.mixing, MIXINGS)
        for name, least in (("span", 1), ("copies", 0)):
            at_least(f"method.{name}", getattr(self, name), least)
        for name, lengths in (("reconstruction", (0, 2)), ("recognition", (2,))):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) not in lengths:
                raise ValueError(f"method.{name}: got {value!r}, expected two numbers")
        numbers: dict[str, tuple[float, ...]] = {
            "independent_weight": (self.independent_weight,),
            "cascade_weight": (self.cascade_weight,),
            "reconstruction": self.reconstruction,
            "recognition": self.recognition,
        }
        for name, values in numbers.items():
            if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in values):
                raise ValueError(f"method.{name}: got {getattr(self, name)!r}, expected numbers of at least 0")
        if self.checkpoint and not self.end_to_end:
            raise ValueError("method.checkpoint: got True without end_to_end, expected both or none")

    def weights(self, index: int, heads: int) -> tuple[float, float]:
        """Return the weights of reconstruction and recognition of the head ``index`` of so many."""
        share = index / (heads - 1) if heads > 1 else 0.0
        rebuilt = self.reconstruction or (0.0, 0.0)
        return tuple(first + share * (last - first) for first, last in (rebuilt, self.recognition))  # type: ignore[return-value]


# InfoPro's weights are those of the authors' command for ResNet-32 in four modules on CIFAR-10, contrast; for others
# they have others.
_INFOPRO = Method(head="infopro", reconstruction=(6.0, 1.0), recognition=(0.0, 2.0))

METHODS = {
    "bp": Method(end_to_end=True),
    "checkpointing": Method(end_to_end=True, checkpoint=True),
    "greedy": Method(),
    "dgl": Method(head="dgl"),
    "infopro-softmax": _INFOPRO,
    "infopro-contrast": Method(
        head="infopro", contrastive=True, reconstruction=_INFOPRO.reconstruction, recognition=_INFOPRO.recognition
    ),
    "man": Method(head="dgl", copies=1),
    "man++": Method(head="dgl", copies=1, mixing="scaled"),
    "hilo": Method(span=2, independent=True, cascade_weight=0.999, head="dgl"),
    "mlaan": Method(span=2, independent=True, cascade_weight=0.999, copies=4),
}
"""By name. Greedy supervised learning; DGL (arXiv 1901.08164); InfoPro (2101.10832); MAN; MAN++ (2507.16279); HiLo, the
cascades of HPFF; MLAAN, which is HiLo with auxiliary nets. Weights, spans and momentum are those of public code where
the papers could not be read."""
