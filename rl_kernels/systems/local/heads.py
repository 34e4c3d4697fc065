"""What judges a module's output: small heads with a classifier, and InfoPro's decoder.

Sizes are those of the authors' public code (DGL and MAN++, InfoPro); the papers leave them open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HeadName = Literal["linear", "dgl", "infopro"]
HEADS = ("linear", "dgl", "infopro")


class Pool(nn.Module):
    """Images ``(B, C, H, W)`` to their means, tokens ``(B, T, C)`` to the first or the mean: ``(B, C)``."""

    def __init__(self, first_token: bool):
        super().__init__()
        self.first_token = first_token

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return x[:, 0] if self.first_token else x.mean(1)
        return x.flatten(2).mean(2) if x.ndim > 3 else x


def make_head(
    name: HeadName, shape: Sequence[int], outputs: int, *, last: Sequence[int], width: int, first_token: bool
) -> nn.Sequential:
    """Make a head.

    Args:
        name: ``"linear"``: pooled, and one linear layer (Greedy, MLAAN). ``"dgl"``: averaged to at most 8x8, three 1x1
            convolutions, pooled, three layers of four times that width (DGL). ``"infopro"``: one 3x3 convolution to
            twice the channels at half the size, where the network has such a stage to come, pooled, one hidden layer
            (InfoPro, "1c2f"). Of tokens the convolutions are left out, and a LayerNorm comes first.
        shape: of what it is given: ``(B, C, H, W)``, ``(B, T, C)`` or ``(B, C)``.
        outputs: classes, or the size of a projection.
        last: shape of what the network's last block returns.
        width: of DGL's convolutions and InfoPro's hidden layer; 128 in the authors' code.
        first_token: tokens are judged by the first one, not by their mean.
    """
    pool = Pool(first_token)
    images = len(shape) == 4
    channels = shape[1] if images else shape[-1]
    before: list[nn.Module] = [] if images else [nn.LayerNorm(channels)]
    if name == "linear":
        return nn.Sequential(*before, pool, nn.Linear(channels, outputs))
    if name == "infopro":
        if images:
            final = max(channels, last[1])
            wide = min(2 * channels, final)
            stride = 2 if channels < final else 1
            before = [nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            channels = wide
        return nn.Sequential(
            *before, pool, nn.Linear(channels, width), nn.ReLU(inplace=True), nn.Linear(width, outputs)
        )
    if images:
        # What is smaller stays as it is.
        before = [nn.AdaptiveAvgPool2d((min(8, shape[2]), min(8, shape[3])))]
        for _ in range(3):
            before += [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    after: list[nn.Module] = []
    for _ in range(3):
        after += [nn.Linear(channels, 4 * width, bias=False), nn.BatchNorm1d(4 * width), nn.ReLU(inplace=True)]
        channels = 4 * width
    return nn.Sequential(*before, pool, *after, nn.Linear(channels, outputs))


class Decoder(nn.Module):
    """InfoPro's: what is left of the image in a module's output ``(B, C, h, w)``, as logits of pixels from 0 to 1."""

    def __init__(self, channels: int, image: Sequence[int]):
        super().__init__()
        self.size = tuple(image[2:])
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, image[1], 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(F.interpolate(x, self.size, mode="bilinear", align_corners=False))


def contrast(features: Tensor, targets: Tensor, temperature: float = 0.07) -> Tensor:
    """The supervised contrastive loss (arXiv 2004.11362, Eq. 2) of one view an image.

    Args:
        features: ``(B, D)``; their length does not count.
        targets: int64 ``(B,)``.
        temperature: 0.07 as in that paper's code.

    Returns:
        The mean over images that share their class with another; zero where none does.
    """
    features = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    logits = (features @ features.T / temperature).masked_fill(itself, float("-inf"))
    alike = (targets[:, None] == targets[None]) & ~itself
    count = alike.sum(1)
    of_alike = torch.where(alike, logits - logits.logsumexp(1, keepdim=True), 0.0).sum(1)
    # Nothing is indexed by values, for which a GPU would have to wait; and where none is alike the sum is zero.
    return -(of_alike / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
