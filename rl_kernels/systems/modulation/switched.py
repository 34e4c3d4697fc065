"""A layer of the shared network, with what each task has of its own in its place."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from rl_kernels.systems.modulation.modulators import Modulator


class Own(nn.Module):
    """A task's own copy of a norm, or its own classifier, in the base's place.

    Args:
        module: that runs.
        statistics: whether its buffers, running statistics, are the task's: else they stay as they are.
    """

    def __init__(self, module: nn.Module, statistics: bool = True):
        super().__init__()
        self.own, self.statistics = module, statistics

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self.own(x)

    def train(self, mode: bool = True) -> Own:
        """Set the mode; statistics that are not the task's are not followed."""
        super().train(mode)
        if not self.statistics:
            self.own.eval()
        return self

    def weight_of(self, layer: nn.Module) -> Any:
        return self.own.weight

    def bias_of(self, layer: nn.Module) -> Any:
        return self.own.bias


class Switched(nn.Module):
    """Runs as ``base`` does, or as the chosen task has it. The base is frozen and always in evaluation.

    ``weight`` and ``bias`` are those of the chosen task, made as a whole; other attributes are the base's.

    Attributes:
        base: the layer of the shared network.
        tasks: by task, its part of this layer: a modulator or an ``Own``; none where it has the base's.
        known: names of the model's tasks, those without a part here among them.
        chosen: name of the task that runs; None for the base.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.tasks = nn.ModuleDict()
        self.known: list[str] = []
        self.chosen: str | None = None
        # Calls in training that checkpointing may compute again, by what was chosen.
        self._pending: Counter[str | None] = Counter()
        self.base.eval()

    @property
    def part(self) -> Modulator | Own | None:
        """What the chosen task has here."""
        if self.chosen is None or self.chosen not in self.tasks:
            return None
        return self.tasks[self.chosen]  # type: ignore[return-value]

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """What the base computes, as the chosen task has it.

        Raises:
            RuntimeError: checkpointing computes this again while another task may have been chosen then.
        """
        if self.training and not torch.compiler.is_compiling():
            self._check_choice()
        part = self.part
        return self.base(x, *arguments, **keywords) if part is None else part(x, self.base)

    def train(self, mode: bool = True) -> Switched:
        """Set the mode of the tasks' parts."""
        super().train(mode)
        self.base.eval()
        self._pending.clear()
        return self

    def _check_choice(self) -> None:
        """Raise where a call within backward cannot be told to have the choice of the call that it repeats."""
        if torch._C._current_graph_task_id() == -1:
            self._pending[self.chosen] += 1
            return
        others = [task for task, count in self._pending.items() if count > 0 and task != self.chosen]
        if others:
            raise RuntimeError(
                f"task: got {self.chosen!r} where checkpointing computes a layer again in backward, after calls with "
                f"{', '.join(map(repr, others))}: call backward before another task is chosen, or without checkpointing"
            )
        self._pending[self.chosen] = max(0, self._pending[self.chosen] - 1)

    @property
    def weight(self) -> Any:
        part = self.part
        return self.base.weight if part is None else part.weight_of(self.base)

    @property
    def bias(self) -> Any:
        part = self.part
        return self.base.bias if part is None else part.bias_of(self.base)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "tasks"):  # Not there yet, as in a copy that is being made.
                raise
            return getattr(self.base, name)

    def plain(self) -> nn.Module:
        """A layer of the base's class that computes what the chosen task has; it shares nothing with this."""
        part = self.part
        if isinstance(part, Own):
            return copy.deepcopy(part.own)
        layer = copy.deepcopy(self.base)
        if part is not None:
            for name, value in (("weight", part.weight_of(self.base)), ("bias", part.bias_of(self.base))):
                if value is not None:
                    setattr(layer, name, nn.Parameter(value.detach().clone()))
        return layer
