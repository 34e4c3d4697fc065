"""What a replaced layer runs on cannot leave its model unnoticed."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import ReplacementLinear

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Model(nn.Module):
    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def replaced(make: Callable[[], nn.Module] = Model) -> Any:
    torch.manual_seed(0)
    model = make()
    return rl.replace(model, rl.plan(model, every=2))


def chain() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))


# Calls.


def cut_with_the_list_alive(model: Any) -> Any:
    model.everything = [model.layers]  # As a local variable would: the old list is whole, and no part of the model.
    model.layers = model.layers[:2]
    return model


def without_a_neighbour(model: Any) -> Any:
    del model.layers[2]
    return model


def another_in_its_place(model: Any) -> Any:
    model.layers[2].inner[0] = nn.Linear(8, 8)
    return model


def another_block(model: Any) -> Any:
    model.layers[2] = Block()
    return model


def quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "leave", [cut_with_the_list_alive, without_a_neighbour, another_in_its_place, another_block, quantised]
)
def test_a_call_notices(leave: Callable[[Any], Any]) -> None:
    model = leave(replaced())
    message = r"^sources\[[01]\]: got a Linear that layers\.[13]\.inner\.[02] runs on and that has left layers\.[024]\."
    with pytest.raises(RuntimeError, match=message):
        model(X)
    with pytest.raises(RuntimeError, match=message):
        rl.merge(model)


def test_coefficients_that_leave_are_noticed() -> None:
    model = replaced()
    model.layers[1].inner[0] = nn.Linear(8, 8)  # It held the block's coefficients.
    with pytest.raises(RuntimeError, match=r"^coefficients: got a Coefficients that layers\.1\.inner\.2 runs on"):
        model(X)


@pytest.mark.parametrize("part", [lambda m: copy.deepcopy(m[1]), lambda m: pickle.loads(pickle.dumps(m))[1]])
def test_a_part_by_itself_warns_once(part: Callable[[Any], Any]) -> None:
    layer = part(replaced(chain))
    with pytest.warns(UserWarning, match=r"^1 \(ReplacementLinear\): the model in which it stood .* is gone"):
        layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)


def compiled_blocks(model: Any) -> Any:
    for i, block in enumerate(model.layers):
        model.layers[i] = torch.compile(block, backend="eager")
    return model


def rebuilt_list(model: Any) -> Any:
    model.layers = nn.ModuleList(model.layers)
    return model


def inserted(model: Any) -> Any:
    model.layers.insert(2, nn.Identity())
    return model


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(copy.deepcopy(m)),
        lambda m: nn.Sequential(m),
        compiled_blocks,
        rebuilt_list,
        inserted,
    ],
    ids=["copy", "pickle", "copy of a copy", "within another", "compiled blocks", "rebuilt list", "inserted"],
)
def test_what_stays_in_the_model_may_move(change: Callable[[Any], Any]) -> None:
    model = replaced()
    expected = model(X)
    model = change(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(stood|outside)")
        torch.testing.assert_close(model(X), expected)
        rl.check(model)
        model.state_dict()


def test_the_copy_notices_too() -> None:
    model = copy.deepcopy(replaced())
    model(X)
    with pytest.raises(RuntimeError, match="has left"):
        without_a_neighbour(model)(X)


def test_rebinding_is_what_the_message_asks_for() -> None:
    model = replaced(chain)
    model[2] = nn.Linear(8, 8)
    model[1].rebind(model[0], model[2])
    model[3].rebind(model[2], model[4])
    model(X)
    model[2] = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="has left 2 of Sequential"):
        model(X)


class Adapter(nn.Module):
    """A hand-made one, of no library's protocol."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.more(x)


def test_an_adapter_around_a_source() -> None:
    model = replaced(chain)
    model[2] = Adapter(model[2])
    with pytest.raises(RuntimeError, match=r"Linear that was put into tests\..*Adapter at 2, whose own computation"):
        model(X)
    model[1].rebind(model[0], model[2].base)
    model[3].rebind(model[2].base, model[4])
    model(X)


# SyncBatchNorm.


def test_batch_norms_follow_their_sources_to_sync_batch_norm() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)))
    rl.replace(model, rl.plan(model, every=2))
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    state = {key: value * 3 if key == "0.1.weight" else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    norm, left, right = model[1][1], model[0][1], model[2][1]
    torch.testing.assert_close(norm.weight, 0.5 * (left.weight + right.weight))
    assert norm.sources == (left, right)
    assert norm.synchronised
    norm.rebind(left, right)
    model.load_state_dict({**state, "0.1.weight": torch.ones(4)}, assign=True)
    torch.testing.assert_close(model(x), expected)
    assert isinstance(rl.merge(model)[1][1], nn.SyncBatchNorm)


# Saved and loaded.


def test_a_saved_part_warns_as_it_is_saved_and_loaded() -> None:
    model = replaced(chain)
    with pytest.warns(UserWarning, match=r"^state_dict: 1 \(ReplacementLinear\) runs on sources\[1\] outside the Sequ"):
        state = model[:2].state_dict()
    with pytest.warns(UserWarning, match=r"^state_dict: 1 was saved without sources\[1\]"):
        replaced(chain)[:2].load_state_dict(state)


def test_a_state_dict_is_of_a_layer_with_the_same_sources() -> None:
    buffer = io.BytesIO()
    torch.save(replaced(chain).state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert sorted(state) == sorted(replaced(chain).state_dict())
    replaced(chain).load_state_dict(state)
    nn.Sequential(replaced(chain)).load_state_dict(nn.Sequential(replaced(chain)).state_dict())

    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    swapped = nn.Sequential(first, ReplacementLinear((last, first)), last)
    straight = nn.Sequential(first, ReplacementLinear((first, last)), last)
    with pytest.raises(
        RuntimeError, match=r"1: got a state_dict of a layer that runs on \.2, \.0, expected .* \.0, \.2"
    ):
        straight.load_state_dict(swapped.state_dict())
    straight.load_state_dict(dict(swapped.state_dict()))  # Without metadata, as from safetensors: nothing is known.


# rl.check.


def test_check_names_what_is_missing() -> None:
    model = replaced()
    rl.check(model)
    model.layers = nn.ModuleList(copy.deepcopy(block) for block in model.layers)
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.inner\.0 \(ReplacementLinear\) misses sources\[0\] \(Linear\); l"
    ):
        rl.check(model)


def test_check_lets_hand_made_layers_know_where_they_stand() -> None:
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(first, ReplacementLinear((first, last)), last)
    rl.check(model)
    model[2] = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="has left 2 of Sequential"):
        model(X)


def test_check_of_an_optimizer() -> None:
    model = chain()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    rl.replace(model, rl.plan(model, every=2))
    with pytest.raises(RuntimeError, match=r"optimizer: got one without 1\.mixing\.coefficients, 3\.mixing"):
        rl.check(model, early)
    rl.check(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_check_of_other_things() -> None:
    with pytest.raises(TypeError, match=r"model: got int, expected an nn\.Module"):
        rl.check(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer: got int"):
        rl.check(chain(), 3)  # type: ignore[arg-type]


# What takes a model apart.


def test_data_parallel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replaced(chain)[1]._replicate_for_data_parallel()


def test_fx_has_a_replaced_layer_as_one_node() -> None:
    model = replaced(chain)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    torch.testing.assert_close(traced(X), model(X))


class MarkedProxy(torch.fx.Proxy):
    """As transformers' tracer makes them."""


class MarkedTracer(torch.fx.Tracer):
    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return MarkedProxy(node, self)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = replaced(chain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](x=x)


def test_fx_by_keyword_and_with_proxies_of_another_class() -> None:
    model = ByKeyword()
    graph = MarkedTracer().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["layers.1"]
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(X), model(X))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_says_merge_first() -> None:
    model = replaced(chain)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: got a ReplacementLinear, .* call rl_kernels\.merge"):
        torch.jit.script(model)
    expected = model(X)
    torch.testing.assert_close(torch.jit.script(rl.merge(model))(X), expected)
