"""A plan: what it holds, how it is saved, and how it prints."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rl_kernels._moved import renamed, warn
from rl_kernels.conversion.blocks import join
from rl_kernels.conversion.memory import ASSUMED, STATES, Memory, Optimizer, footprint, table
from rl_kernels.conversion.options import Options, one_of
from rl_kernels.nn.coefficients import Granularity as LayerGranularity

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

Reason = Literal[
    "first",
    "last",
    "stage boundary",
    "shape mismatch",
    "neighbour replaced",
    "shared parameters",
    "nothing to replace",
    "siblings",
]

_FORMAT = 4
"""1, of version 0.1.0, and 2 know numbers, not bytes; 1 calls a block's ``kept`` parts ``own``; 3 knows two neighbours,
and one granularity for all layers. All are read too."""


@dataclass(frozen=True)
class PlannedCut:
    """A source of a layer that is a part of one of its block's sources, or that is repeated; or all of one.

    Attributes:
        neighbour: the number of that source of the block, from 0.
        out, in_, repeats: as ``rl_kernels.nn.SourceView`` has them.
    """

    neighbour: int
    out: tuple[int, int] = (0, 1)
    in_: tuple[int, int] = (0, 1)
    repeats: tuple[int, int] = (1, 1)

    @property
    def factor(self) -> float:
        """What its coefficient starts with of its neighbour's number: so that the output's variance is as without.

        That holds where the variance of weights goes with 1 / inputs, as where torch initialises them: of n blocks one
        below the other all are added up, and the r inputs that a repeated column sees as well.
        """
        return (self.out[1] * self.repeats[1]) ** -0.5


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to be replaced.

    Attributes:
        path: in the block; empty where it is the block.
        class_name: of the layer.
        shapes: of its parameters.
        coefficients: how many numbers are learned in place of them, if it shares them with no other layer.
        kind: the class that takes its place; empty in plans of older formats, which know one for each class.
        stored: how many numbers of the mix are stored while it runs: 0 where a kernel synthesises it.
        granularity: of the layer that takes its place; None in plans of older formats, for the options'.
        cuts: its sources, where not each is all of one of its block's; empty where they are.
    """

    path: str
    class_name: str
    shapes: dict[str, tuple[int, ...]]
    coefficients: int
    kind: str = ""
    stored: int = 0
    granularity: LayerGranularity | None = None
    cuts: tuple[PlannedCut, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers its parameters hold."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class KeptPart:
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
        sources: paths of the blocks that it is mixed from: the previous and the next, then any further ones.
        layers: what is replaced in it.
        kept: what keeps its own parameters.
        coefficients: how many numbers are learned in place of the layers' parameters.
        bytes_saved: how many bytes of parameters fewer it holds after.
        trainable_bytes_saved: the same of the trainable ones.
        distances: of the sources in blocks, negative before it.
    """

    number: int
    path: str
    class_name: str
    sources: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    kept: tuple[KeptPart, ...]
    coefficients: int
    bytes_saved: int
    trainable_bytes_saved: int
    distances: tuple[int, ...] = (-1, 1)

    @property
    def is_cut(self) -> bool:
        """Whether a layer of it is mixed from layers of other sizes: then each layer has coefficients of its own."""
        return any(layer.cuts for layer in self.layers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, also of version 0.1.0."""
        if "own" in state:
            state["kept"] = state.pop("own")
        self.__dict__.update({**_assumed_saving(state["layers"], state["coefficients"]), **state})

    @property
    def own(self) -> tuple[KeptPart, ...]:
        """The name of ``kept`` in version 0.1.0."""
        warn("ReplacedBlock.own", "ReplacedBlock.kept")
        return self.kept

    @property
    def parameters(self) -> int:
        """How many numbers the block holds before it is replaced."""
        return sum(layer.parameters for layer in self.layers) + sum(part.parameters for part in self.kept)

    @property
    def saved(self) -> int:
        """How many numbers fewer it holds after."""
        return sum(layer.parameters for layer in self.layers) - self.coefficients


def _assumed_saving(layers: Iterable[PlannedLayer], coefficients: int) -> dict[str, Any]:
    """What is said of a block's bytes where only its numbers are known."""
    saved = ASSUMED * (sum(layer.parameters for layer in layers) - coefficients)
    return {"bytes_saved": saved, "trainable_bytes_saved": saved}


def _assumed_bytes(parameters: int) -> dict[str, Any]:
    """The same of a model."""
    size = ASSUMED * parameters
    return {"parameter_bytes": size, "trainable_bytes": size, "buffer_bytes": 0, "bytes_assumed": True}


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
        parameter_bytes, trainable_bytes: of the model's parameters before, and of the trainable ones among them.
        buffer_bytes: of the buffers in its ``state_dict``.
        bytes_assumed: whether a number is taken for 4 bytes, and all for trainable, as the plan's file is of a version
            that did not know bytes.
        optimizer: for which the plan prints the memory.
        siblings: paths of replaced layers that are mixed from layers beside them in one module, which may not follow
            one another in the computation: a key from the query and the value.
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
    parameter_bytes: int
    trainable_bytes: int
    buffer_bytes: int
    bytes_assumed: bool = False
    optimizer: Optimizer = "adamw"
    siblings: tuple[str, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, also of version 0.1.0."""
        self.__dict__.update(state if "parameter_bytes" in state else {**_assumed_bytes(state["parameters"]), **state})

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

    def memory(self, optimizer: Optimizer | None = None) -> Memory:
        """The bytes that training takes before and after: parameters, gradients, the optimizer's state; a checkpoint.

        Activations are not among them: replacement leaves them as they are. Gradients and state are those of trainable
        parameters; buffers belong to the checkpoint.

        Args:
            optimizer: ``"adamw"``, ``"adam"``, ``"sgd"`` or ``"sgd-momentum"``; the plan's own by default.

        Raises:
            ValueError: an unknown optimizer.
        """
        chosen: Optimizer = self.optimizer if optimizer is None else optimizer
        one_of("optimizer", chosen, STATES)
        saved = sum(block.bytes_saved for block in self.replaced)
        trainable_saved = sum(block.trainable_bytes_saved for block in self.replaced)
        before = footprint(self.parameter_bytes, self.trainable_bytes, self.buffer_bytes, chosen)
        parameters, trainable = self.parameter_bytes - saved, self.trainable_bytes - trainable_saved
        return Memory(chosen, before, footprint(parameters, trainable, self.buffer_bytes, chosen))

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
        if found not in (1, 2, 3, _FORMAT):
            raise ValueError(f"text: got format {found!r}, expected a plan of format {_FORMAT}, 3, 2 or 1")
        try:
            return _plan_from(fields, with_bytes=found >= 3)
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
        return _rendered(self)

    def __str__(self) -> str:
        from rl_kernels._tables import as_text

        return as_text(_rendered(self))


def _plan_from(fields: dict[str, Any], with_bytes: bool) -> Plan:
    def cut(neighbour: int, **rest: list[int]) -> PlannedCut:
        pairs: Any = {name: tuple(numbers) for name, numbers in rest.items()}
        return PlannedCut(neighbour, **pairs)

    def layer(shapes: dict[str, list[int]], **rest: Any) -> PlannedLayer:
        rest["cuts"] = tuple(cut(**item) for item in rest.get("cuts", ()))
        return PlannedLayer(shapes={name: tuple(shape) for name, shape in shapes.items()}, **rest)

    def block(sources: list[str], layers: list[Any], **rest: Any) -> ReplacedBlock:
        parts = rest.pop("own") if "own" in rest else rest.pop("kept")
        planned, kept = tuple(layer(**item) for item in layers), tuple(KeptPart(**item) for item in parts)
        if not with_bytes:
            rest |= _assumed_saving(planned, rest["coefficients"])
        rest["distances"] = tuple(rest.get("distances", (-1, 1)))
        return ReplacedBlock(sources=tuple(sources), layers=planned, kept=kept, **rest)

    if not with_bytes:
        fields |= _assumed_bytes(fields["parameters"])
    fields["targets"] = tuple(fields["targets"])
    fields["siblings"] = tuple(fields.get("siblings", ()))
    fields["options"] = Options(**fields["options"])
    fields["stages"] = tuple(Stage(**item) for item in fields["stages"])
    fields["replaced"] = tuple(block(**item) for item in fields["replaced"])
    fields["skipped"] = tuple(SkippedBlock(**item) for item in fields["skipped"])
    return Plan(**fields)


# Printing, which alone needs rich: it takes a while to import.


def _rendered(plan: Plan) -> RenderableType:
    """What is replaced, what was skipped, what stays a replaced block's own, and the totals."""
    from rich.console import Group

    tables: list[RenderableType] = [_heading(plan), _replaced(plan)]
    if plan.skipped:
        tables.append(_skipped(plan))
    if any(block.kept for block in plan.replaced):
        tables.append(_kept(plan))
    return Group(*tables, table(plan.memory()), _totals(plan))


def _heading(plan: Plan) -> Text:
    from rich.text import Text

    unit = plan.level
    lines = [f"Plan for {plan.model}: {plan.blocks} {unit}s"]
    if unit == "block":
        lines[0] += ": " + "; ".join(
            f"{stage.blocks} {stage.class_name} in {stage.path or 'it'}" for stage in plan.stages
        )
    if plan.fell_back:
        lines.append("No block was found between two of its shape: single layers are replaced instead.")
    if unit == "layer":
        lines.append("A layer's neighbours are the previous and the next of its kind, as the model registers them.")
    if plan.siblings:
        first, rest = plan.siblings[:3], len(plan.siblings) - 3
        named = ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
        lines.append(f"These stand beside their neighbours in one module, and may not follow one another: {named}.")
    due = f"A replacement falls due every {plan.every} {unit}s, first at number {plan.offset}"
    lines.append(due + (". " if plan.strict else f", and goes to the first {unit} from there on that can be replaced."))
    if plan.strict:
        lines[-1] += f"A {unit} that cannot be replaced then is skipped."
    if plan.targets:
        lines.append(f"Targets: {', '.join(plan.targets)} only.")
    return Text("\n".join([*lines, ""]))


def _replaced(plan: Plan) -> Table:
    from rl_kernels._tables import simple_table

    numbers = ("#", "parameters", "after")
    made = simple_table("Replaced", "#", plan.level, "mixed from", "layers", "parameters", "after", numbers=numbers)
    for block in plan.replaced:
        counts = Counter(layer.class_name for layer in block.layers)
        layers = "\n".join(f"{n} {name}" for name, n in counts.items())
        before, after = block.parameters, block.parameters - block.saved
        made.add_row(str(block.number), block.path, "\n".join(block.sources), layers, f"{before:,}", f"{after:,}")
    return made


def _skipped(plan: Plan) -> Table:
    from rl_kernels._tables import simple_table

    made = simple_table("Due, but skipped", "#", plan.level, "why", "", numbers=("#",))
    for block in plan.skipped:
        made.add_row(str(block.number), block.path, block.reason, block.detail)
    return made


def _kept(plan: Plan) -> Table:
    from rl_kernels._tables import simple_table

    numbers = ("parameters",)
    made = simple_table("Stays a replaced block's own", "what", "class", "in", "parameters", "why", numbers=numbers)
    rows: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for block in plan.replaced:
        for part in block.kept:
            rows[part.path, part.class_name, part.reason].append((block.number, part.parameters))
    for (path, class_name, reason), found in rows.items():
        blocks = ", ".join(str(number) for number, _ in found)
        made.add_row(path, class_name, blocks, f"{sum(size for _, size in found):,}", reason)
    return made


def _totals(plan: Plan) -> Text:
    from rich.text import Text

    options = plan.options
    unit = plan.level if options.share == "block" else "layer"
    each = {"scalar": "", "channel": " and channel", "projection": ", a pair for each projection of an attention"}
    each["head"] = ", a pair for each head of an attention"
    pairs = f"one pair of coefficients a {unit}{each[options.granularity]}"
    if options.window == 1:
        default = "0.5 each"
    else:
        default = "0.5 each for the nearest two and 0" if options.constraint == "free" else "the same each"
        pairs = pairs.replace("pair of coefficients", "coefficient for each source", 1).replace("a pair", "one")
    starts = {None: default, "fit": "the least-squares fit"}
    start = str(options.init) if isinstance(options.init, tuple) else starts[options.init]
    details = [pairs, options.constraint, f"starting from {start}"]
    if options.detach:
        names = [("previous", "next")[j % 2] + (f" at distance {j // 2 + 1}" if j > 1 else "") for j in options.detach]
        details.append("no gradient to the " + " or the ".join(names))
    assumed = f"\nA number is taken for {ASSUMED} bytes: the plan is of an older version, which did not count them."
    return Text(
        f"{len(plan.replaced)} of {plan.blocks} {plan.level}s replaced; {', '.join(details)}.\n"
        f"Parameters: {plan.parameters:,} -> {plan.parameters_after:,} "
        f"({plan.saved:,} saved, {100 * plan.saved / plan.parameters:.1f} %)"
        + (assumed if plan.bytes_assumed else "")
        + "".join(f"\n{line}" for line in (*_cut(plan), *_stored(plan)))
    )


def _cut(plan: Plan) -> list[str]:
    """What is said of blocks whose neighbours have other sizes."""
    found = [
        f"{join(block.path, layer.path)} from {len(layer.cuts)}"
        for block in plan.replaced
        for layer in block.layers
        if layer.cuts
    ]
    text = "Mixed from parts of larger neighbours, or from smaller ones repeated, by coefficients of their own"
    return [f"{text}: {', '.join(found)}."] if found else []


def _stored(plan: Plan) -> list[str]:
    """What is said of layers whose mix is stored while they run."""
    largest: dict[str, int] = defaultdict(int)
    for layer in (layer for block in plan.replaced for layer in block.layers if layer.stored):
        largest[layer.class_name] = max(largest[layer.class_name], layer.stored)
    return [
        f"A {name} runs its own forward: its mix, {numbers:,} numbers at most, is stored for it and for backward."
        for name, numbers in largest.items()
    ]


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, {"OwnPart": ("KeptPart", KeptPart)})
