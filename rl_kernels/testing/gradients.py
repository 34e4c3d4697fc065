"""check_gradients: what users check a layer's or a model's gradients with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_kernels.backends.selection import CannotServe, registered, use_backend
from rl_kernels.nn.layer import ReplacementLayer
from rl_kernels.ops.ways import plain_torch
from rl_kernels.testing.accuracy import Comparison, assert_as_accurate, compare


@dataclass(frozen=True)
class Report:
    """What ``check_gradients`` found; printing it gives one line a tensor.

    Attributes:
        gradcheck: whether finite differences in float64 were compared (they passed).
        comparisons: by backend, one a tensor.
    """

    gradcheck: bool
    comparisons: dict[str, list[Comparison]]

    def __str__(self) -> str:
        lines = ["gradcheck in float64: " + ("passed" if self.gradcheck else "not asked for")]
        for backend, rows in self.comparisons.items():
            lines += [f"{backend}:", *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def check_gradients(
    module: nn.Module,
    *inputs: Any,
    gradcheck: bool = True,
    trials: int = 8,
    backends: Sequence[str] | None = None,
    verbose: bool = True,
) -> Report:
    """Check the gradients of a replaced layer or of a whole model.

    First ``torch.autograd.gradcheck`` (its fast mode) on a float64 copy, by every floating-point input and parameter,
    those of a lone layer's sources included. Then every backend that can serve is compared, in the module's own dtype,
    with plain torch in float64: outputs and all gradients may be off by at most twice what plain torch
    (``a * W1 + b * W2`` materialised) is off by.

    Args:
        module: a layer or model; it is not changed. Dropout is repeated alike in every run.
        inputs: its arguments. Floating-point tensors get gradients; others are passed on.
        gradcheck: whether to run the finite differences (slow for large models).
        trials: how many random output gradients the comparison pools.
        backends: names; by default all that can serve.
        verbose: print the report.

    Returns:
        The report, which prints as one named RMS ratio a tensor.

    Raises:
        CannotServe: a backend that was named cannot serve the module.
        AssertionError: a backend is less accurate than allowed; the message names the tensors.
        torch.autograd.gradcheck.GradcheckError: analytical and numerical gradients differ.
    """
    exact, exact_inputs = _double_copy(module), [_to_double(value) for value in inputs]
    if gradcheck:
        with use_backend("reference"):
            _gradcheck(exact, exact_inputs)
    found: dict[str, list[Comparison]] = {}
    with plain_torch():
        truth = _values(exact, exact_inputs, trials)
        plain = _values(copy.deepcopy(module), inputs, trials)
    for name in [backend.name for backend in registered()] if backends is None else backends:
        try:
            with use_backend(name):
                values = _values(copy.deepcopy(module), inputs, trials)
        except CannotServe:
            if backends is not None:
                raise
            continue
        found[name] = compare(values, plain, truth)
    report = Report(gradcheck, found)
    if verbose:
        print(report)
    for name, rows in found.items():
        assert_as_accurate(rows, f"backend {name!r}")
    return report


def _double_copy(module: nn.Module) -> nn.Module:
    exact = copy.deepcopy(module).double()
    for layer in exact.modules():
        if isinstance(layer, ReplacementLayer):
            for source in layer.sources:  # A lone layer's sources are not its children.
                source.double()
            for shared in layer._borrowed:
                shared.double()
    return exact


def _to_double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _parameters(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each trainable parameter lives, by a readable name: a lone layer's sources included, each tensor once."""
    modules = dict(module.named_modules())
    for path, layer in list(modules.items()):
        if isinstance(layer, ReplacementLayer):
            for j, source in enumerate(layer.sources):
                if source not in modules.values():
                    modules.update({f"{path}.sources[{j}].{p}".strip("."): m for p, m in source.named_modules()})
    found: dict[str, tuple[nn.Module, str]] = {}
    seen: set[int] = set()
    for path, owner in modules.items():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}".strip(".")] = (owner, name)
    return found


@contextlib.contextmanager
def _swapped(places: Sequence[tuple[nn.Module, str]], tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [owner._parameters[name] for owner, name in places]
    try:
        for (owner, name), tensor in zip(places, tensors, strict=True):
            owner._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for (owner, name), parameter in zip(places, before, strict=True):
            owner._parameters[name] = parameter


def _outputs(module: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # Dropout draws the same masks in every run.
        result = module(*inputs)
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def _gradcheck(module: nn.Module, inputs: Sequence[Any]) -> None:
    places = list(_parameters(module).values())
    positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_floating_point()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for i, tensor in zip(positions, tensors, strict=False):
            arguments[i] = tensor
        with _swapped(places, tensors[len(positions) :]):
            return tuple(_outputs(module, arguments))

    leaves = [inputs[i].clone().requires_grad_() for i in positions]
    leaves += [owner._parameters[name].detach().clone().requires_grad_() for owner, name in places]  # type: ignore[union-attr]
    torch.autograd.gradcheck(run, leaves, fast_mode=True)


def _values(module: nn.Module, inputs: Sequence[Any], trials: int) -> dict[str, Tensor]:
    """Outputs, and gradients by random cotangents, stacked over the trials."""
    arguments = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    named: dict[str, Any] = {
        f"input {i}": value for i, value in enumerate(arguments) if isinstance(value, Tensor) and value.requires_grad
    }
    named |= {name: owner._parameters[entry] for name, (owner, entry) in _parameters(module).items()}
    outputs = _outputs(module, arguments)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(0)
    gradients: dict[str, list[Tensor]] = {name: [] for name in named}
    for _ in range(trials):
        cotangents = [
            torch.randn(output.shape, generator=generator).to(torch.bfloat16).to(output.device, output.dtype)
            for output in outputs
        ]
        values = torch.autograd.grad(outputs, list(named.values()), cotangents, retain_graph=True, allow_unused=True)
        for name, value in zip(named, values, strict=True):
            if value is not None:
                gradients[name].append(value)
    return found | {f"gradient of {name}": torch.stack(values) for name, values in gradients.items() if values}
