"""The library ``rl_kernels/_cuda.so``, of a small kernel, built by nvcc and loaded where there is no GPU."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest
import torch

import rl_kernels as rl
from building import cuda
from rl_kernels import _extension
from rl_kernels._extension import Extension
from rl_kernels.backends.cuda import extension
from rl_kernels.backends.cuda import library as interface
from rl_kernels.backends.cuda.library import Library
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import posing
from tests.emulated.problems import call_of, execute

PROBE = """
#include "registry.h"

struct Scaling {
  float *values;
  float factor;
  int count;
};

template <class T, int TIMES> struct Scale {
  using Params = Scaling;
  static constexpr int MAX_THREADS = 256;
  static constexpr rl_kernels::cuda::LaunchFacts FACTS = {.threads = 128, .rows = TIMES, .kept_bytes = 7};

  static __device__ void run(const Scaling &p) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    for (int time = 0; time < TIMES && i < p.count; ++time)
      p.values[i] *= T(p.factor);
  }
};

RL_KERNEL(probe_scale, Scale<float, 1>);
namespace anywhere {
RL_KERNEL(probe_scale_twice, Scale<float, 2>);
}
"""


class Scaling(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("factor", ctypes.c_float), ("count", ctypes.c_int))


class Other(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p),)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    source = folder / "probe.cu"
    source.write_text(PROBE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda.ARCH_LIST, "8.0+PTX")
        cuda.library(rl.__version__, folder, folder / "objects", [*cuda.HOST, source]).build()
    return folder


@pytest.fixture
def module(built: Path) -> Library:
    return Library(_extension.library(extension.NAME, built))


def launch(module: Library, name: str = "probe_scale", params: ctypes.Structure | None = None, shared: int = 0) -> None:
    stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
    module.launch(name, (2, 1, 1), shared, stream, bytes(params or Scaling()))


def test_the_package_loads_it_and_knows_what_it_is(built: Path) -> None:
    found = extension.library_in(built)
    assert found.missing is None
    kernels, info = found.module.kernels(), found.module.build_info()
    for name, times in (("probe_scale", 1), ("probe_scale_twice", 2)):
        facts = {name: value for name, value in kernels[name].items() if value}
        assert facts == {"threads": 128, "rows": times, "kept_bytes": 7, "params_bytes": ctypes.sizeof(Scaling)}
    assert len(kernels) == 2
    record = json.loads((built / extension.RECORD).read_text())
    assert info["architectures"] == record["architectures"] == "8.0+PTX" and info["nvcc"] == record["nvcc"]
    assert "ptxas info" in (built / "objects" / "probe.o.log").read_text()


def test_it_brings_its_runtimes_and_needs_no_python(built: Path) -> None:
    """One file serves every Python and torch, whatever runtimes they bring."""
    (library,) = built.glob("_cuda*.so")
    assert library.name == "_cuda.so"
    content = library.read_bytes()
    for name in (b"libcudart.so", b"libstdc++.so", b"libpython", b"libtorch", b"libc10", b"PyObject"):
        assert name not in content, name


def test_it_is_missing_without_the_extension_that_calls_it(built: Path) -> None:
    found = extension.library_in(built)
    without = extension.opened_by(Extension(None, "not built"), found)
    assert without.missing == "the C++ extension, which calls them, is missing: not built" and not without.broken


def test_an_interface_of_another_number_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "ABI", 0)
    with pytest.raises(ImportError, match=r"^its interface is number \d+, expected 0$"):
        Library(_extension.library(extension.NAME, built))


def test_the_header_and_python_number_the_interface_alike() -> None:
    (number,) = re.findall(r"ABI = (\d+);", (cuda.SOURCES / "abi.h").read_text())
    assert int(number) == interface.ABI


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("shared", [0, 100_000])
def test_without_a_driver_it_says_so(shared: int, module: Library) -> None:
    words = rf"^kernel probe_scale .*{shared} bytes of shared memory: "
    with pytest.raises(RuntimeError, match=words + "there is no CUDA driver on this machine: cudaError"):
        launch(module, shared=shared)
    with pytest.raises(RuntimeError, match=r"^device 0: there is no CUDA driver"):
        module.device_info(0)


def test_parameters_of_another_size_are_refused(module: Library) -> None:
    with pytest.raises(RuntimeError, match=r"^kernel probe_scale takes parameters of 16 bytes, got 8"):
        launch(module, params=Other())


def test_a_kernel_that_there_is_not(module: Library) -> None:
    with pytest.raises(RuntimeError, match=r"^there is no kernel probe_nothing in _cuda.so"):
        launch(module, "probe_nothing")


def test_a_call_that_needs_a_kernel_that_there_is_not(module: Library) -> None:
    """The plan is made before anything is launched."""
    opened = extension.EXTENSION.module
    caller = _extension.EXTENSION.module.cuda
    caller.open_library(module.__file__)
    try:
        missing = r"^mixed_linear on \(40, 8\), .*: there is no kernel linear_"
        with posing(None), pytest.raises(RuntimeError, match=missing):
            execute(call_of("mixed_linear", Problem(40, 8, 8), torch.bfloat16))
    finally:
        if opened is not None:
            caller.open_library(opened.__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_it_runs_on_the_current_stream(module: Library) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        values = torch.ones(200, device="cuda")
        launch(module, "probe_scale_twice", Scaling(values.data_ptr(), 3.0, 150), shared=64 * 1024)
        found = values.cpu()
    assert found.tolist() == [9.0] * 150 + [1.0] * 50
