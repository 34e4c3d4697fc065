"""What the fast path leaves to Python, and what the backend leaves to others."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels._extension import EXTENSION
from rl_kernels.backends import Case, cpu
from rl_kernels.backends.selection import CannotServe
from rl_kernels.ops import values
from rl_kernels.ops.values import Geometry, Recipe
from rl_kernels.ops.ways import plain_torch
from tests.cpu.common import KINDS, Call, make
from tests.ops.test_errors import CASES


class Subclass(Tensor):
    pass


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_states_out_of_the_ordinary(kind: str) -> None:
    call = make(kind, needs=False)
    assert call.fast() is not None
    for state in (
        Dispatch(),
        Function(),
        plain_torch(),
        torch.autocast("cpu", torch.bfloat16),
        rl.use_backend("streamed"),
        rl.use_backend("reference"),
    ):
        with state:
            assert call.fast() is None, state
        assert call.fast() is not None, state
    with rl.use_backend("streamed"), rl.use_backend("cpu"):
        assert call.fast() is not None
    with rl.use_backend("auto"):
        assert make("linear").fast() is not None

    def transformed(x: Tensor) -> Tensor:
        assert Call(kind, x, call.weights, call.coefficients, call.biases, call.geometry).fast() is None
        return x.sum()

    torch.func.grad(transformed)(call.x)
    torch.vmap(transformed)(call.x[None])
    torch.func.jvp(transformed, (call.x,), (call.x,))
    torch.jit.trace(transformed, (call.x,), check_trace=False)


def other_tensors(call: Call) -> dict[str, Call]:
    def with_x(x: Any) -> Call:
        return Call(call.kind, x, call.weights, call.coefficients, call.biases, call.geometry)

    def with_weights(weights: Any) -> Call:
        return Call(call.kind, call.x, weights, call.coefficients, call.biases, call.geometry)

    def with_coefficients(coefficients: Any) -> Call:
        return Call(call.kind, call.x, call.weights, coefficients, call.biases, call.geometry)

    def with_biases(biases: Any) -> Call:
        return Call(call.kind, call.x, call.weights, call.coefficients, biases, call.geometry)

    w, b = call.weights, call.biases
    assert b is not None
    return {
        "x of a subclass": with_x(call.x.as_subclass(Subclass)),
        "x on meta": with_x(call.x.to("meta")),
        "x no tensor": with_x(call.x.tolist()),
        "x of another dtype": with_x(call.x.double()),
        "x conjugated lazily": with_x(call.x.to(torch.complex64).conj()),
        "x sparse": with_x(call.x.to_sparse()),
        "x negated lazily": with_x(torch._neg_view(call.x)),
        "x too narrow": with_x(call.x[:, :1]),
        "no weights": with_weights([]),
        "weights of a generator": with_weights(w_ for w_ in w),
        "weights of two shapes": with_weights([w[0], w[1][:3]]),
        "weights of two dtypes": with_weights([w[0], w[1].double()]),
        "weights of a subclass": with_weights([w[0], w[1].as_subclass(Subclass)]),
        "too few weights": with_weights([w[0]]),
        "integer coefficients": with_coefficients((1, 2)),
        "tensors as coefficients": with_coefficients((torch.tensor(1.0), torch.tensor(2.0))),
        "a number as coefficients": with_coefficients(1.0),
        "coefficients of another dtype": with_coefficients(torch.ones(2, dtype=torch.float64)),
        "coefficients of another shape": with_coefficients(torch.ones(2, 5)),
        "too few coefficients": with_coefficients((1.0,)),
        "too few biases": with_biases([b[0]]),
        "biases of another shape": with_biases([b_[:3] for b_ in b]),
        "biases of another dtype": with_biases([b_.double() for b_ in b]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_out_of_the_ordinary(kind: str) -> None:
    for name, call in other_tensors(make(kind, needs=False)).items():
        assert call.fast() is None, name


def test_parameters_are_ordinary() -> None:
    call = make("linear")
    weights = [nn.Parameter(w.detach()) for w in call.weights]
    assert Call("linear", call.x, weights, call.coefficients, call.biases).fast() is not None


def test_dual_numbers() -> None:
    call = make("linear", needs=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call.x, torch.ones_like(call.x))
        assert Call("linear", dual, call.weights, call.coefficients, call.biases).fast() is None
        tangent = forward_ad.unpack_dual(F.mixed_linear(dual, call.weights, call.coefficients)).tangent
    torch.testing.assert_close(tangent, F.mixed_linear(torch.ones_like(call.x), call.weights, call.coefficients))


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": "1"},
        {"stride": 0},
        {"stride": (1, 1, 1)},
        {"stride": True},
        {"stride": 2**70},
        {"padding": "same"},
        {"padding": -1},
        {"dilation": 0},
        {"dilation": 9},
        {"groups": 0},
        {"groups": 4},
        {"groups": 1.0},
    ],
    ids=str,
)
def test_geometries_out_of_the_ordinary(changed: dict[str, Any]) -> None:
    call = make("conv", needs=False)
    assert Call("conv", call.x, call.weights, call.coefficients, None, call.geometry | changed).fast() is None


@pytest.mark.parametrize("value", [2, (2, 2), [2, 2], (2,)], ids=str)
def test_geometries_in_other_words(value: Any) -> None:
    call = make("conv", needs=False)
    y = call()
    again = Call("conv", call.x, call.weights, call.coefficients, call.biases, call.geometry | {"stride": value})
    found = again.fast()
    assert found is not None and torch.equal(found, y)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_the_same_words_on_every_backend(name: str) -> None:
    function, arguments, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        function(*arguments)


def too_many(n: int = 40) -> tuple[Tensor, list[Tensor], Tensor]:
    """More sources than the kernels mix."""
    return torch.randn(4, 7), [torch.randn(6, 7) for _ in range(n)], torch.randn(n)


def test_a_refused_call() -> None:
    x, weights, coefficients = too_many()
    reason = EXTENSION.module.why_not_linear(x, weights)
    assert reason is not None
    with pytest.raises(CannotServe, match=f"'cpu' cannot serve mixed_linear .*: {reason}"):
        F.mixed_linear(x, weights, coefficients)
    with rl.use_backend("streamed"):
        expected = F.mixed_linear(x, weights, coefficients)
    with rl.use_backend("auto"):
        assert torch.equal(F.mixed_linear(x, weights, coefficients), expected)


def test_a_refused_call_has_gradients() -> None:
    x, weights, coefficients = too_many()
    for leaf in (x, coefficients, *weights):
        leaf.requires_grad_()
    with rl.use_backend("auto"):
        F.mixed_linear(x, weights, coefficients).sum().backward()
    assert all(leaf.grad is not None for leaf in (x, coefficients, *weights))


def test_a_call_on_which_another_backend_is_faster() -> None:
    """``auto`` leaves it to the next backend; asked for by name, this one takes it."""
    generator = torch.Generator().manual_seed(0)
    for channels, size, kernel, dilation, groups in (
        (16, 8, 3, 1, 1),
        (64, 32, 3, 1, 1),
        (64, 14, 3, 2, 1),
        (32, 8, 3, 1, 32),
        (64, 28, 1, 1, 1),
        (8, 8, 5, 1, 8),
    ):
        x = torch.randn(2, channels, size, size, generator=generator)
        weights = [torch.randn(channels, channels // groups, kernel, kernel, generator=generator) for _ in range(2)]
        options = {"stride": 1, "padding": 0, "dilation": dilation, "groups": groups}
        call = Call("conv", x, weights, torch.tensor([0.5, 0.25]), None, options)
        geometry = Geometry([1, 1], [0, 0], [dilation, dilation], groups)
        asked = values.Call("mixed_conv", x, Recipe(weights, call.coefficients), geometry)
        slower = cpu.BACKEND.worse(Case("mixed_conv", "cpu", x.dtype), asked) is not None
        assert cpu.BACKEND.why_not_call(asked) is None
        forced = call.fast()
        assert forced is not None
        with rl.use_backend("auto"):
            assert (call.fast() is None) == slower
            torch.testing.assert_close(call(), forced, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("capability", EXTENSION.module.build_info()["capabilities"] if EXTENSION.module else [])
def test_the_environment_lowers_the_capability(capability: str) -> None:
    program = (
        "import torch, rl_kernels as rl\n"
        "from rl_kernels.backends import cpu\n"
        "x, w = torch.randn(4, 7), torch.randn(6, 7)\n"
        "with rl.use_backend('cpu'): y = rl.functional.mixed_linear(x, (w,), (1.0,))\n"
        "torch.testing.assert_close(y, x @ w.t())\n"
        "print(cpu.capability())"
    )
    environment = {**os.environ, "RL_KERNELS_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == capability


def test_build_info_says_what_was_built() -> None:
    info = cpu.build_info()
    assert info["torch"] == torch.__version__
    assert info["capability"] in info["capabilities"] and "scalar" in info["capabilities"]
    assert 0 < info["workspace_bytes_a_thread"] <= 4 << 20
