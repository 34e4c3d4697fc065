"""What ``rl_kernels/_C`` is compiled from, with which flags, and for which instruction sets."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

from building.steps import ROOT, Compilation

CSRC = ROOT / "csrc"
FOLDERS = ("bindings", "bindings/cuda", "cpu/torch")
"""Of the sources that are compiled once, in ``csrc``."""
TABLE = CSRC / "cpu" / "kernels" / "table.cpp"
"""The kernels, compiled once for each instruction set."""

# A product and a sum are rounded once where the machine can; nothing reads errno.
KERNELS = ["-ffp-contract=fast", "-fno-math-errno"]


class InstructionSet(NamedTuple):
    """What the kernels are compiled for."""

    name: str
    flags: tuple[str, ...] = ()
    where_accepted: tuple[str, ...] = ()
    """Flags that not every compiler knows."""


BASELINE = InstructionSet("scalar")
"""Nothing beyond what the compiler targets by itself."""

X86 = (
    InstructionSet("avx2", ("-DRLK_AVX2", "-mavx2", "-mfma", "-mf16c")),
    InstructionSet(
        "avx512",
        ("-DRLK_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        where_accepted=("-mavx512bf16",),
    ),
)


def instruction_sets(scalar: bool = False) -> tuple[InstructionSet, ...]:
    """Those for this machine; ``scalar``: without vector instructions."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (BASELINE, *X86) if x86 and not scalar else (BASELINE,)


def watched() -> list[Path]:
    """Every file in ``csrc`` that the library is made from."""
    patterns = ("bindings/*.*", "bindings/cuda/*", "cpu/*/*", *(f"cuda/{name}.h" for name in ("abi", "call", "params")))
    return [path for pattern in patterns for path in CSRC.glob(pattern)]


def compilations(
    compiler: list[str], flags: list[str], folder: Path, scalar: bool, sanitized: bool, quick: bool = False
) -> list[Compilation]:
    """What makes the objects, in ``folder``.

    Args:
        compiler: its command.
        flags: those of every source.
        folder: where objects go.
        scalar: whether to leave out what needs vector instructions.
        sanitized: whether the sanitizers' flags are among ``flags``.
        quick: whether the kernels are to compile fast instead of being fast; what calls them stays as it is.
    """
    sets = instruction_sets(scalar)
    plain = [*compiler, *flags, f"-I{CSRC}", "-O1" if sanitized else "-O2"]
    plain += ["-DRL_KERNELS_SCALAR_ONLY"] * (sets == (BASELINE,))
    steps = [
        Compilation(path, folder / f"{path.parent.name}_{path.stem}.o", tuple(plain))
        for name in FOLDERS
        for path in sorted((CSRC / name).glob("*.cpp"))
    ]
    # Sanitized, the kernels take ten times as long to compile at -O3.
    kernels = [*compiler, *flags, f"-I{CSRC}", "-O1" if sanitized or quick else "-O3", *KERNELS]
    for isa in sets:
        optional = [flag for flag in isa.where_accepted if accepts(compiler, flag)]
        command = (*kernels, *isa.flags, *optional)
        steps.append(Compilation(TABLE, folder / f"kernels_{isa.name}.o", command))
    return steps


def accepts(compiler: list[str], flag: str) -> bool:
    """Whether the compiler knows ``flag``."""
    command = [*compiler, "-Werror", flag, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0
