"""Which blocks are walked, what stands against each one's replacement, and which are replaced in the end."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from rl_kernels.conversion.blocks import (
    Block,
    Part,
    Sharing,
    class_of,
    composite_blocks,
    is_norm,
    join,
    kind_of,
    leaf_blocks,
    leaf_layers,
    obstinate_layers,
    parts,
    stem,
    torch_class,
)
from rl_kernels.conversion.grouping import granularity_of
from rl_kernels.conversion.memory import bytes_of
from rl_kernels.conversion.options import Level, Options
from rl_kernels.conversion.plans import (
    KeptPart,
    PlannedCut,
    PlannedLayer,
    Reason,
    ReplacedBlock,
    SkippedBlock,
    Stage,
)
from rl_kernels.conversion.targets import Targets
from rl_kernels.nn import ReplacementByForward
from rl_kernels.nn.adapters import full_name, has_adapters
from rl_kernels.nn.views import is_depthwise
from rl_kernels.nn.wrapped import numbers_stored
from rl_kernels.ops.mix import accumulate_dtype


@dataclass(frozen=True)
class Obstacle:
    """Why a block cannot be replaced."""

    reason: Reason
    detail: str


@dataclass
class Slot:
    """A block in the walk, with its neighbours, what would be replaced in it, and what stands against that."""

    block: Block
    wanted: list[Part]
    kept: list[KeptPart]
    previous: Block | None = None
    next: Block | None = None
    obstacle: Obstacle | None = None
    far: dict[int, Block] = field(default_factory=dict)
    """Neighbours at a distance of more than 1, by distance, negative before it."""
    cuts: dict[str, tuple[PlannedCut, ...]] = field(default_factory=dict)
    """By path in the block, the sources of what is mixed from layers of other sizes."""
    siblings: tuple[str, ...] = ()
    """Neighbours of a single layer that stand beside it in one module, as a query, a key and a value do."""


def find(
    model: nn.Module, targets: Targets, level: Level, options: Options
) -> tuple[Literal["block", "layer"], list[Slot]]:
    """The blocks to walk: composite ones, else layers in containers, else all layers that can be replaced.

    Raises:
        ValueError: nothing can be replaced in any of these.
    """
    seen: list[Slot] = []
    for kind, slots in _walks(model, targets, level, options):
        if any(slot.obstacle is None for slot in slots):
            return kind, slots
        seen = seen or slots
    raise _nothing(model, targets, level, seen)


def _walks(
    model: nn.Module, targets: Targets, level: Level, options: Options
) -> Iterator[tuple[Literal["block", "layer"], list[Slot]]]:
    if level != "layer":
        yield "block", _slots(composite_blocks(model, targets.classes), model, targets, options)
        yield "block", _slots(leaf_blocks(model, targets.classes), model, targets, options)
    if level != "block":
        yield "layer", _layer_slots(model, targets, level, options)


def _slots(blocks: Sequence[Block], model: nn.Module, targets: Targets, options: Options) -> list[Slot]:
    sharing = Sharing(model)
    slots = [_slot(block, targets, sharing) for block in blocks]
    by_stage: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        by_stage[slot.block.stage].append(slot)
    for stage in by_stage.values():
        _link(stage, options)
    if options.boundaries == "blocks":
        _join_stages(slots)
    for slot in slots:
        slot.obstacle = slot.obstacle or _edge(slot, blocks) or _mismatch(slot, options)
        _leave_out(slot)
    return slots


def _join_stages(slots: Sequence[Slot]) -> None:
    """Let the last block of a stage and the first of the following one be neighbours."""
    for slot, following in pairwise(slots):
        alike = class_of(slot.block.module) is class_of(following.block.module)
        ends = slot.next is None and following.previous is None
        if ends and alike and _follow(slot.block.stage, following.block.stage):
            slot.next, following.previous = following.block, slot.block


def _follow(stage: str, other: str) -> bool:
    """Whether the names say that one stage comes after the other: that one number in them is greater."""
    mine, others = re.split(r"(\d+)", stage), re.split(r"(\d+)", other)
    differ = [i for i, (one, two) in enumerate(zip(mine, others, strict=False)) if one != two]
    return len(mine) == len(others) and [i % 2 for i in differ] == [1] and int(mine[differ[0]]) < int(others[differ[0]])


def _link(chain: Sequence[Slot], options: Options) -> None:
    for slot, following in pairwise(chain):
        slot.next, following.previous = following.block, slot.block
    for i, slot in enumerate(chain):
        found = [distance for distance in options.distances[2:] if 0 <= i + distance < len(chain)]
        slot.far = {distance: chain[i + distance].block for distance in found}


def _leave_out(slot: Slot) -> None:
    """Leave out those of the far neighbours that cannot be mixed into the block."""
    fits = slot.obstacle is None and not slot.cuts
    slot.far = {d: block for d, block in slot.far.items() if fits and not _why_unlike(slot, block)}


def _edge(slot: Slot, blocks: Sequence[Block]) -> Obstacle | None:
    if slot.block is blocks[0]:
        return Obstacle("first", "no block before it")
    if slot.block is blocks[-1]:
        return Obstacle("last", "no block after it")
    if slot.previous is None or slot.next is None:
        side = "first" if slot.previous is None else "last"
        return Obstacle("stage boundary", f"{side} block of {slot.block.stage or 'the model'}")
    return None


def _layer_slots(model: nn.Module, targets: Targets, level: Level, options: Options) -> list[Slot]:
    sharing = Sharing(model)
    found = [_slot(block, targets, sharing) for block in leaf_layers(model, targets.classes)]
    slots = [slot for slot in found if slot.obstacle is None or slot.obstacle.reason != "nothing to replace"]
    chains: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        chains[_kind_of_layer(slot.block.module)].append(slot)
    for kind, chain in chains.items():
        _link(chain, options)
        for slot in chain:
            if slot.obstacle is None and slot.previous is None:
                slot.obstacle = Obstacle("first", f"no {kind} before it")
            if slot.obstacle is None and slot.next is None:
                slot.obstacle = Obstacle("last", f"no {kind} after it")
            if level == "auto":
                slot.far = {d: other for d, other in slot.far.items() if not _are_siblings(slot.block, other)}
            neighbours = [other for other in (slot.previous, slot.next, *slot.far.values()) if other is not None]
            slot.siblings = tuple(other.path for other in neighbours if _are_siblings(slot.block, other))
            slot.obstacle = slot.obstacle or _mismatch(slot, options)
            if level == "auto" and slot.siblings and slot.obstacle is None:
                beside = f"{slot.siblings[0]} is beside it in {class_of(slot.block.inside[-1]).__name__}"
                slot.obstacle = Obstacle("siblings", f"{beside}, not known to be before or after it")
            _leave_out(slot)
    return slots


def _are_siblings(layer: Block, other: Block) -> bool:
    """Whether two layers stand in one module that does not say in which order they run.

    A sequence says it, and so do numbered names: ``conv1`` and ``conv2``, but not ``query`` and ``key``.
    """
    if layer.inside[-1:] != other.inside[-1:]:
        return False
    if isinstance(layer.inside[-1], (nn.Sequential, nn.ModuleList)):
        return False
    names = [block.path.rpartition(".")[2] for block in (layer, other)]
    stems = {stem(name) for name in names}
    return len(stems) > 1 or None in stems


def _kind_of_layer(layer: nn.Module) -> str:
    """Layers of one kind are one another's neighbours. A 1x1 shortcut between two 3x3 convolutions is another kind."""
    kernel = getattr(layer, "kernel_size", ())
    # What runs by its own forward has neighbours of its own class only; of others a subclass counts as its base.
    source = class_of(layer) if kind_of(layer, (class_of(layer),))[0] is ReplacementByForward else torch_class(layer)
    assert source is not None
    return f"{'x'.join(map(str, kernel))} {source.__name__}".strip()


def _slot(block: Block, targets: Targets, sharing: Sharing) -> Slot:
    wanted, kept, shared = [], [], []
    for part in parts(block.module, block.inside, targets.classes):
        why = part.why_kept or targets.why_unwanted(block.path, part)
        if not why and part.module is not None:
            elsewhere = sharing.elsewhere(join(block.path, part.path), part.module)
            if elsewhere:
                why = f"shared with {elsewhere}"
                shared.append(part)
        if why:
            kept.append(KeptPart(part.path, part.class_name, part.parameters, why))
        else:
            wanted.append(part)
    slot = Slot(block, wanted, kept)
    slot.obstacle = _shared(block, wanted or shared, sharing)
    if not wanted and not shared:
        # A layer that is a target all the same has a reason of its own.
        own = next((part.reason for part in kept if part.reason.startswith("granularity")), "")
        slot.obstacle = Obstacle("nothing to replace", own or f"no target in {class_of(block.module).__name__}")
    return slot


def _shared(block: Block, wanted: Sequence[Part], sharing: Sharing) -> Obstacle | None:
    for part in wanted:
        assert part.module is not None
        elsewhere = sharing.explain(join(block.path, part.path), part.module)
        if elsewhere:
            return Obstacle("shared parameters", elsewhere)
    return None


def _mismatch(slot: Slot, options: Options) -> Obstacle | None:
    """What keeps the neighbours that there are from being mixed into the block."""
    for neighbour in (slot.previous, slot.next):
        detail = "" if neighbour is None else _why_unlike(slot, neighbour)
        if detail and options.boundaries == "blocks" and slot.previous is not None and slot.next is not None:
            return _mix_parts(slot, slot.previous, slot.next)
        if detail:
            return Obstacle("shape mismatch", detail)
    return None


def _mix_parts(slot: Slot, *neighbours: Block) -> Obstacle | None:
    """Mix what can be of neighbours of other sizes, and keep the rest; the obstacle where that is nothing but norms."""
    wanted, kept, cuts = [], [], {}
    for part in slot.wanted:
        found = [_cuts(part, slot.block, neighbour, j) for j, neighbour in enumerate(neighbours)]
        why = next((reason for _, reason in found if reason), "")
        if why:
            kept.append(KeptPart(part.path, part.class_name, part.parameters, why))
            continue
        wanted.append(part)
        sources = tuple(cut for cuts_of_one, _ in found for cut in cuts_of_one)
        if sources != tuple(PlannedCut(j) for j in range(len(neighbours))):
            cuts[part.path] = sources
    if not any(part.module is not None and not is_norm(part.module) for part in wanted):
        return Obstacle("shape mismatch", next(part.reason for part in kept))
    slot.wanted, slot.kept, slot.cuts = wanted, [*slot.kept, *kept], cuts
    return None


def _cuts(part: Part, block: Block, neighbour: Block, number: int) -> tuple[list[PlannedCut], str]:
    """What of a neighbour's layer is mixed into ``part`` of the block; or why nothing is."""
    different = _difference(part, block, neighbour)
    if not different or _found_in(part, block, neighbour)[0] is None or not (part.kind and part.kind.takes_views):
        return [PlannedCut(number)], different
    mine: Any = part.module
    theirs: Any = neighbour.module.get_submodule(part.path)
    weight, other = part.kind.main_weight(mine).shape, part.kind.main_weight(theirs).shape
    ratios = [_ratio(size, from_size) for size, from_size in zip(weight[:2], other[:2], strict=True)]
    groups = {getattr(layer, "groups", 1) for layer in (mine, theirs)}
    depthwise = [is_depthwise(layer) for layer in (mine, theirs)]
    alike = all(depthwise) or (groups == {1} and not any(depthwise))
    same = [(layer.bias is None, p.dtype, p.device) for layer in (mine, theirs) for p in [part.kind.main_weight(layer)]]
    if weight[2:] != other[2:] or None in ratios or not alike or same[0] != same[1]:
        return [], different
    (rows, below), (columns, beside) = (ratio for ratio in ratios if ratio is not None)
    blocks = [(row, column) for row in range(rows) for column in range(columns)]
    return [PlannedCut(number, (i, rows), (j, columns), (below, beside)) for i, j in blocks], ""


def _ratio(size: int, from_size: int) -> tuple[int, int] | None:
    """Into how many parts ``from_size`` is cut to make ``size``, and how often it is repeated; None where neither."""
    if from_size % size == 0:
        return from_size // size, 1
    return (1, size // from_size) if size % from_size == 0 else None


def _why_unlike(slot: Slot, neighbour: Block) -> str:
    """Why ``neighbour`` cannot be mixed into the block; empty where it can."""
    return next((why for part in slot.wanted if (why := _difference(part, slot.block, neighbour))), "")


def _difference(part: Part, block: Block, neighbour: Block) -> str:
    assert part.module is not None and part.kind is not None
    found, why = _found_in(part, block, neighbour)
    if found is None:
        return why
    path = join(neighbour.path, part.path)
    mine, theirs = part.kind.signature(part.module), part.kind.signature(found)
    for key in mine | theirs:
        if mine.get(key) != theirs.get(key):
            return f"{join(path, key)} is {theirs.get(key)}, {join(block.path, part.path, key)} {mine.get(key)}"
    return ""


def _found_in(part: Part, block: Block, neighbour: Block) -> tuple[nn.Module | None, str]:
    """The layer of a neighbour that can be mixed with ``part``, if its shapes allow it; or why there is none."""
    assert part.module is not None
    path = join(neighbour.path, part.path)
    try:
        found = neighbour.module.get_submodule(part.path)
    except AttributeError:
        return None, f"{neighbour.path} has no {part.path}"
    if has_adapters(found):
        return None, f"{path} has adapters ({full_name(found)})"
    if torch_class(found) is not torch_class(part.module):
        return None, f"{path} is {class_of(found).__name__}, {join(block.path, part.path)} {part.class_name}"
    kind, reason = kind_of(found, (class_of(part.module),))
    if reason:
        return None, f"{path} cannot be mixed: {reason}"
    if kind is not part.kind:
        return None, f"{path} is {full_name(found)}, {join(block.path, part.path)} {full_name(part.module)}"
    return found, ""


def walk(
    slots: Sequence[Slot], every: int, first: int, strict: bool, options: Options
) -> tuple[list[ReplacedBlock], list[SkippedBlock]]:
    """What is replaced, and what was due and is not: the first falls due at number ``first``."""
    replaced: list[ReplacedBlock] = []
    skipped: list[SkippedBlock] = []
    due = first
    for number, slot in enumerate(slots, start=1):
        if number < due:
            continue
        obstacle = slot.obstacle or _taken(slot, replaced)
        if obstacle is None:
            taken = {block.path for block in replaced}
            near = {-1: slot.previous, 1: slot.next}
            far = {distance: block for distance, block in slot.far.items() if block.path not in taken}
            replaced.append(_replaced(number, slot, {d: b.path for d, b in (near | far).items() if b}, options))
        else:
            skipped.append(SkippedBlock(number, slot.block.path, obstacle.reason, obstacle.detail))
        if obstacle is None or strict:
            due = number + every
    return replaced, skipped


def _taken(slot: Slot, replaced: Sequence[ReplacedBlock]) -> Obstacle | None:
    # A block that another is mixed from has that one for a neighbour: it need not be asked for by itself.
    assert slot.previous is not None and slot.next is not None
    taken = {block.path for block in replaced}
    for neighbour in (slot.previous, slot.next):
        if neighbour.path in taken:
            return Obstacle("neighbour replaced", f"{neighbour.path} is replaced")
    for block in replaced:
        if slot.block.path in block.sources:
            return Obstacle("neighbour replaced", f"{block.path} is mixed from it")
    return None


def _replaced(number: int, slot: Slot, sources: dict[int, str], options: Options) -> ReplacedBlock:
    layers = []
    modules = [part.module for part in slot.wanted if part.module is not None]
    for part in slot.wanted:
        assert part.module is not None and part.kind is not None
        shapes = {name: tuple(parameter.shape) for name, parameter in part.module.named_parameters()}
        granularity = granularity_of(part, options.granularity)
        cuts = slot.cuts.get(part.path, ())
        numbers = len(cuts or sources)
        if granularity != "scalar":
            numbers *= part.kind.out_channels_of(part.module) if granularity == "channel" else granularity
        stored = numbers_stored(part.module) if part.kind is ReplacementByForward else 0
        kind = part.kind.__name__
        layers.append(PlannedLayer(part.path, part.class_name, shapes, numbers, kind, stored, granularity, cuts))
    size, trainable = bytes_of(parameter for module in modules for parameter in module.parameters())
    whole = options.share == "block" and not slot.cuts
    learned = (
        [(modules, len(sources))] if whole else [([modules[i]], layer.coefficients) for i, layer in enumerate(layers)]
    )
    for instead_of, coefficients in learned:
        added, trained = _coefficient_bytes(instead_of, coefficients)
        size, trainable = size - added, trainable - trained
    return ReplacedBlock(
        number=number,
        path=slot.block.path,
        class_name=class_of(slot.block.module).__name__,
        sources=tuple(sources.values()),
        layers=tuple(layers),
        kept=tuple(slot.kept),
        coefficients=sum(coefficients for _, coefficients in learned),
        bytes_saved=size,
        trainable_bytes_saved=trainable,
        distances=tuple(sources),
    )


def _coefficient_bytes(instead_of: Sequence[nn.Module], coefficients: int) -> tuple[int, int]:
    """The bytes of coefficients and of the trainable ones: as ``replace`` makes them in the place of layers."""
    parameters = [parameter for module in instead_of for parameter in module.parameters()]
    size = coefficients * accumulate_dtype(parameters[0].dtype).itemsize
    return size, size if any(parameter.requires_grad for parameter in parameters) else 0


def siblings(slots: Sequence[Slot], replaced: Sequence[ReplacedBlock]) -> tuple[str, ...]:
    """The paths of replaced layers that are mixed from layers beside them in one module."""
    return tuple(block.path for block in replaced if slots[block.number - 1].siblings)


def stages(slots: Sequence[Slot]) -> tuple[Stage, ...]:
    """The containers of the blocks that are walked."""
    by_stage: dict[str, list[str]] = defaultdict(list)
    for slot in slots:
        by_stage[slot.block.stage].append(class_of(slot.block.module).__name__)
    return tuple(Stage(path, ", ".join(dict.fromkeys(names)), len(names)) for path, names in by_stage.items())


def summary(skipped: Sequence[SkippedBlock]) -> str:
    """The reasons in one line, for messages."""
    return "; ".join(f"{called(block.path)}: {block.reason} ({block.detail})" for block in skipped)


def called(path: str) -> str:
    """What messages call the module at ``path``."""
    return path or "the model itself"


def _nothing(model: nn.Module, targets: Targets, level: Level, slots: Sequence[Slot]) -> ValueError:
    name = type(model).__name__
    kept = [(block, part) for block, part in obstinate_layers(model, targets.classes) if targets.may_want(block, part)]
    # What stands in no block and has a class without a replacement comes last: many models have an embedding.
    near = [_sentence(block, part) for block, part in kept if block or part.kind is not None]
    far = [_sentence(block, part) for block, part in kept if not block and part.kind is None]
    if targets.targets and not any(slot.wanted for slot in slots):
        return ValueError(
            f"targets: got {', '.join(targets.labels)}, which match no layer of {name} that can be replaced"
            f"{_listed([*near, *far])}"
        )
    expected = "expected three blocks in a row with linear, convolution or attention layers of equal shape"
    if level != "auto":
        expected += f", or another level than {level!r}"
    obstacles = [
        ("", summary([SkippedBlock(number, slot.block.path, slot.obstacle.reason, slot.obstacle.detail)]))
        for number, slot in enumerate(slots, start=1)
        if slot.obstacle is not None
    ]
    reasons = _listed([*near, *obstacles, *far])
    return ValueError(f"model: got {name}, in which nothing can be replaced{reasons}; {expected}")


def _sentence(block: str, part: Part) -> tuple[str, str]:
    """Why a layer stays, without and with its name."""
    path, subject = called(join(block, part.path)), "it "
    why = part.why_kept
    return why, f"{path} {why.removeprefix(subject)}" if why.startswith(subject) else f"{path}: {why}"


def _listed(reasons: Sequence[tuple[str, str]]) -> str:
    """Up to three reasons in brackets; one that many layers have is named once, for the first of them."""
    seen: dict[str, str] = {}
    for why, sentence in reasons:
        seen.setdefault(why or sentence, sentence)
    sentences = list(seen.values())
    return f" ({'; '.join(sentences[:3])}{'; ...' if len(sentences) > 3 else ''})" if sentences else ""
