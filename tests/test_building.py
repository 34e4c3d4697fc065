"""The scripts of setup.py: what they read from the environment, and what they compile again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from building import cpu, cuda, steps
from building.steps import CannotBuild, Compilation, Library
from rl_kernels._extension import library
from rl_kernels.backends.cuda import extension

VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", cuda.ARCH_LIST, cuda.TORCH_ARCH_LIST, "CXX", "MAX_JOBS")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0 9.0+PTX", ["8.0", "9.0+PTX"]),
        (" 8.0;8.6; 9.0a ", ["8.0", "8.6", "9.0a"]),
        ("8.0 8.0+PTX 8.0", ["8.0+PTX"]),
        ("12.0", ["12.0"]),
    ],
)
def test_a_list_of_architectures(text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.TORCH_ARCH_LIST, "8.9")
    monkeypatch.setenv(cuda.ARCH_LIST, text)
    assert list(map(str, cuda.architectures())) == expected


def test_the_flags_of_an_architecture() -> None:
    (plain, later) = cuda.parse_architectures("9.0a 10.0+PTX", cuda.ARCH_LIST)
    assert plain.flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    expected = ["-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100"]
    assert later.flags() == expected


def test_the_list_of_torch_serves_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert " ".join(map(str, cuda.architectures())) == cuda.DEFAULT_ARCHITECTURES
    monkeypatch.setenv(cuda.TORCH_ARCH_LIST, "7.5;8.6+PTX")
    assert list(map(str, cuda.architectures())) == ["8.6+PTX"]
    monkeypatch.setenv(cuda.TORCH_ARCH_LIST, "7.5")
    with pytest.raises(CannotBuild, match=r"^TORCH_CUDA_ARCH_LIST: got '7.5', the kernels need 8.0 or later"):
        cuda.architectures()


@pytest.mark.parametrize("text", ["Hopper", "80", "8.0+ptx", "9.0b", "sm_80", ";", "8.0, x"])
def test_a_list_that_cannot_be_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ARCH_LIST, text)
    with pytest.raises(CannotBuild, match=r"^RL_KERNELS_CUDA_ARCH_LIST: got .*, expected numbers such as 8.0 9.0\+PTX"):
        cuda.architectures()


def test_an_architecture_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ARCH_LIST, "7.5 8.0")
    with pytest.raises(CannotBuild, match=r"got '7.5', the kernels need 8.0 or later"):
        cuda.architectures()


def program(path: Path, says: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_found_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = program(tmp_path / "package" / "bin" / "nvcc")
    on_path = program(tmp_path / "path" / "nvcc")
    of_path = program(tmp_path / "other" / "bin" / "nvcc")
    of_home = program(tmp_path / "home" / "bin" / "nvcc")
    asked = program(tmp_path / "asked")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda, "_package_folders", lambda: [])
    monkeypatch.setattr(cuda, "USUAL_FOLDER", str(tmp_path / "usual"))
    with pytest.raises(CannotBuild, match=r"there is no nvcc \(CUDACXX, CUDA_HOME, .*nvidia-cuda-nvcc\)"):
        cuda.find_nvcc()
    monkeypatch.setattr(cuda, "_package_folders", lambda: [Path(package).parent])
    assert cuda.find_nvcc() == package
    usual = program(tmp_path / "usual" / "nvcc")
    assert cuda.find_nvcc() == usual
    for variable, value, expected in (
        ("PATH", str(tmp_path / "path"), on_path),
        ("CUDA_PATH", str(tmp_path / "other"), of_path),
        ("CUDA_HOME", str(tmp_path / "home"), of_home),
        ("CUDACXX", asked, asked),
    ):
        monkeypatch.setenv(variable, value)
        assert cuda.find_nvcc() == expected


def test_the_newest_installed_package_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cu12", "cu13", "cudnn"):
        (tmp_path / "nvidia" / name / "bin").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    found = [path for path in cuda._package_folders() if path.is_relative_to(tmp_path)]
    assert [path.parent.name for path in found] == ["cu13", "cu12"]


def test_the_version_of_nvcc(tmp_path: Path) -> None:
    assert cuda.nvcc_version(program(tmp_path / "new", "release 13.0, V13.0.88")) == "13.0.88"
    with pytest.raises(CannotBuild, match=r"nvcc is 11.8.89, 12.0 or later is needed"):
        cuda.nvcc_version(program(tmp_path / "old", "release 11.8, V11.8.89"))
    with pytest.raises(CannotBuild, match="says no version"):
        cuda.nvcc_version(program(tmp_path / "none", "hello"))


def test_a_file_for_one_architecture_is_compiled_a_type_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", program(tmp_path / "nvcc", "release 13.0, V13.0.88"))
    monkeypatch.setenv(cuda.ARCH_LIST, "8.6")
    sources = [Path(name) for name in ("library.cpp", "common.cu", "linear_sm80.cu")]
    found = cuda.library("1.2.3", tmp_path, tmp_path / "objects", sources)
    assert [step.object.name for step in found.compilations] == [
        *("library.o", "common.o", "linear_sm80.f16.o", "linear_sm80.bf16.o", "linear_sm80.tf32.o")
    ]
    elements = [[flag for flag in step.command if "RL_ELEMENT" in flag] for step in found.compilations]
    assert elements == [[], [], ["-DRL_ELEMENT=0"], ["-DRL_ELEMENT=1"], ["-DRL_ELEMENT=2"]]
    assert found.record["architectures"] == "8.6" and found.record["rl_kernels"] == "1.2.3"
    assert found.record_file.name == extension.RECORD and found.target == library(extension.NAME, tmp_path)
    assert "python" not in found.record, "one build serves every Python"


@pytest.mark.parametrize(("nvcc", "flags"), [("12.0.1", cuda.COMPRESS), ("12.8.0", ["--compress-mode=size"])])
def test_what_is_embedded_is_small(nvcc: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda.LINEINFO, raising=False)
    assert cuda.options(nvcc) == flags
    monkeypatch.setenv(cuda.LINEINFO, "1")
    assert cuda.options(nvcc) == [*flags, cuda.LINES]


@pytest.mark.parametrize(
    ("machine", "scalar", "sets"),
    [
        ("x86_64", False, ["scalar", "avx2", "avx512"]),
        ("x86_64", True, ["scalar"]),
        ("aarch64", False, ["scalar"]),
    ],
)
def test_the_kernels_are_compiled_once_an_instruction_set(
    machine: str, scalar: bool, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "accepts", lambda compiler, flag: flag != "-mavx512bf16")
    made = cpu.compilations(["c++"], ["-DPLAIN"], Path("objects"), scalar, sanitized=False)
    assert len({step.object for step in made}) == len(made)
    tables = [step for step in made if step.source == cpu.TABLE]
    assert [step.object.stem for step in tables] == [f"kernels_{name}" for name in sets]
    assert all({"-O3", "-DPLAIN", *cpu.KERNELS} <= set(step.command) for step in tables)
    for step, isa in zip(tables, cpu.instruction_sets(scalar), strict=True):
        assert set(isa.flags) <= set(step.command) and "-mavx512bf16" not in step.command
    others = [step for step in made if step.source != cpu.TABLE]
    patterns = ("bindings/*.cpp", "bindings/cuda/*.cpp", "cpu/torch/*.cpp")
    assert {step.source for step in others} == {path for pattern in patterns for path in cpu.CSRC.glob(pattern)}
    alone = "-DRL_KERNELS_SCALAR_ONLY"
    assert all("-O2" in step.command and (alone in step.command) == (len(sets) == 1) for step in others)


def test_a_quick_build_is_slow_in_the_kernels_alone() -> None:
    made = cpu.compilations(["true"], [], Path("objects"), True, False, quick=True)
    assert {level for step in made for level in step.command if level.startswith("-O")} == {"-O1", "-O2"}
    assert all(("-O1" in step.command) == (step.source == cpu.TABLE) for step in made)


def test_what_is_watched_is_what_is_compiled() -> None:
    watched = set(cpu.watched())
    assert {step.source for step in cpu.compilations(["true"], [], Path("objects"), False, True)} <= watched
    folders = ("bindings", "bindings/cuda", "cpu/torch", "cpu/kernels", "cuda")
    assert {path.parent for path in watched} == {cpu.CSRC / folder for folder in folders}
    interface = {path.name for path in watched if path.parent == cpu.CSRC / "cuda"}
    assert interface == {"abi.h", "call.h", "params.h"}, "what the binding includes of the kernels' library"


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiles C++; the package works without a compiler, too")
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
class TestLibrary:
    """A small one of two sources and a header, in a folder whose name needs care."""

    @pytest.fixture(autouse=True)
    def sources(self, ninja: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = shutil.which("c++")
        assert compiler is not None
        if not ninja:
            monkeypatch.setattr(steps.shutil, "which", lambda *_, **__: None)
        self.folder = tmp_path / "a $folder: here"
        self.folder.mkdir()
        (self.folder / "number.h").write_text("#define NUMBER 1\n")
        (self.folder / "one.cpp").write_text('#include "number.h"\nint one() { return NUMBER; }\n')
        (self.folder / "two.cpp").write_text("int two() { return 2; }\n")
        self.library = Library(
            target=self.folder / "made" / "library.so",
            record={"made": "for a test"},
            record_file=self.folder / "made" / "record.json",
            watched=list(self.folder.iterdir()),
            folder=self.folder / "objects",
            compilations=[
                Compilation(
                    self.folder / f"{name}.cpp", self.folder / "objects" / f"{name}.o", (compiler, "-fPIC"), logged
                )
                for name, logged in (("one", False), ("two", True))
            ],
            linker=(compiler,),
            linking=("-shared",),
        )

    def dates(self) -> dict[str, int]:
        files = [self.library.target, *(step.object for step in self.library.compilations)]
        return {path.name: path.stat().st_mtime_ns for path in files}

    def change(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        later = self.library.target.stat().st_mtime + 1
        os.utime(self.folder / name, (later, later))

    def test_it_is_made_once(self) -> None:
        self.library.build()
        assert json.loads(self.library.record_file.read_text()) == self.library.record
        assert (self.folder / "objects" / "two.o.log").exists()
        before = self.dates()
        self.library.build()
        assert self.dates() == before

    def test_a_changed_header_is_noticed(self, ninja: bool) -> None:
        self.library.build()
        before = self.dates()
        self.change("number.h", "#define NUMBER 3\n")
        self.library.build()
        after = self.dates()
        changed = {name for name in after if after[name] != before[name]}
        assert changed == ({"library.so", "one.o"} if ninja else {"library.so", "one.o", "two.o"})

    @pytest.mark.parametrize("name", ["one", "two"])
    def test_what_the_compiler_says_is_the_error(self, name: str) -> None:
        self.library.build()
        self.change(f"{name}.cpp", "nonsense")
        with pytest.raises(CannotBuild, match=rf"(?s)^the compiler failed:.*{name}\.cpp.*error:.*nonsense"):
            self.library.build()
        assert not self.library.target.exists() and not self.library.record_file.exists()
