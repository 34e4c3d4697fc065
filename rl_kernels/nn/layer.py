"""The base of all replaced layers: how it refers to its neighbours, and what a kind of layer defines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rl_kernels import functional as F
from rl_kernels.nn import recorded
from rl_kernels.nn.adapters import check_adapters, full_name, parameter_of
from rl_kernels.nn.belongings import Belongings, Unregistered
from rl_kernels.nn.coefficients import (
    Coefficients,
    Constraint,
    Granularity,
    GroupedCoefficients,
    Init,
    check_granularity,
    initial_coefficients,
)
from rl_kernels.nn.entered import entered
from rl_kernels.nn.standing import Standing, found_again, paths_of
from rl_kernels.nn.views import Cut, Cuts, Source, SourceView, Tiles, both_as_seen, module_of, shapes_of, view_of

Layer = TypeVar("Layer", bound="ReplacementLayer")
Plain = TypeVar("Plain", bound=nn.Module)


class ReplacementLayer(nn.Module):
    """A layer without weights of its own: it runs on ``sum_j c_j * W_j`` over its sources (arXiv 2410.01239).

    Its parameters are its coefficients and nothing else, or none where it borrows a block's. It refers to its sources
    without registering them. After ``rl_kernels.replace``, or ``rl_kernels.check``, it knows where they stand in the
    model, and a call raises when one has left (``model.fc3 = ...``): call ``rebind`` then.

    Args:
        sources: N >= 1 plain layers of one shape: for Replacement Learning the two neighbours, the previous first.
            Linear layers and convolutions take a ``SourceView`` too, a layer of another size cut or repeated to this
            one's.
        own: the plain layer that this one replaces. Its settings (stride, eps, ...) are taken over, those of the
            first source otherwise; its weight is what ``init="fit"`` fits; its running statistics are kept.
        init: initial coefficients: None for 1/N each (0.5 for two; the paper does not say); N numbers, or a tensor
            shaped as the coefficients; or ``"fit"``, the least-squares coefficients for ``own``'s weight, for
            pretrained models (beyond the paper).
        constraint: ``"free"``, as in the paper, or ``"convex"``: positive with sum 1 (beyond the paper).
        granularity: ``"scalar"``, as in the paper; ``"channel"``: one coefficient per source and output channel; or
            an integer G, which divides the output channels: one per source and group of consecutive output channels, a
            parameter ``(N, G)`` (both beyond the paper).
        detach: indices of sources that get no gradient from this layer (for two neighbours 0 is the previous, 1 the
            next). None by default: the paper lets gradients reach both.
        coefficients: another layer's or block's ``Coefficients`` to share, instead of own ones (the paper's case of
            one pair a block). The module that registers them is another's; this layer only refers to them.

    Raises:
        TypeError: a source of another kind.
        ValueError: sources that do not fit together, or an unknown option; the message names it.
    """

    source_type: ClassVar[tuple[type[nn.Module], ...]]
    """What a source may be."""

    converted_type: ClassVar[tuple[type[nn.Module], ...]] = ()
    """What torch may have made of a source since."""

    _holders: tuple[tuple[nn.Module, str], ...] = ()
    """The module that holds each source, and under which name; empty where nobody said so."""

    _standing: Standing | None = None
    """Where the layer and what it runs on stand in a model, once that is known."""

    takes_views: ClassVar[bool] = False
    """Whether a source may be a ``SourceView``."""

    _cuts: Cuts | None = None
    """What of each source is mixed; None where all of all."""

    _as_held: bool = False
    """Whether sources are mixed as they hold their parameters: neither cut, nor repeated, nor detached."""

    keeps_belongings: ClassVar[bool] = False
    """Whether a layer of this kind has a place for further parameters, buffers and submodules of ``own``."""

    belongings: Belongings | None = None
    """What hung on the layer that ``rl_kernels.replace`` replaced."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = entered(cls.forward)

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        own: nn.Module | None = None,
        init: Init = None,
        constraint: Constraint = "free",
        granularity: Granularity = "scalar",
        detach: Collection[int] = (),
        coefficients: Coefficients | None = None,
    ):
        super().__init__()
        check_granularity(granularity)
        self.check_sources(sources)
        if own is not None:
            self.check_source(own, "own")
            self._check_alike("own", own, "sources[0]", sources[0])
        self.granularity: Granularity = granularity
        self._sources = Unregistered(*(module_of(source) for source in sources))
        self._borrowed = Unregistered()
        self._detach_and_cut(detach, sources)
        if coefficients is not None:
            if granularity != "scalar":
                raise ValueError(f"granularity: got {granularity!r} with shared coefficients, expected 'scalar'")
            if not isinstance(coefficients, Coefficients):
                raise TypeError(f"coefficients: got {type(coefficients).__name__}, expected a Coefficients module")
            if coefficients.shape != (len(sources),):
                raise ValueError(f"coefficients: got shape {coefficients.shape}, expected ({len(sources)},) as sources")
            self._borrowed = Unregistered(coefficients)
        else:
            self.mixing = self._make_coefficients(own, init, constraint)
        self.training = sources[0].training if own is None else own.training

    def _make_coefficients(self, own: nn.Module | None, init: Init, constraint: Constraint) -> Coefficients:
        groups, channels = self._groups()
        pairs = self._pairs_to_fit(own) if own is not None and isinstance(init, str) else []
        values = initial_coefficients(init, len(self._sources), groups, constraint, pairs)
        weight = self.main_weight(self._sources[0])
        values = values.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        made = Coefficients(values, constraint) if isinstance(self.granularity, str) else None
        # Their start is known on the CPU.
        return (made or GroupedCoefficients(values, constraint, channels=channels)).to(weight.device)

    def _detach_and_cut(self, detach: Collection[int], sources: Sequence[Source]) -> None:
        if not set(detach) <= set(range(len(sources))):
            raise ValueError(f"detach: got {sorted(detach)}, expected indices of the {len(sources)} sources")
        self.detach: tuple[int, ...] = tuple(sorted(set(detach)))
        self._cut(sources)

    def _cut(self, sources: Sequence[Source]) -> None:
        """Mix of the sources what these views of them say."""
        self._cuts = Cuts.of(sources, self.detach)
        self._as_held = not self.detach and self._cuts is None

    def _groups(self) -> tuple[int | None, int]:
        """How many coefficients a source has, None for a scalar, and how many output channels one serves."""
        if self.granularity == "scalar":
            return None, 1
        source, got = self.views[0], f"granularity: got {self.granularity!r}, expected"
        if why := self.why_not_by_channel(source):
            raise ValueError(f"{got} 'scalar' for {full_name(self._sources[0])}: {why}")
        out = self.out_channels_of(source)
        if self.granularity == "channel":
            return out, 1
        if out % self.granularity:
            raise ValueError(f"{got} a divisor of {out}, the output channels of {full_name(self._sources[0])}")
        return self.granularity, out // self.granularity

    def _pairs_to_fit(self, own: nn.Module) -> list[tuple[Tensor, list[Tensor]]]:
        """``fit_pairs`` for this layer's granularity: all but ``"scalar"`` need channels as the first dimension."""
        return self.fit_pairs(own, self.views)

    @classmethod
    def from_neighbours(cls: type[Layer], prev: Source, next: Source, **options: Any) -> Layer:
        """The paper's layer, ``a * W[prev] + b * W[next]``; options as the constructor's."""
        return cls((prev, next), **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, also of version 0.1.0, which called what holds the sources ``_places``."""
        if "_places" in state:
            state["_holders"] = state.pop("_places")
        super().__setstate__(state)

    def __getattr__(self, name: str) -> Any:
        """Also the methods of the class that was replaced, where torch's own class does not have them."""
        had = self.__dict__.get("belongings")
        method = None if had is None else getattr(had.class_before, name, None)
        if isinstance(method, FunctionType) and not any(hasattr(kind, name) for kind in self.source_type):
            return method.__get__(self)
        return super().__getattr__(name)

    # What a kind of layer defines. A source is a ``SourceView`` in places, which has a layer's parameters and sizes.

    @staticmethod
    def main_weight(source: nn.Module) -> Tensor:
        """The source's weight: its shape, dtype and device stand for the source's."""
        weight = source.weight
        assert isinstance(weight, Tensor)
        return weight

    @classmethod
    def why_not_by_channel(cls, source: nn.Module) -> str:  # noqa: ARG003
        """Why granularity ``"channel"`` is refused for layers like ``source``; empty where it is served."""
        return ""

    @classmethod
    def out_channels_of(cls, source: nn.Module) -> int:
        """How many coefficients a source has at granularity ``"channel"``."""
        return cls.main_weight(source).shape[0]

    @classmethod
    def fit_pairs(cls, own: nn.Module, sources: Sequence[nn.Module]) -> list[tuple[Tensor, list[Tensor]]]:
        """What ``init="fit"`` fits: own weights, each with those of the sources."""
        return [(cls.main_weight(own), [cls.main_weight(source) for source in sources])]

    @classmethod
    def signature(cls, layer: nn.Module) -> dict[str, Any]:
        """What must agree between sources: the shapes of their parameters (None for an absent one), dtype, device."""
        weight = cls.main_weight(layer)
        return {**shapes_of(layer), "dtype": weight.dtype, "device": weight.device}

    @classmethod
    def check_source(cls, source: nn.Module, name: str) -> None:
        """Raise unless ``source`` is a layer of this kind; ``name`` is for the message."""
        expected = " or ".join(kind.__name__ for kind in cls.source_type)
        if isinstance(source, ReplacementLayer):
            raise TypeError(f"{name}: got {type(source).__name__}, which is itself replaced; expected {expected}")
        if not isinstance(source, (*cls.source_type, *cls.converted_type)):
            found = type(source).__name__
            found = full_name(source) if found in expected else found  # peft's wrapper of a Linear is called Linear.
            raise TypeError(f"{name}: got {found}, expected {expected}")

    @classmethod
    def check_sources(cls, sources: Sequence[Source]) -> None:
        """Raise unless ``sources`` are layers of this kind that can be mixed."""
        if len(sources) == 0:
            raise ValueError("sources: got none, expected one or more layers")
        for j, source in enumerate(sources):
            if isinstance(source, SourceView) and not cls.takes_views:
                raise TypeError(f"sources[{j}]: got a SourceView, expected a whole layer: {cls.__name__} cuts none")
            cls.check_source(module_of(source), f"sources[{j}]")
            cls._check_alike(f"sources[{j}]", source, "sources[0]", sources[0])

    @classmethod
    def _check_alike(cls, name: str, layer: Any, other_name: str, other: Any, ignored: Collection[str] = ()) -> None:
        found, expected = map(cls.signature, both_as_seen(layer, other))
        for key in sorted((found.keys() | expected.keys()) - set(ignored)):
            if found.get(key) != expected.get(key):
                raise ValueError(f"{name}: got {key} {found.get(key)}, expected {expected.get(key)} as {other_name}")

    # What every replaced layer offers.

    @property
    def sources(self) -> tuple[nn.Module, ...]:
        """The layers whose weights are mixed; one of which several parts are, several times."""
        return tuple(self._sources)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What of each source is mixed; empty where all of all."""
        return () if self._cuts is None else self._cuts.each

    @property
    def views(self) -> tuple[Any, ...]:
        """The sources as they were given: a ``SourceView`` where a source is cut or repeated, else the layer."""
        if self._cuts is None:
            return tuple(self._sources)
        return tuple(map(view_of, self._sources, self._cuts.each))

    def rebind(self, *sources: Source) -> None:
        """Refer to other sources, as many as before and of the same shape: after a neighbour was replaced.

        Where a source is cut or repeated, that is a ``SourceView`` again, as in the constructor.

        Raises:
            TypeError: a source of another kind.
            ValueError: another number or shape of sources.
        """
        if len(sources) != len(self._sources):
            raise ValueError(f"sources: got {len(sources)} layers, expected {len(self._sources)}")
        self.check_sources(sources)
        moved = ("dtype", "device")  # The layer bound before may be out of the model, and left behind where that moved.
        self._check_alike("sources[0]", sources[0], "the one bound before", self.views[0], ignored=moved)
        modules = [module_of(source) for source in sources]
        self.run_on([*modules, *self._borrowed])
        self._cut(sources)
        held = zip(modules, self._holders, strict=False)
        still = [parent._modules.get(name) is source for source, (parent, name) in held]
        self._holders = self._holders if all(still) else ()
        known = None if self._standing is None else self._standing.root(self)
        self._standing = None
        if known is not None:
            self.stand_in(known[0])

    def detach_sources(self, detach: Collection[int]) -> None:
        """Give these sources, and no others, no gradient from now on: as the constructor's ``detach``.

        Raises:
            ValueError: an index of no source.
        """
        self._detach_and_cut(detach, self.views)

    @property
    def runs_on(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters a call reads and which others own: the sources, and borrowed coefficients."""
        # Not (*self._sources, ...): before torch 2.13 Dynamo unpacks no iterable of ours.
        return self._sources.modules + self._borrowed.modules

    @property
    def _trained(self) -> bool:
        """Whether a parameter that a call reads requires a gradient."""
        return any(p.requires_grad for module in (self, *self.runs_on) for p in module.parameters())

    def role(self, j: int) -> str:
        """What ``runs_on[j]`` is, for messages."""
        return f"sources[{j}]" if j < len(self._sources) else "coefficients"

    def run_on(self, modules: Sequence[nn.Module]) -> None:
        """Exchange ``runs_on``, of which nothing is checked: see ``rebind``."""
        count = len(self._sources)
        self._sources, self._borrowed = Unregistered(*modules[:count]), Unregistered(*modules[count:])

    def stand_in(self, model: nn.Module, paths: Mapping[int, str] | None = None) -> bool:
        """Take ``model`` for the one that holds this layer and what it runs on; from then on calls look for it there.

        Args:
            model: the one.
            paths: its ``paths_of``, where many layers are asked.

        Returns:
            Whether ``model`` holds all of them. Where it does not, nothing is changed.
        """
        paths = paths_of(model) if paths is None else paths
        wanted = (self, *self.runs_on)
        if not self.runs_on or self is model or any(id(module) not in paths for module in wanted):
            return False
        path, *others = (paths[id(module)] for module in wanted)
        self._standing = Standing.within(model, path, others, self.runs_on)
        return True

    def place_sources(self, *holders: tuple[nn.Module, str]) -> None:
        """Say which module holds each source, and under which name: adapters that are put around one are noticed then.

        ``rl_kernels.check(model)`` finds out the same and more by itself.
        """
        self._holders = holders

    @property
    def coefficient_module(self) -> Coefficients:
        """The module that holds the coefficients: the layer's own, or the one it borrows."""
        borrowed = self._borrowed.modules
        module = borrowed[0] if borrowed else self._modules.get("mixing") or self.mixing
        if not isinstance(module, Coefficients):
            raise TypeError(f"mixing: got {full_name(module)}, expected Coefficients")
        return module

    @property
    def coefficients(self) -> Tensor:
        """The coefficients that mix the sources: ``(N,)`` or ``(N, out)``."""
        return self.coefficient_module()

    def reset_parameters(self) -> None:
        """Start anew: the layer's own coefficients, where it has some, at their initial values."""
        if isinstance(own := self._modules.get("mixing"), Coefficients):
            own.reset_parameters()

    @property
    def a(self) -> Tensor:
        """The coefficient of the previous neighbour: a view of ``coefficients``."""
        return self.coefficients[0]

    @property
    def b(self) -> Tensor:
        """The coefficient of the next neighbour: a view of ``coefficients``."""
        return self.coefficients[1]

    def _look_around(self) -> None:
        """Raise if what the layer runs on has left its model, or has adapters that the mix would leave out."""
        standing = self._standing
        if standing is None:
            for source, (parent, name) in zip(self._sources, self._holders, strict=False):
                if parent._modules.get(name) is not source:
                    check_adapters(source, parent, name)
        elif torch.compiler.is_compiling():
            standing.ends_hold(self.runs_on)
        elif not standing.holds():
            self._standing = found_again(standing, self)
            self._look_around()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        with suppress(RuntimeError):  # What has left is warned of below: saving does not fail.
            self._look_around()
        recorded.record(self, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = recorded.compare(self, prefix, local_metadata.get(recorded.KEY))
        if problem:
            error_msgs.append(problem)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            f"nn.DataParallel: got a model with a {type(self).__name__}, whose replicas would all read the first "
            "device's sources; expected torch.nn.parallel.DistributedDataParallel, or one visible device"
        )

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script: got a {type(self).__name__}, whose sources are other modules' parameters; expected a "
            "model of plain layers: call rl_kernels.merge first, or torch.jit.trace"
        )

    def _tensors(self, name: str) -> list[Tensor] | None:
        """The parameter ``name`` of every source, cut and detached where asked.

        None where the sources have none, and where some are repeated: those are ``_tiles``.
        """
        tensors = [parameter_of(source, name) for source in self._sources]
        if tensors[0] is None:
            return None
        if self._as_held:
            return tensors
        return None if self._cuts is not None and self._cuts.repeat else self._tiles_of(tensors)

    def _tiles_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found = [tensor.detach() if j in self.detach else tensor for j, tensor in enumerate(tensors)]
        return found if self._cuts is None else self._cuts.cut(found)

    def _tiles(self, name: str) -> list[Tensor] | None:
        """As ``_tensors``; of sources that are repeated each once."""
        tensors = [parameter_of(source, name) for source in self._sources]
        return None if tensors[0] is None else self._tiles_of(tensors)

    def _in_tiles(self) -> Tiles:
        """The recipe where some sources are repeated."""
        weights = self._tiles("weight")
        assert weights is not None and self._cuts is not None
        return Tiles(weights, self.coefficients, self._tiles("bias"), [cut.repeats for cut in self._cuts.each])

    def _evaluated(self, name: str) -> Tensor | None:
        """The mixed parameter ``name``, within a call."""
        tensors = self._tensors(name)
        if tensors is None and self._cuts is not None and (tiles := self._tiles(name)) is not None:
            tensors = self._cuts.repeated(tiles)
        return None if tensors is None else F.mix(tensors, self.coefficients)

    def _mixed(self, name: str) -> Tensor | None:
        """The mixed parameter ``name``, for whoever reads it from outside."""
        self._look_around()
        return self._evaluated(name)

    @property
    def weight(self) -> Tensor | None:
        """The mixed weight, evaluated at each access: for export, and for code that reads a layer's ``weight``."""
        return self._mixed("weight")

    @property
    def bias(self) -> Tensor | None:
        """The mixed bias, evaluated at each access; None where the sources have none."""
        return self._mixed("bias")

    def merged(self) -> nn.Module:
        """The plain torch layer that computes the same, with parameters of its own."""
        raise NotImplementedError

    def _filled(self, layer: Plain, values: dict[str, Tensor | None]) -> Plain:
        """A plain ``layer`` off the meta device, with copies of ``values``, like the sources, in this layer's mode.

        Its parameters require gradients where one that it is made from does.
        """
        like = next(value for value in values.values() if value is not None)
        layer.to_empty(device=like.device).to(dtype=like.dtype)
        with torch.no_grad():
            for name, value in values.items():
                if value is not None:
                    layer.get_parameter(name).copy_(value)
        return layer.requires_grad_(self._trained).train(self.training)

    def extra_repr(self) -> str:
        """Sources and options, for printing."""
        borrowed = ", coefficients shared" if len(self._borrowed) else ""
        detached = f", detach={self.detach}" if self.detach else ""
        cut = "" if self._cuts is None else ", cut"
        return f"sources={len(self._sources)}{cut}, granularity={self.granularity!r}{detached}{borrowed}"
