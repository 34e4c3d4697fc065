"""torch's FLOP counter: exact for every op, and as it counts torch's own layers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rl_kernels import functional as F
from rl_kernels.nn import ReplacementMultiheadAttention
from tests.transforms.common import images, net


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


WANTED = {"x": (True, False, False), "weights": (False, True, False), "coefficients": (False, False, True)}
WANTED |= {"everything": (True, True, True)}


def assert_counts(
    mixed: Any, plain: Any, x: Tensor, weight: Tensor, bias: Tensor, forward: int, groups: int = 1
) -> None:
    """``forward`` once for the output and once each for dgrad and wgrad where asked; as torch's ``plain`` counts.

    Not quite: torch counts the wgrad of a grouped convolution ``groups`` times.
    """
    for wants_x, wants_weights, wants_coefficients in WANTED.values():
        given = x.requires_grad_(wants_x)
        sources = [weight.clone().requires_grad_(wants_weights) for _ in range(3)]
        biases = [bias.clone().requires_grad_() for _ in range(3)]
        c = torch.tensor([0.3, 0.5, 0.2], requires_grad=wants_coefficients)
        wgrad = wants_weights or wants_coefficients
        expected = forward * (1 + wants_x + wgrad)
        assert flops(lambda given=given, s=sources, c=c, b=biases: mixed(given, s, c, b).sum().backward()) == expected
        own = weight.clone().requires_grad_(wgrad)
        expected += forward * wgrad * (groups - 1)
        assert flops(lambda given=given, own=own, b=biases: plain(given, own, b[0]).sum().backward()) == expected
    with torch.no_grad():
        assert flops(lambda: mixed(x, sources, c, biases)) == forward


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_linear(batch: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(*batch, 7), torch.randn(5, 7), torch.randn(5)
    assert_counts(F.mixed_linear, nn.functional.linear, x, weight, bias, 2 * math.prod(batch) * 7 * 5)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups and stride": {"groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2, "stride": 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolution(spatial: int, name: str) -> None:
    settings = CONVOLUTIONS[name]
    mixed = (F.mixed_conv1d, F.mixed_conv2d, F.mixed_conv3d)[spatial - 1]
    plain: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spatial - 1]
    inside = 4 // settings.get("groups", 1)
    x, weight, bias = torch.randn(2, 4, *(7, 6, 5)[:spatial]), torch.randn(8, inside, *(3,) * spatial), torch.randn(8)
    outputs = plain(x, weight, **settings).numel()
    assert_counts(
        lambda x, w, c, b: mixed(x, w, c, b, **settings),
        lambda x, w, b: plain(x, w, b, **settings),
        x,
        weight,
        bias,
        2 * outputs * inside * 3**spatial,
        settings.get("groups", 1),
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_transposed_convolution(spatial: int, name: str) -> None:
    settings = CONVOLUTIONS[name]
    mixed = (F.mixed_conv_transpose1d, F.mixed_conv_transpose2d, F.mixed_conv_transpose3d)[spatial - 1]
    plain: Any = tuple(getattr(nn.functional, f"conv_transpose{dim}d") for dim in (1, 2, 3))[spatial - 1]
    outside = 8 // settings.get("groups", 1)
    x, weight, bias = torch.randn(2, 4, *(4, 3, 5)[:spatial]), torch.randn(4, outside, *(3,) * spatial), torch.randn(8)
    assert_counts(
        lambda x, w, c, b: mixed(x, w, c, b, **settings),
        lambda x, w, b: plain(x, w, b, **settings),
        x,
        weight,
        bias,
        2 * x.numel() * outside * 3**spatial,
        settings.get("groups", 1),
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_attention(cross: bool, need_weights: bool) -> None:
    """As torch's layer in training; the projections are 4 E^2 products a token, or as many as there are inputs."""
    sources = [nn.MultiheadAttention(8, 2) for _ in range(2)]
    x = torch.randn(5, 2, 8, requires_grad=True)
    other = torch.randn(3, 2, 8, requires_grad=True) if cross else x
    counts = []
    for layer in (ReplacementMultiheadAttention(sources), sources[0]):
        counts.append(flops(lambda call=layer: call(x, other, other, need_weights=need_weights)[0].sum().backward()))
    assert counts[0] == counts[1]
    tokens, others = 5 * 2, 3 * 2 if cross else 5 * 2
    projections = 2 * 8 * 8 * (2 * tokens + 2 * others)
    q, k = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 3 if cross else 5, 4)
    fused = flops(lambda: nn.functional.scaled_dot_product_attention(q, k, k))  # torch counts none on the CPU.
    products = 2 * 2 * q.numel() * k.shape[2]  # scores and values, of 2 FLOPs each
    with torch.no_grad():
        layer = ReplacementMultiheadAttention(sources)
        found = flops(lambda: layer(x, other, other, need_weights=need_weights))
    assert found == projections + (products if need_weights else fused)


def test_by_module() -> None:
    """A replaced layer's count stands under its own name, and equals its neighbours'."""
    model = net()
    with FlopCounterMode(display=False) as counter:
        model(images().requires_grad_()).sum().backward()
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    for kind, products in (("convs", 3 * 36 * 4 * 4 * 9), ("linears", 3 * 4 * 4)):
        for j in range(3):
            assert counts[f"Net.{kind}.{j}"] == 3 * 2 * products, (kind, j)
