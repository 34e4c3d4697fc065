"""What a plan says of layers that it leaves, and the error where it leaves all."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl


class Transposed(nn.Module):
    """A linear layer of a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Scaled(nn.Linear):
    """As FalconLinear, or timm's StdConv2d of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Linear(nn.Module):
    """A namesake of torch's, as torch_geometric has one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


def dispatched() -> nn.Module:
    """As accelerate leaves a layer."""
    layer = nn.Linear(8, 8)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def blocks(make: Callable[[], nn.Module], depth: int = 9) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(make(), nn.LayerNorm(8)) for _ in range(depth)))


HERE = __name__.replace(".", r"\.")

LEFT = [
    (Transposed, rf" is Transposed \({HERE}\.Transposed\), for which there is no replacement"),
    (Linear, rf" is Linear \({HERE}\.Linear\), for which there is no replacement"),
    (lambda: Scaled(8, 8), rf": {HERE}\.Scaled has a forward of its own"),
    (lambda: nn.Bilinear(8, 8, 8), r" is Bilinear \(torch\..*\.Bilinear\), for which there is no replacement"),
    (lambda: nn.LSTM(8, 8), r" is LSTM \(torch\.nn\.modules\.rnn\.LSTM\), for which there is no replacement"),
    (lambda: nn.Embedding(8, 8), r" is Embedding \(torch\..*\.Embedding\), for which there is no replacement"),
    (dispatched, r" has a forward of its own, set on this instance \(as accelerate's hooks do\)"),
]
IDS = [
    "an unknown class",
    "a namesake",
    "a subclass",
    "a bilinear layer",
    "an LSTM",
    "an embedding",
    "dispatched",
]


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=IDS)
def test_the_error_names_a_layer_of_the_blocks_and_why_it_stays(make, reason):
    nothing = r"^model: got Sequential, in which nothing can be replaced"
    with pytest.raises(ValueError, match=rf"{nothing} \(0\.0{reason}\); expected three blocks"):
        rl.plan(blocks(make))
    with pytest.raises(ValueError, match=rf"{nothing} \(0{reason}\); expected three blocks"):
        rl.plan(nn.Sequential(*(make() for _ in range(9))))


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=IDS)
def test_a_head_does_not_hide_the_blocks(make, reason):
    model = nn.Sequential(blocks(make), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=rf"replaced \(0\.0\.0{reason}; 1: first \(no Linear before it\)\); expected"):
        rl.plan(model)


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=IDS)
def test_in_a_block_with_something_to_replace_the_rest_says_the_same(make, reason):
    plan = rl.plan(blocks(lambda: nn.Sequential(nn.Linear(8, 8), make())), every=4)
    assert [layer.path for layer in plan.replaced[0].layers] == ["0.0", "1"]
    (kept,) = plan.replaced[0].kept
    assert kept.path == "0.1"
    expected = reason.removeprefix(":").strip()
    assert re.search(expected, kept.reason)


def test_a_reason_is_named_once_and_three_at_most():
    makers = [Transposed, lambda: Scaled(8, 8), dispatched, lambda: nn.LSTM(8, 8)]
    model = nn.Sequential(*(nn.Sequential(*(make() for make in makers)) for _ in range(3)))
    with pytest.raises(
        ValueError, match=r"\(0\.0 is Transposed [^;]*; 0\.1: [^;]*; 0\.2 has [^;]*; \.\.\.\); expected"
    ):
        rl.plan(model)


def test_an_embedding_beside_layers_comes_last():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"\(1: first \(.*\); 2: last \(.*\); 0 is Embedding "):
        rl.plan(model)


def test_targets_that_match_nothing_that_can_be_replaced_say_why():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = Transposed()

    model = nn.Sequential(*(nn.Sequential(Attention(), nn.Linear(8, 8)) for _ in range(3)))
    found = (
        r"^targets: got attention, which match no layer of Sequential that can be replaced \(0\.0\.qkv is Transposed"
    )
    with pytest.raises(ValueError, match=found):
        rl.plan(nn.Sequential(*(nn.Sequential(Attention()) for _ in range(3))), targets="attention")
    with pytest.raises(ValueError, match=r"that can be replaced$"):
        rl.plan(model, targets="conv")
    asked = []
    with pytest.raises(ValueError, match="which match no layer"):
        rl.plan(model, targets=lambda path, layer: asked.append(layer.in_features))  # Only a linear layer has them.
    assert asked


def test_a_model_that_is_one_layer_has_a_name():
    with pytest.raises(ValueError, match=r"\(the model itself: first \(no Linear before it\)\)"):
        rl.plan(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\(the model itself is LSTM \(torch"):
        rl.plan(nn.LSTM(2, 2))
