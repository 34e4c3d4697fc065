"""What the machine of a call says of itself, and which of CUDA's programs are there."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from building.cuda import find_program
from rl_kernels._machine import versions
from rl_kernels.backends.gpu.disassembler import find_tool

QUERY = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
PACKAGES = ("setuptools", "ninja", "pytest", "pytest-xdist", "hypothesis", "numpy", "click", "rich")


def gpu() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is none."""
    program = find_program("nvidia-smi")
    if program is None:
        return {}
    said = _output([program, f"--query-gpu={QUERY}", "--format=csv,noheader"]).splitlines()
    return dict(zip(QUERY.split(","), map(str.strip, said[0].split(",")), strict=False)) if said else {}


def describe() -> dict[str, Any]:
    """The GPU, the versions of all that takes part, and which programs there are; those that are missing are named."""
    programs = {name: find_program(name) for name in ("nvcc", "compute-sanitizer", "ncu")} | {"nvdisasm": None}
    with contextlib.suppress(FileNotFoundError):  # As kernels are looked at: Triton's package has one.
        programs["nvdisasm"] = str(find_tool("nvdisasm"))
    nvcc = programs["nvcc"]
    return {
        "gpu": gpu(),
        "cores": os.cpu_count(),
        "versions": versions("triton") | {name: _version(name) for name in PACKAGES},
        "nvcc": _output([nvcc, "--version"]).splitlines()[-1:] if nvcc else None,
        "missing": [name for name, path in programs.items() if path is None],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
