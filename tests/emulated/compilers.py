"""nvcc, where there is one."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def find_nvcc() -> str | None:
    """On the path, under CUDA_HOME, or installed as a package of Python's."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    spec = importlib.util.find_spec("nvidia")
    homes += [Path(folder) / "cu13" for folder in (spec.submodule_search_locations if spec else None) or ()]
    found = (shutil.which("nvcc", path=home / "bin") for home in homes)
    return shutil.which("nvcc") or next(filter(None, found), None)


@functools.cache
def compiled(source: Path, arch: str) -> str:
    """A CUDA source's PTX for ``arch``; the test is skipped where there is no nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: neither on PATH, nor under CUDA_HOME, nor in the package nvidia-cuda-nvcc")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.ptx"
        flags = ["-std=c++17", f"-gencode=arch=compute_{arch},code=compute_{arch}"]
        result = subprocess.run([nvcc, "-ptx", *flags, source, "-o", target], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return target.read_text()
