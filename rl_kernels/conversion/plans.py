"""What a plan holds, how it is saved, and the options of replaced blocks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from rl_kernels.nn import Coefficients
from rl_kernels.nn.coefficients import GRANULARITIES, Constraint, Granularity

if TYPE_CHECKING:
    from rich.console import RenderableType

Level = Literal["auto", "block", "layer"]
Norms = Literal["mixed", "own"]
Share = Literal["block", "layer"]
Reason = Literal[
    "first",
    "last",
    "stage boundary",
    "shape mismatch",
    "neighbour replaced",
    "shared parameters",
    "nothing to replace",
]

_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """How the layers of a replaced block mix: see ``plan``. Checked when made.

    ``share`` becomes ``"block"`` where it is None, and ``"layer"`` with ``granularity="channel"``.
    """

    init: Literal["fit"] | tuple[float, ...] | None = None
    constraint: Constraint = "free"
    granularity: Granularity = "scalar"
    detach: tuple[int, ...] = ()
    share: Share | None = None
    norms: Norms = "mixed"

    def __post_init__(self) -> None:
        one_of("granularity", self.granularity, GRANULARITIES)
        one_of("norms", self.norms, get_args(Norms))
        channel = self.granularity == "channel"
        if self.share is None:
            object.__setattr__(self, "share", "layer" if channel else "block")
        one_of("share", self.share, get_args(Share))
        if channel and self.share == "block":
            raise ValueError("share: got 'block' with granularity 'channel', expected 'layer' or None")
        object.__setattr__(self, "init", _checked_init(self.init))
        values = torch.tensor(self.init) if isinstance(self.init, tuple) else torch.full((2,), 0.5)
        Coefficients(values, self.constraint)
        if not isinstance(self.detach, Collection) or not set(self.detach) <= {0, 1}:
            raise ValueError(f"detach: got {self.detach!r}, expected indices out of 0 (the previous) and 1 (the next)")
        object.__setattr__(self, "detach", tuple(sorted(set(self.detach))))


def one_of(name: str, value: object, expected: Iterable[str]) -> None:
    """Raise unless ``value`` is one of the ``expected``."""
    if value not in tuple(expected):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, expected))}")


def _checked_init(init: Any) -> Literal["fit"] | tuple[float, ...] | None:
    if init is None or (isinstance(init, str) and init == "fit"):
        return cast('Literal["fit"] | None', init)
    try:
        values = tuple(float(value) for value in (init.tolist() if isinstance(init, Tensor) else init))
    except (TypeError, ValueError):
        values = ()
    if len(values) != 2:
        raise ValueError(f"init: got {init!r}, expected None, 'fit' or two numbers")
    return values


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to be replaced: its path in the block (empty where it is the block), class and parameter shapes."""

    path: str
    class_name: str
    shapes: dict[str, tuple[int, ...]]
    coefficients: int

    @property
    def parameters(self) -> int:
        """How many numbers its parameters hold."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class OwnPart:
    """What keeps its own parameters in a replaced block, and why."""

    path: str
    class_name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class ReplacedBlock:
    """A block to be replaced.

    Attributes:
        number: in the walk over all blocks, counted from 1.
        path: in the model.
        class_name: of the block.
        sources: paths of the blocks that it is mixed from: the previous and the next.
        layers: what is replaced in it.
        own: what keeps its own parameters.
        coefficients: how many numbers are learned in place of the layers' parameters.
    """

    number: int
    path: str
    class_name: str
    sources: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    own: tuple[OwnPart, ...]
    coefficients: int

    @property
    def parameters(self) -> int:
        """How many numbers the block holds before it is replaced."""
        return sum(layer.parameters for layer in self.layers) + sum(part.parameters for part in self.own)

    @property
    def saved(self) -> int:
        """How many numbers fewer it holds after."""
        return sum(layer.parameters for layer in self.layers) - self.coefficients


@dataclass(frozen=True)
class SkippedBlock:
    """A block that was due but cannot be replaced."""

    number: int
    path: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Stage:
    """Blocks that follow one another: the path of their container, their classes, and how many they are."""

    path: str
    class_name: str
    blocks: int


@dataclass(frozen=True)
class Plan:
    """What ``replace`` is to do to a model; printing it shows it as a table.

    Attributes:
        model: the model's class.
        every, offset, strict, targets, options: as ``plan`` was given them, defaults filled in.
        level: ``"block"``, or ``"layer"`` where single layers are walked.
        fell_back: whether single layers are walked because no block can be replaced.
        stages: the blocks that were walked.
        replaced: the blocks to replace.
        skipped: the blocks that were due and are not replaced.
        parameters: how many numbers the model holds before.
    """

    model: str
    every: int
    offset: int
    strict: bool
    targets: tuple[str, ...]
    options: Options
    level: Literal["block", "layer"]
    fell_back: bool
    stages: tuple[Stage, ...]
    replaced: tuple[ReplacedBlock, ...]
    skipped: tuple[SkippedBlock, ...]
    parameters: int

    @property
    def blocks(self) -> int:
        """How many blocks were walked."""
        return sum(stage.blocks for stage in self.stages)

    @property
    def saved(self) -> int:
        """How many numbers fewer the model holds after."""
        return sum(block.saved for block in self.replaced)

    @property
    def parameters_after(self) -> int:
        """How many numbers the model holds after."""
        return self.parameters - self.saved

    def to_json(self) -> str:
        """The plan as JSON text, which ``from_json`` reads."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: the text is no plan, or one of another format.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: got no JSON ({error}), expected a plan") from error
        found = fields.pop("format", None) if isinstance(fields, dict) else None
        if found != _FORMAT:
            raise ValueError(f"text: got format {found!r}, expected a plan of format {_FORMAT}")
        try:
            return _plan_from(fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"text: got a plan that does not read ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            ValueError: the file holds no plan.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __rich__(self) -> RenderableType:
        from rl_kernels.conversion.table import render

        return render(self)

    def __str__(self) -> str:
        from rl_kernels.conversion.table import as_text

        return as_text(self)


def _plan_from(fields: dict[str, Any]) -> Plan:
    def layer(shapes: dict[str, list[int]], **rest: Any) -> PlannedLayer:
        return PlannedLayer(shapes={name: tuple(shape) for name, shape in shapes.items()}, **rest)

    def block(sources: list[str], layers: list[Any], own: list[Any], **rest: Any) -> ReplacedBlock:
        planned, kept = tuple(layer(**item) for item in layers), tuple(OwnPart(**item) for item in own)
        return ReplacedBlock(sources=tuple(sources), layers=planned, own=kept, **rest)

    fields["targets"] = tuple(fields["targets"])
    fields["options"] = Options(**fields["options"])
    fields["stages"] = tuple(Stage(**item) for item in fields["stages"])
    fields["replaced"] = tuple(block(**item) for item in fields["replaced"])
    fields["skipped"] = tuple(SkippedBlock(**item) for item in fields["skipped"])
    return Plan(**fields)
