"""Carrying out a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from rl_kernels.conversion import encoder_fast_path
from rl_kernels.conversion.blocks import (
    Sharing,
    check_plain,
    class_of,
    join,
    kind_named,
    replacement_for,
    why_not,
)
from rl_kernels.conversion.carrying import carry, what_would_be_lost
from rl_kernels.conversion.options import Options
from rl_kernels.conversion.plans import Plan, PlannedCut, PlannedLayer, ReplacedBlock
from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.coefficients import Granularity, Init, initial_coefficients
from rl_kernels.nn.standing import paths_of
from rl_kernels.nn.views import Cut, SourceView, module_of, view_of

Model = TypeVar("Model", bound=nn.Module)


def replace(model: Model, plan: Plan) -> Model:
    """Replace the layers that ``plan`` names, in item.

    Do it before the optimizer is made: the layers' parameters go, and coefficients come. Coefficients are trainable
    where a replaced parameter of their block was. Everything is checked before anything is changed. In
    ``nn.TransformerEncoder`` torch's inference fast path is switched off, because it would read the weights of
    replaced layers past them.

    Args:
        model: the model for which the plan was made, or another instance of it.
        plan: from ``rl_kernels.plan`` or ``Plan.load``.

    Returns:
        ``model``.

    Raises:
        TypeError: something else than a plan.
        ValueError: a model that the plan does not fit, or one with replaced layers; the message names the layer.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan; see rl_kernels.plan")
    check_plain(model)
    if not plan.replaced:
        raise ValueError("plan: got one that replaces nothing, expected at least one block")
    sharing = Sharing(model)
    options = plan.options
    blocks = [[_find(model, block, layer, options, sharing) for layer in block.layers] for block in plan.replaced]
    _check_apart(blocks)
    made = {path: layer for items in blocks for path, layer in _make(items, options)}
    put(model, {item.path: item.own for items in blocks for item in items}, made, made)
    return model


def put(
    model: nn.Module,
    owns: Mapping[str, nn.Module],
    made: Mapping[str, ReplacementLayer],
    places: Mapping[str, ReplacementLayer],
) -> None:
    """Put the layers ``made``, by the path of what each replaces, into their places."""
    for path, layer in made.items():
        carry(owns[path], layer)
    for path, layer in places.items():
        model.set_submodule(path, layer)
    paths = paths_of(model)
    for layer in made.values():
        layer.stand_in(model, paths)
    encoder_fast_path.switch_off(model)


@dataclass(frozen=True)
class Found:
    """A layer to be replaced, as it was found in the model, its sources modules or views of some."""

    path: str
    kind: type[ReplacementLayer]
    own: nn.Module
    sources: tuple[Any, ...]
    granularity: Granularity = "scalar"
    start: Init = None
    detach: tuple[int, ...] = ()


def _find(model: nn.Module, block: ReplacedBlock, layer: PlannedLayer, options: Options, sharing: Sharing) -> Found:
    path, *source_paths = (join(where, layer.path) for where in (block.path, *block.sources))
    own = find_layer(model, path, layer.class_name, layer.shapes)
    modules = [layer_at(model, where) for where in source_paths]
    kind = kind_named(layer.kind) if layer.kind else replacement_for(own)
    if kind is None:
        raise ValueError(f"model: got {layer.class_name} at {path}, for which there is no replacement")
    for where, module in zip((path, *source_paths), (own, *modules), strict=True):
        if reason := why_not(kind, module):
            raise ValueError(f"model: got a layer at {where} that cannot be mixed: {reason}")
    cuts = layer.cuts or [PlannedCut(j) for j in range(len(modules))]
    try:
        sources = tuple(view_of(modules[cut.neighbour], Cut(cut.out, cut.in_, cut.repeats)) for cut in cuts)
        kind.check_sources([*sources, own])
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: the layer at {path} and its neighbours do not fit: {error}") from error
    elsewhere = sharing.explain(path, own)
    if elsewhere:
        raise ValueError(f"model: got shared parameters ({elsewhere}), expected those of replaced layers used once")
    lost = what_would_be_lost(own, kind, path)
    if lost:
        raise ValueError(
            f"model: got {lost}, which would be lost; expected a layer without, or hooks that are registered afterwards"
        )
    granularity: Any = layer.granularity or options.granularity  # Plans of older formats have the latter alone.
    distances = [block.distances[cut.neighbour] for cut in cuts]
    start, detach = options.start(distances, [cut.factor for cut in cuts]), options.detached(distances)
    return Found(path, kind, own, sources, granularity, start, detach)


def find_layer(
    model: nn.Module,
    path: str,
    class_name: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    origin: str = "as in the plan",
) -> nn.Module:
    """The layer at ``path``, of that class (None for any) and with parameters of these shapes."""
    own = layer_at(model, path, origin)
    if class_name is not None and class_of(own).__name__ != class_name:
        raise ValueError(f"model: got {class_of(own).__name__} at {path}, expected {class_name} {origin}")
    found = {name: tuple(parameter.shape) for name, parameter in own.named_parameters()}
    if found != shapes:
        raise ValueError(f"model: got shapes {found} at {path}, expected {shapes} {origin}")
    return own


def layer_at(model: nn.Module, path: str, origin: str = "as in the plan") -> nn.Module:
    """The module at ``path``."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"model: got {type(model).__name__} without {path}, expected it {origin}") from None


def _check_apart(blocks: Sequence[Sequence[Found]]) -> None:
    """Raise if a layer is replaced twice, or replaced and mixed from."""
    items = [item for block in blocks for item in block]
    taken = {id(module_of(source)) for item in items for source in item.sources}
    for item in items:
        if id(item.own) in taken:
            raise ValueError(f"plan: got {item.path} replaced twice or mixed from, expected neighbours to be kept")
        taken.add(id(item.own))


def _make(items: Sequence[Found], options: Options) -> Iterator[tuple[str, ReplacementLayer]]:
    """The new layers of a block with their paths. The first holds the coefficients that the others share."""
    if options.share == "layer" or any(isinstance(source, SourceView) for item in items for source in item.sources):
        for item in items:
            yield item.path, _with_coefficients(item, item.start, options, instead_of=[item])
        return
    init = items[0].start
    if isinstance(init, str):
        pairs = [pair for item in items for pair in item.kind.fit_pairs(item.own, item.sources)]
        init = initial_coefficients(init, len(items[0].sources), None, options.constraint, pairs)
    first = _with_coefficients(items[0], init, options, instead_of=items)
    yield items[0].path, first
    for item in items[1:]:
        borrowed = first.coefficient_module
        yield item.path, item.kind(item.sources, own=item.own, detach=item.detach, coefficients=borrowed)


def _with_coefficients(item: Found, init: Init, options: Options, instead_of: Sequence[Found]) -> ReplacementLayer:
    made = item.kind(
        item.sources,
        own=item.own,
        init=init,
        constraint=options.constraint,
        granularity=item.granularity,
        detach=item.detach,
    )
    trained = any(parameter.requires_grad for item in instead_of for parameter in item.own.parameters())
    made.coefficient_module.requires_grad_(trained)
    return made
