"""Peak memory of every op on the streamed backend: its documented workspace beyond outputs, nothing weight-sized."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels.backends import streamed
from rl_kernels.testing import peak_memory

MEBI = 1 << 20
WORKSPACE = streamed.workspace_bytes("cpu")


def weights_of(shape: tuple[int, ...], dtype: torch.dtype, n: int = 2) -> list[Tensor]:
    return [torch.randn(shape).mul_(0.01).to(dtype).requires_grad_() for _ in range(n)]


# Weights of 64 MiB and more (float32), four times the workspace; activations of a few MiB at most.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor]]] = {
    "linear": ((32, 4096), (4096, 4096), F.mixed_linear),
    "linear-one-row": ((4096,), (4096, 4096), F.mixed_linear),
    "linear-wide": ((8, 65536), (256, 65536), F.mixed_linear),
    "conv1d": ((1, 2048, 8), (2048, 2048, 4), lambda *a: F.mixed_conv1d(*a, padding=1)),
    "conv2d": ((1, 1536, 7, 7), (1536, 1536, 3, 3), lambda *a: F.mixed_conv2d(*a, padding=1)),
    "conv2d-strided": ((1, 1536, 7, 7), (1536, 1536, 3, 3), lambda *a: F.mixed_conv2d(*a, padding=1, stride=2)),
    "conv2d-grouped": ((1, 4096, 5, 5), (4096, 2048, 3, 3), lambda *a: F.mixed_conv2d(*a, groups=2)),
    "conv3d": ((1, 1024, 3, 3, 3), (1024, 1024, 3, 3, 3), lambda *a: F.mixed_conv3d(*a, padding=1)),
}


def measure(name: str, dtype: torch.dtype, layout: Any, wanted: str) -> tuple[int, int, int]:
    """Peak bytes of forward and of backward beyond what they return, and the bytes of one weight."""
    x_shape, weight_shape, call = CASES[name]
    x = torch.randn(x_shape).to(dtype)
    weights = weights_of(weight_shape, dtype)
    if layout is not torch.contiguous_format:
        x = x.contiguous(memory_format=layout)
        weights = [w.detach().contiguous(memory_format=layout).requires_grad_() for w in weights]
    x.requires_grad_()
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)
    biases = [torch.randn(weight_shape[0]).to(dtype).requires_grad_() for _ in weights]
    inputs = {
        "all": [x, coefficients, *weights, *biases],
        "x": [x],
        "coefficients": [coefficients],
        "one": [weights[1]],
    }[wanted]
    for tensor in (x, coefficients, *weights, *biases):
        tensor.requires_grad_(any(tensor is one for one in inputs))
    y = call(x, weights, coefficients, biases)
    dy = torch.randn_like(y)
    forward = peak_memory(lambda: call(x, weights, coefficients, biases))
    backward = peak_memory(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))
    outputs = sum(tensor.nbytes for tensor in inputs)
    return forward - y.nbytes, backward - outputs, weights[0].nbytes


def bound(name: str) -> int:
    """The documented workspace, and activations that the vendor copies or reorders."""
    x_shape, *_ = CASES[name]
    return WORKSPACE + 4 * torch.Size(x_shape).numel() * 4 + MEBI


@pytest.mark.parametrize("wanted", ["all", "x", "coefficients", "one"])
@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, wanted: str) -> None:
    with rl.use_backend("streamed"):
        forward, backward, weight = measure(name, torch.float32, torch.contiguous_format, wanted)
    assert weight >= 2 * bound(name), "the weight is too small to be told from the workspace"
    assert forward <= bound(name), f"forward took {forward / MEBI:.1f} MiB"
    assert backward <= bound(name), f"backward took {backward / MEBI:.1f} MiB"


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_bfloat16(name: str) -> None:
    with rl.use_backend("streamed"):
        forward, backward, _ = measure(name, torch.bfloat16, torch.contiguous_format, "all")
    assert forward <= bound(name), f"forward took {forward / MEBI:.1f} MiB"
    assert backward <= bound(name), f"backward took {backward / MEBI:.1f} MiB"


@pytest.mark.parametrize("wanted", ["all", "coefficients"])
def test_channels_last(wanted: str) -> None:
    with rl.use_backend("streamed"):
        forward, backward, _ = measure("conv2d", torch.float32, torch.channels_last, wanted)
    assert forward <= bound("conv2d"), f"forward took {forward / MEBI:.1f} MiB"
    assert backward <= bound("conv2d"), f"backward took {backward / MEBI:.1f} MiB"


def test_autocast() -> None:
    """float32 sources are mixed as they are: no cast copies of whole weights, and gradients in float32."""
    x, weights = torch.randn(32, 4096, requires_grad=True), weights_of((4096, 4096), torch.float32)
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mixed_linear(x, weights, coefficients)

    with rl.use_backend("streamed"):
        y = forward()
        assert y.dtype == torch.bfloat16
        assert peak_memory(forward) - y.nbytes <= bound("linear")
        inputs = [x, coefficients, *weights]
        backward = peak_memory(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True))
    assert backward - sum(tensor.nbytes for tensor in inputs) <= bound("linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_activations(dtype: torch.dtype) -> None:
    """Neither does the workspace grow with the activations: 64 MiB of them on weights of 1 MiB."""
    weights = weights_of((512, 512), dtype)
    biases = [torch.randn(512).to(dtype).requires_grad_() for _ in weights]
    x = torch.randn(32768, 512).to(dtype).requires_grad_()
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)
    with rl.use_backend("streamed"):
        y = F.mixed_linear(x, weights, coefficients, biases)
        inputs = [x, coefficients, *weights, *biases]
        dy = torch.ones_like(y)
        forward = peak_memory(lambda: F.mixed_linear(x, weights, coefficients, biases)) - y.nbytes
        backward = peak_memory(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))
    backward -= sum(tensor.nbytes for tensor in inputs)
    assert forward <= WORKSPACE < y.nbytes
    assert backward <= WORKSPACE


def test_the_measure_sees_a_whole_weight() -> None:
    """The reference backend, which does materialise the weight, is caught by the same measure."""
    with rl.use_backend("reference"):
        forward, backward, weight = measure("linear", torch.float32, torch.contiguous_format, "all")
    assert forward >= weight > bound("linear")
    assert backward >= weight > bound("linear")


def test_nothing_is_kept_for_backward() -> None:
    """Between forward and backward only x, the sources and the coefficients are held."""
    held = []
    x, weights = torch.randn(4, 512, requires_grad=True), weights_of((512, 512), torch.float32)
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        F.mixed_linear(x, weights, coefficients)
    assert set(held) <= {t.data_ptr() for t in (x, coefficients, *weights)}


def test_x_is_not_kept_where_no_weight_wants_it() -> None:
    held = []
    x, weights = torch.randn(4, 512, requires_grad=True), [w.detach() for w in weights_of((512, 512), torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        F.mixed_linear(x, weights, [0.5, 0.25])
    assert x.data_ptr() not in held


def test_a_hundred_steps_do_not_grow() -> None:
    x, weights = torch.randn(8, 256, requires_grad=True), weights_of((256, 256), torch.float32)
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)

    def steps(count: int) -> None:
        for _ in range(count):
            F.mixed_linear(x, weights, coefficients).sum().backward()
            for tensor in (x, coefficients, *weights):
                tensor.grad = None

    assert peak_memory(lambda: steps(100)) <= peak_memory(lambda: steps(2)) + MEBI


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_attention(cross: bool) -> None:
    """Self-attention stores no mixed projection; across sequences torch joins the gradients of three parts, once."""
    embed_dim, heads = 2048, 8
    query, key = (torch.randn(4, 1, embed_dim, requires_grad=True) for _ in range(2))
    key = key if cross else query
    packed, out = (
        weights_of((3 * embed_dim, embed_dim), torch.float32),
        weights_of((embed_dim, embed_dim), torch.float32),
    )
    coefficients = torch.tensor([0.5, 0.25], requires_grad=True)

    def forward() -> Tensor:
        output, _ = F.mixed_multi_head_attention(
            *(query, key, key, embed_dim, heads, packed, None, None, None, False, 0.0, out, None),
            need_weights=False,
            coefficients=coefficients,
        )
        return output

    inputs = [query, coefficients, *packed, *out]
    with rl.use_backend("streamed"):
        y = forward()
        assert peak_memory(forward) <= WORKSPACE + MEBI
        backward = peak_memory(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True))
    backward -= sum(tensor.nbytes for tensor in inputs)
    joined = packed[0].nbytes if cross else 0
    assert backward <= WORKSPACE + MEBI + joined, f"backward took {backward / MEBI:.1f} MiB"
