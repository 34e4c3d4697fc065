"""The C++ extension ``rl_kernels._C``: found, held against the torch that runs, and loaded; or why not.

A library built for another torch may crash the process when it is loaded. So it comes with a record of what it was
built for, and is loaded only where that fits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER_VARIABLE = "RL_KERNELS_EXTENSION"
"""Names a folder to take the extension from: another build of it, for the sanitizers and for tests."""

HOW_TO_BUILD = "pip install --no-build-isolation -e ."
"""Beside torch and with a C++ compiler, in a checkout."""

RECORD = "_build.json"


class Extension(NamedTuple):
    """What became of the extension."""

    module: Any
    """``rl_kernels._C``, or None."""
    missing: str | None
    """Why there is none."""
    broken: bool = False
    """Whether there is one that cannot be used, which an installation should not have."""


def load(folder: Path) -> Extension:
    """Load the extension that lies in ``folder``, unless it was built for another torch."""
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        return Extension(None, f"not built ({HOW_TO_BUILD} with a C++ compiler builds it)")
    again = f"build it again: {HOW_TO_BUILD}"
    try:
        built_for = json.loads((folder / RECORD).read_text())["torch"]
    except (OSError, ValueError, KeyError, TypeError):
        return Extension(None, f"its record {RECORD} cannot be read; {again}", broken=True)
    if built_for != torch.__version__:
        return Extension(None, f"built for torch {built_for}, this is {torch.__version__}; {again}", broken=True)
    name = "rl_kernels._C"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return Extension(None, f"cannot be loaded ({error}); {again}", broken=True)
    sys.modules[name] = module
    return Extension(module, None)


def is_older_than_its_sources(package: Path = Path(__file__).parent) -> bool:
    """Whether the sources beside the package, in a checkout, changed after the extension was built."""
    library = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [path for path in (package.parent / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    return library.exists() and any(path.stat().st_mtime > library.stat().st_mtime for path in sources)


EXTENSION = load(Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parent))


def _declines(*arguments: Any) -> None:
    return None


# The fast path: a whole call in C++, or None where it declines. It never serves before selection.py says that it may.
mixed_linear_call: Any = getattr(EXTENSION.module, "mixed_linear_call", _declines)
mixed_conv_call: Any = getattr(EXTENSION.module, "mixed_conv_call", _declines)

_bypasses = 0


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Inside, the fast path declines every call, whatever else is entered and left meanwhile."""
    _set_bypasses(_bypasses + 1)
    try:
        yield
    finally:
        _set_bypasses(_bypasses - 1)


def _set_bypasses(count: int) -> None:
    global _bypasses
    _bypasses = count
    if EXTENSION.module is not None:
        EXTENSION.module.set_bypassed(count > 0)
