"""torch's optimizers on replaced models: every implementation, parameter groups, and sources frozen on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rl_kernels as rl
from tests.conversion.common import coefficients_of, mixed_by_hand, relative_error, spread_out
from tests.conversion.toys import ViT, image

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


class ByHand(nn.Module):
    """The same replaced model in plain torch: a whole one, whose replaced parameters are mixed at every call."""

    def __init__(self, plain: nn.Module, model: nn.Module, plan: rl.Plan):
        super().__init__()
        self.plain, self.plan = plain, plan
        modules = coefficients_of(model, plan)
        unique = {id(module): nn.Parameter(module().detach().clone()) for module in modules.values()}
        self.coefficients = nn.ParameterList(unique.values())
        self.by_path = {path: unique[id(module)] for path, module in modules.items()}
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=False)
        self.replaced = set(mixed_by_hand(plain, plan, self.by_path))
        names = {id(module): name for name, module in model.named_modules()}
        self.named = {n: p for n, p in plain.named_parameters() if n not in self.replaced}
        for path, module in modules.items():
            self.named[f"{names[id(module)]}.coefficients"] = self.by_path[path]

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.plain, mixed_by_hand(self.plain, self.plan, self.by_path), (x,))


def pair(**options: Any) -> tuple[nn.Module, ByHand]:
    """A replaced model, and the same by hand: the coefficients of its layers are free."""
    model = ViT(5).double()
    plain = copy.deepcopy(model)
    plan = rl.plan(model, **options)
    rl.replace(model, plan)
    spread_out(model)
    hand = ByHand(plain, model, plan)
    assert set(hand.named) == {name for name, _ in model.named_parameters()}
    return model, hand


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) * torch.linspace(0.5, 1.5, 5, dtype=x.dtype)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def check_same(model: nn.Module, hand: ByHand, tolerance: float = 1e-8) -> None:
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, hand.named[name], floor=1e-2) < tolerance, name


EPS = 1e-3
"""By the default, Adam and its like would blow up rounding, which is all that the gradient of the keys' bias is."""

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, eps=EPS, amsgrad=True, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, eps=EPS, amsgrad=True, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=EPS),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, eps=EPS, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=EPS, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=EPS, fused=True),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=EPS, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=EPS),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=EPS),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_as_on_weights_mixed_by_hand(name: str) -> None:
    model, hand = pair()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours, truth = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](list(hand.named.values()))
    for _ in range(3):
        x = image()
        step(model, ours, x)
        step(hand, truth, x)
    check_same(model, hand)
    coefficients = "blocks.3.norm1.mixing.coefficients"
    assert relative_error(model.get_parameter(coefficients), before[coefficients]) > 1e-6


def test_parameter_groups() -> None:
    """Coefficients in a group of their own: another rate, no decay. Every parameter is in one group, once."""
    model, hand = pair(share="layer")

    def groups(named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
        named = list(named)
        mixing = [p for n, p in named if n.endswith("coefficients")]
        rest = [p for n, p in named if not n.endswith("coefficients")]
        return [
            {"params": rest, "weight_decay": 0.1},
            {"params": mixing, "lr": 0.3, "weight_decay": 0.0},
        ]

    assert len(groups(model.named_parameters())[1]["params"]) == 5
    ours = torch.optim.SGD(groups(model.named_parameters()), lr=0.05)
    truth = torch.optim.SGD(groups(hand.named.items()), lr=0.05)
    assert sum(len(group["params"]) for group in ours.param_groups) == len(list(model.parameters()))
    for _ in range(3):
        x = image()
        step(model, ours, x)
        step(hand, truth, x)
    check_same(model, hand)


def test_layers_may_each_have_a_group() -> None:
    # Neighbours in other groups than the layer that mixes them: no parameter occurs twice, which torch would refuse.
    model, hand = pair()
    groups = [{"params": list(block.parameters()), "lr": 0.01 * (i + 1)} for i, block in enumerate(model.blocks)]
    by_hand = [
        {"params": [p for n, p in hand.named.items() if n.startswith(f"blocks.{i}.")], "lr": 0.01 * (i + 1)}
        for i in range(len(model.blocks))
    ]
    ours, truth = torch.optim.SGD(groups, lr=1.0), torch.optim.SGD(by_hand, lr=1.0)
    x = image()
    step(model, ours, x)
    step(hand, truth, x)
    check_same(model, hand)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW foreach", "AdamW fused"])
def test_neighbours_frozen_and_thawed_between_steps(name: str) -> None:
    """A frozen source gets no gradient and stays; the mix goes on with it, and its own training again when thawed."""
    model, hand = pair()
    ours, truth = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](list(hand.named.values()))
    neighbours = [n for n, _ in model.named_parameters() if n.startswith(("blocks.2.", "blocks.4."))]
    for frozen in (False, True, False):
        for n in neighbours:
            model.get_parameter(n).requires_grad_(not frozen)
            hand.named[n].requires_grad_(not frozen)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        x = image()
        step(model, ours, x)
        step(hand, truth, x)
        check_same(model, hand)
        for n, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[n])
            assert moved == (not frozen or n not in neighbours), n
            assert (parameter.grad is None) == (frozen and n in neighbours), n
    # One of two frozen: the other learns.
    model.blocks[2].requires_grad_(False)
    model.zero_grad()
    model(image()).sum().backward()
    assert all(p.grad is None for p in model.blocks[2].parameters())
    assert all(p.grad is not None for p in model.blocks[4].parameters())


def test_frozen_coefficients() -> None:
    model, hand = pair()
    (mixing,) = (m for m in model.modules() if isinstance(m, rl.nn.Coefficients))
    mixing.requires_grad_(False)
    hand.coefficients.requires_grad_(False)
    before = mixing.coefficients.detach().clone()
    ours, truth = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](list(hand.named.values()))
    x = image()
    step(model, ours, x)
    step(hand, truth, x)
    check_same(model, hand)
    assert torch.equal(mixing.coefficients, before)


def test_an_optimizer_resumes_from_its_state() -> None:
    model, _ = pair()
    optimizer = OPTIMIZERS["AdamW fused"](model.parameters())
    step(model, optimizer, image())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    x = image()
    step(model, optimizer, x)
    again, _ = pair()
    resumed = OPTIMIZERS["AdamW fused"](again.parameters())
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    step(again, resumed, x)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_gradients_applied_as_they_come() -> None:
    """An optimizer a parameter, stepped in its hook: a source's fires once, after all its uses."""
    model, hand = pair()
    fired: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        one = torch.optim.SGD([parameter], lr=0.05)

        def hook(_: Tensor, name: str = name, one: torch.optim.Optimizer = one) -> None:
            fired[name] = fired.get(name, 0) + 1
            one.step()
            one.zero_grad()

        parameter.register_post_accumulate_grad_hook(hook)
    x = image()
    (model(x) * torch.linspace(0.5, 1.5, 5, dtype=x.dtype)).square().mean().backward()
    step(hand, torch.optim.SGD(list(hand.named.values()), lr=0.05), x)
    assert set(fired.values()) == {1} and len(fired) == len(list(model.parameters()))
    check_same(model, hand)
