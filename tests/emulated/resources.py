"""What ptxas gives each kernel: registers, bytes spilled, and how many blocks a multiprocessor's registers suffice for.

``python -m tests.emulated.resources`` compiles all kernels of bfloat16 for compute capability 8.0 and writes
resources.json; minutes. Of ptxas 13.0; another counts a few registers more or less.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from building.cuda import find_nvcc

TABLE = Path(__file__).with_name("resources.json")
REGISTERS = 65536
"""Of a multiprocessor, on every architecture since 8.0; a warp takes multiples of 256."""


class Resources(NamedTuple):
    """Of a kernel; bytes are a thread's.

    Attributes:
        registers: of a thread.
        spilled: bytes that are stored for want of registers.
        blocks: on a multiprocessor, by its registers alone.
    """

    registers: int
    spilled: int
    blocks: int


def resources(ptx: str, arch: str = "80") -> dict[str, Resources]:
    """Of each kernel of a PTX text."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.ptx")
        source.write_text(ptx)
        ptxas = Path(find_nvcc()).resolve().with_name("ptxas")
        command = [ptxas, f"-arch=sm_{arch}", "-v", source, "-o", Path(folder, "kernels.cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    threads = dict(re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, flags=re.DOTALL))
    found = {}
    for name, spilled, registers in re.findall(pattern, result.stderr, flags=re.DOTALL):
        if name.startswith("skinny"):
            threads[name] = "256"  # What is compiled for more threads than run leaves registers to another block.
        warp = -(-int(registers) * 32 // 256) * 256
        found[name] = Resources(int(registers), int(spilled), REGISTERS // (warp * int(threads[name]) // 32))
    return found


def table() -> dict[str, Resources]:
    """The committed one."""
    return {name: Resources(*entry) for name, entry in json.loads(TABLE.read_text()).items()}


if __name__ == "__main__":
    from tests.emulated.backend import ptx_of

    every: dict[str, Resources] = {}
    for main in ("linear", "conv", "skinny", "resident"):
        every |= resources(ptx_of(f"{main}_bf16", "80"))
    lines = ",\n".join(f'  "{name}": {json.dumps(list(entry))}' for name, entry in sorted(every.items()))
    TABLE.write_text(f"{{\n{lines}\n}}\n")
