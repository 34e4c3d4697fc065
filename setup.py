"""Builds ``rl_kernels/_C``, the C++ kernels for CPUs, against the torch that is installed. All else: pyproject.toml.

Without torch, without a C++ compiler, or where a compilation fails, the package installs all the same, in pure Python,
and says what it then lacks. Environment variables:

* ``USE_CPP``: 0 skips the build, 1 makes a build that fails an error.
* ``RL_KERNELS_SCALAR``: 1 leaves out everything that needs vector instructions.
* ``RL_KERNELS_SANITIZE``: a list for the compiler's ``-fsanitize``, as ``address,undefined``.
* ``CXX``: the compiler. ``MAX_JOBS``: how many of it run at once, by default one a core.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
RECORD = "_build.json"  # beside the extension: what it was built for, read before it is loaded

COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-psabi"]
# A product and a sum are rounded once where the machine can; nothing reads errno.
KERNELS = ["-ffp-contract=fast", "-fno-math-errno"]
X86 = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
OPENMP = {"darwin": ["-Xpreprocessor", "-fopenmp"]}
WHERE_ACCEPTED = {"kernels_avx512": ["-mavx512bf16"]}

LOST = """
rl_kernels: the C++ kernels for CPUs were not built: {reason}
The package works without them, on its streamed backend: slower on a CPU, most of all where calls are small.
To build them later, beside torch and with a C++ compiler:  pip install --no-build-isolation -e .
"""


class CannotBuild(Exception):
    """Why the extension cannot be built here."""


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``CXX``, what Python was built with, or a usual name."""
    asked = os.environ.get("CXX")
    for command in [asked] if asked else [sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            # Python's own command may carry options, such as -pthread.
            return words
    raise CannotBuild(f"there is no C++ compiler ({asked or 'c++, g++ or clang++'} is not on the PATH)")


class BuildKernels(build_ext):
    """Compiles with flags of each file's own, all files at once."""

    def run(self) -> None:
        self.built: list[str] = []
        required = os.environ.get("USE_CPP") == "1"
        try:
            self._build()
        except (CannotBuild, OSError, subprocess.SubprocessError) as error:
            self.built = []
            if required:
                raise SystemExit(f"rl_kernels: the C++ kernels were not built: {error}") from error
            print(LOST.format(reason=error), file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        return self.built

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib, "rl_kernels", Path(path).name)): path for path in self.built}

    def _build(self) -> None:
        if os.environ.get("USE_CPP") == "0":
            raise CannotBuild("USE_CPP=0")
        if sys.platform == "win32":
            raise CannotBuild("they are not built on Windows")
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            raise CannotBuild(f"torch cannot be imported here ({error}); pip hides it under build isolation") from error
        compiler = find_compiler()

        scalar = os.environ.get("RL_KERNELS_SCALAR") == "1"
        sanitizers = os.environ.get("RL_KERNELS_SANITIZE", "")
        options = " ".join(["scalar"] * scalar + [f"sanitize={sanitizers}"] * bool(sanitizers))
        record = {
            "torch": torch.__version__,
            "python": sysconfig.get_config_var("EXT_SUFFIX"),
            "compiler": shlex.join(compiler),
            "options": options,
        }
        folder = ROOT / "rl_kernels" if self.inplace else Path(self.build_lib, "rl_kernels")
        target = folder / f"_C{record['python']}"
        sources = [path for path in sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))]
        if scalar:
            sources = [path for path in sources if path.stem not in X86]
        self.built = [str(target), str(folder / RECORD)]
        if not self.force and is_current(target, folder / RECORD, record):
            return

        flags = [*COMMON, f'-DRL_KERNELS_TORCH="{torch.__version__}"', f'-DRL_KERNELS_OPTIONS="{options}"']
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        flags += ["-DRL_KERNELS_SCALAR_ONLY"] * scalar
        flags += [f"-I{ROOT / 'csrc'}"]
        # Headers of others, whose warnings are not ours.
        flags += [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
        linking = ["-fvisibility=hidden", *(f"-L{path}" for path in cpp_extension.library_paths())]
        linking += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        if torch.backends.openmp.is_available():
            # at::parallel_for is inline, and runs on one thread without this. GCC's calls are answered by the library
            # that torch brought: linking another would make a second pool of threads.
            flags += OPENMP.get(sys.platform, ["-fopenmp"])
            linking += [] if is_gcc(compiler) or sys.platform == "darwin" else ["-fopenmp"]
        linking += ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        if sanitizers:
            checked = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1"]
            flags, linking = flags + checked, linking + checked

        objects = Path(self.build_temp).resolve() / ("_".join(["kernels", *options.split()]))
        objects.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        commands = [
            [
                *compiler,
                *flags,
                *flags_of(path, compiler, bool(sanitizers)),
                "-c",
                str(path),
                "-o",
                str(objects / f"{path.stem}.o"),
            ]
            for path in sources
        ]
        # Until the new one is there, there is none: one of other sources may not fit the package any more.
        (folder / RECORD).unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(execute, commands))
        made = [str(objects / f"{path.stem}.o") for path in sources]
        execute([*compiler, *made, *linking, "-o", str(target)])
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def is_current(target: Path, record_file: Path, record: dict[str, str]) -> bool:
    """Whether ``target`` was built as ``record`` says, and after every source changed last."""
    if not target.exists() or not record_file.exists() or json.loads(record_file.read_text()) != record:
        return False
    files = [Path(__file__), *ROOT.glob("csrc/*.*"), *ROOT.glob("csrc/cpu/*.*")]
    return target.stat().st_mtime > max(path.stat().st_mtime for path in files)


def flags_of(path: Path, compiler: list[str], sanitized: bool) -> list[str]:
    """The flags of one source file: optimisation, and the instructions that it may use."""
    # Sanitized, the kernels take ten times as long to compile at -O3.
    optimisation = "-O1" if sanitized else "-O3" if path.stem.startswith("kernels_") else "-O2"
    if not path.stem.startswith("kernels_"):
        return [optimisation]
    flags = [optimisation, *KERNELS]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags += X86.get(path.stem, [])
        flags += [flag for flag in WHERE_ACCEPTED.get(path.stem, []) if accepts(compiler, flag)]
    return flags


def accepts(compiler: list[str], flag: str) -> bool:
    """Whether the compiler knows ``flag``."""
    command = [*compiler, "-Werror", flag, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


def is_gcc(compiler: list[str]) -> bool:
    """Whether the compiler is GCC, and not one that calls itself so."""
    macros = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True).stdout
    return "__GNUC__" in macros and "__clang__" not in macros


def execute(command: list[str]) -> None:
    """Run the compiler; its words become the error's."""
    print(shlex.join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.stdout:
        print(result.stdout, flush=True)
    if result.returncode != 0:
        raise CannotBuild(f"the compiler failed:\n{shlex.join(command)}\n{result.stdout}".rstrip())


setup(
    ext_modules=[Extension("rl_kernels._C", [], language="c++", optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
