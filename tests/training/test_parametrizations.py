"""Sources whose weights are parametrised: the mix sees what the sources' own forward sees, or says that it cannot."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

import rl_kernels as rl
from rl_kernels.nn import ReplacementConv2d, ReplacementLinear, ReplacementMultiheadAttention

Apply = Callable[[nn.Module], Any]

PARAMETRIZATIONS: dict[str, Apply] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
HOOKED: dict[str, Apply] = {
    "weight_norm": hooked_weight_norm,
    "spectral_norm": hooked_spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}


class ByHand(nn.Module):
    """What a replaced layer computes, in plain torch, reading the sources' weights as often."""

    def __init__(self, layer: Any, call: Callable[..., Tensor]):
        super().__init__()
        self.coefficients = nn.Parameter(layer.coefficients.detach().clone())
        self.sources = [*layer.sources]  # Not registered: the model has them.
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.coefficients
        prev, last = self.sources
        return self.call(
            x, a * prev.weight + b * last.weight, None if prev.bias is None else a * prev.bias + b * last.bias
        )


def of_linears(apply: Apply, which: str, before: bool) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(3)
    prev, last = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    chosen = {"prev": [prev], "next": [last], "both": [prev, last]}[which]
    for source in chosen if before else ():
        apply(source)
    layer = ReplacementLinear.from_neighbours(prev, last, init=(0.3, 0.9))
    for source in () if before else chosen:
        apply(source)
    return nn.Sequential(prev, nn.Tanh(), layer, nn.Tanh(), last), layer


def by_hand(model: nn.Sequential, call: Callable[..., Tensor] = nn.functional.linear) -> nn.Sequential:
    twin = copy.deepcopy(model)
    twin[2] = ByHand(twin[2], call)
    return twin


def check_training(model: nn.Sequential, twin: nn.Sequential, x: Tensor) -> None:
    """Three steps, in training and evaluation: outputs, gradients, parameters and buffers are those by hand."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    names = {"2.mixing.coefficients": "2.coefficients"}
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs = [m(x) for m in (model, twin)]
        torch.testing.assert_close(*outputs, rtol=1e-7, atol=1e-9)
        for y in outputs:
            (y.square().mean() + y.sum()).backward()
        for name, parameter in model.named_parameters():
            truth = twin.get_parameter(names.get(name, name))
            assert parameter.grad is not None and parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, truth.grad, rtol=1e-7, atol=1e-9)
        for optimizer in optimizers:
            optimizer.step()
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize(
    ("which", "before"), [("both", True), ("both", False), ("prev", False), ("next", False)], ids=str
)
def test_parametrised_neighbours_train_as_by_hand(name: str, which: str, before: bool) -> None:
    model, _ = of_linears(PARAMETRIZATIONS[name], which, before)
    check_training(model, by_hand(model), torch.randn(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrised_convolutions_train_as_by_hand(name: str) -> None:
    convolutions = [nn.Conv2d(4, 4, 3, padding=1, bias=False).double() for _ in range(2)]
    for convolution in convolutions:
        PARAMETRIZATIONS[name](convolution)
    layer = ReplacementConv2d.from_neighbours(*convolutions)
    model = nn.Sequential(convolutions[0], nn.Tanh(), layer, nn.Tanh(), convolutions[1])
    twin = by_hand(model, lambda x, weight, bias: nn.functional.conv2d(x, weight, bias, padding=1))
    check_training(model, twin, torch.randn(2, 4, 5, 5, dtype=torch.float64))


def test_parametrised_attention_is_seen() -> None:
    sources = [nn.MultiheadAttention(8, 2).double() for _ in range(2)]
    layer = ReplacementMultiheadAttention(sources, init=(0.3, 0.9))
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    before = layer(x, x, x)[0]
    for source in sources:
        parametrizations.weight_norm(source, "in_proj_weight")
        parametrizations.weight_norm(source.out_proj)
    torch.testing.assert_close(layer(x, x, x)[0], before)
    with torch.no_grad():
        sources[0].parametrizations.in_proj_weight.original0.mul_(3)
        sources[1].out_proj.parametrizations.weight.original0.mul_(2)
    after = layer(x, x, x)[0]
    torch.testing.assert_close(after, layer.merged()(x, x, x)[0])
    assert not torch.allclose(after, before)
    after.sum().backward()
    for source in sources:
        assert source.parametrizations.in_proj_weight.original1.grad.any()
        assert source.out_proj.parametrizations.weight.original1.grad.any()


def test_cached_and_removed_parametrizations() -> None:
    model, layer = of_linears(parametrizations.weight_norm, "both", True)
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = model(x)
    with parametrize.cached():
        torch.testing.assert_close(model(x), expected)
    for source in layer.sources:
        parametrize.remove_parametrizations(source, "weight")
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrised_model_merges_and_goes_round_by_state_dict(name: str) -> None:
    model, _ = of_linears(PARAMETRIZATIONS[name], "both", True)
    model.eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    again, _ = of_linears(PARAMETRIZATIONS[name], "both", True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(again.eval()(x), model(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(rl.merge(again)(x), model(x), rtol=1e-7, atol=1e-9)


def test_parametrised_neighbours_compile() -> None:
    model, _ = of_linears(parametrizations.weight_norm, "both", True)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 5, dtype=torch.float64)
    outputs = [torch.compile(model, backend="aot_eager", fullgraph=True)(x), twin(x)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.sum().backward()
    for found, truth in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, truth.grad)


def test_one_parametrised_source_beside_a_plain_one_is_refused_when_a_layer_is_made() -> None:
    message = r"^sources\[0\]: got parametrizations\.weight\.original0 \(5, 1\), expected None as sources\[1\]|"
    message += r"^sources\[1\]: got parametrizations\.weight\.original0 None, expected \(5, 1\) as sources\[0\]"
    with pytest.raises(ValueError, match=message):
        of_linears(parametrizations.weight_norm, "prev", True)


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_weights_that_hooks_make_are_refused(name: str, before: bool) -> None:
    """The deprecated kind makes a weight when its layer runs: the next neighbour's is still that of the last step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model, layer = of_linears(HOOKED[name], "both", before)
    x = torch.randn(3, 5, dtype=torch.float64)
    message = r"^sources: got a Linear whose weight is made by \w+ of torch\.nn\.utils\.\w+ in its own forward, out of "
    with pytest.raises(RuntimeError, match=message):
        model(x)
    with pytest.raises(RuntimeError, match=message):
        _ = layer.weight
    with pytest.raises(RuntimeError, match=message):
        rl.merge(model)


def test_a_plan_keeps_off_weights_that_hooks_make() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    prune.l1_unstructured(model[1], "weight", amount=0.3)
    with pytest.raises(ValueError, match="nothing can be replaced"):
        rl.plan(model, every=2)
