"""NVIDIA's disassemblers, found, and what they say of a cubin. Neither needs a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

LISTINGS = (("nvdisasm", "-c"), ("cuobjdump", "-sass"))
"""What makes a listing of machine code; the first one that is there does."""


def find_tool(*names: str) -> Path:
    """The first of some tools of CUDA's that is there: in Triton's package, or in a CUDA toolkit.

    Raises:
        FileNotFoundError: none is; the message says where they come from.
    """
    for name in names:
        for folder in _folders():
            if os.access(folder / name, os.X_OK):
                return folder / name
    raise FileNotFoundError(
        f"no {' or '.join(names)}: it comes with Triton (pip install triton) and with the CUDA toolkit, which "
        f"is looked for in CUDA_HOME, on PATH and in /usr/local/cuda"
    )


def _folders() -> Iterator[Path]:
    triton = importlib.util.find_spec("triton")
    for package in (triton.submodule_search_locations if triton else None) or ():
        yield Path(package, "backends", "nvidia", "bin")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin")
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parent
    yield from map(Path, filter(None, os.environ.get("PATH", "").split(os.pathsep)))
    yield Path("/usr/local/cuda/bin")


def run_tool(tool: Path, *arguments: str | Path, errors_too: bool = False) -> str:
    """What a tool prints, if ``errors_too`` with its warnings.

    Raises:
        RuntimeError: it fails; the message has its words.
    """
    result = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{tool.name}: {' '.join((result.stderr or result.stdout).split())[:500]}")
    return result.stdout + result.stderr if errors_too else result.stdout


@functools.lru_cache(maxsize=512)
def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, for ``hazards.check``."""
    tool = find_tool(*(name for name, _ in LISTINGS))
    with as_file(cubin) as path:
        return run_tool(tool, dict(LISTINGS)[tool.name], path)


@contextlib.contextmanager
def as_file(cubin: bytes) -> Iterator[Path]:
    """A cubin as a file, which these tools need, for as long as a ``with`` lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        yield path
