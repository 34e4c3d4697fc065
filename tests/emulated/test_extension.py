"""The module ``rl_kernels._cuda``, of a small kernel, built by nvcc and loaded where there is no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rl_kernels as rl
from building import cuda
from rl_kernels import _extension
from rl_kernels._extension import Extension
from rl_kernels.backends.cuda import configs, extension

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
        cuda.library(rl.__version__, folder, folder / "objects", [cuda.SOURCES / "bindings.cpp", source]).build()
    return folder


@pytest.fixture
def module(built: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """It in the place of the package's own."""
    # By another name: pybind11 makes one module of a name in a process, whatever the file.
    spec = importlib.util.spec_from_file_location("probe._cuda", _extension.library(extension.NAME, built))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(extension, "EXTENSION", Extension(module, None))
    return module


def launch(name: str = "probe_scale", params: ctypes.Structure | None = None, shared_bytes: int = 0) -> None:
    operands = torch.empty(8, 4, device="cuda" if torch.cuda.is_available() else "cpu"), torch.empty(5, 4)
    extension.launch("mixed_linear", name, (2, 1, 1), shared_bytes, params or Scaling(), operands)


def test_the_package_loads_it_and_knows_what_it_is(built: Path) -> None:
    program = """
import json
from rl_kernels.backends.cuda import extension
assert extension.EXTENSION.missing is None, extension.EXTENSION.missing
print(json.dumps([extension.EXTENSION.module.kernels(), extension.build_info()]))
"""
    environment = {**os.environ, _extension.FOLDER_VARIABLE: str(built), "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    kernels, info = json.loads(found.stdout)
    for name, times in (("probe_scale", 1), ("probe_scale_twice", 2)):
        facts = configs.Facts(threads=128, rows=times, kept_bytes=7)
        assert kernels[name] == {**facts._asdict(), "params_bytes": ctypes.sizeof(Scaling)}
    assert len(kernels) == 2
    record = json.loads((built / extension.RECORD).read_text())
    assert info["architectures"] == record["architectures"] == "8.0+PTX" and info["nvcc"] == record["nvcc"]
    assert "ptxas info" in (built / "objects" / "probe.o.log").read_text()


def test_it_brings_a_runtime_of_its_own(built: Path) -> None:
    (library,) = built.glob("_cuda*.so")
    assert b"libcudart.so" not in library.read_bytes()


class Anywhere:
    """Stands for torch's handling of devices and streams, which a build of torch for CPUs lacks."""

    cuda_stream = 0

    def __init__(self, device: torch.device):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("module")
class TestLaunch:
    @pytest.fixture(autouse=True)
    def no_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device", Anywhere)
        monkeypatch.setattr(torch.cuda, "current_stream", Anywhere)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize("shared_bytes", [0, 100_000])
    def test_without_a_driver_it_says_so(self, shared_bytes: int, module: Any) -> None:
        words = rf"^mixed_linear on \(8, 4\), \(5, 4\): kernel probe_scale .*{shared_bytes} bytes of shared memory: "
        with pytest.raises(RuntimeError, match=words + "there is no CUDA driver on this machine: cudaError"):
            launch(shared_bytes=shared_bytes)
        with pytest.raises(RuntimeError, match=r"^device 0: there is no CUDA driver"):
            module.device_info(0)

    def test_parameters_of_another_size_are_refused(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"mixed_linear on \(8, 4\), \(5, 4\): .* takes parameters of 16 bytes, got 8"
        ):
            launch(params=Other())

    def test_a_kernel_that_there_is_not(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"^mixed_linear on \(8, 4\), \(5, 4\): there is no kernel probe_nothing"
        ):
            launch("probe_nothing")


@pytest.mark.usefixtures("module")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_without_cuda_is_told_as_well() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)^mixed_linear on \(8, 4\), \(5, 4\): .*cuda"):
        launch()


@pytest.mark.gpu
@pytest.mark.usefixtures("module")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_it_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        values = torch.ones(200, device="cuda")
        launch("probe_scale_twice", Scaling(values.data_ptr(), 3.0, 150), shared_bytes=64 * 1024)
        found = values.cpu()
    assert found.tolist() == [9.0] * 150 + [1.0] * 50
