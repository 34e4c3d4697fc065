"""Triton's interpreter truncates float32 to bfloat16, where hardware rounds to nearest: here it rounds as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """For this process; more than once is no harm."""
    convert = interpreter._convert_float
    if getattr(convert, "rounds", False):
        return

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    rounding.rounds = True
    interpreter._convert_float = rounding
