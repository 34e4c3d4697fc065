"""The sample inputs that torch ships for its own layers, as cases: values and all gradients, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.backends import registered
from rl_kernels.ops.ways import plain_torch
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
    power: int = 1,
) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, coefficients, *weights, *(biases or ()))]
    n = len(weights)
    y = OPS[name](leaves[0], leaves[2 : 2 + n], leaves[1], leaves[2 + n :] or None, *rest, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().to(y.dtype)
    dy = dy**power
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
                power=2,
            )
        spread = {key: value.abs().sqrt() for key, value in squares.items()}
        assert_as_accurate(
            compare(found, plain, truth, spread, dtype), f"{name} {backend} {tuple(x.shape)} {rest} {kwargs}"
        )


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


def attention_samples() -> list[Any]:
    (info,) = (info for info in op_db if info.name == "nn.functional.multi_head_attention_forward")
    # torch's reference inputs: masks, appended and zero keys, static keys, separate projections, batched or not.
    return list(info.reference_inputs("cpu", torch.float64, requires_grad=False))


def test_attention_samples() -> None:
    """Values and all gradients of every sample of torch's attention, against torch's own on the mixed weights."""
    found_samples = attention_samples()
    assert len(found_samples) >= 100
    names = {
        "in_proj_weight": 3, "in_proj_bias": 4, "bias_k": 5, "bias_v": 6, "out_proj_weight": 9, "out_proj_bias": 10
    }  # fmt: skip
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    for sample in found_samples:
        coefficients = torch.tensor([0.75, -0.5], dtype=torch.float64, requires_grad=True)
        inputs = [sample.input, *sample.args[:2]]
        leaves = {id(t): t.detach().clone().requires_grad_() for t in inputs}
        query, key, value = (leaves[id(t)] for t in inputs)
        rest = list(sample.args[2:])
        kwargs = dict(sample.kwargs)
        stacks: dict[str, list[Tensor]] = {}
        for name in (*names, *separate):
            tensor = kwargs.get(name) if name in separate else rest[names[name] - 1]
            if tensor is not None:
                stacks[name] = [tensor.detach().clone(), torch.randn_like(tensor)]
                stacks[name] = [t.requires_grad_() for t in stacks[name]]

        def both(mixed: bool, name: str, stacks: Any = stacks, coefficients: Tensor = coefficients) -> Any:
            if name not in stacks:
                return None
            return stacks[name] if mixed else coefficients[0] * stacks[name][0] + coefficients[1] * stacks[name][1]

        results = []
        for mixed in (False, True):
            arguments, options = list(rest), dict(kwargs)
            for name, position in names.items():
                arguments[position - 1] = both(mixed, name)
            for name in separate:
                options.pop(name, None)
                options[f"{name}s" if mixed else name] = both(mixed, name)
            function: Any = torch.nn.functional.multi_head_attention_forward
            if mixed:
                function, options["coefficients"] = F.mixed_multi_head_attention, coefficients
            torch.manual_seed(0)
            outputs = [t for t in function(query, key, value, *arguments, **options) if t is not None]
            wanted = [*leaves.values(), coefficients, *(t for stack in stacks.values() for t in stack)]
            loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            results.append([*outputs, *gradients])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
