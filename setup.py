"""Builds ``rl_kernels/_C``, the C++ kernels for CPUs, against the torch that is installed, and ``rl_kernels/_cuda.so``,
the kernels for NVIDIA GPUs, where there is nvcc. All else: pyproject.toml.

Without torch, without a compiler, or where a compilation fails, the package installs all the same, without what could
not be built, and says what it then lacks. Environment variables:

* ``USE_CPP``, ``USE_CUDA``: 0 skips the one or the other, 1 makes a build of it that fails an error.
* ``RL_KERNELS_SCALAR``: 1 leaves out everything that needs vector instructions.
* ``RL_KERNELS_QUICK``: 1 compiles the kernels for CPUs in a fraction of the time, and slow; not what calls them.
* ``RL_KERNELS_SANITIZE``: a list for the compiler's ``-fsanitize``, as ``address,undefined``.
* ``CXX``: the C++ compiler. ``MAX_JOBS``: how many compilers run at once, by default one a core.
* ``CUDACXX``: nvcc. Without it: that of ``CUDA_HOME``, ``CUDA_PATH``, the ``PATH``, the package nvidia-cuda-nvcc.
* ``RL_KERNELS_CUDA_LINEINFO``: 1 adds the lines of the sources, for profilers and compute-sanitizer.
* ``RL_KERNELS_CUDA_ARCH_LIST``: compute capabilities, as "8.0 9.0+PTX"; or ``TORCH_CUDA_ARCH_LIST``, written alike.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # It would stop at pyproject.toml's licence, naming no cause.
    sys.exit(
        f"rl_kernels: setuptools 77 or later is needed to build it, this is {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # builds by pyproject.toml leave it out

from building import cpu, cuda  # noqa: E402
from building.steps import CannotBuild, Library  # noqa: E402

RECORD = "_build.json"  # beside the extension: what it was built for, read before it is loaded

COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-psabi"]
OPENMP = {"darwin": ["-Xpreprocessor", "-fopenmp"]}

LOST_CPP = """
rl_kernels: the C++ kernels for CPUs were not built: {reason}
The package works without them, on its streamed backend: slower on a CPU, most of all where calls are small.
To build them later, beside torch and with a C++ compiler:  pip install --no-build-isolation -e .
"""
LOST_CUDA = "rl_kernels works without the CUDA kernels, which were not built: {reason}"


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
    """Makes both extensions, of which each may fail without the other."""

    def run(self) -> None:
        self.built: list[str] = []
        failures = [
            self._failure("USE_CPP", self._cpp, LOST_CPP),
            self._failure("USE_CUDA", self._cuda, LOST_CUDA),
        ]
        if any(failures):
            raise SystemExit("\n".join(filter(None, failures)))

    def get_outputs(self) -> list[str]:
        return self.built

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib, "rl_kernels", Path(path).name)): path for path in self.built}

    def _failure(self, variable: str, library: Callable[[Path, Path], Library], lost: str) -> str | None:
        """Make what ``library`` describes; return why it could not be where ``variable`` says that it must."""
        folder = ROOT / "rl_kernels" if self.inplace else Path(self.build_lib, "rl_kernels")
        # setuptools' own default; of an editable install it makes a temporary folder, and objects are to stay.
        kept = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        objects = kept if self.inplace else Path(self.build_temp).resolve()
        try:
            if os.environ.get(variable) == "0":
                raise CannotBuild(f"{variable}=0")
            made = library(folder.resolve(), objects)
            made.build(self.force)
        except (CannotBuild, OSError, subprocess.SubprocessError) as error:
            message = lost.format(reason=error)
            if os.environ.get(variable) == "1":
                return message
            print(message, file=sys.stderr, flush=True)
        else:
            self.built += [str(made.target), str(made.record_file)]
        return None

    def _cuda(self, folder: Path, objects: Path) -> Library:
        return cuda.library(self.distribution.get_version(), folder, objects / "cuda")

    def _cpp(self, folder: Path, objects: Path) -> Library:
        if sys.platform == "win32":
            raise CannotBuild("they are not built on Windows")
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            raise CannotBuild(f"torch cannot be imported here ({error}); pip hides it under build isolation") from error
        compiler = find_compiler()

        scalar = os.environ.get("RL_KERNELS_SCALAR") == "1"
        quick = os.environ.get("RL_KERNELS_QUICK") == "1"
        sanitizers = os.environ.get("RL_KERNELS_SANITIZE", "")
        chosen = {"scalar": scalar, "quick": quick, f"sanitize={sanitizers}": bool(sanitizers)}
        options = " ".join(name for name, is_chosen in chosen.items() if is_chosen)
        record = {
            "torch": torch.__version__,
            "python": sysconfig.get_config_var("EXT_SUFFIX"),
            "compiler": shlex.join(compiler),
            "options": options,
        }
        flags = [*COMMON, f'-DRL_KERNELS_TORCH="{torch.__version__}"', f'-DRL_KERNELS_OPTIONS="{options}"']
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
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

        kept = objects / "_".join(["kernels", *options.split()])
        scripts = [Path(__file__), *ROOT.glob("building/*.py")]
        return Library(
            target=folder / f"_C{record['python']}",
            record=record,
            record_file=folder / RECORD,
            watched=[*scripts, *cpu.watched()],
            folder=kept,
            compilations=cpu.compilations(compiler, flags, kept, scalar, bool(sanitizers), quick),
            linker=tuple(compiler),
            linking=tuple(linking),
        )


class TaggedWheel(bdist_wheel):
    """A wheel without extensions is for every Python and machine, and not tagged as if it held some."""

    def get_tag(self) -> tuple[str, str, str]:
        # An editable wheel is tagged before anything is built, for this Python.
        if getattr(self.get_finalized_command("build_ext"), "built", None) == []:
            self.root_is_pure = True
        tag: tuple[str, str, str] = super().get_tag()
        return tag


def is_gcc(compiler: list[str]) -> bool:
    """Whether the compiler is GCC, and not one that calls itself so."""
    macros = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True).stdout
    return "__GNUC__" in macros and "__clang__" not in macros


setup(
    ext_modules=[Extension(f"rl_kernels.{name}", [], language="c++", optional=True) for name in ("_C", "_cuda")],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TaggedWheel},
)
