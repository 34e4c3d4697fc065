"""What is replaced in a model, as data: taken down from one model, and made anew in another.

A plan says what was to be done, with one set of options for all. This says what is there: whatever was merged, bound to
other sources or wired by hand since.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_kernels.conversion.blocks import check_plain, kind_named, why_not
from rl_kernels.conversion.carrying import what_would_be_lost
from rl_kernels.conversion.replacing import Found, find_layer, layer_at, put
from rl_kernels.nn import Coefficients, ReplacementLayer
from rl_kernels.nn.adapters import full_name
from rl_kernels.nn.coefficients import Constraint, Granularity
from rl_kernels.nn.standing import TRANSPARENT
from rl_kernels.nn.views import Cut, shapes_of, view_of

_ORIGIN = "as it was saved"


def bare(path: str) -> str:
    """``path`` without the steps of wrappers that compute nothing, such as ``torch.compile``'s."""
    return ".".join(step for step in path.split(".") if step not in TRANSPARENT)


@dataclass(frozen=True)
class CoefficientsEntry:
    """A module of coefficients.

    Attributes:
        shape: of its parameter.
        constraint: ``"free"`` or ``"convex"``.
        start: what ``reset_parameters`` sets, by source; or by source and channel where the channels differ. None for
            the default.
    """

    shape: tuple[int, ...]
    constraint: Constraint
    start: list[Any] | None

    @classmethod
    def of(cls, module: Coefficients) -> CoefficientsEntry:
        """Take down ``module``."""
        start = module._start
        if start is not None and start.dim() == 2 and bool((start == start[:, :1]).all()):
            start = start[:, 0]
        return cls(tuple(module.shape), module.constraint, None if start is None else start.tolist())

    def values(self) -> Tensor:
        """The start, in full."""
        count, *channels = self.shape
        start = torch.tensor([1 / count] * count if self.start is None else self.start, dtype=torch.float64)
        return start if start.dim() == len(self.shape) else start[:, None].expand(count, *channels)


@dataclass(frozen=True)
class LayerEntry:
    """A replaced layer.

    Attributes:
        paths: where it stands; more than one where the model holds it more than once.
        kind: its class, of ``rl_kernels.nn``.
        instead_of: the class of the layer that was replaced; None where that is not known.
        shapes: that layer's parameters.
        sources: the paths of what it is mixed from.
        coefficients: the path of its coefficients, its own or others'; None where it has none.
        granularity, detach: its options.
        affine: ``"own"`` for a norm with affine parameters of its own.
        cuts: what of each source is mixed, as ``rl_kernels.nn.views.Cut``; empty where all of all.
    """

    paths: tuple[str, ...]
    kind: str
    instead_of: str | None
    shapes: dict[str, tuple[int, ...]]
    sources: tuple[str, ...]
    coefficients: str | None
    granularity: Granularity
    detach: tuple[int, ...]
    affine: str = "mixed"
    cuts: tuple[Cut, ...] = ()

    @property
    def path(self) -> str:
        """The first of its places."""
        return self.paths[0]

    @property
    def owns_coefficients(self) -> bool:
        """Whether its coefficients are its own."""
        return self.coefficients == f"{self.path}.mixing"


@dataclass(frozen=True)
class Inventory:
    """All replaced layers of a model, and the coefficients that they run on, by path."""

    layers: tuple[LayerEntry, ...]
    coefficients: dict[str, CoefficientsEntry]

    def as_dict(self) -> dict[str, Any]:
        """The inventory as JSON has it; ``from_dict`` reads it."""
        fields = dataclasses.asdict(self)
        for entry in fields["layers"]:
            if not entry["cuts"]:
                del entry["cuts"]  # What versions without them read.
        return fields

    @property
    def is_newer(self) -> bool:
        """Whether it has what versions that know whole sources, and "scalar" and "channel" alone, do not read."""
        return any(entry.cuts or isinstance(entry.granularity, int) for entry in self.layers)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Inventory:
        """Read ``as_dict``; what does not fit raises ``KeyError``, ``TypeError`` or ``AttributeError``."""

        def layer(**entry: Any) -> LayerEntry:
            for name in ("paths", "sources", "detach"):
                entry[name] = tuple(entry[name])
            entry["cuts"] = tuple(Cut(*map(tuple, cut)) for cut in entry.get("cuts", ()))
            entry["shapes"] = {name: tuple(shape) for name, shape in entry["shapes"].items()}
            return LayerEntry(**entry)

        def coefficients(**entry: Any) -> CoefficientsEntry:
            return CoefficientsEntry(**{**entry, "shape": tuple(entry["shape"])})

        layers = tuple(layer(**entry) for entry in fields["layers"])
        found = {path: coefficients(**entry) for path, entry in fields["coefficients"].items()}
        for entry in layers:
            if entry.coefficients is not None and entry.coefficients not in found:
                raise KeyError(entry.coefficients)
        return cls(layers, found)


def take(model: nn.Module) -> Inventory:
    """Take down what is replaced in ``model``, which holds all that its layers run on.

    Raises:
        ValueError: a class of replaced layers that is not this package's.
    """
    places: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        places[id(module)].append(bare(path))
    layers, coefficients = [], {}
    for module in model.modules():
        if not isinstance(module, ReplacementLayer):
            continue
        entry = _entry(module, places)
        layers.append(entry)
        if entry.coefficients is not None:
            coefficients[entry.coefficients] = CoefficientsEntry.of(module.coefficient_module)
    return Inventory(tuple(layers), coefficients)


def _entry(layer: ReplacementLayer, places: Mapping[int, list[str]]) -> LayerEntry:
    paths = tuple(dict.fromkeys(places[id(layer)]))
    kind = kind_named(type(layer).__name__.removeprefix("FSDP"))  # FSDP2 derives a class from each.
    if kind is None or not isinstance(layer, kind):
        raise ValueError(
            f"model: got {full_name(layer)} at {paths[0]}, expected replaced layers of rl_kernels.nn: save the "
            "state_dict of a model with others"
        )
    mixes = getattr(layer, "affine_from", "mixed") == "mixed"
    had = layer.belongings
    return LayerEntry(
        paths=paths,
        kind=kind.__name__,
        instead_of=None if had is None else had.class_before.__name__,
        shapes=shapes_of(layer.views[0]),
        sources=tuple(_place(source, places) for source in layer.sources),
        coefficients=places[id(layer.coefficient_module)][0] if mixes else None,
        granularity=layer.granularity,
        detach=layer.detach,
        affine="mixed" if mixes else "own",
        cuts=layer.cuts,
    )


def _place(source: nn.Module, places: Mapping[int, list[str]]) -> str:
    # A norm that keeps its affine parameters mixes nothing, and its sources may have left.
    return places[id(source)][0] if id(source) in places else ""


def make_anew(model: nn.Module, inventory: Inventory) -> None:
    """Replace in a plain ``model`` what the inventory names. Everything is checked before anything is changed.

    Coefficients start as they did, and are trainable where a parameter of the layers that they mix was.

    Raises:
        ValueError: a model that the inventory does not fit, or one with replaced layers; the message names the layer.
    """
    check_plain(model)
    found = [_find(model, entry) for entry in inventory.layers]
    _check_kept(inventory)
    made = dict(_make(model, found, inventory))
    places = {path: made[entry.path] for entry in inventory.layers for path in entry.paths}
    put(model, {item.path: item.own for item in found}, made, places)


def _find(model: nn.Module, entry: LayerEntry) -> Found:
    kind = kind_named(entry.kind)
    if kind is None:
        raise ValueError(f"model: got a {entry.kind} at {entry.path}, expected a replaced layer of rl_kernels.nn")
    own = find_layer(model, entry.path, entry.instead_of, entry.shapes, _ORIGIN)
    modules = [layer_at(model, path, _ORIGIN) if path else own for path in entry.sources]
    try:
        sources = tuple(map(view_of, modules, entry.cuts or [Cut()] * len(modules)))
        kind.check_sources([*sources, own])
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: the layer at {entry.path} and its neighbours do not fit: {error}") from error
    for path, module in zip((entry.path, *entry.sources), (own, *modules), strict=True):
        if reason := why_not(kind, module):
            raise ValueError(f"model: got a layer at {path} that cannot be mixed: {reason}")
    if lost := what_would_be_lost(own, kind, entry.path):
        raise ValueError(f"model: got {lost}, which would be lost; expected hooks that are registered after loading")
    return Found(entry.path, kind, own, sources)


def _check_kept(inventory: Inventory) -> None:
    replaced = {path for entry in inventory.layers for path in entry.paths}
    for entry in inventory.layers:
        if replaced & set(entry.sources):
            raise ValueError(f"model: got {entry.path} mixed from a replaced layer, expected neighbours to be kept")


def _make(model: nn.Module, found: Sequence[Found], inventory: Inventory) -> Iterator[tuple[str, ReplacementLayer]]:
    """The new layers with their paths. Those that own coefficients come first: others refer to these."""
    owned: dict[str, Coefficients] = {}
    trained: dict[str | None, bool] = defaultdict(bool)
    items = list(zip(inventory.layers, found, strict=True))
    for entry, item in items:
        trained[entry.coefficients] |= any(parameter.requires_grad for parameter in item.own.parameters())
    for entry, item in items:
        if entry.owns_coefficients or entry.coefficients is None:
            yield entry.path, (layer := _layer(entry, item, inventory))
            if entry.coefficients is not None:
                owned[entry.coefficients] = layer.coefficient_module.requires_grad_(trained[entry.coefficients])
    for entry, item in items:
        path = entry.coefficients
        if path is None or entry.owns_coefficients:
            continue
        if path not in owned:  # Wired by hand: a block holds them.
            owned[path] = _registered(model, path, inventory.coefficients[path], item).requires_grad_(trained[path])
        yield entry.path, item.kind(item.sources, own=item.own, detach=entry.detach, coefficients=owned[path])


def _layer(entry: LayerEntry, item: Found, inventory: Inventory) -> ReplacementLayer:
    options: dict[str, Any] = {"detach": entry.detach, "granularity": entry.granularity}
    if entry.coefficients is None:
        return item.kind(item.sources, own=item.own, affine=entry.affine, **options)  # type: ignore[call-arg]
    mixing = inventory.coefficients[entry.coefficients]
    made = item.kind(item.sources, own=item.own, init=mixing.values(), constraint=mixing.constraint, **options)
    if made.coefficient_module.shape != mixing.shape:
        shape = made.coefficient_module.shape
        raise ValueError(f"model: got coefficients of shape {mixing.shape} for {entry.path}, expected {shape}")
    return made


def _registered(model: nn.Module, path: str, entry: CoefficientsEntry, item: Found) -> Coefficients:
    holder, _, name = path.rpartition(".")
    weight = item.kind.main_weight(item.sources[0])
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    made = Coefficients(entry.values().to(dtype), entry.constraint).to(weight.device)
    layer_at(model, holder, _ORIGIN).add_module(name, made)
    return made
