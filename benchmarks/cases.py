"""What is measured: cases are data. A case says shapes, dtype and layout, and from these its work and its traffic."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["NCHW", "channels_last"]

GROUPS = ("linear", "conv", "attention", "block", "model", "modulated")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """What all cases have.

    Attributes:
        name: unique among the cases of one dtype.
        group: what ``--cases`` selects.
        dtype: of activations and weights, as torch names it.
        quick: whether ``--quick`` runs it.
    """

    name: str
    group: str
    dtype: str = "float32"
    quick: bool = False

    @property
    def key(self) -> str:
        """The name with the dtype: unique in a record."""
        return f"{self.name} {self.dtype}"

    @property
    def picture(self) -> str:
        """The picture that the case is drawn in."""
        return self.group

    @property
    @abstractmethod
    def flops(self) -> int | None:
        """Floating-point operations of the forward's products, two a multiply-add; None where only torch can count."""

    @property
    @abstractmethod
    def elements(self) -> tuple[int, int, int] | None:
        """Elements of the input, of one source's weights and of the output; None where there is no one layer."""

    def as_record(self) -> dict[str, Any]:
        """The fields as plain JSON types, and what is derived from them for reading the record."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "quick"}
        return {"key": self.key, "picture": self.picture, **fields}


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """``y = x W^T + b`` with x ``(m, k)`` and W ``(n, k)``."""

    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Of the forward's product."""
        return 2 * self.m * self.n * self.k

    @property
    def elements(self) -> tuple[int, int, int]:
        """Of x, of W and its bias, of y."""
        return self.m * self.k, self.n * self.k + self.n, self.m * self.n


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    """A 2d convolution with bias; padding is half the kernel, images and kernels are square."""

    batch: int
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    layout: Layout = "NCHW"

    @property
    def picture(self) -> str:
        """One picture a layout."""
        return f"conv-{self.layout}"

    @property
    def padding(self) -> int:
        """Pixels on each side."""
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> int:
        """Of the direct convolution."""
        each = self.in_channels // self.groups * self.kernel**2
        return 2 * self.batch * self.out_size**2 * self.out_channels * each

    @property
    def elements(self) -> tuple[int, int, int]:
        """Of x, of the weight and its bias, of y."""
        weight = self.out_channels * (self.in_channels // self.groups) * self.kernel**2 + self.out_channels
        x = self.batch * self.in_channels * self.size**2
        return x, weight, self.batch * self.out_channels * self.out_size**2


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Self-attention with biases: x ``(tokens, batch, features)``."""

    features: int
    heads: int
    tokens: int
    batch: int

    @property
    def picture(self) -> str:
        """Attention and the residual block share one."""
        return "blocks"

    @property
    def flops(self) -> int:
        """Of the four projections and of attention's two products."""
        projections = 8 * self.tokens * self.batch * self.features**2
        return projections + 4 * self.batch * self.tokens**2 * self.features

    @property
    def elements(self) -> tuple[int, int, int]:
        """Of x, of the two projections' weights and biases, of y."""
        x = self.tokens * self.batch * self.features
        return x, 4 * (self.features**2 + self.features), x


@dataclass(frozen=True, kw_only=True)
class BlockCase(Case):
    """ResNet's basic block: two 3x3 convolutions with batch normalisation, ReLU and a skip."""

    channels: int
    size: int
    batch: int
    layout: Layout = "NCHW"

    @property
    def picture(self) -> str:
        """Attention and the residual block share one."""
        return "blocks"

    @property
    def flops(self) -> int:
        """Of the two convolutions."""
        return 2 * 2 * self.batch * self.size**2 * self.channels**2 * 9

    @property
    def elements(self) -> tuple[int, int, int]:
        """Of x, of the convolutions' weights and the norms' vectors, of y."""
        x = self.batch * self.channels * self.size**2
        return x, 2 * 9 * self.channels**2 + 4 * self.channels, x


@dataclass(frozen=True, kw_only=True)
class ModulatedCase(Case):
    """A layer on a frozen weight that is modulated by a factor of low rank: ``W * (1 + left^T right)``, elementwise."""

    layer: LinearCase | ConvCase
    rank: int

    @property
    def flops(self) -> int | None:
        """Of the layer's product."""
        return self.layer.flops

    @property
    def elements(self) -> tuple[int, int, int] | None:
        """The layer's."""
        return self.layer.elements


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A training step of a whole model on images ``(batch, 3, 32, 32)``; a block in ``every`` is replaced."""

    model: Literal["ResNet-32", "ViT-Ti"]
    optimizer: Literal["sgd", "adamw"]
    batch: int
    every: int = 4

    @property
    def flops(self) -> None:
        """Left to torch's own counter."""
        return None

    @property
    def elements(self) -> None:
        """There is no one layer."""
        return None


def _linear(m: int, n: int, k: int, note: str = "", quick: bool = False) -> LinearCase:
    return LinearCase(name=f"linear {m}x{n}x{k}{note}", group="linear", m=m, n=n, k=k, quick=quick)


def _conv(
    note: str,
    channels: int,
    out_channels: int,
    size: int,
    kernel: int,
    batch: int,
    *,
    stride: int = 1,
    groups: int = 1,
    quick: bool = False,
) -> list[ConvCase]:
    """One case a layout."""
    widths = f"{channels}" if channels == out_channels else f"{channels}>{out_channels}"
    options = (f" stride {stride}" if stride != 1 else "") + (f" {note}" if note else "")
    layouts: tuple[Layout, ...] = ("NCHW", "channels_last")
    return [
        ConvCase(
            name=f"conv {kernel}x{kernel} {widths} {size}x{size} b{batch}{options} {layout}",
            group="conv",
            batch=batch,
            in_channels=channels,
            out_channels=out_channels,
            size=size,
            kernel=kernel,
            stride=stride,
            groups=groups,
            layout=layout,
            quick=quick,
        )
        for layout in layouts
    ]


def _modulated(layers: Iterable[LinearCase | ConvCase], ranks: Sequence[int], quick: int) -> list[ModulatedCase]:
    """Each layer with each rank; ``quick`` is the rank of the quick ones."""
    return [
        ModulatedCase(
            name=f"{layer.name}, rank {rank}",
            group="modulated",
            layer=layer,
            rank=rank,
            quick=layer.quick and rank == quick,
        )
        for layer in layers
        for rank in ranks
    ]


CASES: tuple[Case, ...] = (
    _linear(8, 8, 8, " (overhead)", quick=True),
    _linear(1, 768, 768, quick=True),
    _linear(1, 4096, 4096),
    _linear(8, 3072, 768, quick=True),
    _linear(64, 768, 3072, quick=True),
    _linear(64, 4096, 4096),
    _linear(512, 4096, 4096),
    _linear(1576, 2304, 768),
    _linear(2048, 1024, 1024),
    *_conv("(overhead)", 8, 8, 8, 3, 1, quick=True),
    *_conv("", 16, 16, 32, 3, 128),  # CIFAR's ResNets
    *_conv("", 32, 32, 16, 3, 128),
    *_conv("", 64, 64, 8, 3, 128, quick=True),
    *_conv("", 64, 64, 56, 3, 8),  # ImageNet's
    *_conv("", 128, 128, 28, 3, 8),
    *_conv("", 256, 256, 14, 3, 8),
    *_conv("", 512, 512, 7, 3, 8, quick=True),
    *_conv("", 256, 64, 56, 1, 8),
    *_conv("", 512, 2048, 7, 1, 8, quick=True),
    *_conv("", 128, 256, 28, 3, 8, stride=2),
    *_conv("32 groups", 256, 256, 14, 3, 8, groups=32),
    *_conv("depthwise", 256, 256, 14, 3, 8, groups=256),
    AttentionCase(name="attention ViT-B 197 tokens b8", group="attention", features=768, heads=12, tokens=197, batch=8),
    AttentionCase(
        name="attention ViT-Ti 65 tokens b8", group="attention", features=192, heads=3, tokens=65, batch=8, quick=True
    ),
    BlockCase(name="basic block 64 56x56 b8 NCHW", group="block", channels=64, size=56, batch=8),
    BlockCase(
        name="basic block 64 56x56 b8 channels_last",
        group="block",
        channels=64,
        size=56,
        batch=8,
        layout="channels_last",
        quick=True,
    ),
    ModelCase(name="ResNet-32 32x32 b128", group="model", model="ResNet-32", optimizer="sgd", batch=128, quick=True),
    ModelCase(name="ViT-Ti 65 tokens b32", group="model", model="ViT-Ti", optimizer="adamw", batch=32, quick=True),
    *_modulated((_linear(m, 1024, 1024, quick=m == 64) for m in (1, 64, 512, 2048)), (1, 4, 16), quick=4),
    *_modulated(_conv("", 64, 64, 56, 3, 8), (4,), quick=4),
    *_modulated(_conv("", 256, 256, 14, 3, 8), (1, 4, 16), quick=4),
)


# The most important first: a run may be cut off.
GPU_CASES: tuple[Case, ...] = (
    _linear(4096, 4096, 4096, quick=True),
    _linear(8192, 4096, 4096),
    _linear(16, 4096, 4096, quick=True),
    _linear(64, 4096, 4096),
    *_conv("", 256, 256, 14, 3, 64, quick=True),
    *_conv("", 64, 64, 56, 3, 64),
    _linear(512, 4096, 4096, quick=True),
    _linear(2048, 4096, 4096),
    _linear(1, 4096, 4096),
    _linear(12608, 2304, 768),  # ViT-B's, of 64 images
    _linear(12608, 768, 3072),
    *_conv("", 16, 16, 32, 3, 128, quick=True),  # CIFAR's ResNets
    *_conv("", 32, 32, 16, 3, 128),
    *_conv("", 64, 64, 8, 3, 128),
    *_conv("", 128, 128, 28, 3, 64),
    *_conv("", 512, 512, 7, 3, 64),
    *_conv("", 256, 64, 56, 1, 64),
    *_conv("", 128, 256, 28, 3, 64, stride=2),
    *_conv("32 groups", 256, 256, 14, 3, 64, groups=32),
    *_conv("depthwise", 256, 256, 14, 7, 64, groups=256),
    _linear(8, 8, 8, " (overhead)", quick=True),
    *(case for case in CASES if case.group in ("attention", "block", "model")),
    *_modulated((_linear(m, 4096, 4096, quick=m == 4096) for m in (16, 512, 4096)), (1, 4, 16), quick=4),
    *_modulated(_conv("", 256, 256, 14, 3, 64), (4,), quick=4),
)


def select(groups: Iterable[str], dtypes: Sequence[str], quick: bool = False, device: str = "cpu") -> list[Case]:
    """The cases of ``groups`` for a device, in each of ``dtypes``; with ``quick`` the quick ones."""
    cases = GPU_CASES if device == "cuda" else CASES
    chosen = [case for case in cases if case.group in set(groups) and (case.quick or not quick)]
    return [_of_dtype(case, dtype) for case in chosen for dtype in dtypes]


def _of_dtype(case: Case, dtype: str) -> Case:
    if isinstance(case, ModulatedCase):
        case = dataclasses.replace(case, layer=dataclasses.replace(case.layer, dtype=dtype))
    return dataclasses.replace(case, dtype=dtype)
