"""Records: whether a backend's kernels are right on a machine, and where they win. Data, and pure decisions on it.

``python -m rl_kernels qualify`` makes them; ``record_store.py`` finds them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

from rl_kernels.ops.shapes import conv_output_size, is_channels_last
from rl_kernels.ops.values import Call

SCHEMA = 1
TOLERANCE = 1.02
"""How many times the fastest rival's time still counts as a win."""
MATERIALISED = "mix then vendor"
"""A rival that decides nothing: it holds the whole mixed weight, and ``auto`` never falls back on it."""
HOW = "run python -m rl_kernels qualify"
NO_RECORD = f"not qualified: no record for this device; {HOW}"


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel is right.

    Attributes:
        op: its name.
        dtype: of the activation, as ``"float32"``.
        passed: whether every check passed.
        detail: which check failed, in which configuration, and by how much.
    """

    op: str
    dtype: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Point:
    """One call that was timed.

    Attributes:
        op: its name.
        dtype: of the activation.
        kind: of layer, as ``describe`` says.
        sizes: as ``describe`` says.
        seconds: the median of a call.
        rivals: the same of each rival, by name.
    """

    op: str
    dtype: str
    kind: str
    sizes: tuple[int, ...]
    seconds: float
    rivals: dict[str, float]

    @property
    def fastest(self) -> str:
        """The name of the fastest rival that ``auto`` could take instead."""
        return min((name for name in self.rivals if name != MATERIALISED), key=self.rivals.__getitem__)

    @property
    def ratio(self) -> float:
        """This kernel's time over that rival's."""
        return self.seconds / self.rivals[self.fastest]

    @property
    def won(self) -> bool:
        """Whether that rival is not faster, as nearly as can be measured."""
        return self.ratio <= TOLERANCE


class Here(NamedTuple):
    """What a record has to fit: facts of this machine and of the installed kernels."""

    architecture: str
    driver: int | None
    compiler: str
    sources: str


@dataclass(frozen=True)
class Record:
    """What was found of one backend on one architecture.

    Attributes:
        backend: its name.
        architecture: as ``architecture`` says.
        device: its name, for people.
        driver: the CUDA version that the driver supports, as 13000; None on a CPU.
        compiler: what compiles the kernels as they run, as ``"triton 3.8"``; empty where nothing does.
        sources: the hash of the kernels' sources.
        date: when it was made.
        command: that made it.
        versions: of Python and of packages.
        verdicts: one an op and dtype.
        points: what was timed.
        schema: of this record.
    """

    backend: str
    architecture: str
    device: str
    driver: int | None
    compiler: str
    sources: str
    date: str
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    points: tuple[Point, ...] = ()
    schema: int = SCHEMA

    def as_json(self) -> str:
        """The file's text; a line a point."""
        lines = json.dumps(asdict(self), indent=1)
        return re.sub(r"\n {3,}|\n  (?=[]}])", " ", lines) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read what ``as_json`` wrote; of another schema no more than is needed to refuse it.

        Raises:
            ValueError, TypeError, KeyError: it is no record.
        """
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            return cls(**{entry.name: data.get(entry.name, "") for entry in fields(cls)})
        data["verdicts"] = tuple(Verdict(**verdict) for verdict in data["verdicts"])
        data["points"] = tuple(Point(**{**point, "sizes": tuple(point["sizes"])}) for point in data["points"])
        return cls(**data)

    def verdict(self, op: str, dtype: str) -> Verdict | None:
        """The verdict on an op in a dtype, or None."""
        return next((v for v in self.verdicts if (v.op, v.dtype) == (op, dtype)), None)

    def points_of(self, op: str, dtype: str) -> list[Point]:
        """What was timed of an op in a dtype."""
        return [point for point in self.points if (point.op, point.dtype) == (op, dtype)]


# Decisions.


def why_stale(record: Record, here: Here) -> str | None:
    """Why a record says nothing about ``here``; None where it holds."""
    if record.schema != SCHEMA:
        return f"the record has schema {record.schema}, expected {SCHEMA}"
    if record.architecture != here.architecture:
        return f"the record is of {record.architecture}, this is {here.architecture}"
    if record.sources != here.sources:
        return "the record is of other kernel sources"
    if record.compiler != here.compiler:
        return f"the record is of {record.compiler or 'no compiler'}, this is {here.compiler or 'none'}"
    if record.driver is not None and (here.driver is None or here.driver < record.driver):
        return f"the record is of a driver for CUDA {record.driver}, this one supports {here.driver}"
    return None


def nearest(op: str, dtype: str, kind: str, sizes: Sequence[int], record: Record) -> Point | None:
    """The point of the same op, dtype and kind whose sizes are nearest in log2; of equals the worst for the kernel."""

    def distance(point: Point) -> float:
        pairs = zip(point.sizes, sizes, strict=True)
        return round(sum((math.log2(max(a, 1)) - math.log2(max(b, 1))) ** 2 for a, b in pairs), 9)

    points = [point for point in record.points_of(op, dtype) if point.kind == kind]
    return min(points, key=lambda point: (distance(point), -point.ratio), default=None)


def why_worse(op: str, dtype: str, kind: str, sizes: Sequence[int], record: Record | None) -> str | None:
    """Why the kernel is not used for a call; None where it may be.

    Args:
        op: its name.
        dtype: of the activation, as ``"float32"``.
        kind: of layer, as ``describe`` says.
        sizes: as ``describe`` says.
        record: of the backend on this device, if there is one.
    """
    if record is None:
        return NO_RECORD
    reason = why_wrong(op, dtype, record)
    if reason is not None:
        return reason
    point = nearest(op, dtype, kind, sizes, record)
    if point is None:
        return f"not measured: {kind}"
    return None if point.won else f"slower than {point.fastest} at the nearest measured size (x{point.ratio:.2f})"


def why_wrong(op: str, dtype: str, record: Record) -> str | None:
    """Why the kernel is not used for any call, its speed aside; None where it may be."""
    verdict = record.verdict(op, dtype)
    if verdict is None:
        return "not qualified: the record does not have it"
    return None if verdict.passed else f"failed its qualification: {verdict.detail}"


def describe(call: Call) -> tuple[str, tuple[int, ...]]:
    """The kind of layer and the sizes of a call, cheaply.

    Returns:
        ``"linear"`` and (tokens, out_features, in_features); or, as ``"grouped channels_last strided"``, which
        convolution and (output pixels of all images, out and in channels a group, taps, groups).
    """
    activation, weight, geometry = call.activation, call.recipe.weights[0], call.geometry
    out, within, *taps = weight.shape
    if geometry is None:
        return "linear", (activation.numel() // max(activation.shape[-1], 1), out, within)
    groups = geometry.groups
    if call.op == "mixed_conv":
        pixels = activation.shape[0] * math.prod(conv_output_size(activation.shape[2:], taps, geometry))
    else:
        pixels = activation.numel() // max(out, 1)
    kind = "dense" if groups == 1 else "depthwise" if within == 1 else "grouped"
    kind += " channels_last" if is_channels_last(activation) or is_channels_last(weight) else " contiguous"
    sizes = (pixels, out // groups, within, math.prod(taps), groups)
    return kind + " strided" * (max(geometry.stride) > 1), sizes
