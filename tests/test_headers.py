"""Every header of the kernels compiles on its own, without a warning: those for CPUs for every instruction set."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from building import cpu

HEADERS = sorted(cpu.TABLE.parent.glob("*.h"))
CUDA_HEADERS = sorted((cpu.CSRC / "cuda").rglob("*.h"))
"""Those of the kernels' library that the host's compiler reads."""


def compiler() -> list[str]:
    for command in (sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    pytest.skip("there is no C++ compiler; the package works without one")


@pytest.mark.parametrize("name", [path.name for path in HEADERS])
def test_a_header_stands_alone(name: str) -> None:
    command = [*compiler(), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{cpu.TABLE.parent}"]
    for isa in cpu.instruction_sets():
        found = subprocess.run(
            [*command, *isa.flags, "-fsyntax-only", "-x", "c++", "-"],
            input=f'#include "{name}"\n#include "{name}"\n',
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, f"{isa.name}: {found.stderr}"


@pytest.mark.parametrize("path", CUDA_HEADERS, ids=lambda path: path.name)
def test_a_header_of_the_cuda_kernels_stands_alone_and_needs_no_cuda(path: Path) -> None:
    command = [*compiler(), "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{cpu.CSRC}", "-fsyntax-only", "-x", "c++"]
    text = f'#include "{path.relative_to(cpu.CSRC)}"\n' * 2
    found = subprocess.run([*command, "-"], input=text, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_the_instruction_sets_share_no_function(path: Path) -> None:
    """What is compiled for a newer CPU has internal linkage, and nothing comes from the C++ library's templates."""
    text = path.read_text()
    assert "#pragma once" in text
    allowed = {"cstddef", "cstdint", "immintrin.h"}
    included = {line.split("<")[1].split(">")[0] for line in text.splitlines() if line.startswith("#include <")}
    assert included <= allowed
    functions = re.search(r"^(inline|template|constexpr) .*\(", text, re.MULTILINE)
    assert functions is None or "\nnamespace {" in text[: functions.start()]
