"""The library ``rl_kernels/_cuda.so``: found and loaded, or why not; and opened for the calls that C++ makes of it.

It knows neither Python nor torch, so that one build serves any. What calls it is ``rl_kernels._C``, which is built for
one torch (``csrc/bindings/cuda``): without that these kernels are missing, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl_kernels import _extension
from rl_kernels._extension import Extension
from rl_kernels._version import __version__
from rl_kernels.backends.cuda.library import Library

NAME = "_cuda"
RECORD = "_build_cuda.json"
SOURCES = ("cuda/*.h", "cuda/*.cpp", "cuda/*.cu", "cuda/*.cuh", "cuda/host/*")


def library_in(folder: Path) -> Extension:
    """What lies in a folder, loaded, unless it was built for another version of the package."""
    fits, opened = ("rl_kernels", __version__), lambda _, path: Library(path)
    return _extension.load(folder, NAME, RECORD, fits, needs="nvcc", opened=opened)


def opened_by(caller: Extension, found: Extension) -> Extension:
    """What ``library_in`` found, opened by the extension that calls it, or why it is not."""
    if found.module is None:
        return found
    if caller.module is None:
        return Extension(None, f"the C++ extension, which calls them, is missing: {caller.missing}")
    try:
        caller.module.cuda.open_library(found.module.__file__)
    except RuntimeError as error:
        again = f"build it again: {_extension.HOW_TO_BUILD}"
        return Extension(None, f"cannot be opened ({error}); {again}", broken=True)
    return found


EXTENSION = opened_by(_extension.EXTENSION, library_in(_extension.folder()))


def build_info() -> dict[str, Any]:
    """``architectures`` as ``"8.0 9.0+PTX"``, the versions ``nvcc`` and ``runtime``; empty without the extension."""
    return {} if EXTENSION.module is None else EXTENSION.module.build_info()


def sources() -> str:
    """What the build was made of, by ``building/cuda.py``; empty without the extension, or an older one."""
    if EXTENSION.module is None:
        return ""
    record: dict[str, str] = json.loads((_extension.folder() / RECORD).read_text())
    return record.get("sources", "")


def is_older_than_its_sources() -> bool:
    """Whether the sources, in a checkout, changed after it was built."""
    return _extension.is_older_than_its_sources(name=NAME, patterns=SOURCES)
