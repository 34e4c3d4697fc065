"""What a recorded measurement says about where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rl_kernels._extension import EXTENSION


def machine() -> dict[str, str | int | float | list[str]]:
    """Describe the processor, its memory (GiB), torch's threads and the GPUs; names no host and no path."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    described: dict[str, str | int | float | list[str]] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels": EXTENSION.module.build_info()["capability"] if EXTENSION.module is not None else "none",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        described["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return described


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of the installed ones among rl_kernels, torch and ``packages``.

    What is imported says its own: the metadata of torch's builds for CUDA leaves out "+cu130", and a checkout that was
    not installed has none.
    """
    found = {"python": platform.python_version()}
    for name in ("rl_kernels", "torch", *packages):
        said = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(said, str):
            found[name] = str(said)
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(*status: str) -> dict[str, Any]:
    """Return the commit that this package lies at, and whether its tree differs from it; None where git cannot say.

    Args:
        status: further arguments of ``git status``.
    """
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain", *status)
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
