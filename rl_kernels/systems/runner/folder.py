"""The folder of a run: what its files are called, and how they are written so that a kill or a full disk loses none.

=================  =======================================================================
``run.json``       what was asked for: system, config, versions, commit, data, machine
``log.jsonl``      a line a step, a line an epoch
``last.pt``        the newest checkpoint, from which ``resume`` goes on
``best.pt``        the checkpoint of the best epoch so far
``metrics.json``   the final figures; there once the run is finished
=================  =======================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

RUN, LOG, LAST, BEST, METRICS = "run.json", "log.jsonl", "last.pt", "best.pt", "metrics.json"
ORDER = "order.json"
"""Beside the folders of an experiment's variants: their names, the one that others are compared with first."""


class RunError(RuntimeError):
    """A run that cannot begin or go on: its folder, its files or what they hold; the message says which and why."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside ``path`` and rename it, so that ``path`` holds the old or the new content, never half.

    Raises:
        RunError: the file cannot be written; what was there is left as it was.
    """
    written = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        written = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(written, 0o666 & ~_umask())
        os.replace(written, path)
    # torch's writer turns an OSError of the file below it into a RuntimeError.
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise RunError(f"{path}: not written: {cause}; what was there before is as it was") from error
    finally:
        if written is not None:
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=True) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunError: it is not there, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: not there, expected the folder of a run; `train --out` makes one") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not read: {error}") from error


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    write_whole(path, lambda file: torch.save(content, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file can run.

    Raises:
        RunError: it is not there, or no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: not there") from None
    except Exception as error:
        raise RunError(f"{path}: no checkpoint that can be read: {str(error).splitlines()[0]}") from error


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's log; one that a kill cut short is left out."""
    path = folder / LOG
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def make_folder(folder: Path) -> None:
    """Make the folder of a new run.

    Raises:
        RunError: it holds a run already, or something else, or cannot be made.
    """
    if (folder / RUN).exists():
        raise RunError(f"out: {folder} holds a run: `python -m rl_kernels resume {folder}`, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise RunError(f"out: {folder} holds {', '.join(others[:3])}, expected an empty or a new folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"out: {folder} cannot be written: {error}") from error
