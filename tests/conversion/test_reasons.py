"""What a plan says of layers that it leaves, and the error where it leaves all."""

from __future__ import annotations

import copy
import dataclasses
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


class Gated(nn.Linear):
    """A subclass with parameters elsewhere than in itself."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.gate = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(x)


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
UNLESS = " unless its class is a target"

LEFT = [
    (Transposed, rf" is Transposed \({HERE}\.Transposed\), for which there is no replacement{UNLESS}"),
    (Linear, rf" is Linear \({HERE}\.Linear\), for which there is no replacement{UNLESS}"),
    (Gated, rf": {HERE}\.Gated has a forward of its own, and modules in it have parameters"),
    (lambda: nn.Bilinear(8, 8, 8), rf" is Bilinear \(torch.*\.Bilinear\), for which there is no replacement{UNLESS}"),
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
    makers = [Transposed, Gated, dispatched, lambda: nn.LSTM(8, 8)]
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


# Layers that run by their own forward.


class TheirRMSNorm(nn.Module):
    """As transformers' and timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x / x.norm(dim=-1, keepdim=True)) * self.weight


def stored(plan: rl.Plan) -> dict[str, int]:
    return {layer.path: layer.stored for layer in plan.replaced[0].layers}


def assert_runs_as_by_hand(model: nn.Sequential, plan: rl.Plan) -> None:
    """The replaced model computes what one computes whose parameters were mixed by hand."""
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for block in plan.replaced:
            for layer in block.layers:
                own, first, second = (
                    dict(by_hand.get_submodule(f"{path}.{layer.path}".strip(".")).named_parameters())
                    for path in (block.path, *block.sources)
                )
                for name, parameter in own.items():
                    parameter.copy_((first[name] + second[name]) / 2)
    x = torch.randn(3, 8)
    rl.replace(model, plan)
    torch.testing.assert_close(model(x), by_hand(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(rl.merge(model)(x), by_hand(x))
    assert [type(module) for module in model.modules()] == [type(module) for module in by_hand.modules()]


def test_norms_of_others_are_mixed_unless_they_are_to_stay() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), TheirRMSNorm()) for _ in range(5)))
    plan = rl.plan(model, every=2)
    assert stored(plan) == {"0": 0, "1": 0}
    assert [layer.kind for layer in plan.replaced[0].layers] == ["ReplacementLinear", "ReplacementByForward"]
    assert "runs its own forward" not in str(plan)
    assert [layer.path for layer in rl.plan(model, norms="own").replaced[0].layers] == ["0"]
    assert [layer.path for layer in rl.plan(model, targets="norm").replaced[0].layers] == ["1"]
    assert_runs_as_by_hand(model, rl.Plan.from_json(plan.to_json()))


def test_subclasses_run_their_own_forward_and_the_plan_says_what_it_stores() -> None:
    for model in (blocks(lambda: Scaled(8, 8), 5), nn.Sequential(*(Scaled(8, 8) for _ in range(5)))):
        plan = rl.plan(model, every=2, targets="linear")
        assert list(stored(plan).values()) == [64]
        assert "A Scaled runs its own forward: its mix, 64 numbers at most, is stored for it" in str(plan)
        assert_runs_as_by_hand(model, plan)


def test_layers_of_an_unknown_class_are_replaced_when_it_is_a_target() -> None:
    for make in (Transposed, lambda: nn.Bilinear(8, 8, 8)):
        kind = type(make())
        for model in (blocks(make, 5), nn.Sequential(*(make() for _ in range(5)))):
            plan = rl.plan(model, every=2, targets=kind)
            assert [layer.class_name for block in plan.replaced for layer in block.layers] == [kind.__name__] * 2
            plan = rl.plan(model, every=2, targets=kind, level="layer")
            assert len(plan.replaced) == 2
            if kind is Transposed:
                assert_runs_as_by_hand(model, plan)
    with pytest.raises(ValueError, match=r"^targets: got LSTM, .*no replacement\)"):
        rl.plan(blocks(lambda: nn.LSTM(8, 8)), targets=nn.LSTM)
    beside = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Transposed()) for _ in range(5)))
    assert [layer.path for layer in rl.plan(beside).replaced[0].layers] == ["0"]
    assert [layer.path for layer in rl.plan(beside, targets=[Transposed, "linear"]).replaced[0].layers] == ["0", "1"]


def test_a_namesake_is_no_layer_of_the_plan() -> None:
    plan = rl.plan(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5))), every=2)
    model = nn.Sequential(*(Linear() for _ in range(5)))
    with pytest.raises(ValueError, match=r"layer at 1 and its neighbours do not fit: .*Linear"):
        rl.replace(model, plan)
    old = [
        dataclasses.replace(block, layers=(dataclasses.replace(block.layers[0], kind=""),)) for block in plan.replaced
    ]
    with pytest.raises(ValueError, match="got Linear at 1, for which there is no replacement"):
        rl.replace(model, dataclasses.replace(plan, replaced=tuple(old)))
    for module in model.modules():
        assert not isinstance(module, rl.nn.ReplacementLayer)


def test_a_coefficient_per_channel_leaves_layers_that_have_none() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1))

    plan = rl.plan(nn.Sequential(*(make() for _ in range(5))), granularity="channel")
    assert [layer.path for layer in plan.replaced[0].layers] == ["0"]
    (kept,) = plan.replaced[0].kept
    assert kept.reason.startswith("granularity='channel': its output channels are not the first dimension")
    with pytest.raises(ValueError, match=r"nothing to replace \(granularity='channel': its output channels"):
        rl.plan(nn.Sequential(*(nn.ConvTranspose2d(4, 4, 3) for _ in range(5))), granularity="channel")
