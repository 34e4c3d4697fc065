"""Two small networks: a residual CNN, as ResNet-20 for CIFAR is one, and a vision transformer.

Both keep their equal-shaped blocks in one ``nn.Sequential`` named ``blocks``, and know nothing of replacement:
:func:`rl_kernels.plan` finds the blocks by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """``relu(x + norm(conv(relu(norm(conv(x))))))`` with 3x3 convolutions, the basic block of ResNet-18 and -34.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output. Where they differ from the input's, or with a stride, the skip
            connection is a strided 1x1 convolution with its own normalisation.
        stride: of the first convolution.

    Shapes: ``(B, in_channels, H, W)`` -> ``(B, out_channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.skip = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class DigitsResNet(nn.Module):
    """A residual CNN: a 3x3 stem, stages of residual blocks, global average pooling and a linear head.

    Every stage after the first halves the image and doubles the channels in its first block, so the chains of
    equal-shaped blocks end at the stages' borders.

    Args:
        width: channels of the stem and of the first stage.
        depths: residual blocks of each stage.
        classes: number of classes.
        in_channels: of the images.

    Shapes: ``(B, in_channels, H, W)`` -> logits ``(B, classes)``.
    """

    def __init__(
        self, width: int = 16, depths: Sequence[int] = (6, 6), classes: int = 10, in_channels: int = 1
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        blocks = []
        channels = width
        for stage, depth in enumerate(depths):
            for index in range(depth):
                first_of_later_stage = stage > 0 and index == 0
                out_channels = channels * 2 if first_of_later_stage else channels
                blocks.append(ResidualBlock(channels, out_channels, stride=2 if first_of_later_stage else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: self-attention, then a two-layer perceptron with GELU, each with a skip.

    Args:
        dim: width of a token.
        heads: attention heads; divides ``dim``.
        mlp_ratio: width of the perceptron's hidden layer, in multiples of ``dim``.

    Shapes: ``(B, tokens, dim)`` -> the same.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class DigitsViT(nn.Module):
    """A vision transformer: patch embedding, class token, learned positions, pre-norm blocks and a linear head.

    Args:
        image_size: height and width of the image; divisible by ``patch_size``.
        patch_size: height and width of a patch.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a block; divides ``dim``.
        classes: number of classes.
        in_channels: of the images.

    Shapes: ``(B, in_channels, image_size, image_size)`` -> logits ``(B, classes)``.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        dim: int = 48,
        depth: int = 9,
        heads: int = 4,
        classes: int = 10,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        tokens = 1 + (image_size // patch_size) ** 2
        self.patches = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        # As large as the patches' own embedding, not ViT's 0.02: with so few steps, place must count from the start.
        self.positions = nn.Parameter(torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens)[:, 0]))
