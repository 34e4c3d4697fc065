"""Replaced models on several processes: FSDP2 and tensor parallelism. DistributedDataParallel needs nothing of this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module
from torch.distributed.tensor import parallel as torchs

from rl_kernels.conversion import Plan
from rl_kernels.nn import Coefficients, ReplacementLayer, ReplacementLinear

__all__ = ["shard", "ColwiseParallel", "RowwiseParallel"]

Model = TypeVar("Model", bound=nn.Module)
Chain = list[nn.Module]


def shard(
    model: Model, plan: Plan | None = None, *, units: Iterable[nn.Module] = (), **fully_shard_options: Any
) -> Model:
    """Apply torch's ``fully_shard`` (FSDP2) to a replaced model, in place.

    A replaced layer runs on its sources' weights, which must be gathered while it runs; layers that are sharded each by
    itself are gathered for themselves only. So a replaced layer, its sources and whatever holds its coefficients belong
    together, and what shares a member belongs together too: a *chain*. Each chain becomes one ``fully_shard`` group,
    each of ``units`` outside the chains another, and what is left over becomes the model's own.

    Parameters of a group have one dtype. Coefficients are float32 beside half precision, whether the model is stored in
    it or ``mp_policy`` gathers it so: they are one group then, which stays gathered from forward to backward.

    Args:
        model: after ``replace`` and, where its layers are parallel too, ``parallelize_module``; before the optimizer
            is made.
        plan: the one that ``replace`` carried out: the members of a chain are its blocks, whole. Without it, and for
            what was wired by hand, they are single layers.
        units: further modules of the model to shard by themselves, such as its other blocks. Members of chains are
            passed over, so that ``units=model.blocks`` will do.
        fully_shard_options: ``torch.distributed.fsdp.fully_shard``'s (``mesh``, ``reshard_after_forward``,
            ``mp_policy``, ...), for every group.

    Returns:
        ``model``.

    Raises:
        TypeError: a model, plan or unit of another type.
        ValueError: a model without replaced layers, one that the plan does not fit, or one that is sharded already; a
            source or a unit that is no part of the model; a chain that cannot be a group, because one of its members
            lies within another, or that a unit would split. Nothing has been sharded then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan or None; see rl_kernels.plan")
    tree = _Tree(model)
    for path, module in tree.modules.items():
        if isinstance(module, FSDPModule):
            raise ValueError(f"model: got one sharded already at {path or 'its root'}, expected fully_shard to be left")
    chains, linked = _chains(tree, _blocks(tree, plan))
    members = {member for chain in chains for member in chain}
    inner, outer = _sorted_units(tree, units, members, linked)
    # From the inside out: a group takes the parameters that no earlier one has.
    _shard_coefficients(tree, fully_shard_options)
    for unit in inner:
        fully_shard(unit, **fully_shard_options)
    for chain in chains:
        fully_shard(chain, **fully_shard_options)
    for unit in outer:
        fully_shard(unit, **fully_shard_options)
    fully_shard(model, **fully_shard_options)
    return model


def _shard_coefficients(tree: _Tree, options: dict[str, Any]) -> None:
    """Make a group of all coefficients where the rest of the model is gathered in another dtype."""
    found: list[nn.Module] = [module for module in tree.paths if isinstance(module, Coefficients)]
    own = {parameter for module in found for parameter in module.parameters()}
    rest = {p.dtype for module in tree.paths for p in module._parameters.values() if p is not None and p not in own}
    gathered_as = getattr(options.get("mp_policy"), "param_dtype", None)
    if {parameter.dtype for parameter in own} >= (rest if gathered_as is None else {gathered_as}):
        return
    for module in found:
        module.register_forward_hook(_copied)
    fully_shard(found, **{**options, "mp_policy": MixedPrecisionPolicy(), "reshard_after_forward": False})


def _copied(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    """A tensor of this call: on the parameter itself FSDP2's hooks would pile up call by call."""
    return output.clone()


class _Tree:
    """The modules of a model by path, and the paths of its modules."""

    def __init__(self, model: nn.Module):
        self.name = type(model).__name__
        self.modules = dict(model.named_modules())
        self.paths = {module: path for path, module in self.modules.items()}

    def above(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that ``module`` lies within, the model first, and ``module`` itself at the end."""
        steps = self.paths[module].split(".")
        for depth in range(len(steps) if self.paths[module] else 0):
            yield self.modules[".".join(steps[:depth])]
        yield module


def _blocks(tree: _Tree, plan: Plan | None) -> set[nn.Module]:
    found = set()
    for block in () if plan is None else plan.replaced:
        for path in (block.path, *block.sources):
            if path not in tree.modules:
                raise ValueError(f"plan: got one with a block {path}, expected one for {tree.name}, which has none")
            found.add(tree.modules[path])
    return found


def _chains(tree: _Tree, blocks: set[nn.Module]) -> tuple[list[Chain], set[nn.Module]]:
    """The chains in the order of the model, and all modules that they link."""
    linked: set[nn.Module] = set()
    groups: list[set[nn.Module]] = []
    for path, layer in tree.modules.items():
        if not isinstance(layer, ReplacementLayer):
            continue
        ends = [layer, *layer.sources, *layer._borrowed]
        for end in ends:
            if end not in tree.paths:
                role = "coefficients" if isinstance(end, Coefficients) else f"a source ({type(end).__name__})"
                raise ValueError(
                    f"model: got {role} of {path or 'the model'} that is no part of it, expected all in one model; "
                    "after a source is replaced, call rebind"
                )
        linked.update(ends)
        group = {_member(tree, end, blocks) for end in ends}
        met = [other for other in groups if other & group]
        groups = [*(other for other in groups if other not in met), group.union(*met)]
    if not groups:
        raise ValueError(f"model: got {tree.name} without replaced layers, expected one after replace")
    members = set[nn.Module]().union(*groups)
    for member in members:
        for outside in tree.above(member):
            if outside is not member and outside in members:
                raise ValueError(
                    f"model: got {tree.paths[member]} and {tree.paths[outside] or 'the model'}, one within the other, "
                    "as members of chains of replaced layers and their sources, expected them apart: a group of "
                    "fully_shard cannot hold both"
                )
    order = {module: number for number, module in enumerate(tree.paths)}
    return [sorted(group, key=order.__getitem__) for group in groups], linked


def _member(tree: _Tree, module: nn.Module, blocks: set[nn.Module]) -> nn.Module:
    """What stands for ``module`` in a chain: the plan's block around it, else the layer that has it, else itself."""
    for outside in tree.above(module):
        if outside in blocks or (isinstance(module, Coefficients) and isinstance(outside, ReplacementLayer)):
            return outside
    return module


def _sorted_units(
    tree: _Tree, units: Iterable[nn.Module], members: set[nn.Module], linked: set[nn.Module]
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
    """The units within members of chains, and the others; the innermost first."""
    if not isinstance(units, Iterable):
        raise TypeError(f"units: got {type(units).__name__}, expected modules in an iterable")
    found = list(units)
    for unit in found:
        if not isinstance(unit, nn.Module):
            raise TypeError(f"units: got {type(unit).__name__}, expected modules")
    inner, outer = [], []
    for unit in dict.fromkeys(found):
        if unit not in tree.paths:
            raise ValueError(f"units: got a {type(unit).__name__} that is no part of {tree.name}")
        if unit in members or not tree.paths[unit]:
            continue
        around = next((module for module in tree.above(unit) if module in members), None)
        if around is None:
            outer.append(unit)
            continue
        for module in unit.modules():
            if module in linked:
                raise ValueError(
                    f"units: got {tree.paths[unit]}, which would split a chain: {tree.paths[module]} is replaced or "
                    f"mixed from, and belongs to the group of {tree.paths[around]}"
                )
        inner.append(unit)

    def depth(unit: nn.Module) -> int:
        return tree.paths[unit].count(".")

    return sorted(inner, key=depth, reverse=True), sorted(outer, key=depth, reverse=True)


class ColwiseParallel(torchs.ColwiseParallel):
    """torch's ``ColwiseParallel``, for ``ReplacementLinear`` too: for ``parallelize_module``.

    A replaced layer has no weight to shard: give its sources the same style. The kernels run on the local shards.

    Its coefficients are the same on every rank, whether they belong to it or to a layer that is not parallel, such as a
    norm. Sources that are cut or repeated (``rl_kernels.nn.SourceView``) are refused with a ``ValueError``.

    Layouts: as torch's: the input replicated, the output sharded in its last dimension, unless told otherwise.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, ReplacementLinear):
            return super()._apply(module, device_mesh)
        _check_whole(module)
        return _replicate_coefficients(self, module, device_mesh)


class RowwiseParallel(torchs.RowwiseParallel):
    """torch's ``RowwiseParallel``, for ``ReplacementLinear`` too: as ``ColwiseParallel``.

    Layouts: as torch's: the input sharded in its last dimension, the output replicated, unless told otherwise.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, ReplacementLinear):
            return super()._apply(module, device_mesh)
        _check_whole(module)
        self.desired_input_layouts = (Shard(-1),)
        return _replicate_coefficients(self, module, device_mesh)


def _check_whole(module: ReplacementLinear) -> None:
    if module.cuts:
        raise ValueError(
            "module: got a ReplacementLinear whose sources are cut or repeated, expected whole ones: parts of a "
            "sharded weight lie on several ranks"
        )


def _replicate_coefficients(
    style: ColwiseParallel | RowwiseParallel, module: nn.Module, device_mesh: DeviceMesh
) -> nn.Module:
    return distribute_module(
        module,
        device_mesh,
        None,  # which replicates parameters
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
