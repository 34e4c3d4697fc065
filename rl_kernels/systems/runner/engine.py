"""How the losses of a step are differentiated: in the run's precision, and averaged over its processes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class FabricEngine:
    """Lightning Fabric's backward.

    Args:
        fabric: of the run.
        parts: of a batch, whose gradients are added up one after the other.
        last: this is the last of them, after which they are averaged over processes.
    """

    def __init__(self, fabric: Fabric, parts: int, last: bool) -> None:
        self.fabric, self.parts, self.last = fabric, parts, last

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss / self.parts)

    def unsynchronised(self, piece: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        if (self.last and not wanted) or self.fabric.world_size == 1:
            return contextlib.nullcontext()
        return self.fabric.no_backward_sync(piece)  # type: ignore[arg-type]
