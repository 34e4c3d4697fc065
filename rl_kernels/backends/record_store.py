"""The record in force for a backend on a device, and what ``auto`` asks of it.

Records lie in the user's cache folder, and others come with the package. They are read when ``auto`` first asks for a
backend on a device, never at import, and are then kept: a change of torch's number of threads counts from the next
``selection.refresh`` on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl_kernels._extension import EXTENSION
from rl_kernels.backends.case import Case
from rl_kernels.backends.records import (
    HOW,
    NO_RECORD,
    Here,
    Record,
    describe,
    nearest,
    why_stale,
    why_worse,
    why_wrong,
)
from rl_kernels.ops.values import Call

CACHE_VARIABLE = "RL_KERNELS_CACHE"
"""Names the folder of the user's own records."""
COMMITTED = Path(__file__).parent / "qualified"
"""The folder of the records that come with the package."""


def architecture(device: torch.device) -> str:
    """What a record is bound to: ``"sm_90"``; of a CPU the path of the C++ kernels and the number of threads."""
    if device.type == "cuda" and torch.cuda.is_available():
        if torch.version.hip:
            return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    if device.type != "cpu":
        return device.type
    built = EXTENSION.module.build_info()["capability"] if EXTENSION.module is not None else "none"
    return f"{platform.machine()} {built} {torch.get_num_threads()} threads"


def cache_folder() -> Path:
    """The folder of the user's own records."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rl_kernels")


def file_name(backend: str, where: str) -> str:
    """Of the record of a backend on an architecture."""
    return f"{backend}-{re.sub(r'[^A-Za-z0-9_]+', '-', where)}.json"


def hash_of(files: Sequence[Path]) -> str:
    """sha256 of files, of their names and contents."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


@dataclass(frozen=True, eq=False)
class RecordStore:
    """Finds the record of a backend, and answers from it what ``auto`` asks.

    Attributes:
        backend: its name.
        needed: whether nothing is used but what a record says to be right and fast; else a record only takes away.
        files: the kernels' sources, or their binary.
        build: what a build of them is known by instead, given a device: a binary differs with where it was made.
        kinds: of convolutions, as ``records.describe`` says, those that the backend does not pass over by itself.
        compiler: what compiles them as they run, with its version; empty where nothing does.
    """

    backend: str
    needed: bool
    files: Callable[[], Sequence[Path]]
    compiler: Callable[[], str] = str
    build: Callable[[torch.device], str] | None = None
    kinds: tuple[str, ...] = ()

    def here(self, device: torch.device) -> Here:
        """What a record has to fit."""
        internals: Any = torch._C
        driver = internals._cuda_getDriverVersion() if device.type == "cuda" and torch.version.cuda else None
        build = self.build(device) if self.build is not None else ""
        return Here(architecture(device), driver, self.compiler(), build or hash_of(self.files()))

    def worse(self, case: Case, call: Call | None = None) -> str | None:
        """Why ``auto`` passes the backend over for all calls of ``case``, or for one; None where it does not."""
        if call is None:
            return _why_worse(self, *case)
        activation = call.activation
        if not self.needed and _lost(self, *case) is None:
            return None
        return _why_worse_at(self, case.op, activation.device, activation.dtype, *describe(call))

    def lost(self, case: Case) -> str | None:
        """At how many of the measured sizes of ``case`` a rival is faster, in words; None where at none."""
        return _lost(self, *case)

    def settles(self, case: Case) -> bool:
        """Whether every call of ``case`` may go to the backend, whatever its size, its kind and the GPU it is on."""
        if self.lost(case) is not None:
            return False
        return not self.needed or all(_settles_on(self, case, device) for device in _devices(case.device))


@functools.cache
def find(store: RecordStore, device: torch.device) -> tuple[Record | None, str]:
    """The record in force for a backend on a device, or the reason why there is none."""
    reason = NO_RECORD
    for folder in (cache_folder(), COMMITTED):
        path = folder / file_name(store.backend, architecture(device))
        if not os.path.isfile(path):  # Unlike Path.is_file, also where a folder may not be looked into.
            continue
        try:
            record = Record.from_json(path.read_text())
        except (OSError, ValueError, TypeError, KeyError) as error:
            warnings.warn(f"{path}: cannot be read as a record: {type(error).__name__}: {error}", stacklevel=2)
            continue
        stale = why_stale(record, store.here(device))
        if stale is None:
            return record, ""
        if reason == NO_RECORD:
            reason = f"not qualified: {stale}; {HOW}"
    return None, reason


def _devices(kind: str) -> list[torch.device]:
    """All of a type: a case is of them all, and there may be GPUs of two kinds."""
    count = torch.cuda.device_count() if kind == "cuda" else 0
    return [torch.device(kind, index) for index in range(count)] or [torch.device(kind)]


@functools.cache
def _why_worse(store: RecordStore, op: str, device: str, dtype: torch.dtype) -> str | None:
    reasons = [_why_worse_on(store, op, each, dtype) for each in _devices(device)]
    return None if None in reasons else reasons[0]


def _why_worse_on(store: RecordStore, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    name = str(dtype).removeprefix("torch.")
    record, reason = find(store, device)
    if record is None:
        return reason if store.needed else None
    if store.needed or record.verdict(op, name) is not None:
        reason = why_wrong(op, name, record) or ""
    points = record.points_of(op, name)
    if reason or any(point.won for point in points):
        return reason or None
    if not points:
        return "not measured" if store.needed else None
    best = min(points, key=lambda point: point.ratio)
    return f"slower than {best.fastest} at every measured size (x{best.ratio:.2f} at best)"


def _settles_on(store: RecordStore, case: Case, device: torch.device) -> bool:
    record, _ = find(store, device)
    if record is None or _why_worse_on(store, case.op, device, case.dtype) is not None:
        return False
    measured = {point.kind for point in record.points_of(case.op, case.dtype_name)}
    return "conv" not in case.op or measured.issuperset(store.kinds)


@functools.lru_cache(maxsize=4096)
def _why_worse_at(
    store: RecordStore, op: str, device: torch.device, dtype: torch.dtype, kind: str, sizes: tuple[int, ...]
) -> str | None:
    name = str(dtype).removeprefix("torch.")
    record, reason = find(store, device)
    if store.needed:
        return reason or why_worse(op, name, kind, sizes, record)
    if record is None or nearest(op, name, kind, sizes, record) is None:
        return None
    return why_worse(op, name, kind, sizes, record)


@functools.cache
def _lost(store: RecordStore, op: str, device: str, dtype: torch.dtype) -> str | None:
    records = [find(store, each)[0] for each in _devices(device)]
    name = str(dtype).removeprefix("torch.")
    points = [point for record in records if record is not None for point in record.points_of(op, name)]
    lost = sum(not point.won for point in points)
    return f"not near {lost} of {len(points)} measured sizes, where a rival was faster" if lost else None


def forget() -> None:
    """Read the records again when they are next asked for; ``selection.refresh`` calls this."""
    for cached in (find, _why_worse, _why_worse_at, _lost):
        cached.cache_clear()
