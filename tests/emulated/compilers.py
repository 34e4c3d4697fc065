"""nvcc, and what it makes: without one nothing in this folder is collected."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from building.cuda import find_nvcc


@functools.cache
def compiled(source: Path, arch: str, *flags: str) -> str:
    """The PTX of a CUDA source for ``arch``."""
    return compiled_files({source.name: source.read_text()}, source.name, arch, "-std=c++17", *flags)


def compiled_files(files: Mapping[str, str], main: str, arch: str, *flags: str) -> str:
    """The PTX of one of several files that include one another; kept in the temporary folder, for other processes."""
    command: list[Any] = [find_nvcc(), "-ptx", f"-gencode=arch=compute_{arch},code=compute_{arch}", *flags]
    key = hashlib.sha256(repr((command, main, sorted(files.items()))).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"rl_kernels_ptx_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    target = cache / f"{Path(main).stem}_{key}.ptx"
    with filelock.FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory() as folder:
                for name, text in files.items():
                    Path(folder, name).write_text(text)
                made = Path(folder, "kernels.ptx")
                result = subprocess.run([*command, Path(folder, main), "-o", made], capture_output=True, text=True)
                assert result.returncode == 0, result.stderr
                shutil.move(made, target)
    return target.read_text()


def cutlass() -> str:
    """The folder of CUTLASS's headers."""
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (include := Path(folder) / "source" / "include").is_dir():
            return str(include)
    raise FileNotFoundError("CUTLASS's headers, which the extra `emulated` brings (nvidia-cutlass)")
