"""What a model is made of: its stages, their blocks, and the parts of a block that can or cannot be replaced."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import parametrize

from rl_kernels import nn as replacements
from rl_kernels.nn import ReplacementByForward, ReplacementLayer
from rl_kernels.nn.adapters import full_class_name, full_name, has_adapters
from rl_kernels.nn.foreign import foreign_class, foreign_kind
from rl_kernels.nn.wrapped import why_not_wrapped

Classes = tuple[type[nn.Module], ...]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_METHODS = ("forward", "_conv_forward")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Block:
    """A block of the model.

    Attributes:
        path: of the block in the model.
        module: the block.
        stage: path of the container that holds it; for numbered attributes, what they have in common: ``block*``.
        inside: the modules around a single layer, the model first; empty for a block of a stage.
    """

    path: str
    module: nn.Module
    stage: str = ""
    inside: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Part:
    """A piece of a block that has parameters: a layer, or a parameter that belongs to no layer.

    Attributes:
        path: relative to the block; empty where the block itself is the layer.
        module: the layer; None for a bare parameter.
        kind: the class that stands in for the layer, or would if nothing spoke against it; None where there is none.
        inside: the modules around the layer, the block first.
        class_name: of the layer, or ``"Parameter"``.
        parameters: how many numbers it holds.
        why_kept: why it cannot be replaced; empty where it can.
    """

    path: str
    module: nn.Module | None
    kind: type[ReplacementLayer] | None
    inside: tuple[nn.Module, ...]
    class_name: str
    parameters: int
    why_kept: str = ""


def join(*parts: str) -> str:
    """A path from its parts, of which some may be empty."""
    return ".".join(part for part in parts if part)


def stem(name: str) -> str | None:
    """What a numbered name has before its number (``block`` of ``block3``); None where it ends in none."""
    found = re.fullmatch(r"(.*?)\d+", name)
    return None if found is None else found[1]


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer: one of torch's, or a single layer whose class is called so."""
    if isinstance(module, _NORMS) or torch_class(module) is not None:
        return isinstance(module, _NORMS)
    return "norm" in type(module).__name__.lower() and _is_single(module)


def _is_single(module: nn.Module) -> bool:
    """Whether no module in ``module`` has parameters: an activation may be there."""
    return not any(True for child in module.children() for _ in child.parameters())


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; parametrised modules have one each, made from it."""
    return parametrize.type_before_parametrizations(module)


def count(module: nn.Module) -> int:
    """How many numbers the parameters of ``module`` hold, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def kind_named(name: str) -> type[ReplacementLayer] | None:
    """The class of replaced layers of that name, among those of ``rl_kernels.nn``."""
    kind = getattr(replacements, name, None) if name in replacements.__all__ else None
    fits = isinstance(kind, type) and issubclass(kind, ReplacementLayer) and kind is not ReplacementLayer
    return kind if fits else None


@cache
def _kinds() -> Mapping[type[nn.Module], type[ReplacementLayer]]:
    kinds = [kind for name in replacements.__all__ if (kind := kind_named(name)) is not None]
    return {source: kind for kind in kinds for source in kind.source_type}


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """The class with a replacement, of torch or another library, that ``module`` is an instance of, or None."""
    return next((source for source in _kinds() if isinstance(module, source)), None) or foreign_class(module)


def replacement_for(layer: nn.Module) -> type[ReplacementLayer] | None:
    """The class that stands in for layers of ``layer``'s class, or None."""
    source = torch_class(layer)
    return None if source is None else _kinds().get(source) or foreign_kind(source)


def kind_of(module: nn.Module, asked: Classes = ()) -> tuple[type[ReplacementLayer] | None, str]:
    """The class that stands in for a layer, and why it cannot be replaced, which is empty where it can.

    Kernels of this package serve the layers of torch and others that compute the same. The forward of their own class
    serves subclasses of them, norms of other libraries, and layers of the classes in ``asked``.
    """
    source = torch_class(module)
    if source is None:
        why, text = why_not_wrapped(module), f"it is {class_of(module).__name__} ({full_name(module)})"
        if not why and (is_norm(module) or isinstance(module, asked)):
            return ReplacementByForward, ""
        return None, f"{text}, for which there is no replacement" + ("" if why else " unless its class is a target")
    kind = replacement_for(module)
    for method in _METHODS:
        if method in vars(module):
            return kind, f"it has a {method} of its own, set on this instance (as accelerate's hooks do)"
    for method in _METHODS:
        if getattr(type(module), method, None) is not getattr(source, method, None):
            why = why_not_wrapped(module)
            text = f"{full_name(module)} has a {method} of its own, and {why}"
            return (kind, text) if why else (ReplacementByForward, "")
    return kind, _why_not_mixed(module)


def why_not(kind: type[ReplacementLayer], module: nn.Module) -> str:
    """Why ``kind`` cannot take the place of a layer, or mix it; empty where it can.

    Layers of a class that ``kind`` does not know are for ``kind.check_source`` to refuse.
    """
    if kind is ReplacementByForward:
        return why_not_wrapped(module)
    if torch_class(module) is None:
        return ""
    found, reason = kind_of(module)
    by_forward = f"{full_name(module)} has a forward of its own, and no {kind.__name__} can run it"
    return by_forward if found is ReplacementByForward else reason


def _why_not_mixed(module: nn.Module) -> str:
    """Why the numbers that a layer holds cannot be mixed; empty where they can."""
    for name, parameter in module.named_parameters():
        kind = type(parameter)
        if kind.__module__.split(".")[0] == "torchao":
            return f"its {name} is quantised ({full_class_name(kind)})"
        if not parameter.is_floating_point():
            return f"its dtype is {parameter.dtype}, expected a real floating-point one"
    if isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module, "weight"):
        return ""
    return "it has no parameter named weight" if module._parameters.get("weight") is None else ""


def parts(module: nn.Module, inside: tuple[nn.Module, ...] = (), asked: Classes = ()) -> Iterator[Part]:
    """The parts of a block in registration order. A module that the block has at two places is a part at the first."""
    seen: set[nn.Module] = set()
    for part in _parts(module, "", inside, asked):
        if part.module is None or part.module not in seen:
            yield part
        if part.module is not None:
            seen.add(part.module)


def _parts(module: nn.Module, path: str, inside: tuple[nn.Module, ...], asked: Classes) -> Iterator[Part]:
    name = class_of(module).__name__
    if has_adapters(module):
        # Mixed one by one, the weight and the adapters around it would give another sum than their sums mixed.
        yield Part(path, module, None, inside, name, count(module), f"it has adapters ({full_name(module)})")
        return
    bare = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    if torch_class(module) is not None or (bare and _is_single(module)):
        if (size := count(module)) > 0:
            kind, reason = kind_of(module, asked)
            yield Part(path, module, kind, inside, name, size, reason)
        return
    for parameter_name, parameter in bare:
        place = join(path, parameter_name)
        yield Part(place, None, None, (*inside, module), "Parameter", parameter.numel(), "a parameter of no layer")
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _parts(child, join(path, child_name), (*inside, module), asked)


def _is_leaf(module: nn.Module, asked: Classes) -> bool:
    return torch_class(module) is not None or (isinstance(module, asked) and _is_single(module))


def _layers(module: nn.Module, asked: Classes) -> Iterator[Part]:
    """The layers of ``module`` but its norms, whether they can be replaced or not."""
    return (part for part in parts(module, asked=asked) if part.module is not None and not is_norm(part.module))


def _can_be_block(module: nn.Module, asked: Classes) -> bool:
    """Whether ``module`` holds, or is, a layer with a matrix that can be replaced."""
    return any(not part.why_kept for part in _layers(module, asked))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _children(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children with parameters, without norms: those that can be neighbours of one another."""
    named = [(name, child) for name, child in container._modules.items() if child is not None]
    return [(name, child) for name, child in named if not is_norm(child) and any(True for _ in child.parameters())]


class _Search:
    """Finds the stages of a model whose blocks are leaf layers, or composite.

    With ``any_layer`` a block may hold layers of which none can be replaced.
    """

    def __init__(self, model: nn.Module, leaves: bool, asked: Classes, any_layer: bool = False):
        self.model = model
        self.leaves = leaves
        self.asked = asked
        self.any_layer = any_layer
        self.known: set[type[nn.Module]] = set()

    def run(self) -> list[Block]:
        # A first walk learns the classes that form blocks, for stages that have them in other shapes only.
        found = list(self._walk(self.model, ""))
        classes = {class_of(block.module) for block in found}
        self.known = classes - set(CONTAINERS)
        return found if self.leaves else list(self._walk(self.model, ""))

    def _walk(self, module: nn.Module, path: str) -> Iterator[Block]:
        stages = self._stages(module)
        for name, child in module._modules.items():
            if child is None:
                continue
            place = join(path, name)
            if name in stages:
                yield Block(place, child, join(path, stages[name]))
            elif not _is_leaf(child, self.asked):
                yield from self._walk(child, place)

    def _stages(self, module: nn.Module) -> dict[str, str]:
        """The children of ``module`` that are blocks, with the stage's name in ``module``: empty for itself."""
        children = _children(module)
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            classes = self._block_classes(module)
            return {name: "" for name, child in children if class_of(child) in classes and self._may_be(child)}
        if self.leaves:
            return {}
        if isinstance(module, nn.ModuleDict):
            return dict.fromkeys(self._row(children), "")
        groups: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
        for name, child in children:
            if (found := stem(name)) is not None:
                groups[found].append((name, child))
        return {name: f"{common}*" for common, group in groups.items() for name in self._row(group)}

    def _row(self, children: list[tuple[str, nn.Module]]) -> list[str]:
        """Which of the children are blocks where nothing says that they run one after the other: three alike or none.

        Two towers, or the stages of a network, are none: what has blocks inside is searched for them.
        """
        alike = [self._alike(child, following) for (_, child), (_, following) in pairwise(children)]
        rows = [class_of(children[i][1]) for i in range(len(alike) - 1) if alike[i] and alike[i + 1]]
        found = [(name, child) for name, child in children if class_of(child) in rows and self._may_be(child)]
        return [] if any(self._holds_stage(child) for _, child in found) else [name for name, _ in found]

    def _holds_stage(self, module: nn.Module) -> bool:
        inside = Counter(block.stage for block in self._walk(module, ""))
        layers = _Search(module, True, self.asked, self.any_layer)
        bare = type(module) in CONTAINERS and bool(layers._block_classes(module))
        return bare or any(blocks > 2 for blocks in inside.values())

    def _block_classes(self, module: nn.Module) -> set[type[nn.Module]]:
        """The classes whose instances among the children of a container are blocks: none where it is no stage."""
        if not isinstance(module, CONTAINERS):
            return set()
        children = [child for _, child in _children(module)]
        classes = {class_of(child) for child in children} & self.known
        return classes | {class_of(child) for child, following in pairwise(children) if self._alike(child, following)}

    def _alike(self, child: nn.Module, following: nn.Module) -> bool:
        if class_of(child) is not class_of(following) or _shapes(child) != _shapes(following):
            return False
        return self._may_be(child) and self._may_be(following)

    def _may_be(self, module: nn.Module) -> bool:
        can_be = any(not part.why_kept or self.any_layer for part in _layers(module, self.asked))
        if self.leaves:
            return _is_leaf(module, self.asked) and can_be
        # A bare container of blocks is a stage even where it stands among its likes.
        is_stage = type(module) in CONTAINERS and bool(self._block_classes(module))
        return not _is_leaf(module, self.asked) and not is_stage and can_be


def composite_blocks(model: nn.Module, asked: Classes = ()) -> list[Block]:
    """The blocks made of several layers, in the order in which the model registers them.

    A container (``nn.Sequential``, ``nn.ModuleList``) is a stage where two adjacent children have one class and equal
    parameter shapes, or where a child has a class that forms the blocks of another stage. Its children of these
    classes are blocks. So are those of an ``nn.ModuleDict``, and children with numbered names (``block0``,
    ``block1``, ...) of any other module, where three in a row are alike and hold no stage themselves. Stages are not
    searched inside a block. Children without parameters and norms do not count.
    """
    return _Search(model, False, asked).run()


def leaf_blocks(model: nn.Module, asked: Classes = ()) -> list[Block]:
    """The layers that stand in a container as blocks do: ``nn.Linear`` in an ``nn.Sequential``, for instance.

    Stages are containers, ``nn.Sequential`` or ``nn.ModuleList``, as in ``composite_blocks``. Composite blocks are not
    searched.
    """
    blocks = composite_blocks(model, asked)
    return [leaf for leaf in _Search(model, True, asked).run() if not any(_within(leaf, block) for block in blocks)]


def _within(leaf: Block, block: Block) -> bool:
    return leaf.path.startswith(block.path + ".")


def leaf_layers(model: nn.Module, asked: Classes = ()) -> list[Block]:
    """All single layers with a matrix that can be replaced, wherever they are, in registration order."""
    found = (part for part in _layers(model, asked) if not part.why_kept)
    return [Block(part.path, part.module, inside=part.inside) for part in found if part.module is not None]


def obstinate_layers(model: nn.Module, asked: Classes = ()) -> list[tuple[str, Part]]:
    """The layers that cannot be replaced, norms left out, each after the path of its block, or "" for none.

    First those of what would be a block if they could be, then others.
    """
    candidates = _Search(model, False, asked, any_layer=True).run()
    blocks = [block for block in candidates if not _can_be_block(block.module, asked)]
    found = [(block.path, part) for block in blocks for part in _layers(block.module, asked)]
    seen = {id(part.module) for _, part in found}
    return found + [("", part) for part in _layers(model, asked) if part.why_kept and id(part.module) not in seen]


class Sharing:
    """Which parameters and layers of a model are used at more than one place."""

    def __init__(self, model: nn.Module):
        self._model = type(model).__name__
        self._owners: dict[int, list[str]] = defaultdict(list)
        self._places: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self._places[id(module)].append(path)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[id(parameter)].append(join(path, name))

    def elsewhere(self, path: str, layer: nn.Module) -> str:
        """Where else than at ``path`` the model holds the module ``layer``; empty where nowhere."""
        return next((place for place in self._places[id(layer)] if place != path), "")

    def explain(self, path: str, layer: nn.Module) -> str:
        """Where else the parameters of ``layer``, at ``path``, are used; empty where nowhere.

        Raises:
            ValueError: the model is a wrapper that passes ``path`` on to the one inside, as ``torch.compile`` makes.
        """
        places = self._places[id(layer)]
        if path not in places:
            raise ValueError(
                f"model: got {self._model}, which has {path} as {', '.join(places) or 'no module of its own'}, "
                "expected the model inside it: pass the model that was compiled or wrapped"
            )
        for name, parameter in layer.named_parameters():
            place = join(path, name)
            others = [owner for owner in self._owners[id(parameter)] if owner != place]
            if others:
                return f"{place} is also {others[0]}"
        return ""


def check_plain(model: nn.Module) -> None:
    """Raise unless ``model`` is a module without replaced layers, whose parameters all have shapes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if "_orig_mod" in model._modules:
        raise ValueError(
            f"model: got {type(model).__name__}, which torch.compile made, expected the model inside it: plan and "
            "replace that, then compile it"
        )
    for path, module in model.named_modules():
        if isinstance(module, ReplacementLayer):
            raise ValueError(f"model: got one with replaced layers ({path or 'itself'}), expected none; see merge")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise ValueError(f"model: got {name} uninitialised, expected lazy layers to have seen a batch")
