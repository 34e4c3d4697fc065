"""The C++ extension ``rl_kernels._C``: found, held against the torch that runs, and loaded; or why not.

A library built for another torch may crash the process when it is loaded. So it comes with a record of what it was
built for, and is loaded only where that fits. ``load`` does the same for the CUDA extension, for its backend.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER_VARIABLE = "RL_KERNELS_EXTENSION"
"""Names a folder to take the extensions from: other builds of them, for the sanitizers and for tests."""

HOW_TO_BUILD = "pip install --no-build-isolation -e ."
"""Beside torch and with a C++ compiler, in a checkout."""

RECORD = "_build.json"
SOURCES = ("bindings/*", "bindings/cuda/*", "cpu/*/*", "cuda/abi.h", "cuda/call.h", "cuda/params.h")
"""What it is built from, in ``csrc``."""


class Extension(NamedTuple):
    """What became of an extension."""

    module: Any
    """``rl_kernels._C``, say, or None."""
    missing: str | None
    """Why there is none."""
    broken: bool = False
    """Whether there is one that cannot be used, which an installation should not have."""


def folder() -> Path:
    """Where extensions are looked for."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parent)


PLAIN = ("_cuda",)
"""What is no module of Python's, but a library with a C interface, which serves every Python."""


def library(name: str, folder: Path) -> Path:
    """The file of the extension ``name``."""
    return folder / f"{name}{'.so' if name in PLAIN else sysconfig.get_config_var('EXT_SUFFIX')}"


def _import(qualified: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[qualified] = module
    return module


def load(
    folder: Path,
    name: str = "_C",
    record: str = RECORD,
    fits: tuple[str, str] = ("torch", torch.__version__),
    needs: str = "a C++ compiler",
    opened: Callable[[str, Path], Any] = _import,
) -> Extension:
    """Load the extension that lies in ``folder``, unless it was built for something else.

    Args:
        folder: that of the library and its record.
        name: of the module in ``rl_kernels``.
        record: the JSON file that says what it was built for.
        fits: which of its entries must be what.
        needs: what a machine must have to build it.
        opened: makes a library, of a name in full and a file, what Python calls; ImportError where it cannot.
    """
    path = library(name, folder)
    if not path.exists():
        return Extension(None, f"not built ({HOW_TO_BUILD} with {needs} builds it)")
    again = f"build it again: {HOW_TO_BUILD}"
    key, expected = fits
    try:
        built_for = json.loads((folder / record).read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return Extension(None, f"its record {record} cannot be read; {again}", broken=True)
    if built_for != expected:
        return Extension(None, f"built for {key} {built_for}, this is {expected}; {again}", broken=True)
    try:
        return Extension(opened(f"rl_kernels.{name}", path), None)
    except ImportError as error:
        return Extension(None, f"cannot be loaded ({error}); {again}", broken=True)


def is_older_than_its_sources(
    package: Path = Path(__file__).parent, name: str = "_C", patterns: Iterable[str] = SOURCES
) -> bool:
    """Whether the sources beside the package, in a checkout, changed after the extension was built."""
    built = library(name, package)
    sources = [path for pattern in patterns for path in (package.parent / "csrc").glob(pattern)]
    return built.exists() and any(path.stat().st_mtime > built.stat().st_mtime for path in sources)


EXTENSION = load(folder())


def describe_missing(extension: Extension) -> str:
    """Why the C++ kernels are missing, what that costs, and the command that mends it, in a line."""
    if extension.broken:
        return f"broken: {extension.missing}"
    return (
        "not built: layers on a CPU run on streamed, slower, most of all in small calls; "
        f"to build it: {HOW_TO_BUILD} with a C++ compiler"
    )


def complaint() -> str | None:
    """What an import says of the C++ kernels: None where they are there, or cannot be built, or another backend is
    asked for by name, which does without them knowingly.
    """
    lacking = EXTENSION.broken or (EXTENSION.missing is not None and sys.platform != "win32")
    if not lacking or os.environ.get("RL_KERNELS_BACKEND", "") not in ("", "auto", "cpu"):
        return None
    return f"the C++ kernels for CPUs are {describe_missing(EXTENSION)}"


def _declines(*_: Any) -> None:
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
