"""Stages run against the clock, in such a way that nothing found is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUMMARY, ARCHIVE = "summary.jsonl", "run.tgz"
GRACE = 5.0
"""Seconds that a stage has to end after it was asked to."""


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side.

    Attributes:
        name: in the summary.
        seconds: at most; less where the call's own time ends before.
        commands: each with its arguments.
        environment: beside the caller's.
        background: the next stage starts at once; one that ``needs`` it waits for it.
        needs: a stage in the background without which this one is not run.
        lacks: what is missing for it on this machine: then it is not run, and the summary says so.
    """

    name: str
    seconds: float
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    background: bool = False
    needs: str = ""
    lacks: str = ""


class Session:
    """One call: a folder that gets a summary and an archive, a folder to work in, and a deadline.

    Args:
        output: where the two files go.
        work: for logs and records, all of which go into the archive.
        seconds: for everything.
    """

    def __init__(self, output: Path, work: Path, seconds: float):
        self.output, self.work = output, work
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[str]] = []
        self._background: dict[str, threading.Thread] = {}
        self._status: dict[str, str] = {}
        output.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self._summary = (output / SUMMARY).open("w", encoding="utf-8")

    def note(self, stage: str, **found: Any) -> None:
        """Add a line to the summary; it is on the disk when this returns."""
        line = {"t": round(time.monotonic() - self.start, 2), "stage": stage, **found}
        with self._lock:
            self.lines.append(line)
            self._summary.write(json.dumps(line) + "\n")
            self._summary.flush()
            os.fsync(self._summary.fileno())

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages in their order, those in the background beside the others."""
        with self._ending():
            for stage in stages:
                if stage.background:
                    thread = threading.Thread(target=self._run, args=(stage,), daemon=True)
                    self._background[stage.name] = thread
                    thread.start()
                else:
                    self._run(stage)
                    self.pack()
            for thread in self._background.values():
                thread.join(max(0.0, self.left()) + GRACE)

    def _run(self, stage: Stage) -> None:
        if stage.needs in self._background:
            self._background[stage.needs].join(max(0.0, self.left()))
        status, started = "", time.monotonic()
        if stage.lacks:
            status = f"not run: {stage.lacks}"
        elif stage.needs and self._status.get(stage.needs) != "done":
            status = f"not run: {stage.needs} is not done"
        elif self.left() < 1:
            status = "not run: no time left"
        else:
            status = self._watch(stage, min(stage.seconds, self.left()))
        self._status[stage.name] = status
        self.note(stage.name, status=status, seconds=round(time.monotonic() - started, 1))

    def _watch(self, stage: Stage, seconds: float) -> str:
        end = time.monotonic() + seconds
        readers, processes = [], []
        for number, command in enumerate(stage.commands):
            log = self.work / f"{stage.name}{number or ''}.log"
            process = subprocess.Popen(
                [*command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **stage.environment},
                start_new_session=True,  # So that what it starts ends with it.
            )
            self._running.append(process)
            processes.append(process)
            reader = threading.Thread(target=self._read, args=(stage.name, process, log), daemon=True)
            reader.start()
            readers.append(reader)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        cut = [process for process in processes if process.poll() is None]
        _stop(cut)
        for reader in readers:
            reader.join(GRACE)
        if cut:
            return f"cut after {seconds:.0f} s"
        failed = [process.returncode for process in processes if process.returncode != 0]
        return f"failed with {', '.join(map(str, failed))}" if failed else "done"

    def _read(self, stage: str, process: subprocess.Popen[str], log: Path) -> None:
        """Keep what a process prints; its lines of JSON go to the summary as well."""
        assert process.stdout is not None
        with log.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        self.note(stage, **json.loads(line))

    def pack(self) -> None:
        """Write the archive anew, whole or not at all."""
        unfinished = self.work.with_suffix(".tgz")
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(self.work, arcname=".")
        # Another file system, perhaps: copied beside the archive first.
        beside = self.output / f".{ARCHIVE}"
        beside.write_bytes(unfinished.read_bytes())
        beside.replace(self.output / ARCHIVE)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends the session, its processes end and the archive is written."""

        def end(number: int, frame: object) -> None:  # noqa: ARG001
            raise SystemExit(128 + number)

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except SystemExit as error:
            self.note("session", status=f"ended by signal {int(error.code or 0) - 128}")
            raise
        finally:
            _stop([process for process in self._running if process.poll() is None])
            self.pack()
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        end = time.monotonic() + GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
