"""A library made of many compilations: by ninja, all at once and only what changed; without ninja, all of them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class CannotBuild(Exception):
    """Why an extension cannot be built here."""


@dataclass(frozen=True)
class Compilation:
    """One source file made into one object.

    Attributes:
        source: what is compiled.
        object: what comes out; its dependency file is written beside it.
        command: the compiler and its flags, less those that name the files.
        logged: whether what ptxas tells of each kernel goes to ``<object>.log`` instead of the terminal.
    """

    source: Path
    object: Path
    command: tuple[str, ...]
    logged: bool = False

    def line(self) -> str:
        """The whole command, for a shell."""
        files = ["-MMD", "-MF", f"{self.object}.d", "-c", str(self.source), "-o", str(self.object)]
        line = shlex.join([*self.command, *files])
        if not self.logged:
            return line
        log = shlex.quote(f"{self.object}.log")
        # Warnings and errors are shown as well.
        shown = f"grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame' {log}"
        return f"{line} > {log} 2>&1; status=$?; {shown}; exit $status"


@dataclass(frozen=True)
class Library:
    """An extension module, and how it is made.

    Attributes:
        target: the module's file.
        record: what it is built for, which is written beside it as JSON, for whoever loads it.
        record_file: where.
        watched: the files it is made from, headers and these scripts included.
        folder: where objects go, and stay for the next time.
        compilations: what makes the objects.
        linker: what makes ``target`` of them.
        linking: its flags and libraries, which must come after the objects.
    """

    target: Path
    record: dict[str, str]
    record_file: Path
    watched: list[Path]
    folder: Path
    compilations: list[Compilation]
    linker: tuple[str, ...]
    linking: tuple[str, ...]

    def build(self, force: bool = False) -> None:
        """Make it, unless it is there and newer than all it is made from; CannotBuild says what the compiler said."""
        if force:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self._is_current():
            return
        for folder in (self.folder, self.target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        # Until the new one is there, there is none: one of other sources may not fit the package any more.
        self.record_file.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is not None:
            plan = self.folder / "build.ninja"
            plan.write_text(self._plan())
            _run([ninja, "-f", str(plan), "-j", str(jobs)])
        else:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(_run_line, [step.line() for step in self.compilations]))
            _run_line(self._link_line())
        self.record_file.write_text(json.dumps(self.record, indent=1) + "\n")

    def _is_current(self) -> bool:
        if not self.target.exists() or not self.record_file.exists():
            return False
        if json.loads(self.record_file.read_text()) != self.record:
            return False
        return self.target.stat().st_mtime > max(path.stat().st_mtime for path in self.watched)

    def _link_line(self) -> str:
        objects = [str(step.object) for step in self.compilations]
        return shlex.join([*self.linker, *objects, *self.linking, "-o", str(self.target)])

    def _plan(self) -> str:
        """The same for ninja, which compares commands, dates and, by the dependency files, headers."""
        lines = [
            f"builddir = {_escaped(self.folder)}",
            "rule compile",
            "  command = $line",
            "  description = compile $what",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $line",
            "  description = link $what",
        ]
        for step in self.compilations:
            lines += _edge(step.object, "compile", [step.source], step.line())
        lines += _edge(self.target, "link", [step.object for step in self.compilations], self._link_line())
        return "\n".join(lines) + "\n"


def _edge(output: Path, rule: str, inputs: list[Path], line: str) -> list[str]:
    return [
        f"build {_escaped(output)}: {rule} {' '.join(map(_escaped, inputs))}",
        f"  line = {line.replace('$', '$$')}",
        f"  what = {output.name.replace('$', '$$')}",
    ]


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _run_line(line: str) -> None:
    _run(["/bin/sh", "-c", line], line)


def _run(command: list[str], shown: str | None = None) -> None:
    """Run it and print what it says as it comes; its words, after ``shown``, become the error's."""
    if shown is not None:
        print(shown, flush=True)
    said = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode != 0:
        words = "".join(said)
        # Ninja's begin with what it did before; it gives the command itself.
        failed = words.partition("FAILED: ")[2] or words
        raise CannotBuild("\n".join(["the compiler failed:", *([shown] if shown else []), failed]).rstrip())
