"""The sample inputs that torch ships for its own layers, as cases: values and all gradients, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels._autograd import plain_torch
from rl_kernels.backends import registered
from rl_kernels.testing import assert_as_accurate, compare

BACKENDS = [backend.name for backend in registered()]
OPS = {
    "nn.functional.linear": F.mixed_linear,
    "nn.functional.conv1d": F.mixed_conv1d,
    "nn.functional.conv2d": F.mixed_conv2d,
    "nn.functional.conv3d": F.mixed_conv3d,
}
INFOS = {info.name: info for info in op_db if info.name in OPS}


def samples(name: str) -> list[tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...], dict[str, Any]]]:
    """x, weight, bias and the other arguments of every sample, in float64."""
    found = []
    for sample in INFOS[name].sample_inputs("cpu", torch.float64):
        weight, *rest = sample.args
        kwargs = dict(sample.kwargs)
        bias = rest.pop(0) if rest else kwargs.pop("bias", None)
        found.append((sample.input.detach(), weight.detach(), bias, tuple(rest), kwargs))
    return found


def run(
    name: str,
    x: Tensor,
    weights: list[Tensor],
    coefficients: Tensor,
    biases: list[Tensor] | None,
    rest: Any,
    kwargs: Any,
) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, coefficients, *weights, *(biases or ()))]
    n = len(weights)
    y = OPS[name](leaves[0], leaves[2 : 2 + n], leaves[1], leaves[2 + n :] or None, *rest, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_samples(name: str, backend: str, dtype: torch.dtype) -> None:
    cases = samples(name)
    assert len(cases) >= 10
    for x, weight, bias, rest, kwargs in cases:
        x, weights = x.to(dtype), [weight.to(dtype), torch.randn_like(weight).to(dtype)]
        biases = None if bias is None else [bias.detach().to(dtype), torch.randn_like(bias).to(dtype)]
        coefficients = torch.tensor([0.75, -0.375], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        arguments = (x, weights, coefficients, biases)
        with rl.use_backend(backend):
            found = run(name, *arguments, rest, kwargs)
        with plain_torch():
            plain = run(name, *arguments, rest, kwargs)
            double = [
                None if value is None else [t.double() for t in value] if isinstance(value, list) else value.double()
                for value in arguments
            ]
            truth = run(name, *double, rest, kwargs)  # type: ignore[arg-type]
            squares = run(
                name,
                *[
                    None if v is None else [t.square() for t in v] if isinstance(v, list) else v.square()  # type: ignore[arg-type]
                    for v in double
                ],
                rest,
                kwargs,
            )
        spread = {key: value.abs().sqrt() for key, value in squares.items()}
        assert_as_accurate(compare(found, plain, truth, spread), f"{name} {backend} {tuple(x.shape)} {rest} {kwargs}")


@pytest.mark.parametrize("name", ["nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d"])
def test_error_inputs(name: str) -> None:
    """What torch's convolution refuses, ours refuses, before anything is computed."""
    count = 0
    for error in INFOS[name].error_inputs("cpu"):
        sample = error.sample_input
        weight, *rest = sample.args
        kwargs = dict(sample.kwargs)
        bias = rest.pop(0) if rest else kwargs.pop("bias", None)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            OPS[name](sample.input, [weight], [1.0], None if bias is None else [bias], *rest, **kwargs)
        count += 1
    assert count >= 8
