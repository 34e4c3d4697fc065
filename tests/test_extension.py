"""The C++ extension is loaded only where it fits; the package and the doctor say so where it does not."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import rl_kernels as rl
from rl_kernels._extension import RECORD, Extension, load
from rl_kernels.backends import Case, cpu
from rl_kernels.backends.cuda import extension as cuda
from rl_kernels.commands import doctor
from rl_kernels.commands.doctor import doctor_command

LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def write(folder: Path, record: object) -> None:
    # Loading it would fail with other words.
    (folder / LIBRARY).write_bytes(b"no library")
    (folder / RECORD).write_text(record if isinstance(record, str) else json.dumps(record))


def test_none(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.module is None and not found.broken
    assert found.missing is not None and "not built (pip install --no-build-isolation -e ." in found.missing


def test_one_for_another_torch_is_not_loaded(tmp_path: Path) -> None:
    write(tmp_path, {"torch": "1.2.3"})
    found = load(tmp_path)
    assert found.module is None and found.broken
    assert found.missing is not None
    assert found.missing.startswith(f"built for torch 1.2.3, this is {torch.__version__}; build it again: pip install")


@pytest.mark.parametrize("record", ["", "[]", "{}"])
def test_one_without_a_record_is_not_loaded(record: str, tmp_path: Path) -> None:
    write(tmp_path, record)
    found = load(tmp_path)
    assert found.module is None and found.broken and "cannot be read" in (found.missing or "")


def test_one_that_does_not_load(tmp_path: Path) -> None:
    write(tmp_path, {"torch": torch.__version__})
    found = load(tmp_path)
    assert found.module is None and found.broken and "cannot be loaded" in (found.missing or "")


def test_the_backend_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.backend, "EXTENSION", Extension(None, "planted"))
    assert cpu.BACKEND.why_not(Case("mixed_linear", "cpu", torch.float32)) == "planted"
    assert cpu.BACKEND.why_not(Case("mixed_linear", "cuda", torch.float32)) == "needs a CPU"
    assert cpu.BACKEND.why_not(Case("mixed_linear", "cpu", torch.float8_e5m2)) == "no kernel for float8_e5m2"


@pytest.mark.parametrize("broken", [False, True])
def test_the_doctor_tells_a_missing_extension_from_a_broken_one(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTENSION", Extension(None, "built for torch 1.2.3", broken))
    result = CliRunner().invoke(doctor_command, env={"COLUMNS": "300"})
    assert result.exit_code == int(broken), result.output
    assert (
        "broken: built for torch 1.2.3" if broken else "not built: layers on a CPU run on streamed"
    ) in result.output


def test_the_cuda_extension_is_held_against_the_package(tmp_path: Path) -> None:
    library = tmp_path / "_cuda.so"
    library.write_bytes(b"no library")
    (tmp_path / cuda.RECORD).write_text(json.dumps({"rl_kernels": "0.0.1"}))
    found = load(tmp_path, cuda.NAME, cuda.RECORD, ("rl_kernels", rl.__version__), "nvcc")
    assert found.broken and (found.missing or "").startswith(f"built for rl_kernels 0.0.1, this is {rl.__version__}; ")


@pytest.mark.parametrize("broken", [False, True])
def test_the_doctor_tells_of_the_cuda_extension(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EXTENSION", Extension(None, "planted", broken))
    result = CliRunner().invoke(doctor_command, env={"COLUMNS": "300"})
    assert result.exit_code == int(broken), result.output
    assert ("broken: planted" in result.output) == broken and "CUDA kernels" in result.output
