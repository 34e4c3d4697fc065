"""What a checkpoint holds, and how it comes back; on one process or sharded over several."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

FORMAT = 1


@dataclass
class Progress:
    """Where a run is. Nothing random is kept: every draw follows from the seed and the step.

    Attributes:
        step: updates done.
        evaluated: epochs whose end has been evaluated.
        loss_sum: of the steps of the epoch that is under way.
        seconds: of training and evaluation, in all processes' lives together.
        best: the best score of an epoch so far; -1 before the first.
    """

    step: int = 0
    evaluated: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best: float = -1.0


def save_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    progress: Progress,
    config: dict[str, Any],
    sharded: bool,
) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU where the model is ``sharded``: all of it on the first process."""
    of_model, of_optimizer = model.state_dict(), optimizer.state_dict()
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    return {
        "format": FORMAT,
        "config": config,
        "progress": asdict(progress),
        "model": of_model,
        "optimizer": of_optimizer,
        "ema": None if ema is None else ema.state_dict(),
    }


def load_state(
    content: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    ema: nn.Module | None,
    sharded: bool,
) -> Progress:
    """Put a checkpoint back; without an ``optimizer`` only the weights."""
    if sharded:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, content["model"], options=options)
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, content["optimizer"], options=options)
    else:
        model.load_state_dict(content["model"])
        if optimizer is not None:
            optimizer.load_state_dict(content["optimizer"])
    if ema is not None and content["ema"] is not None:
        ema.load_state_dict(content["ema"])
    return Progress(**content["progress"])
