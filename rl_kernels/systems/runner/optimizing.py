"""What updates the weights: optimizer, schedule, mixed images; and the seeds of what a step draws."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from rl_kernels.conversion.zoo import import_timm
from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.systems.config import Config
from rl_kernels.systems.data.loading import mixed_seed


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed what a step may draw from: torch, numpy (timm's mixup) and Python."""
    drawn = mixed_seed(seed, step, rank, 1)
    torch.manual_seed(drawn)
    np.random.seed(drawn % 2**32)
    random.seed(drawn)


def make_optimizer(config: Config, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Make the optimizer: matrices and filters decay, biases and norms do not, coefficients have their own rate."""
    wanted = config.optimizer
    mixing = {id(p) for module in model.modules() if isinstance(module, Coefficients) for p in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2 and id(p) not in mixing],
            "weight_decay": wanted.weight_decay,
            "lr": wanted.learning_rate,
        },
        {
            "params": [p for p in trained if p.ndim < 2 and id(p) not in mixing],
            "weight_decay": 0.0,
            "lr": wanted.learning_rate,
        },
        {
            "params": [p for p in trained if id(p) in mixing],
            "weight_decay": 0.0,
            "lr": wanted.learning_rate * wanted.coefficient_factor,
        },
    ]
    filled = [group for group in groups if group["params"]]
    if wanted.name == "adamw":
        return torch.optim.AdamW(filled, lr=wanted.learning_rate, fused=fused)
    return torch.optim.SGD(
        filled, lr=wanted.learning_rate, momentum=wanted.momentum, nesterov=wanted.momentum > 0, fused=fused
    )


def make_schedule(config: Config, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """Make timm's scheduler, whose rates are a function of the step: ``step_update(step)`` before each update."""
    import_timm()
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    wanted = config.schedule
    warmup: dict[str, Any] = {
        "warmup_t": round(wanted.warmup * total),
        "warmup_lr_init": config.optimizer.learning_rate / 100,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if wanted.name == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total, lr_min=0.0, **warmup)
    milestones = [round(share * total) for share in wanted.milestones] if wanted.name == "multistep" else []
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=wanted.decay, **warmup)


def make_mixing(config: Config, classes: int) -> Any:
    """Make timm's mixup and CutMix; None for neither."""
    if not (config.data.mixup or config.data.cutmix):
        return None
    if config.batch_size // config.runtime.devices % 2:
        raise ValueError(f"batch_size: got {config.batch_size}, expected an even number a process for mixup and cutmix")
    import_timm()
    from timm.data.mixup import Mixup

    return Mixup(config.data.mixup, config.data.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)
