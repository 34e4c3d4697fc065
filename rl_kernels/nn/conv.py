"""ReplacementConv1d, 2d and 3d, and ReplacementConvTranspose1d, 2d and 3d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as aten
from torch import Tensor, nn

from rl_kernels import functional as F
from rl_kernels.nn.layer import ReplacementLayer
from rl_kernels.nn.views import forward_in_parts


def padded(x: Tensor, layer: Any) -> tuple[Tensor, str | tuple[int, ...]]:
    """``x`` as a convolution takes it, and the padding that is left to that; ``layer`` has torch's attributes.

    Padding by zeros is left to it, any other is done here.
    """
    if layer.padding_mode == "zeros":
        return x, layer.padding
    sides: list[int] = []  # As torch.nn.functional.pad takes them: the last dimension first, before and after.
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0 if layer.padding == "valid" else int(layer.padding[dim])] * 2
    return aten.pad(x, sides, mode=layer.padding_mode), (0,) * len(layer.kernel_size)


class _ReplacementConv(ReplacementLayer):
    _settings: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    """What the plain layer is made of, by the names that it has too."""

    def __init__(self, sources: Any, *, own: nn.Module | None = None, **options: Any):
        super().__init__(sources, own=own, **options)
        settings: Any = sources[0] if own is None else own
        self.in_channels: int = settings.in_channels
        self.out_channels: int = settings.out_channels
        self.kernel_size: tuple[int, ...] = settings.kernel_size
        self.stride: tuple[int, ...] = settings.stride
        self.padding: str | tuple[int, ...] = settings.padding
        self.dilation: tuple[int, ...] = settings.dilation
        self.groups: int = settings.groups
        self.padding_mode: str = settings.padding_mode

    @classmethod
    def signature(cls, layer: nn.Module) -> dict[str, Any]:
        """Parameter shapes, dtype, device, and the groups, by which filters read their channels."""
        return {**super().signature(layer), "groups": layer.groups}

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the mixed weight and bias."""
        weights = self._tensors("weight")
        if weights is None:
            return self._forward_in_parts(x)
        x, padding = padded(x, self)
        convolution = (F.mixed_conv1d, F.mixed_conv2d, F.mixed_conv3d)[len(self.kernel_size) - 1]
        biases = self._tensors("bias")
        return convolution(x, weights, self.coefficients, biases, self.stride, padding, self.dilation, self.groups)

    def _forward_in_parts(self, x: Tensor) -> Tensor:
        """``forward`` where some sources are repeated."""
        x, padding = padded(x, self)
        convolution: Any = (F.mixed_conv1d, F.mixed_conv2d, F.mixed_conv3d)[len(self.kernel_size) - 1]

        def call(x: Tensor, weights: Any, coefficients: Tensor, biases: Any, groups: int) -> Tensor:
            return convolution(x, weights, coefficients, biases, self.stride, padding, self.dilation, groups)

        dim = x.dim() - len(self.kernel_size) - 1
        return forward_in_parts(call, x, dim, self._in_tiles(), self.groups)

    def merged(self) -> nn.Module:
        """The plain layer that computes the same."""
        (kind,) = self.source_type
        bias = self.bias
        settings = {name: getattr(self, name) for name in self._settings}
        return self._filled(
            kind(**settings, bias=bias is not None, device="meta"), {"weight": self.weight, "bias": bias}
        )

    def extra_repr(self) -> str:
        """Sizes, sources and options, for printing."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"padding_mode={self.padding_mode!r}, {super().extra_repr()}"
        )


class ReplacementConv1d(_ReplacementConv):
    """``nn.Conv1d`` on the mixed weights and biases of other ``nn.Conv1d``; options of ``ReplacementLayer``.

    Stride, padding (all of torch's padding modes), dilation and groups are ``own``'s, else the first source's.
    """

    source_type = (nn.Conv1d,)
    takes_views = True


class ReplacementConv2d(_ReplacementConv):
    """``nn.Conv2d`` on the mixed weights and biases of other ``nn.Conv2d``; as ``ReplacementConv1d``."""

    source_type = (nn.Conv2d,)
    takes_views = True


class ReplacementConv3d(_ReplacementConv):
    """``nn.Conv3d`` on the mixed weights and biases of other ``nn.Conv3d``; as ``ReplacementConv1d``."""

    source_type = (nn.Conv3d,)
    takes_views = True


class _ReplacementConvTranspose(_ReplacementConv):
    _settings = (*_ReplacementConv._settings, "output_padding")

    def __init__(self, sources: Any, *, own: nn.Module | None = None, **options: Any):
        super().__init__(sources, own=own, **options)
        settings: Any = sources[0] if own is None else own
        self.output_padding: tuple[int, ...] = settings.output_padding

    @classmethod
    def why_not_by_channel(cls, source: nn.Module) -> str:  # noqa: ARG003
        """The kernels mix by the first dimension of a weight, here the input channels."""
        return "its output channels are not the first dimension of its weight, by which the kernels mix"

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution with the mixed weight and bias.

        Args:
            x: ``(batch, in_channels, *spatial)`` or unbatched.
            output_size: spatial, or of all dimensions: which of the sizes that a stride leaves open the output has;
                the layer's ``output_padding`` says so otherwise.

        Raises:
            ValueError: a size that cannot be.
        """
        weights = self._tensors("weight")
        assert weights is not None
        more = self.output_padding if output_size is None else self._output_padding(x, output_size)
        functions = (F.mixed_conv_transpose1d, F.mixed_conv_transpose2d, F.mixed_conv_transpose3d)
        biases = self._tensors("bias")
        return functions[len(self.kernel_size) - 1](
            x, weights, self.coefficients, biases, self.stride, self._pads(), more, self.groups, self.dilation
        )

    def _pads(self) -> tuple[int, ...]:
        assert not isinstance(self.padding, str)
        return self.padding

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        """What is missing of ``output_size``, by dimension."""
        spatial = len(self.kernel_size)
        wanted = list(output_size)
        if len(wanted) not in (spatial, x.dim()):
            raise ValueError(f"output_size: got {wanted}, expected {spatial} or {x.dim()} sizes")
        wanted = wanted[-spatial:]
        numbers = zip(x.shape[-spatial:], self.stride, self._pads(), self.dilation, self.kernel_size, strict=True)
        least = [(size - 1) * step - 2 * pad + dil * (kernel - 1) + 1 for size, step, pad, dil, kernel in numbers]
        most = [size + step - 1 for size, step in zip(least, self.stride, strict=True)]
        if not all(low <= size <= high for low, size, high in zip(least, wanted, most, strict=True)):
            raise ValueError(f"output_size: got {wanted}, expected from {least} to {most} for x of {tuple(x.shape)}")
        return [size - low for size, low in zip(wanted, least, strict=True)]

    def extra_repr(self) -> str:
        """Sizes, sources and options, for printing."""
        return f"output_padding={self.output_padding}, {super().extra_repr()}"


class ReplacementConvTranspose1d(_ReplacementConvTranspose):
    """``nn.ConvTranspose1d`` on the mixed weights and biases of other ``nn.ConvTranspose1d``; as ``ReplacementConv1d``.

    ``output_padding`` is ``own``'s, too, else the first source's, and ``forward`` takes an ``output_size`` as the plain
    layer's. Granularity ``"channel"`` is refused: the kernels mix by the first dimension of a weight, here the input
    channels.
    """

    source_type = (nn.ConvTranspose1d,)


class ReplacementConvTranspose2d(_ReplacementConvTranspose):
    """``nn.ConvTranspose2d`` on the mixed weights and biases of other ones; as ``ReplacementConvTranspose1d``."""

    source_type = (nn.ConvTranspose2d,)


class ReplacementConvTranspose3d(_ReplacementConvTranspose):
    """``nn.ConvTranspose3d`` on the mixed weights and biases of other ones; as ``ReplacementConvTranspose1d``."""

    source_type = (nn.ConvTranspose3d,)
