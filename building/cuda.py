"""``rl_kernels/_cuda.so``, the kernels for NVIDIA GPUs: which nvcc, for which architectures, with which flags.

It is a library with a C interface (``csrc/cuda/abi.h``). Neither Python's nor torch's headers or libraries are needed:
one build serves every Python and every torch, and is made beside a CPU build of torch, too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from building.steps import ROOT, CannotBuild, Compilation, Library

SOURCES = ROOT / "csrc" / "cuda"
HOST = [*SOURCES.glob("*.cpp"), *SOURCES.glob("host/*.cpp")]
"""What the host's compiler compiles: the C interface, and the plans of launches."""
RECORD = "_build_cuda.json"
ARCH_LIST = "RL_KERNELS_CUDA_ARCH_LIST"
TORCH_ARCH_LIST = "TORCH_CUDA_ARCH_LIST"
DEFAULT_ARCHITECTURES = "8.0 9.0+PTX"
"""Code for 8.0 runs on 8.6 and 8.9 as well; PTX is compiled by the driver for whatever comes later."""
OLDEST_ARCHITECTURE = (8, 0)
OLDEST_NVCC = (12, 0)  # knows C++20

ELEMENTS = {"f16": 0, "bf16": 1, "tf32": 2}
"""The types that a file for one architecture is compiled for, each by itself, and what RL_ELEMENT then is."""
FOR_EACH_ELEMENT = ("_sm80.cu", "_sm90.cu")

FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG"]
FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
# The runtimes of CUDA and of C++ are linked in, and their names kept from those that torch and others bring.
LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-Xcompiler", "-static-libstdc++"]


LINEINFO = "RL_KERNELS_CUDA_LINEINFO"
"""Whether the lines of the sources are embedded, which doubles the size."""
LINES = "-lineinfo"
KNOWS_COMPRESS_MODE = (12, 8)  # the version of nvcc
COMPRESS = ["-Xfatbin", "-compress-all"]


class Architecture(NamedTuple):
    """A compute capability to compile for."""

    number: str
    """As ``"8.0"`` or ``"9.0a"``."""
    ptx: bool
    """Whether its PTX is kept, for later ones."""

    def __str__(self) -> str:
        return self.number + "+PTX" * self.ptx

    def flags(self) -> list[str]:
        """Nvcc's."""
        name = self.number.replace(".", "")
        codes = [f"sm_{name}", *([f"compute_{name}"] if self.ptx else [])]
        return [f"-gencode=arch=compute_{name},code={code}" for code in codes]


def architectures() -> list[Architecture]:
    """Those that the environment asks for, or the default; CannotBuild names what cannot be read."""
    own, torchs = os.environ.get(ARCH_LIST), os.environ.get(TORCH_ARCH_LIST)
    if own or not torchs:
        return parse_architectures(own or DEFAULT_ARCHITECTURES, ARCH_LIST)
    # That list is for other packages too: what is too old for these kernels is no mistake there.
    return parse_architectures(torchs, TORCH_ARCH_LIST, leave_out_older=True)


def parse_architectures(text: str, variable: str, leave_out_older: bool = False) -> list[Architecture]:
    """Read a list such as ``"8.0 9.0+PTX"``, with spaces or semicolons; ``variable`` is where it stood."""
    found: dict[str, Architecture] = {}
    for word in re.split(r"[\s;,]+", text.strip(" ;,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise CannotBuild(f"{variable}: got {word!r} in {text!r}, expected numbers such as {DEFAULT_ARCHITECTURES}")
        major, minor, variant, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCHITECTURE:
            if leave_out_older:
                continue
            raise CannotBuild(f"{variable}: got {word!r}, the kernels need 8.0 or later")
        number = f"{major}.{minor}{variant}"
        found[number] = Architecture(number, bool(ptx) or (number in found and found[number].ptx))
    if not found:
        raise CannotBuild(f"{variable}: got {text!r}, the kernels need 8.0 or later")
    return list(found.values())


USUAL_FOLDER = "/usr/local/cuda/bin"


def find_program(name: str) -> str | None:
    """A program of CUDA: in CUDA_HOME, CUDA_PATH, the PATH, the usual folder or Python's packages; None without it."""
    homes = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    folders = [*map(str, homes), os.environ.get("PATH", ""), USUAL_FOLDER, *map(str, _package_folders())]
    return next(filter(None, (shutil.which(name, path=folder) for folder in folders if folder)), None)


def find_nvcc() -> str:
    """The compiler: CUDACXX, or what ``find_program`` finds; CannotBuild where there is none."""
    asked = os.environ.get("CUDACXX")
    if asked:
        found = shutil.which(asked)
        if found is None:
            raise CannotBuild(f"there is no nvcc ({asked}, which CUDACXX names, cannot be run)")
        return found
    found = find_program("nvcc")
    if found is None:
        places = "CUDACXX, CUDA_HOME, CUDA_PATH, the PATH, /usr/local/cuda, the package nvidia-cuda-nvcc"
        raise CannotBuild(f"there is no nvcc ({places})")
    return found


def _package_folders() -> list[Path]:
    """Where packages of CUDA have their programs, the newest first."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations if spec else None) or ()]
    return [path for root in roots for path in sorted(root.glob("cu[0-9][0-9]/bin"), reverse=True)]


def nvcc_version(nvcc: str) -> str:
    """As ``"13.0.88"``."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"V(\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        raise CannotBuild(f"{nvcc} --version says no version: {said.strip()!r}")
    if (int(match[1]), int(match[2])) < OLDEST_NVCC:
        raise CannotBuild(f"nvcc is {match[0][1:]}, 12.0 or later is needed")
    return match[0][1:]


def options(nvcc: str) -> list[str]:
    """Flags that depend on the compiler's version or on the environment: what is embedded is made small."""
    found = ["--compress-mode=size"] if tuple(map(int, nvcc.split(".")[:2])) >= KNOWS_COMPRESS_MODE else COMPRESS
    return [*found, LINES] if os.environ.get(LINEINFO) == "1" else found


def record_of(version: str, targets: Sequence[Architecture], nvcc: str) -> dict[str, str]:
    """What the library is built for, as it is written beside it."""
    listed = " ".join(map(str, targets))
    return {"rl_kernels": version, "architectures": listed, "nvcc": nvcc, "sources": made_of(nvcc)}


def made_of(nvcc: str) -> str:
    """What decides the kernels' code and how it is launched, as a hash: their sources, the flags and nvcc; no path, no
    date, and neither compression nor line tables, which change no instruction.

    A record of what was measured holds for every build of the same.
    """
    total = hashlib.sha256(json.dumps([nvcc, FLAGS]).encode())
    files = (path for path in SOURCES.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    for name, path in sorted((path.relative_to(SOURCES).as_posix(), path) for path in files):
        total.update(f"{name} {path.stat().st_size}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def library(version: str, folder: Path, objects: Path, sources: Sequence[Path] | None = None) -> Library:
    """The library of the package at ``version``.

    Args:
        version: of the package, whose code must fit the library.
        folder: where the library and its record go.
        objects: where object files and the logs of ptxas go.
        sources: ``.cu`` and ``.cpp`` files; those of ``csrc/cuda`` unless given.

    Raises:
        CannotBuild: where something is missing, or the environment asks for what there is not.
    """
    if sys.platform != "linux":
        raise CannotBuild("they are built on Linux")
    nvcc = find_nvcc()
    targets = architectures()
    record = record_of(version, targets, nvcc_version(nvcc))
    flags = [f'-DRL_KERNELS_CUDA_ARCHITECTURES="{record["architectures"]}"', f'-DRL_KERNELS_NVCC="{record["nvcc"]}"']
    flags += [f"-I{SOURCES}", *options(record["nvcc"])]
    flags += [flag for target in targets for flag in target.flags()]
    # Its own choice otherwise, which NVCC_CCBIN changes.
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    # Of Python's packages nvcc does not find the libraries by itself.
    libraries = Path(nvcc).resolve().parents[1] / "lib"
    found = [f"-L{libraries}"] if (libraries / "libcudart_static.a").exists() else []

    compilations = []
    for source in sources or sorted([*HOST, *SOURCES.glob("*.cu")]):
        elements = ELEMENTS if source.name.endswith(FOR_EACH_ELEMENT) else {"": None}
        for name, element in elements.items():
            defines = [] if element is None else [f"-DRL_ELEMENT={element}"]
            target = objects / ".".join(filter(None, [source.stem, name, "o"]))
            command = (nvcc, *host, *FLAGS, *flags, *defines)
            compilations.append(Compilation(source, target, command, logged=source.suffix == ".cu"))
    return Library(
        target=folder / "_cuda.so",
        record=record,
        record_file=folder / RECORD,
        watched=[
            *(path for path in SOURCES.rglob("*.*") if path.suffix != ".md"),
            *(ROOT / "building").glob("*.py"),
            *(sources or []),
        ],
        folder=objects,
        compilations=compilations,
        linker=(nvcc, *host),
        linking=(*LINK, *found),
    )
