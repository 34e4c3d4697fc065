"""What the choice of a backend depends on before a call is looked at."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """All calls of an op on a type of device in a dtype.

    Attributes:
        op: its name.
        device: the device's type, as ``torch.device.type``.
        dtype: of the activation.
    """

    op: str
    device: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """As ``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op} on {self.device} in {self.dtype_name}"
