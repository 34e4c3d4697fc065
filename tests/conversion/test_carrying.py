"""What hangs on a layer goes with it through ``replace`` and ``merge``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl


class Named(nn.Linear):
    def norm_of(self) -> torch.Tensor:
        return self.weight.norm()


def chain(kind: type[nn.Linear] = nn.Linear) -> Any:
    return nn.Sequential(*(kind(8, 8) for _ in range(5)))


def replaced(model: Any) -> Any:
    return rl.replace(model, rl.plan(model, every=2))


@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_attributes_are_carried_and_given_back(through: Callable[[Any], Any]) -> None:
    model = chain()
    for i, layer in enumerate(model):
        layer.f, layer.i, layer.type, layer.detach = -1, i, "Linear", "mine"
    model[1].weight.no_decay = True
    model = through(replaced(model))
    assert (model[1].f, model[1].i, model[1].type, model[1].detach) == (-1, 1, "Linear", ())
    model[1].f = [-1, 4]
    rl.merge(model)
    assert (model[1].f, model[1].i, model[1].type, model[1].detach) == ([-1, 4], 1, "Linear", "mine")
    assert model[1].weight.no_decay
    assert vars(model[1]).keys() == vars(model[0]).keys()


def test_a_subclass_keeps_its_methods_and_comes_back() -> None:
    model = replaced(chain(Named))
    torch.testing.assert_close(model[1].norm_of(), model[1].weight.norm())
    with pytest.raises(AttributeError, match="nothing"):
        model[1].nothing  # noqa: B018
    assert type(rl.merge(model)[1]) is Named


def hook(*_: Any) -> None: ...


@pytest.mark.parametrize(
    ("hang", "what"),
    [
        (lambda m: m.register_state_dict_post_hook(hook), "state_dict_hooks"),
        (lambda m: m.register_state_dict_pre_hook(hook), "state_dict_pre_hooks"),
        (lambda m: m.register_load_state_dict_pre_hook(hook), "load_state_dict_pre_hooks"),
        (lambda m: m.register_load_state_dict_post_hook(hook), "load_state_dict_post_hooks"),
        (lambda m: m.register_forward_hook(hook), "forward_hooks"),
        (lambda m: m.weight.register_hook(hook), "on its weight"),
        (lambda m: m.bias.register_post_accumulate_grad_hook(hook), "on its bias"),
        (lambda m: m.register_buffer("mask", torch.ones(8)), "mask at 1, for which ReplacementLinear has no place"),
        (lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(8))), "gain at 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_lost_is_refused(hang: Callable[[Any], Any], what: str) -> None:
    model = chain()
    for layer in model:
        hang(layer)
    before = [type(layer) for layer in model]
    with pytest.raises(ValueError, match=r"model: got .* at 1\b.*which would be lost") as raised:
        replaced(model)
    assert what in str(raised.value)
    assert [type(layer) for layer in model] == before


def test_a_frozen_model_stays_frozen() -> None:
    model = replaced(chain().requires_grad_(False))
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in rl.merge(model).parameters())
    model = replaced(chain())
    model[0].requires_grad_(False)
    assert all(p.requires_grad for p in rl.merge(model)[1].parameters())
