"""A model as a chain of units, between any two of which a single tensor passes: where it can be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import fx, nn

from rl_kernels.conversion.blocks import class_of, composite_blocks, is_norm, join, leaf_layers
from rl_kernels.nn import ReplacementLayer

_INSIDE = "model."


@dataclass(frozen=True)
class Unit:
    """A piece of a chain that is not cut.

    Attributes:
        path: of its block in the model; empty for what runs before the first block.
        nodes: of the graph, in their order.
        tail: how many of them, at the end, follow the block.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    tail: int = 0


class Chain:
    """What a model runs, one unit after the other: what comes before the first block, then block by block.

    What stands between two blocks belongs to the second from its first parameters on, and to the first without any;
    what follows the last block belongs to it. Blocks are what :func:`rl_kernels.plan` takes for blocks, or else the
    layers of ``nn.Sequential``. Blocks that more than one tensor joins, as long skips do, are one unit.

    Args:
        model: takes one tensor, and returns one; ``torch.fx`` can trace what lies around its blocks.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is no such chain; the message says why.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
        self.model = model
        blocks = _block_paths(model)
        if not blocks:
            raise ValueError(f"model: got {type(model).__name__}, which has no chain of blocks")
        # Nodes live as long as their graph.
        self._graph, self._returned = _traced(model, blocks)
        self.units = tuple(_units(self._graph, model, blocks))
        _check_apart(model, self.units)

    def __len__(self) -> int:
        return len(self.units)

    @property
    def has_stem(self) -> bool:
        """Whether something runs before the first block."""
        return not self.units[0].path

    def part(self, first: int, end: int, *, root: nn.Module | None = None, tail: bool = True) -> fx.GraphModule:
        """Return a module that runs the units ``first`` up to ``end``, on the model's own layers, under their names.

        Args:
            first: number of the first unit.
            end: one more than that of the last.
            root: a copy of the model whose layers are to run instead.
            tail: with what follows the last unit's block.
        """
        nodes = [node for unit in self.units[first:end] for node in unit.nodes]
        if not tail and (following := self.units[end - 1].tail):
            nodes = nodes[:-following]
        graph = fx.Graph()
        entry = graph.placeholder("x")
        made: dict[fx.Node, fx.Node] = {}

        def find(node: fx.Node) -> fx.Node:
            if node.op == "get_attr" and node not in made:
                made[node] = _copied(graph, node, find)
            return made.get(node, entry)  # What comes from before is the one tensor that passes.

        for node in nodes:
            made[node] = _copied(graph, node, find)
        graph.output(made[self._returned if end == len(self.units) and self._returned in made else nodes[-1]])
        return fx.GraphModule(self.model if root is None else root, graph, class_name="Part")


def _copied(graph: fx.Graph, node: fx.Node, find: Callable[[fx.Node], fx.Node]) -> fx.Node:
    made = graph.node_copy(node, find)
    if node.op in ("call_module", "get_attr"):
        made.target = str(node.target).removeprefix(_INSIDE)
    return made


def _block_paths(model: nn.Module) -> list[str]:
    """Where composite blocks stand, replaced ones too; in a model without, where its layers do."""
    found = composite_blocks(model)
    if found:
        stages = {block.path.rpartition(".")[0] for block in found}
        classes = {class_of(block.module) for block in found}
        return [
            join(stage, name)
            for stage in stages
            for name, child in model.get_submodule(stage).named_children()
            if class_of(child) in classes
        ]
    layers = {block.path for block in leaf_layers(model)}
    replaced = (path for path, module in model.named_modules() if isinstance(module, ReplacementLayer))
    return [*layers, *(path for path in replaced if not is_norm(model.get_submodule(path)))]


class _Around(nn.Module):
    """A model called with one tensor, so that what else it can be given keeps its default."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Looks into the modules around blocks, and into nothing else."""

    def __init__(self, opened: set[nn.Module]):
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened


def _traced(model: nn.Module, blocks: Sequence[str]) -> tuple[fx.Graph, fx.Node]:
    """What the model runs around its blocks, and what of it is returned."""
    around = {""}
    for path in blocks:
        names = path.split(".")[:-1]
        around |= {".".join(names[:count]) for count in range(1, len(names) + 1)}
    named = dict(model.named_modules(remove_duplicate=False))
    whole = _Around(model)
    opened = {whole, *(named[path] for path in around)}
    graphs = []
    training = {module: module.training for module in model.modules()}
    # Three times: what the model decides by itself, by its mode or by chance, would be frozen as it was.
    try:
        for number, mode in enumerate((True, True, False)):
            for module in training:
                module.training = mode
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                graphs.append(_Tracer(opened).trace(whole))
    except Exception as error:  # Whatever the model's own forward raises where it meets no tensor.
        raise ValueError(
            f"model: got {type(model).__name__}, whose forward cannot be traced around its blocks, expected one that "
            f"runs them one after the other whatever the numbers are: {error}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    for one, other in pairwise(graphs):
        if (where := _first_difference(one, other)) is not None:
            raise ValueError(
                f"model: got {type(model).__name__}, whose forward does not always do the same outside of its blocks "
                f"({where}), expected modules, as nn.Dropout, for what depends on training or chance"
            )
    (returned,) = (node.args[0] for node in graphs[0].nodes if node.op == "output")
    if not isinstance(returned, fx.Node):
        raise ValueError(
            f"model: got {type(model).__name__}, whose forward returns a {type(returned).__name__}, expected one "
            "tensor, the logits"
        )
    return graphs[0], returned


def _first_difference(one: fx.Graph, other: fx.Graph) -> str | None:
    """The name of the first node that only one of two graphs has so; None where they are the same."""
    for mine, theirs in zip_longest(one.nodes, other.nodes):
        if mine is None or theirs is None:
            return str(mine or theirs)
        if (mine.op, mine.target, str(mine.args), str(mine.kwargs)) != (
            theirs.op,
            theirs.target,
            str(theirs.args),
            str(theirs.kwargs),
        ):
            return str(mine)
    return None


def _units(graph: fx.Graph, model: nn.Module, blocks: Sequence[str]) -> Iterator[Unit]:
    known = set(blocks)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    places = [index for index, node in enumerate(nodes) if _path_of(node) in known]
    if not places:
        raise ValueError(f"model: got {type(model).__name__}, whose forward calls none of its blocks, as {blocks[0]}")
    narrow = _narrow(graph, nodes)
    start, path, block = 0, "", -1
    for place in places:
        end = _end_of_unit(nodes, model, block, place, narrow)
        if end is not None and end > start:
            yield Unit(path, tuple(nodes[start:end]))
            start = end
        path, block = _path_of(nodes[place]), place
    tail = len(nodes) - 1 - block
    whole = tail == 0 or block in narrow
    yield Unit(path, tuple(nodes[start:]), tail if whole else 0)


def _path_of(node: fx.Node) -> str:
    return str(node.target).removeprefix(_INSIDE) if node.op == "call_module" else ""


def _end_of_unit(
    nodes: Sequence[fx.Node], model: nn.Module, block: int, following: int, narrow: set[int]
) -> int | None:
    """Where the unit of the node ``block`` ends, before that of ``following``; None where no cut is."""
    if block < 0:
        return following if following - 1 in narrow else None
    wanted = next((index for index in range(block + 1, following) if _has_parameters(nodes[index], model)), following)
    before = [index + 1 for index in range(block, wanted) if index in narrow]
    after = [index + 1 for index in range(wanted, following) if index in narrow]
    return before[-1] if before else after[0] if after else None


def _has_parameters(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node reads parameters of its own; a norm is taken for what follows the layer before."""
    if node.op == "call_module":
        module = model.get_submodule(_path_of(node))
        return not is_norm(module) and any(True for _ in module.parameters())
    return any(source.op == "get_attr" for source in node.all_input_nodes)


def _narrow(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[int]:
    """The numbers of nodes after which their own result is all that is used later."""
    number = {node: index for index, node in enumerate(nodes)}
    last = len(nodes)
    used_until = {
        node: max((number.get(user, last) for user in node.users), default=-1)
        for node in graph.nodes
        if node.op in ("placeholder", *{each.op for each in nodes})
    }
    found, alive = set(), {node for node in graph.nodes if node.op == "placeholder"}
    for index, node in enumerate(nodes):
        alive = {each for each in alive if used_until[each] > index}
        if used_until[node] > index:
            alive.add(node)
        if alive == {node}:
            found.add(index)
    return found


def _check_apart(model: nn.Module, units: Sequence[Unit]) -> None:
    """Raise if two units hold one parameter."""
    holders: dict[int, str] = {}
    for unit in units:
        own: dict[int, str] = {}
        for node in unit.nodes:
            path = _path_of(node)
            if path:
                held = model.get_submodule(path).named_parameters()
                own |= {id(parameter): join(path, name) for name, parameter in held}
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    name = str(source.target).removeprefix(_INSIDE)
                    own[id(fetch(model, name))] = name
        for key, name in own.items():
            if key in holders:
                raise ValueError(
                    f"model: got {type(model).__name__}, which runs on {name} in two places ({holders[key]}), expected "
                    f"parameters that one unit of the chain uses"
                )
        holders |= own


def fetch(model: nn.Module, path: str) -> Any:
    """Return the module, parameter or buffer at ``path``."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)
