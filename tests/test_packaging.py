"""What the project's own files promise to installers and tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rl_kernels as rl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# The oldest and the newest Python that the classifiers name.
PYTHONS = ("3.10", "3.13")


def constraints(python: str) -> dict[str, str]:
    """The pinned versions that apply to one version of Python, by canonical name."""
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": python + ".0"}
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        name = canonicalize_name(requirement.name)
        assert name not in pins, f"{name} is pinned twice for Python {python}"
        pins[name] = specifier.version
    return pins


def required(requirements: list[str]) -> list[Requirement]:
    return [r for r in map(Requirement, requirements) if canonicalize_name(r.name) != "rl-kernels"]


def test_nothing_that_is_installed_names_torch():
    named = [PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"], *EXTRAS.values()]
    assert "torch" not in {canonicalize_name(r.name) for group in named for r in required(group)}
    assert "torch" not in {Requirement(r).name for r in metadata.requires("rl_kernels") or []}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_to_a_version_it_admits(python):
    pins = constraints(python)
    assert pins["torch"] == "2.13.0"
    for group in (PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"], *EXTRAS.values()):
        for requirement in required(group):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


def test_the_version_is_the_same_everywhere():
    assert "version" in PROJECT["project"]["dynamic"]
    assert rl.__version__ == metadata.version("rl_kernels")


def test_a_missing_torch_is_named_and_not_installed():
    program = "import sys; sys.modules['torch'] = None; import rl_kernels"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 1
    assert re.search("^ImportError: rl_kernels needs PyTorch", found.stderr, re.MULTILINE), found.stderr


@pytest.mark.parametrize("fault", ["ImportError('libcudnn.so.9: no such file')", "ModuleNotFoundError(name='sympy')"])
def test_a_torch_that_does_not_load_says_why_itself(fault, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {fault}\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import rl_kernels"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 1
    assert "needs PyTorch" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith(fault.partition("(")[0]), found.stderr


def test_the_package_says_that_it_is_typed():
    assert resources.files(rl).joinpath("py.typed").is_file()


def test_pre_commit_uses_the_pinned_versions():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    pins = constraints(PYTHONS[0])
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks
    for hook in hooks:
        for pinned in hook["additional_dependencies"]:
            name, version = pinned.split("==")
            assert pins[canonicalize_name(name)] == version, hook["id"]


def test_the_licence_is_the_one_declared():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder),
    ]
    everything = {**os.environ, "USE_CPP": "0", "USE_CUDA": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"USE_CPP": "0"}, "USE_CPP=0"),
        ({"CXX": "no-such-compiler", "USE_CPP": ""}, "there is no C++ compiler (no-such-compiler is not on the PATH)"),
        ({"CXX": "false", "USE_CPP": ""}, "the compiler failed:"),
    ],
    ids=["skipped", "no compiler", "failing compiler"],
)
def test_without_the_kernels_the_package_builds_and_says_so(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    found = build(tmp_path, **environment)
    assert found.returncode == 0, found.stderr
    assert f"the C++ kernels for CPUs were not built: {reason}" in found.stderr
    assert "To build them later" in found.stderr
    assert not list(tmp_path.rglob("_C*")) and not list(tmp_path.rglob("_build*"))


def test_without_nvcc_the_package_builds_and_says_so_in_a_line(tmp_path: Path) -> None:
    found = build(tmp_path, CUDACXX="no-such-nvcc", USE_CUDA="")
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in found.stderr.splitlines() if "CUDA" in line]
    assert "works without the CUDA kernels, which were not built: there is no nvcc (no-such-nvcc, which" in line


def test_what_was_not_asked_for_is_not_built(tmp_path: Path) -> None:
    found = build(tmp_path, CUDACXX="no-such-nvcc", USE_CUDA="0")
    assert found.returncode == 0, found.stderr
    assert "the CUDA kernels, which were not built: USE_CUDA=0\n" in found.stderr


def test_a_build_that_must_not_fail_fails(tmp_path: Path) -> None:
    found = build(tmp_path, CXX="no-such-compiler", USE_CPP="1", CUDACXX="no-such-nvcc", USE_CUDA="1")
    assert found.returncode != 0
    assert "the C++ kernels for CPUs were not built: there is no C++ compiler" in found.stderr
    assert "the CUDA kernels, which were not built: there is no nvcc" in found.stderr, "the one must not hide the other"


def test_a_source_distribution_holds_the_kernels() -> None:
    assert {"graft csrc", "graft building"} <= set((ROOT / "MANIFEST.in").read_text().splitlines())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_documented_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_an_old_setuptools_is_named() -> None:
    pytest.importorskip("setuptools")
    program = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("rl_kernels: setuptools 77 or later is needed to build it, this is 65.5.0: pip install")
