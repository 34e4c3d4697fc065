"""The extension ``rl_kernels._C`` as this backend uses it."""

from __future__ import annotations

from typing import Any

from rl_kernels._extension import EXTENSION


def build_info() -> dict[str, Any]:
    """What the extension was built for and with, and the path in use; empty without it."""
    return {} if EXTENSION.module is None else dict(EXTENSION.module.build_info())


def capability() -> str | None:
    """The path in use: ``"avx512"``, ``"avx2"`` or ``"scalar"``; None without the extension."""
    return None if EXTENSION.module is None else build_info()["capability"]
