"""The CUDA kernels compiled for every architecture they are meant for: what the machine code holds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from building.cuda import ELEMENTS, SOURCES
from rl_kernels.backends.gpu import hazards
from rl_kernels.backends.gpu.disassembler import disassemble
from tests.emulated.compilers import find_nvcc

ARCHITECTURES = ("80", "90", "120")
BETWEEN = ("86", "89", "100")
"""Architectures that are looked at by ``make test-slow``: each takes ptxas minutes."""
FILES = tuple(sorted(path.stem for path in SOURCES.glob("*_sm80.cu")))
MATRIX_INSTRUCTION = {"f16": "HMMA.16816.F32 ", "bf16": "HMMA.16816.F32.BF16", "tf32": "HMMA.1688.F32.TF32"}
"""What takes its operands, the mixed weight first, from registers."""


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("element", "arch"),
    [
        *(("bf16", arch) for arch in ARCHITECTURES),
        *(pytest.param("bf16", arch, marks=pytest.mark.slow) for arch in BETWEEN),
        ("f16", "90"),
        ("tf32", "80"),
    ],
)
def test_machine_code(file: str, element: str, arch: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    said = compile_to(cubin, file, element, arch)
    spilled = re.findall(r"entry function '(\w+)'[^\n]*\n[^\n]*\n\s*(\d+) bytes stack frame, (\d+) bytes spill", said)
    kernels = machine_code(cubin)
    assert {name for name, _, _ in spilled} == kernels.keys() and kernels
    assert [name for name, stack, spill in spilled if stack != "0" or spill != "0"] == []
    # They multiply by mma.sync, which the processor guards itself.
    findings = hazards.check(listing(cubin))
    assert {found.kernel for found in findings} == kernels.keys()
    assert [found for found in findings if found.products or found.hazards] == []
    for name, code in kernels.items():
        if "reduce" in name or name.startswith("finish"):
            continue
        assert MATRIX_INSTRUCTION[element] in code, name
        assert "LDL" not in code and "STL" not in code, name
        if name.startswith("skinny"):
            assert "LDG.E.128" in code, f"{name}: sources are to be read 16 bytes at a time"
        else:
            assert re.search(r"LDGSTS\.E\.BYPASS[.\w]*\.128", code), f"{name}: 16 bytes are to be copied at a time"
            assert element == "tf32" or "LDSM.16." in code, name


def compile_to(cubin: Path, file: str, element: str, arch: str) -> str:
    """Returns what ptxas says of registers and memory."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-DRL_ELEMENT={ELEMENTS[element]}", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command = [find_nvcc(), "-cubin", *flags, SOURCES / f"{file}.cu", "-o", cubin]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def listing(cubin: Path) -> str:
    try:
        return disassemble(cubin.read_bytes())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def machine_code(cubin: Path) -> dict[str, str]:
    """The code of each kernel, by its name."""
    text = listing(cubin)
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
