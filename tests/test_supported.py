"""Which versions are supported is stated once, said everywhere alike, and told at import where it is not kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from rl_kernels import _extension, _supported
from rl_kernels._extension import Extension
from rl_kernels.backends.triton.backend import OLDEST as OLDEST_TRITON
from rl_kernels.commands import doctor

ROOT = Path(__file__).parents[1]
TORCH, TRITON = _supported.dotted(_supported.OLDEST_TORCH), _supported.dotted(OLDEST_TRITON)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.11.0", (2, 11, 0)),
        ("2.13.0+cpu", (2, 13, 0)),
        ("2.14.0a0+git1a2b3c4", (2, 14, 0)),
        ("2.15.0.dev20261120+cu132", (2, 15, 0)),
        ("unknown", ()),
    ],
)
def test_the_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert _supported.release(version) == expected


@pytest.mark.parametrize(
    ("version", "said"),
    [
        *((version, None) for version in ("2.11.0", "2.11.0+cu130", "2.11.0a0+git12", "2.100.0", "3.0.0", "unknown")),
        ("2.10.1+cpu", "tested with torch 2.11 and later, this is 2.10.1+cpu: layers are right in eager mode"),
        ("2.9.0.dev20250801", "this is 2.9.0.dev20250801"),
    ],
)
def test_an_older_torch_is_spoken_of(version: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    found = _supported.why_not_torch()
    assert (found is None) if said is None else (found is not None and said in found)


def imported(version: str, *lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``import rl_kernels`` where torch says that it is ``version``."""
    program = "\n".join(["import torch", f"torch.__version__ = {version!r}", "import rl_kernels", *lines])
    # What this run was started with must not decide it.
    names = ("RANK", "LOCAL_RANK", "RL_KERNELS_BACKEND", _supported.QUIET_VARIABLE, "PYTHONWARNINGS")
    everything = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**everything, **environment}, capture_output=True, text=True, cwd=ROOT)


def test_an_import_says_all_of_it_in_one_warning_at_its_line(tmp_path: Path) -> None:
    found = imported("2.8.0+cu128", "import rl_kernels.nn", RL_KERNELS_EXTENSION=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("Warning") == 1
    assert re.match(r"<string>:3: RuntimeWarning: rl_kernels: tested with .*, this is 2\.8\.0\+cu128", found.stderr)
    assert f"kernels for CPUs are {_extension.describe_missing(_extension.load(tmp_path))}" in found.stderr
    assert _extension.HOW_TO_BUILD in found.stderr and f"{_supported.QUIET_VARIABLE}=1" in found.stderr


def test_an_import_can_be_silent(tmp_path: Path) -> None:
    found = imported("2.8.0", RL_KERNELS_EXTENSION=str(tmp_path), RL_KERNELS_QUIET="1")
    assert (found.returncode, found.stderr) == (0, "")


def test_a_torch_that_is_too_old_is_refused_before_anything_fails() -> None:
    found = imported("2.4.1")
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert re.match(rf"ImportError: rl_kernels needs torch 2\.5 or later, and is tested with {TORCH} and later", last)
    assert last.endswith("this is torch 2.4.1")


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 1),
        ({"LOCAL_RANK": "0", "RANK": "8"}, 1),  # The first of a second machine, installed by itself.
        ({"LOCAL_RANK": "1", "RANK": "1"}, 0),
        ({"RANK": "3"}, 0),
        ({_supported.QUIET_VARIABLE: "1"}, 0),
        ({_supported.QUIET_VARIABLE: "0"}, 1),
    ],
    ids=str,
)
def test_who_warns(variables: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", _supported.QUIET_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _supported.warn(None, "planted", None, "and more")
        _supported.warn(None, None)
    assert len(caught) == number
    assert all(str(each.message).startswith("rl_kernels: planted; and more (") for each in caught)


def test_a_process_that_another_started_leaves_it_to_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_supported.multiprocessing, "parent_process", lambda: object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _supported.warn("planted")


BROKEN = Extension(None, "built for torch 1.2.3, this is 4.5.6; build it again: ...", broken=True)


@pytest.mark.parametrize(
    ("extension", "platform", "backend", "said"),
    [
        (Extension(object(), None), "linux", "", None),
        (Extension(None, "none"), "linux", "", "not built: layers on a CPU run on streamed"),
        (Extension(None, "none"), "linux", "cpu", "not built: layers on a CPU run on streamed"),
        (Extension(None, "none"), "linux", "streamed", None),
        (Extension(None, "none"), "win32", "auto", None),  # Where they are never built.
        (BROKEN, "linux", "auto", "broken: built for torch 1.2.3, this is 4.5.6"),
    ],
)
def test_what_is_said_of_the_kernels(
    extension: Extension, platform: str, backend: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_extension, "EXTENSION", extension)
    monkeypatch.setattr(_extension.sys, "platform", platform)
    monkeypatch.setenv("RL_KERNELS_BACKEND", backend)
    found = _extension.complaint()
    assert (found is None) if said is None else (found is not None and said in found)


def test_the_doctor_says_it_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_extension, doctor):
        monkeypatch.setattr(module, "EXTENSION", BROKEN)
    monkeypatch.delenv("RL_KERNELS_BACKEND", raising=False)
    assert doctor.describe_extension() in (_extension.complaint() or "")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/compatibility.md"])
def test_every_document_names_the_same_versions(document: str) -> None:
    text = (ROOT / document).read_text()
    assert set(re.findall(r"torch (\d+\.\d+)(?:\s+(?:and|or)\s+later)", text)) == {TORCH}
    assert set(re.findall(r"Triton (\d+\.\d+)(?:\s+(?:and|or)\s+later)", text)) <= {TRITON}


def test_what_is_installed_and_checked_names_them_too() -> None:
    assert f'"triton>={TRITON};' in (ROOT / "pyproject.toml").read_text()
    sessions = (ROOT / "noxfile.py").read_text()
    assert f'OLDEST_TORCH = "torch=={TORCH}.0"' in sessions and f'OLDEST_TRITON = "triton=={TRITON}.0"' in sessions
