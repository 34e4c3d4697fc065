"""What a model is made of: its stages, their blocks, and the parts of a block that can or cannot be replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import parametrize

from rl_kernels import nn as replacements
from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.adapters import full_name, has_adapters
from rl_kernels.nn.foreign import foreign_class, foreign_kind

CONTAINERS = (nn.Sequential, nn.ModuleList)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Block:
    """A block of the model.

    Attributes:
        path: of the block in the model.
        module: the block.
        stage: path of the container that holds it.
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
        kind: the class that can stand in for the layer; None where there is none.
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


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer: one of torch's, or a leaf whose class is called so."""
    if isinstance(module, _NORMS) or torch_class(module) is not None:
        return isinstance(module, _NORMS)
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; parametrised modules have one each, made from it."""
    return parametrize.type_before_parametrizations(module)


def count(module: nn.Module) -> int:
    """How many numbers the parameters of ``module`` hold, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def _kinds() -> Mapping[type[nn.Module], type[ReplacementLayer]]:
    exported = (getattr(replacements, name) for name in replacements.__all__)
    kinds = [kind for kind in exported if issubclass(kind, ReplacementLayer) and kind is not ReplacementLayer]
    return {source: kind for kind in kinds for source in kind.source_type}


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """The class with a replacement, of torch or another library, that ``module`` is an instance of, or None."""
    return next((source for source in _kinds() if isinstance(module, source)), None) or foreign_class(module)


def replacement_for(layer: nn.Module) -> type[ReplacementLayer] | None:
    """The class that stands in for layers of ``layer``'s class, or None."""
    source = torch_class(layer)
    return None if source is None else _kinds().get(source) or foreign_kind(source)


def why_kept(module: nn.Module, source: type[nn.Module]) -> str:
    """Why a layer of the class ``source`` cannot be replaced; empty where it can."""
    for method in ("forward", "_conv_forward"):
        if method in vars(module):
            return f"it has a {method} of its own, set on this instance (as accelerate's hooks do)"
        if getattr(type(module), method, None) is not getattr(source, method, None):
            return f"{full_name(module)} has a {method} of its own"
    if isinstance(module, nn.MultiheadAttention):
        return ""
    if module._parameters.get("weight") is None and not parametrize.is_parametrized(module, "weight"):
        return "it has no parameter named weight"
    return ""


def parts(module: nn.Module, inside: tuple[nn.Module, ...] = ()) -> Iterator[Part]:
    """The parts of a block in registration order. A module that the block has at two places is a part at the first."""
    seen: set[nn.Module] = set()
    for part in _parts(module, "", inside):
        if part.module is None or part.module not in seen:
            yield part
        if part.module is not None:
            seen.add(part.module)


def _parts(module: nn.Module, path: str, inside: tuple[nn.Module, ...]) -> Iterator[Part]:
    source, name = torch_class(module), class_of(module).__name__
    if has_adapters(module):
        # Mixed one by one, the weight and the adapters around it would give another sum than their sums mixed.
        yield Part(path, module, None, inside, name, count(module), f"it has adapters ({full_name(module)})")
        return
    if source is not None:
        if (size := count(module)) > 0:
            yield Part(path, module, replacement_for(module), inside, name, size, why_kept(module, source))
        return
    children = [(child_name, child) for child_name, child in module._modules.items() if child is not None]
    bare = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    if bare and not children:
        reason = f"it is {name} ({full_name(module)}), for which there is no replacement"
        yield Part(path, module, None, inside, name, sum(p.numel() for _, p in bare), reason)
        return
    for parameter_name, parameter in bare:
        place = join(path, parameter_name)
        yield Part(place, None, None, (*inside, module), "Parameter", parameter.numel(), "a parameter of no layer")
    for child_name, child in children:
        yield from _parts(child, join(path, child_name), (*inside, module))


def _is_leaf(module: nn.Module) -> bool:
    return torch_class(module) is not None


def _layers(module: nn.Module) -> Iterator[Part]:
    """The layers of ``module`` but its norms, whether they can be replaced or not."""
    return (part for part in parts(module) if part.module is not None and not is_norm(part.module))


def _can_be_block(module: nn.Module) -> bool:
    """Whether ``module`` holds, or is, a layer with a matrix that can be replaced."""
    return any(not part.why_kept for part in _layers(module))


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

    def __init__(self, model: nn.Module, leaves: bool, any_layer: bool = False):
        self.model = model
        self.leaves = leaves
        self.can_be_block = (lambda module: any(True for _ in _layers(module))) if any_layer else _can_be_block
        self.known: set[type[nn.Module]] = set()

    def run(self) -> list[Block]:
        # A first walk learns the classes that form blocks, for stages that have them in other shapes only.
        found = list(self._walk(self.model, ""))
        classes = {class_of(block.module) for block in found}
        self.known = classes - {*CONTAINERS, nn.ModuleDict}
        return found if self.leaves else list(self._walk(self.model, ""))

    def _walk(self, module: nn.Module, path: str) -> Iterator[Block]:
        classes = self._block_classes(module)
        for name, child in module._modules.items():
            if child is None:
                continue
            place = join(path, name)
            if class_of(child) in classes and not is_norm(child) and self._may_be(child):
                yield Block(place, child, path)
            elif not _is_leaf(child):
                yield from self._walk(child, place)

    def _block_classes(self, module: nn.Module) -> set[type[nn.Module]]:
        """The classes whose instances among the children of ``module`` are blocks: none where it is no stage."""
        if not isinstance(module, CONTAINERS):
            return set()
        children = [child for _, child in _children(module)]
        classes = {class_of(child) for child in children} & self.known
        for child, following in pairwise(children):
            alike = class_of(child) is class_of(following) and _shapes(child) == _shapes(following)
            if alike and self._may_be(child) and self._may_be(following):
                classes.add(class_of(child))
        return classes

    def _may_be(self, module: nn.Module) -> bool:
        if self.leaves:
            return _is_leaf(module) and self.can_be_block(module)
        # A bare container of blocks is a stage even where it stands among its likes.
        is_stage = type(module) in CONTAINERS and bool(self._block_classes(module))
        return not _is_leaf(module) and not is_stage and self.can_be_block(module)


def composite_blocks(model: nn.Module) -> list[Block]:
    """The blocks made of several layers, in the order in which the model registers them.

    A container (``nn.Sequential``, ``nn.ModuleList``) is a stage where two adjacent children have one class and equal
    parameter shapes, or where a child has a class that forms the blocks of another stage. Its children of these
    classes are blocks. Stages are not searched inside a block. Children without parameters and norms do not count.
    """
    return _Search(model, leaves=False).run()


def leaf_blocks(model: nn.Module) -> list[Block]:
    """The layers that stand in a container as blocks do: ``nn.Linear`` in an ``nn.Sequential``, for instance.

    Stages as in ``composite_blocks``. Composite blocks are not searched.
    """
    blocks = composite_blocks(model)
    return [leaf for leaf in _Search(model, leaves=True).run() if not any(_within(leaf, block) for block in blocks)]


def _within(leaf: Block, block: Block) -> bool:
    return leaf.path.startswith(block.path + ".")


def leaf_layers(model: nn.Module) -> list[Block]:
    """All single layers with a matrix that can be replaced, wherever they are, in registration order."""
    found = (part for part in _layers(model) if not part.why_kept)
    return [Block(part.path, part.module, inside=part.inside) for part in found if part.module is not None]


def obstinate_layers(model: nn.Module) -> list[tuple[str, Part]]:
    """The layers that cannot be replaced, norms left out, each after the path of its block, or "" for none.

    First those of what would be a block if they could be, then others.
    """
    blocks = [block for block in _Search(model, leaves=False, any_layer=True).run() if not _can_be_block(block.module)]
    found = [(block.path, part) for block in blocks for part in _layers(block.module)]
    seen = {id(part.module) for _, part in found}
    return found + [("", part) for part in _layers(model) if part.why_kept and id(part.module) not in seen]


class Sharing:
    """Which parameters and layers of a model are used at more than one place."""

    def __init__(self, model: nn.Module):
        self._owners: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[id(parameter)].append(join(path, name))

    def explain(self, path: str, layer: nn.Module) -> str:
        """Where else the parameters of ``layer``, at ``path``, are used; empty where nowhere."""
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
    for path, module in model.named_modules():
        if isinstance(module, ReplacementLayer):
            raise ValueError(f"model: got one with replaced layers ({path or 'itself'}), expected none; see merge")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise ValueError(f"model: got {name} uninitialised, expected lazy layers to have seen a batch")
