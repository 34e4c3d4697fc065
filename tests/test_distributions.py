"""The source distribution, the wheels made from it, and what they and an editable install put into an environment."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import rl_kernels as rl

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
WITHOUT = {"USE_CPP": "0", "USE_CUDA": "0"}
BUILT = ("_C", "_cuda", "_build")

# Not by find_spec: looking for pip switches setuptools' distutils off for the rest of the process.
pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not {"pip", "setuptools"} <= {found.name for found in metadata.distributions()},
    reason="needs a checkout, pip and setuptools",
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run in an environment in which this checkout is not found; return stdout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def build(kind: str, source: Path, to: Path, **environment: str) -> Path:
    """Make the sdist or a wheel of ``source`` as a front end does, in this environment."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    printed = run(sys.executable, "-c", program, cwd=source, **environment)
    return to / printed.splitlines()[-1]


def tracked(*patterns: str) -> set[str]:
    return set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns, cwd=ROOT).split())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of what git knows, in which extensions lie about as in a checkout where they were built."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    for name in (f"_C{SUFFIX}", "_cuda.so", "_build.json", "_build_cuda.json"):
        (copy / "rl_kernels" / name).write_bytes(b"planted")
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the sdist without a compiler."""
    return build("wheel", source, tmp_path_factory.mktemp("wheel"), **WITHOUT)


def test_the_sdist_holds_all_that_the_package_is_built_from_and_nothing_built(source: Path) -> None:
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    needed = tracked("rl_kernels", "csrc", "building", "docs")
    needed |= {"setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt"}
    needed |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert {name for name in needed if (ROOT / name).exists()} <= held
    made = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("rl_kernels.egg-info/")}
    assert held - needed - made == set()


def test_a_wheel_without_extensions_is_for_every_machine(wheel: Path, source: Path) -> None:
    assert wheel.name == f"rl_kernels-{rl.__version__}-py3-none-any.whl"
    information = f"rl_kernels-{rl.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        package = {name for name in names if not name.startswith(f"{information}/")}
        assert package == {name for name in tracked("rl_kernels") if name.endswith((".py", "py.typed", ".json"))}
        assert f"{information}/licenses/LICENSE" in names
        about = archive.read(f"{information}/WHEEL").decode()
        assert "Root-Is-Purelib: true" in about and "Tag: py3-none-any" in about
        # RECORD names every file, with its hash.
        recorded = {row[0]: row[1] for row in csv.reader(archive.read(f"{information}/RECORD").decode().splitlines())}
        assert recorded.keys() == names
        for name, expected in recorded.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).decode().rstrip("=")
            assert expected == f"sha256={digest}" or name == f"{information}/RECORD", name


@pytest.mark.skipif(sys.platform != "linux", reason="builds with a stand-in for the compiler")
def test_a_wheel_with_the_kernels_is_for_this_python_and_machine(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"  # It makes empty files, in no time.
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" != -o ] || : > "$2"; shift; done\n')
    compiler.chmod(0o755)
    built = build("wheel", source, tmp_path, USE_CPP="1", USE_CUDA="0", CXX=str(compiler))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert built.name.startswith(f"rl_kernels-{rl.__version__}-{python}-{python}-linux_"), built.name
    with zipfile.ZipFile(built) as archive:
        found = {name for name in archive.namelist() if Path(name).name.startswith(BUILT)}
        assert found == {f"rl_kernels/_C{SUFFIX}", "rl_kernels/_build.json"}
        assert torch.__version__ in archive.read("rl_kernels/_build.json").decode()


def environment(folder: Path) -> Path:
    """An environment that sees this one's packages, less this package: the Python in it."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Folders alone: what .pth files in them name, as an editable install of this checkout, is not added.
    (site / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n{Path(pytest.__file__).parents[1]}\n")
    return python


TRAINS = """
import warnings
from pathlib import Path
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, rl_kernels as rl
said = [str(each.message) for each in caught if str(each.message).startswith("rl_kernels: ")]
assert len(said) == 1 and "kernels for CPUs are not built" in said[0], said
weights = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
rl.functional.mixed_linear(torch.randn(2, 4), weights, (0.5, 0.5)).sum().backward()
assert all(weight.grad is not None for weight in weights)
from importlib.metadata import version
assert version("rl_kernels") == rl.__version__
print(Path(rl.__file__).resolve().parent)
"""


def install(python: Path, *what: str | Path, **variables: str) -> None:
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent, **variables)


def test_the_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, wheel)
    imported = Path(run(python, "-c", TRAINS, cwd=tmp_path).splitlines()[-1])
    assert imported.is_relative_to((tmp_path / "venv").resolve())
    assert (imported / "py.typed").is_file()
    assert not [path for path in imported.iterdir() if path.name.startswith(BUILT)]


def test_an_editable_install_runs_the_checkout(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, "--editable", source, **WITHOUT)
    assert Path(run(python, "-c", TRAINS, cwd=tmp_path).splitlines()[-1]) == (source / "rl_kernels").resolve()
