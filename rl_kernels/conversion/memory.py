"""How many bytes training a model takes, before and after replacement: activations are not among them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from rich.table import Table

Optimizer = Literal["adamw", "adam", "sgd", "sgd-momentum"]

STATES: dict[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1}
"""How many tensors an optimizer keeps for a parameter, each of its shape and dtype; counters of steps are left out."""

ASSUMED = 4
"""Bytes a number, for plans of a format that does not know them."""

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}B": (1024 if kind else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for kind in ("", "i")
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model in training, activations left out.

    Attributes:
        parameters: what it holds.
        gradients: one of each trainable parameter.
        optimizer: the optimizer's state for these.
        checkpoint: the parameters and the buffers that its ``state_dict`` holds.
    """

    parameters: int
    gradients: int
    optimizer: int
    checkpoint: int

    @property
    def training(self) -> int:
        """Parameters, gradients and the optimizer's state."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Memory:
    """Bytes before and after a replacement, with ``optimizer``."""

    optimizer: Optimizer
    before: Footprint
    after: Footprint

    @property
    def saved(self) -> Footprint:
        """Before less after."""
        before, after = self.before, self.after
        return Footprint(
            before.parameters - after.parameters,
            before.gradients - after.gradients,
            before.optimizer - after.optimizer,
            before.checkpoint - after.checkpoint,
        )


def footprint(parameters: int, trainable: int, buffers: int, optimizer: Optimizer) -> Footprint:
    """The footprint of a model with so many bytes of parameters, of which so many are trainable, and of buffers."""
    return Footprint(parameters, trainable, STATES[optimizer] * trainable, parameters + buffers)


def bytes_of(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """The bytes of parameters, and of the trainable ones among them."""
    sizes = [(parameter.numel() * parameter.element_size(), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def buffer_bytes(model: nn.Module) -> int:
    """The bytes of the buffers that are in the ``state_dict`` of ``model``, shared ones counted once."""
    buffers = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())


def parse_bytes(name: str, value: object) -> int:
    """The number of bytes that an argument called ``name`` stands for: an integer, or text such as ``"1.5 GiB"``.

    Raises:
        TypeError: another type.
        ValueError: text that names no number of bytes, or less than one byte.
    """
    expected = "an integer of bytes, or text such as '1.5 GiB' or '800 MB'"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        if found is None or found[2].lower() not in units:
            raise ValueError(f"{name}: got {value!r}, expected {expected}")
        number = int(float(found[1]) * units[found[2].lower()])
    else:
        number = value
    if number < 1:
        raise ValueError(f"{name}: got {value!r}, expected at least one byte")
    return number


def format_bytes(number: int) -> str:
    """A number of bytes as one reads it: ``"1.5 GiB"``."""
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{number} B"


def table(memory: Memory) -> Table:
    """What is in memory, as a table."""
    from rl_kernels._tables import simple_table

    numbers = ("before", "after", "saved")
    made = simple_table("Memory in training, without activations", "of", *numbers, numbers=numbers)
    columns = (memory.before, memory.after, memory.saved)
    rows = {
        "parameters": [column.parameters for column in columns],
        "gradients": [column.gradients for column in columns],
        f"state of {memory.optimizer}": [column.optimizer for column in columns],
        "together": [column.training for column in columns],
        "a checkpoint": [column.checkpoint for column in columns],
    }
    for name, values in rows.items():
        made.add_row(name, *map(format_bytes, values))
    return made
