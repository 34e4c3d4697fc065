"""Replaced layers held against plain torch on weights that are mixed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rl_kernels.nn import ReplacementLayer
from rl_kernels.nn.views import Cut

Factor = Callable[[str, Tensor, Tensor], Tensor]
"""The name of a parameter, a source's coefficients ``()`` or ``(out,)``, the parameter: what multiplies it."""


def by_first_dimension(name: str, coefficients: Tensor, parameter: Tensor) -> Tensor:
    return coefficients if coefficients.dim() == 0 else coefficients.reshape(-1, *(1,) * (parameter.dim() - 1))


def part_by_hand(parameter: Tensor, cut: Cut) -> Tensor:
    """What of a source's parameter is mixed, by slices and as a whole tensor."""
    for dim, (part, parts) in enumerate((cut.out, cut.in_)[: parameter.dim()]):
        size = parameter.shape[dim] // parts
        parameter = torch.cat([parameter.narrow(dim, part * size, size)] * cut.repeats[dim], dim)
    return parameter


def mixed_by_hand(layer: ReplacementLayer, factor: Factor = by_first_dimension) -> dict[str, Tensor]:
    """The parameters of the plain layer that ``layer`` stands for, differentiable."""
    coefficients = layer.coefficients
    mixed: dict[str, Tensor] = {}
    for j, source in enumerate(layer.sources):
        for name, parameter in source.named_parameters():
            parameter = parameter.detach() if j in layer.detach else parameter
            parameter = part_by_hand(parameter, layer.cuts[j]) if layer.cuts else parameter
            term = factor(name, coefficients[j], parameter) * parameter
            mixed[name] = mixed[name] + term if name in mixed else term
    return mixed


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def leaves_of(layer: ReplacementLayer, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Everything that gets a gradient, by name."""
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    leaves |= {name: p for name, p in layer.named_parameters() if p.requires_grad}
    for parameter in layer.coefficient_module.parameters() if hasattr(layer, "coefficient_module") else ():
        leaves["coefficients"] = parameter
    for j, source in enumerate(layer.sources):
        leaves |= {f"sources[{j}].{name}": p for name, p in source.named_parameters() if p.requires_grad}
    return leaves


def results(
    module: Callable[..., Any], leaves: dict[str, Tensor], inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all ``leaves`` by fixed cotangents, by name; zero where there is none."""
    torch.manual_seed(1)  # Dropout draws the same masks in every run.
    outputs = tensors_of(module(*inputs, **(options or {})))
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def assert_as_by_hand(
    layer: ReplacementLayer,
    *inputs: Any,
    plain: nn.Module | None = None,
    factor: Factor = by_first_dimension,
    rtol: float = 1e-10,
    atol: float = 1e-11,
    **options: Any,
) -> None:
    """Values and all gradients equal those of ``plain`` (by default the first source) with parameters mixed by hand."""
    plain = copy.deepcopy(layer.sources[0] if plain is None else plain).train(layer.training)
    leaves = leaves_of(layer, inputs)
    found = results(layer, leaves, inputs, options)

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        return functional_call(plain, mixed_by_hand(layer, factor), args, kwargs)

    expected = results(by_hand, leaves, inputs, options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_accurate(layer: ReplacementLayer, *inputs: Any, **options: Any) -> None:
    """Values and all gradients are near to those of a float64 copy, in the norm of each tensor."""
    exact = copy.deepcopy(layer).double()
    exact.coefficient_module.double()
    for source in exact.sources:
        source.double()
    doubles: dict[int, Any] = {}  # One object stays one: attention tells self-attention by it.
    for x in inputs:
        wanted = isinstance(x, Tensor) and x.is_floating_point() and id(x) not in doubles
        doubles |= {id(x): x.detach().double().requires_grad_(x.requires_grad)} if wanted else {}
    doubled = [doubles.get(id(x), x) for x in inputs]
    found = results(layer, leaves_of(layer, inputs), inputs, options)
    expected = results(exact, leaves_of(exact, doubled), doubled, options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name].double() - value).norm() / value.norm())
        limit = RELATIVE_ERROR[found["output 0"].dtype]
        assert error < limit, f"{name}: relative error {error:.1e}, allowed {limit:.1e}"
