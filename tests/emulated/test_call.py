"""A call from Python to the queue, with a launcher that records: order, workspaces, errors, and the fast path."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rl_kernels as rl
from building.cuda import SOURCES
from rl_kernels import functional as F
from rl_kernels.backends import selection
from rl_kernels.backends.cuda import fast_path
from rl_kernels.backends.cuda.extension import EXTENSION, is_older_than_its_sources
from rl_kernels.backends.gpu.heuristics import use_config
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import emulated, posing
from tests.emulated.problems import BF16, F16, SMALL, TF32, call_of, execute

pytestmark = pytest.mark.skipif(
    EXTENSION.module is None or is_older_than_its_sources(), reason="the CUDA extension is not built from these sources"
)

Event = tuple[Any, ...]


@contextlib.contextmanager
def events() -> Iterator[list[str]]:
    """Inside, what would be done: "allocate", the kernels' names less their sizes and types, and "free"."""
    found: list[str] = []

    def keep(event: Event) -> None:
        found.append(
            re.sub(r"_(pair|general|\d+x\d+|\d+|bf16|f16|tf32)", "", event[1]) if event[0] == "launch" else event[0]
        )

    with posing(keep):
        yield found


def test_workspaces_live_from_before_the_first_launch_to_after_the_last() -> None:
    with use_config(SMALL, 3), events() as found:
        execute(call_of("mixed_linear", Problem(40, 48, 200), BF16))
    assert found == ["allocate", "linear_forward", "linear_reduce", "free"]
    with use_config(SMALL, 3), events() as found:
        execute(call_of("mixed_conv_wgrad", Problem(2, 40, 32, (3, 3), (9, 9), padding=1), BF16))
    launches = ["conv_wgrad", "conv_wgrad_reduce", "finish_sums", "finish_gradients"]
    assert found == ["allocate"] * 3 + launches + ["free"] * 3


def test_what_is_not_wanted_is_not_launched() -> None:
    def launched(**options: Any) -> list[str]:
        with use_config(SMALL), events() as found:
            execute(call_of("mixed_linear_wgrad", Problem(40, 48, 40, **options), BF16))
        return [name for name in found if name not in ("allocate", "free")]

    assert launched(wanted="last", biased=False) == ["linear_wgrad"]
    assert launched(wanted="biases") == ["finish_sums", "finish_gradients"]
    assert launched(wanted="coefficients", biased=False) == ["linear_wgrad", "finish_gradients"]


class Planted(Exception):
    pass


@pytest.mark.parametrize(("kind", "place"), [("allocate", 0), ("allocate", 1), ("launch", 0), ("launch", 1)])
def test_an_error_ends_the_call(kind: str, place: int) -> None:
    """Without memory nothing is queued; where a launch fails, nothing after it; and all memory is given back."""
    seen: list[str] = []

    def record(event: Event) -> None:
        seen.append(event[0])
        if event[0] == kind and seen.count(kind) == place + 1:
            raise Planted

    call = call_of("mixed_linear_wgrad", Problem(300, 48, 40), BF16)
    with use_config(SMALL, 2), pytest.raises(Planted), posing(record):
        execute(call)
    assert seen.count("launch") == (place + 1 if kind == "launch" else 0)
    assert seen.count("free") == seen.count("allocate")
    with events() as found:
        execute(call)
    assert found, "the call after it is served"


def test_errors_name_the_op_and_the_shapes() -> None:
    call = call_of("mixed_linear", Problem(8, 5, 4), BF16)
    with pytest.raises(RuntimeError, match=r"^mixed_linear on \(8, 4\), \(5, 4\), \(5, 4\): .*need tensors on a CUDA"):
        execute(call)
    with (
        posing(None, (80, 108, 1000)),
        pytest.raises(RuntimeError, match=r"^mixed_linear on .*no configuration fits 1000"),
    ):
        execute(call_of("mixed_linear", Problem(40, 50, 40), BF16))


def test_nothing_waits_for_the_gpu_or_takes_memory_past_torch() -> None:
    """So that a call can be captured in a graph, and what it takes is the caching allocator's."""
    host = [*SOURCES.glob("*.cpp"), *SOURCES.glob("host/*"), *(SOURCES.parent / "bindings").rglob("*.cpp")]
    for path in host:
        assert not re.search(r"cuda\w*(Synchronize|Malloc|Free|Memcpy|Memset|Query)\w*\(", path.read_text()), path


# The fast path.


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backend is asked for on a machine that seems to have a GPU; the ops that Python is asked for instead."""
    asked: list[str] = []
    monkeypatch.setattr(fast_path, "has_gpu", lambda: True)
    run = selection.run

    def asked_for(call: Any) -> Any:
        asked.append(call.op)
        with rl.use_backend("reference"):
            return run(call)

    monkeypatch.setattr(selection, "run", asked_for)
    with rl.use_backend("cuda"):
        fast_path.tell()
        yield asked
    monkeypatch.undo()
    fast_path.tell()


def layer(
    dtype: torch.dtype = BF16, sources: int = 2, **changes: Any
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    torch.manual_seed(0)
    weights = [torch.randn(24, 16).to(dtype).requires_grad_() for _ in range(sources)]
    biases = [torch.randn(24).to(dtype).requires_grad_() for _ in range(sources)]
    coefficients = torch.full((sources,), 0.5, requires_grad=True)
    return torch.randn(20, 16).to(dtype).requires_grad_(), weights, coefficients, biases


def test_a_whole_step_takes_no_step_in_python(served: list[str]) -> None:
    x, weights, coefficients, biases = layer()
    with events() as found:
        y = F.mixed_linear(x, weights, coefficients, biases)
        y.backward(torch.ones_like(y))
    assert served == []
    assert [name for name in found if name not in ("allocate", "free")] == [
        *("linear_forward", "linear_dgrad", "linear_wgrad", "finish_sums", "finish_gradients")
    ]
    assert type(y.grad_fn).__name__.startswith("MixedLinear") or "Mixed" in y.grad_fn.name()


def test_profilers_see_its_ops(served: list[str]) -> None:
    x, weights, coefficients, biases = layer()
    with posing(None), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.mixed_linear(x, weights, coefficients, biases).sum().backward()
    assert served == []
    names = {event.name for event in profile.events()}
    assert {f"rl_kernels::mixed_linear{way}" for way in ("", "_dgrad", "_wgrad")} <= names


@pytest.mark.parametrize("conv", [False, True])
def test_its_gradients_are_right(served: list[str], conv: bool) -> None:
    def step(dtype: torch.dtype, way: Any) -> list[Tensor]:
        torch.manual_seed(1)
        shape = (16, 16, 3, 3) if conv else (24, 16)
        weights = [torch.randn(shape).to(F16).to(dtype).requires_grad_() for _ in range(2)]
        biases = [torch.randn(shape[0]).to(F16).to(dtype).requires_grad_() for _ in range(2)]
        x = torch.randn(*((1, 16, 5, 4) if conv else (20, 16))).to(F16).to(dtype).requires_grad_()
        coefficients = torch.tensor([0.5, 0.25], dtype=torch.float64 if dtype == torch.float64 else None)
        coefficients.requires_grad_()
        with way:
            y = (
                F.mixed_conv2d(x, weights, coefficients, biases, padding=1)
                if conv
                else F.mixed_linear(x, weights, coefficients, biases)
            )
            y.backward(torch.ones_like(y))
        gradients = [tensor.grad for tensor in (x, coefficients, *weights, *biases)]
        return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]

    found = step(F16, emulated())
    assert served == []
    expected = step(torch.float64, contextlib.nullcontext())
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4e-3, atol=4e-3 * float(other.abs().max()))


def test_what_is_out_of_the_ordinary_goes_through_python(served: list[str]) -> None:
    def ops(*arguments: Any) -> list[str]:
        served.clear()
        with posing(None):
            F.mixed_linear(*arguments)
        return [*served]

    x, weights, coefficients, biases = layer()
    assert ops(x, weights, coefficients, biases) == []
    with use_config(SMALL):
        assert ops(x, weights, coefficients, biases) == ["mixed_linear"]
    x, weights, coefficients, biases = layer(sources=5)
    assert ops(x, weights, coefficients, biases) == ["mixed_linear"], "more sources than kernels take"
    x, weights, coefficients, biases = layer(TF32)
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("ieee", ["mixed_linear"]), ("tf32", [])):
            matmul.fp32_precision = precision
            assert ops(x, weights, coefficients, biases) == expected, precision
    finally:
        matmul.fp32_precision = before


def test_cpp_reads_the_switch_for_tf32_as_python_does() -> None:
    from rl_kernels._extension import EXTENSION as caller
    from rl_kernels.backends.gpu.operands import TF32 as ALLOWED
    from rl_kernels.backends.gpu.operands import arithmetic

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before: Any = matmul.fp32_precision, cudnn.conv.fp32_precision
    try:
        for linear in ("ieee", "tf32"):
            for conv in ("ieee", "tf32"):
                matmul.fp32_precision, cudnn.conv.fp32_precision = linear, conv
                for convolution in (False, True):
                    allowed = arithmetic(torch.float32, convolution) == ALLOWED
                    assert caller.module.cuda.allows_tf32(convolution) == allowed
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision = before


def test_without_a_pose_the_cpu_kernels_serve_again(served: list[str]) -> None:
    x, weights, coefficients, biases = layer(TF32)
    with rl.use_backend("cpu"):
        fast_path.tell()
        y = F.mixed_linear(x, weights, coefficients, biases)
    assert served == [] and "Mixed" in str(y.grad_fn.name())
