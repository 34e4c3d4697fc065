"""The kernels for GPUs on the hardware they are for: odd shapes first, then what only a GPU can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.backends import Case, registered
from rl_kernels.ops.schema import OPS
from rl_kernels.qualify import correctness
from rl_kernels.testing import peak_memory

MEBI = 1 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_right_and_deterministic_in_every_configuration(name: str, op: str, dtype: torch.dtype) -> None:
    """The checks of ``qualify``: odd shapes, all gradients, each configuration, the same bits twice."""
    backend = next(backend for backend in registered() if backend.name == name)
    case, device = Case(op, "cuda", dtype), torch.device("cuda")
    with torch.no_grad():
        assert list(correctness.failures(backend, correctness.trials_of(backend, case), case, device)) == []


def linear_and_conv(device: str = "cuda") -> nn.Module:
    # Nobody else holds the sources: they are moved before they are mixed.
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    linears = [nn.Linear(256, 256, **options) for _ in range(2)]
    convolutions = [nn.Conv2d(64, 64, 3, padding=1, **options) for _ in range(2)]
    for convolution in convolutions:
        convolution.to(memory_format=torch.channels_last)
    return nn.Sequential(
        rl.nn.ReplacementConv2d.from_neighbours(*convolutions),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        rl.nn.ReplacementLinear.from_neighbours(*linears),
    )


def images() -> Tensor:
    return torch.randn(8, 64, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)


def test_no_synchronisation(name: str) -> None:
    """Neither forward nor backward waits for the device."""
    model, x = linear_and_conv(), images()
    with rl.use_backend(name):
        model(x).sum().backward()  # Compiles.
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def test_cuda_graph(name: str) -> None:
    """Captured once, replayed on other inputs and other coefficients: these are read on the device."""
    model, x = linear_and_conv(), images()
    parameters = list(model.parameters())
    with rl.use_backend(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(model(x).sum(), parameters)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
            gradients = torch.autograd.grad(y.sum(), parameters)
        x.copy_(images())
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.7)
        graph.replay()
        expected = model(x)
        assert torch.equal(y, expected)
        for found, right in zip(gradients, torch.autograd.grad(expected.sum(), parameters), strict=True):
            assert torch.equal(found, right)


def test_compiled_as_one_op(name: str) -> None:
    model, x = linear_and_conv(), images()
    compiled = torch.compile(model, fullgraph=True)
    with rl.use_backend(name):
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


def test_memory(name: str) -> None:
    """Nothing weight-sized beyond outputs and gradients: weights of 128 MiB, a workspace of at most 2 x 32."""
    weights = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    coefficients = torch.tensor([0.5, 0.5], device="cuda", requires_grad=True)
    x = torch.randn(64, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with rl.use_backend(name):
        with torch.no_grad():
            assert peak_memory(lambda: rl.functional.mixed_linear(x, weights, coefficients), "cuda") <= 40 * MEBI
        y = rl.functional.mixed_linear(x, weights, coefficients)
        inputs = (x, coefficients, *weights)
        peak = peak_memory(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True), "cuda")
        assert peak <= (2 * 128 + 80) * MEBI


def test_beyond_32_bits(name: str) -> None:
    """An activation and an output of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    rows, features = (1 << 31) // 4096 + 3, 4096
    x = torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(features, device="cuda")
    weights = [torch.randn(features, features, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2)]
    with rl.use_backend(name):
        y = rl.functional.mixed_linear(x, weights, (0.5, 0.5))
        last = rl.functional.mixed_linear(x[-1:].clone(), weights, (0.5, 0.5))
    torch.testing.assert_close(y[-1:], last, rtol=2e-2, atol=2e-2)
    assert not y[:-1].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device(name: str) -> None:
    """Kernels run on the operands' device, whose current stream they are queued on, whatever the current device."""
    weights = [torch.randn(64, 48, device="cuda:1", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    coefficients = torch.tensor([0.5, 0.5], device="cuda:1", requires_grad=True)
    x = torch.randn(40, 48, device="cuda:1", dtype=torch.bfloat16)
    expected = x.float() @ (weights[0].float() / 2 + weights[1].float() / 2).t()
    with rl.use_backend(name), torch.cuda.device(0):
        y = rl.functional.mixed_linear(x, weights, coefficients)
        y.sum().backward()
        assert torch.cuda.current_device() == 0
    assert y.device == x.device and weights[0].grad is not None
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=0.5)


def test_another_stream(name: str) -> None:
    """Kernels run on the current stream."""
    weights = [torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    expected = rl.functional.mixed_linear(x, weights, (0.5, 0.5))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with rl.use_backend(name), torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        y = rl.functional.mixed_linear(late, weights, (0.5, 0.5))
    stream.synchronize()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=0.5)
