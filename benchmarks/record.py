"""A record: what was measured, where, on what and how. One JSON file, rewritten whole after every cell."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Settings
from rl_kernels import _machine
from rl_kernels._machine import machine, versions

SCHEMA = 1
RESULTS = Path("benchmarks/results")

_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/][\w.+@~-]+){2,}")


@dataclass
class Record:
    """What one run of the benchmarks found; ``complete`` once every cell asked for was measured.

    A cell is a dict: ``case`` (its data), ``mode``, ``baseline``, and ``rivals`` by name: either ``failed`` with the
    reason, or ``seconds`` and ``ratio`` to the baseline (median, p20, p80), ``roofline`` (the bound's fraction of
    the time), ``error`` (relative), ``peak_extra_bytes``, ``rss_extra_bytes``, ``calls`` a sample and ``rounds``.
    """

    created: str
    machine: dict[str, Any]
    versions: dict[str, str]
    git: dict[str, Any]
    command: str
    settings: dict[str, Any]
    roofline: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    @classmethod
    def begin(cls, arguments: Sequence[str], settings: Settings) -> Record:
        """A record without cells of a run that starts now."""
        found = versions("triton")
        if settings.device == "cuda":
            found["cuda"] = str(torch.version.cuda)
        switches = {
            "gradients": "fresh: None before every call",
            "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        }
        return cls(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=machine(),
            versions=found,
            git=git_state(),
            command=without_paths(shlex.join(["python", "-m", "benchmarks", *arguments])),
            settings=dataclasses.asdict(settings) | switches,
        )

    def save(self, path: Path) -> None:
        """Write the record, at once or not at all: whoever reads the file meets a whole one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            ValueError: the file holds none, or one of another schema; the message names it.
        """
        try:
            content = json.loads(path.read_text())
            schema = content["schema"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: got no benchmark record, expected what `run` writes ({error})") from error
        if schema != SCHEMA:
            raise ValueError(f"{path.name}: got schema {schema}, expected {SCHEMA}")
        names = {field.name for field in dataclasses.fields(cls)}
        if content.keys() != names:
            different = ", ".join(sorted(content.keys() ^ names))
            raise ValueError(f"{path.name}: got a record with other fields than expected: {different}")
        return cls(**content)

    def by_key(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The cells by the case's key and the mode."""
        return {(cell["case"]["key"], cell["mode"]): cell for cell in self.cells}

    def rivals(self) -> list[str]:
        """The names of all rivals, in the order in which they come."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell["rivals"]))


def timed(cell: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rivals of a cell that were timed, by name."""
    return ((name, found) for name, found in cell["rivals"].items() if "failed" not in found)


def git_state() -> dict[str, Any]:
    """The commit of the package that is measured, and whether its tree differs from it (results apart)."""
    # A package older than this harness, which `verify` measures too, cannot tell.
    read = getattr(_machine, "git_state", lambda *_: {"commit": None, "dirty": None})
    return read("--", ".", f":!{RESULTS}")


def without_paths(text: str) -> str:
    """``text`` with each absolute path cut down to its last part: a record says nothing of the disk it came from."""
    return _PATH.sub(lambda match: re.split(r"[\\/]", match.group())[-1], text)


def reason(error: BaseException) -> str:
    """An error in a line of at most 200 characters, without paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_paths(f"{type(error).__name__}: {lines[0] if lines else ''}")[:200]
