"""Small models in the shapes that occur in the wild."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """As torchvision's, registered in its order."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1:
            shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stages of basic blocks: (3, 4, 6, 3) is ResNet-34, (2, 2, 2, 2) ResNet-18."""

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), width: int = 4, classes: int = 5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage, depth in enumerate(depths, start=1):
            channels = width << (stage - 1)
            before = channels if stage == 1 else channels // 2
            blocks = [BasicBlock(before, channels, 1 if stage == 1 else 2)]
            blocks += [BasicBlock(channels, channels) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages = [f"layer{stage}" for stage in range(1, len(depths) + 1)]
        self.fc = nn.Linear(width << (len(depths) - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


class LinearAttention(nn.Module):
    """Attention made of linear layers, as third-party models have it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in self.qkv(x).chunk(3, -1))
        return self.proj(self.norm(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)))


class Block(nn.Module):
    """A transformer block, with a bare parameter as ConvNeXt has one."""

    def __init__(self, dim: int, heads: int = 2, torch_attention: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.torch_attention = torch_attention
        torchs = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.attn: nn.Module = torchs if torch_attention else LinearAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = self.attn(y, y, y, need_weights=False)[0] if self.torch_attention else self.attn(y)
        x = x + y
        return x + self.gamma * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, blocks, a head."""

    def __init__(self, depth: int = 9, dim: int = 8, torch_attention: bool = True):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*(Block(dim, torch_attention=torch_attention) for _ in range(depth)))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def sequential(depth: int = 6, width: int = 6) -> nn.Sequential:
    """Linear layers of one shape between two of others, with norms and activations between them."""
    layers: list[nn.Module] = [nn.Linear(3, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def vgg() -> nn.Sequential:
    """Convolutions and pooling in a row, then a classifier: as VGG, the containers being two."""
    features: list[nn.Module] = []
    channels = 3
    for width, depth in ((4, 2), (8, 4)):
        for _ in range(depth):
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(nn.Sequential(*features), nn.Flatten(), nn.Linear(8 * 4, 5))


def encoder(depth: int = 6, dim: int = 8, **options: object) -> nn.TransformerEncoder:
    """torch's own encoder."""
    layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.0, batch_first=True, **options)  # type: ignore[arg-type]
    nested = not options.get("norm_first", False) and bool(options.get("bias", True))
    made = nn.TransformerEncoder(layer, depth, enable_nested_tensor=nested)
    for parameter in made.parameters():  # The layers are copies of one.
        nn.init.normal_(parameter, std=0.3)
    return made


def image(batch: int = 3, size: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of images."""
    return torch.randn(batch, 3, size, size, dtype=dtype)
