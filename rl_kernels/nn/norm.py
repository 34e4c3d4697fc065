"""ReplacementBatchNorm1d, 2d and 3d, ReplacementLayerNorm, ReplacementRMSNorm and ReplacementGroupNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as aten
from torch import Tensor, nn

from rl_kernels.nn.layer import ReplacementLayer, Unregistered

Affine = Literal["mixed", "own"]

AFFINES = ("mixed", "own")


class _ReplacementNorm(ReplacementLayer):
    affine_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The affine parameters that a layer of this kind has, or could have."""

    def __init__(self, sources: Any, *, own: nn.Module | None = None, affine: Affine = "mixed", **options: Any):
        if affine not in AFFINES:
            raise ValueError(f"affine: got {affine!r}, expected one of {', '.join(AFFINES)}")
        super().__init__(sources, own=own, **options)
        settings: Any = sources[0] if own is None else own
        self.eps: Any = settings.eps  # A number; None in some RMSNorms.
        self.affine_from: Affine = affine
        if affine == "own":
            self._borrowed = Unregistered()
            self._modules.pop("mixing", None)
            self._own_affine(sources[0] if own is None else own, fresh=own is None)

    def _own_affine(self, like: nn.Module, fresh: bool) -> None:
        for name in self.affine_names:
            value = getattr(like, name)
            fill = torch.ones_like if name == "weight" else torch.zeros_like
            # Not by assignment: the names are properties of the class, which nn.Module refuses to shadow.
            self._parameters[name] = (
                None
                if value is None
                else nn.Parameter(
                    fill(value) if fresh else value.detach().clone(), requires_grad=fresh or value.requires_grad
                )
            )

    def reset_parameters(self) -> None:
        """Start anew: coefficients at their initial values, own weights at 1 and own biases at 0, no batch seen."""
        super().reset_parameters()
        with torch.no_grad():
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                parameter = self._parameters.get(name)
                if parameter is not None:
                    parameter.fill_(value)

    @classmethod
    def check_source(cls, source: nn.Module, name: str) -> None:
        """Raise unless ``source`` is a norm of this kind with affine parameters."""
        super().check_source(source, name)
        if source.weight is None:
            raise ValueError(
                f"{name}: got {type(source).__name__} without affine parameters, expected a weight: there is nothing "
                "to mix"
            )

    @classmethod
    def fit_pairs(cls, own: nn.Module, sources: Sequence[nn.Module]) -> list[tuple[Tensor, list[Tensor]]]:
        """The weight, and the bias where there is one: both weigh in a norm, and few elements are there to fit."""
        names = [name for name in cls.affine_names if getattr(own, name) is not None]
        return [(getattr(own, name), [getattr(source, name) for source in sources]) for name in names]

    @property
    def runs_on(self) -> tuple[nn.Module, ...]:
        """As every layer's; nothing with affine parameters of its own."""
        return self._sources.modules + self._borrowed.modules if self.affine_from == "mixed" else ()

    def _own_or_mixed(self, name: str) -> Tensor | None:
        """The weight or the bias, within a call."""
        return self._parameters[name] if self.affine_from == "own" else self._evaluated(name)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self._own_or_mixed("weight"), self._own_or_mixed("bias")

    @property
    def weight(self) -> Tensor | None:
        """The layer's own weight, or the mixed one, evaluated at each access."""
        return self._parameters["weight"] if self.affine_from == "own" else self._mixed("weight")

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, or the mixed one, evaluated at each access; None where there is none."""
        return self._parameters["bias"] if self.affine_from == "own" else self._mixed("bias")

    def _plain(self) -> nn.Module:
        """A plain layer of the same settings, on the meta device, its parameters still unset."""
        raise NotImplementedError

    def merged(self) -> nn.Module:
        """The plain norm that computes the same, with a copy of the running statistics if there are any."""
        values = {name: getattr(self, name) for name in self.affine_names}
        layer = self._plain()
        for name, value in values.items():
            if value is None:
                layer.register_parameter(name, None)
        layer = self._filled(layer, values)
        for name, buffer in self._buffers.items():
            layer.register_buffer(name, None if buffer is None else buffer.detach().clone())
        return layer

    def _settings_repr(self) -> str:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Settings, sources and options, for printing."""
        mixing = super().extra_repr() if self.affine_from == "mixed" else f"sources={len(self._sources)}"
        return f"{self._settings_repr()}, eps={self.eps}, affine={self.affine_from!r}, {mixing}"


class _ReplacementBatchNorm(_ReplacementNorm):
    _version = 2  # As the plain layer's: before 2 there was no num_batches_tracked.

    converted_type = (nn.SyncBatchNorm,)

    input_dims: ClassVar[tuple[int, ...]]
    """How many dimensions an input may have."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, sources: Any, *, own: nn.Module | None = None, affine: Affine = "mixed", **options: Any):
        super().__init__(sources, own=own, affine=affine, **options)
        settings: Any = sources[0] if own is None else own
        self.num_features: int = settings.num_features
        self.momentum: float | None = settings.momentum
        self.affine = True
        self.track_running_stats: bool = settings.track_running_stats
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(settings, name)
            self.register_buffer(name, None if buffer is None else buffer.detach().clone())
        if own is None:
            self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forget the batches seen: mean 0, variance 1, none counted."""
        for buffer, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if buffer is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """As every norm's, and the running statistics too."""
        super().reset_parameters()
        self.reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        """Batch normalization with the mixed (or own) affine parameters, and the layer's own running statistics.

        Raises:
            ValueError: an input of another number of dimensions; or, in training, one value a channel.
        """
        if self.synchronised:
            return nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type]
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        updates = self.training and self.track_running_stats
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        # Statistics of the batch are used in training, and where there are no running ones.
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        known = updates or not self.training
        mean, variance = (self.running_mean, self.running_var) if known else (None, None)
        return aten.batch_norm(x, mean, variance, *self._affine(), by_batch, momentum, self.eps)

    @property
    def synchronised(self) -> bool:
        """Whether the sources are ``nn.SyncBatchNorm`` by now; then this layer computes as one, in their group."""
        return isinstance(self._sources[0], nn.SyncBatchNorm)

    @property
    def process_group(self) -> Any:
        """That of the sources, where they are ``nn.SyncBatchNorm``."""
        return getattr(self._sources[0], "process_group", None)

    # The two checks have the names by which nn.SyncBatchNorm calls them.

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in self.input_dims:
            expected = " or ".join(map(str, self.input_dims))
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected} dimensions")

    def _check_non_zero_input_channels(self, x: Tensor) -> None:
        if x.size(1) == 0:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected channels")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        name = f"{prefix}num_batches_tracked"
        tracked = self.num_batches_tracked
        if (local_metadata.get("version") or 1) < 2 and tracked is not None and name not in state_dict:
            state_dict[name] = torch.tensor(0) if tracked.is_meta else tracked
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _plain(self) -> nn.Module:
        if self.synchronised:
            settings = (self.num_features, self.eps, self.momentum, True, self.track_running_stats)
            return nn.SyncBatchNorm(*settings, self.process_group, device="meta")
        (kind,) = self.source_type
        return kind(self.num_features, self.eps, self.momentum, True, self.track_running_stats, device="meta")

    def _settings_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, track_running_stats={self.track_running_stats}"


class ReplacementBatchNorm1d(_ReplacementBatchNorm):
    """``nn.BatchNorm1d`` on the mixed weights and biases of other ``nn.BatchNorm1d``; options of ``ReplacementLayer``.

    The running statistics are always the layer's own, under the plain layer's names (``running_mean``,
    ``running_var``, ``num_batches_tracked``): copied from ``own``, fresh without it. Settings (eps, momentum,
    track_running_stats) are ``own``'s, else the first source's. What looks for plain batch norms by their class, as
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` and ``torch.optim.swa_utils.update_bn`` do, passes this layer over.

    Shape: ``(batch, features)`` or ``(batch, features, length)``.

    Args:
        sources: as ``ReplacementLayer``'s; each with affine parameters.
        own: as ``ReplacementLayer``'s.
        affine: ``"mixed"``: weight and bias are mixed by the coefficients. ``"own"``: they are the layer's own
            parameters ``weight`` and ``bias``, copied from ``own``, fresh without it; there are no coefficients then,
            and the options for them have no effect. (The paper says nothing about norms.)
        options: as ``ReplacementLayer``'s.
    """

    source_type = (nn.BatchNorm1d,)
    input_dims = (2, 3)


class ReplacementBatchNorm2d(_ReplacementBatchNorm):
    """``nn.BatchNorm2d`` on the mixed weights and biases of other ``nn.BatchNorm2d``; as ``ReplacementBatchNorm1d``.

    Shape: ``(batch, features, height, width)``.
    """

    source_type = (nn.BatchNorm2d,)
    input_dims = (4,)


class ReplacementBatchNorm3d(_ReplacementBatchNorm):
    """``nn.BatchNorm3d`` on the mixed weights and biases of other ``nn.BatchNorm3d``; as ``ReplacementBatchNorm1d``.

    Shape: ``(batch, features, depth, height, width)``.
    """

    source_type = (nn.BatchNorm3d,)
    input_dims = (5,)


class ReplacementLayerNorm(_ReplacementNorm):
    """``nn.LayerNorm`` on the mixed weights and biases of other ``nn.LayerNorm``; options of ``ReplacementLayer``.

    ``affine="own"`` as in ``ReplacementBatchNorm1d``. The normalized shape is the sources', eps is ``own``'s, else the
    first source's. Granularity ``"channel"`` has one coefficient per source and entry of the first normalized
    dimension.

    Shape: ``(*, *normalized_shape)``.
    """

    source_type = (nn.LayerNorm,)

    def __init__(self, sources: Any, *, own: nn.Module | None = None, affine: Affine = "mixed", **options: Any):
        super().__init__(sources, own=own, affine=affine, **options)
        self.normalized_shape: tuple[int, ...] = tuple(sources[0].normalized_shape)
        self.elementwise_affine = True

    def forward(self, x: Tensor) -> Tensor:
        """Layer normalization with the mixed (or own) affine parameters."""
        return aten.layer_norm(x, self.normalized_shape, *self._affine(), self.eps)

    def _plain(self) -> nn.Module:
        return nn.LayerNorm(self.normalized_shape, self.eps, device="meta")

    def _settings_repr(self) -> str:
        return f"{self.normalized_shape}"


class ReplacementRMSNorm(_ReplacementNorm):
    """``nn.RMSNorm`` on the mixed weights of other ``nn.RMSNorm``; as ``ReplacementLayerNorm``, without a bias.

    Where eps is None, it is the smallest step of the input's dtype, as in the plain layer. The norms of other libraries
    are other classes, whatever they compute: see ``ReplacementByForward``.

    Shape: ``(*, *normalized_shape)``.
    """

    source_type = (nn.RMSNorm,)
    affine_names = ("weight",)

    def __init__(self, sources: Any, *, own: nn.Module | None = None, affine: Affine = "mixed", **options: Any):
        super().__init__(sources, own=own, affine=affine, **options)
        self.normalized_shape: tuple[int, ...] = tuple(sources[0].normalized_shape)
        self.elementwise_affine = True

    @property
    def bias(self) -> None:
        """None: this norm has none."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Division by the root mean square, with the mixed (or own) weight."""
        return aten.rms_norm(x, self.normalized_shape, self._own_or_mixed("weight"), self.eps)

    def _plain(self) -> nn.Module:
        return nn.RMSNorm(self.normalized_shape, self.eps, device="meta")

    def _settings_repr(self) -> str:
        return f"{self.normalized_shape}"


class ReplacementGroupNorm(_ReplacementNorm):
    """``nn.GroupNorm`` on the mixed weights and biases of other ``nn.GroupNorm``; options of ``ReplacementLayer``.

    ``affine="own"`` as in ``ReplacementBatchNorm1d``. The number of groups and eps are ``own``'s, else the first
    source's.

    Shape: ``(batch, channels, *)``.
    """

    source_type = (nn.GroupNorm,)

    def __init__(self, sources: Any, *, own: nn.Module | None = None, affine: Affine = "mixed", **options: Any):
        super().__init__(sources, own=own, affine=affine, **options)
        settings: Any = sources[0] if own is None else own
        self.num_groups: int = settings.num_groups
        self.num_channels: int = settings.num_channels
        self.affine = True

    def forward(self, x: Tensor) -> Tensor:
        """Group normalization with the mixed (or own) affine parameters."""
        return aten.group_norm(x, self.num_groups, *self._affine(), self.eps)

    def _plain(self) -> nn.Module:
        return nn.GroupNorm(self.num_groups, self.num_channels, self.eps, device="meta")

    def _settings_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}"
