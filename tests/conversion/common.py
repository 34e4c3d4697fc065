"""Replaced models held against plain ones whose parameters are mixed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

import rl_kernels as rl
from rl_kernels.conversion.plans import PlannedCut
from rl_kernels.nn import Coefficients, ReplacementLayer
from rl_kernels.nn.views import Cut
from tests.nn.common import part_by_hand

Model = TypeVar("Model", bound=nn.Module)
Read = Callable[[Any], Tensor]


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def coefficients_of(model: nn.Module, plan: rl.Plan) -> dict[str, Coefficients]:
    """The coefficients of every layer that the plan replaces, by the layer's path."""
    found = {}
    for block in plan.replaced:
        for layer in block.layers:
            path = join(block.path, layer.path)
            module = model.get_submodule(path)
            assert isinstance(module, ReplacementLayer)
            found[path] = module.coefficient_module
    return found


def mixed_by_hand(plain: nn.Module, plan: rl.Plan, coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of ``plain`` that the plan replaces, as ``a * W[prev] + b * W[next]``, or more of such."""
    parameters = dict(plain.named_parameters())
    mixed = {}
    for block in plan.replaced:
        for layer in block.layers:
            path = join(block.path, layer.path)
            for name in layer.shapes:
                terms = []
                for j, cut in enumerate(layer.cuts or map(PlannedCut, range(len(block.sources)))):
                    tensor = parameters[join(block.sources[cut.neighbour], layer.path, name)]
                    factor = rows_of(name, coefficients[path][j])
                    detached = plan.options.detached([block.distances[cut.neighbour]])
                    part = Cut(cut.out, cut.in_, cut.repeats)
                    tensor = part_by_hand(tensor.detach() if detached else tensor, part)
                    terms.append(
                        factor.reshape(-1, *(1,) * (tensor.dim() - 1)) * tensor if factor.dim() else factor * tensor
                    )
                mixed[join(path, name)] = torch.stack(terms).sum(0)
    return mixed


def rows_of(name: str, coefficients: Tensor) -> Tensor:
    """Of an attention's coefficients by channel those of one of its parameters."""
    if coefficients.dim() == 0 or not name.startswith(("in_proj", "out_proj")):
        return coefficients
    inward = 3 * coefficients.shape[0] // 4
    return coefficients[:inward] if name.startswith("in_proj") else coefficients[inward:]


def spread_out(model: nn.Module) -> None:
    """Make what starts equal (coefficients, norms) different, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "running_var" not in name:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def relative_error(found: Tensor | None, expected: Tensor, floor: float = 0.0) -> float:
    """The error in the norm of ``expected``, which counts as ``floor`` at least."""
    expected = expected.detach()
    difference = float((torch.zeros_like(expected) if found is None else found.detach()).sub(expected).norm())
    return difference / max(float(expected.norm()), floor) if difference else 0.0


def output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def check_replaced(
    model: Model, inputs: Any, read: Read = output, call: dict[str, Any] | None = None, **options: Any
) -> Model:
    """Plan, replace and merge ``model`` in float64; returns it as it is after the replacement.

    The outputs and every gradient are those of a plain copy with parameters mixed by hand, to rounding, in training;
    the running statistics too; merging gives the same outputs in training and evaluation; the state_dict goes round.
    """
    call = call or {}
    model.double().train()
    spread_out(model)
    plain = copy.deepcopy(model)
    plan = rl.plan(model, **options)
    assert rl.replace(model, plan) is model
    spread_out(model)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=False)
    assert plan.parameters_after == sum(p.numel() for p in model.parameters())
    assert plan.parameters == sum(p.numel() for p in plain.parameters())

    before = copy.deepcopy(model.state_dict())
    modules = coefficients_of(model, plan)
    assert len({id(module) for module in modules.values()}) == sum(isinstance(m, Coefficients) for m in model.modules())
    y = read(model(*inputs, **call))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(cotangent)

    leaves = {path: module().detach().clone().requires_grad_() for path, module in modules.items()}
    by_module = {id(module): leaves[path] for path, module in modules.items()}
    leaves = {path: by_module[id(module)] for path, module in modules.items()}
    mixed = mixed_by_hand(plain, plan, leaves)
    expected = read(functional_call(plain, mixed, inputs, call))
    expected.backward(cotangent)

    assert relative_error(y, expected) < 1e-10
    replaced = set(mixed)
    # Some gradients vanish but for rounding: of a bias before a batch norm, or of the keys' bias in attention.
    floor = 1e-4 * max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if name in replaced:
            assert name not in found
        elif parameter.grad is None:
            assert found[name] is None or not found[name].any(), name
        else:
            assert relative_error(found[name], parameter.grad, floor) < 1e-10, name
    for path, module in modules.items():
        (parameter,) = module.parameters()
        (gradient,) = torch.autograd.grad(module(), parameter, leaves[path].grad)
        assert parameter.grad is not None and parameter.grad.abs().min() > 0
        assert relative_error(parameter.grad, gradient) < 1e-10, path
    plain_buffers = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, plain_buffers[name], rtol=1e-10, atol=1e-12)

    twin = rl.replace(copy.deepcopy(plain), rl.Plan.from_json(plan.to_json()))
    twin.load_state_dict(before)
    model.load_state_dict(before)
    assert relative_error(read(twin(*inputs, **call)), y) < 1e-12

    for training in (True, False):
        merged = rl.merge(copy.deepcopy(model).train(training))
        assert not any(isinstance(m, (ReplacementLayer, Coefficients)) for m in merged.modules())
        assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
        mixed_output = read(copy.deepcopy(model).train(training)(*inputs, **call))
        assert relative_error(read(merged(*inputs, **call)), mixed_output) < 1e-10
    model.zero_grad()
    return model


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a plan or a refused replacement must leave as it is."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [
        (name, id(t), t._version, t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    return [modules, tensors, attributes]
