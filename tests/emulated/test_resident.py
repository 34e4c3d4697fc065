"""The CUDA kernels for convolutions of few channels, executed, against those of the mixed weight in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels.backends.gpu.heuristics import cdiv
from rl_kernels.ops.shapes import conv_output_size
from rl_kernels.ops.values import Geometry
from tests.emulated.backend import Edit, emulated, multiply
from tests.emulated.exact import assert_near, mixed, operand
from tests.emulated.machine.memory import Fault
from tests.emulated.test_skinny import BF16, F16, F32

LAYOUTS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


class Problem:
    """One convolution: x (batch, channels, *sizes), and sources (out, channels / groups, *taps)."""

    def __init__(
        self,
        x: Sequence[int],
        out: int,
        taps: Sequence[int],
        dtype: torch.dtype,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        sources: int = 2,
        per_channel: bool = False,
        bias: bool = False,
        channels_last: bool = True,
        stages: int = 3,
        padded: bool = False,
    ):
        self.layout = LAYOUTS[len(x)] if channels_last else torch.contiguous_format
        weight = (out, x[1] // groups, *taps)
        self.weights = [self.made(*weight, dtype=dtype) for _ in range(sources)]
        if padded:  # aligned, with something after the channels
            more = out, cdiv(weight[1], 8) * 8, *taps
            self.weights = [self.made(*more, dtype=dtype)[:, : weight[1]] for _ in range(sources)]
        self.biases = [torch.randn(out).to(dtype) for _ in range(sources)] if bias else None
        self.coefficients = torch.randn((sources, out) if per_channel else (sources,))
        self.x = self.made(*x, dtype=dtype)
        every = len(taps)
        self.geometry = Geometry([stride] * every, [padding] * every, [dilation] * every, groups)
        self.stages = stages
        spatial = conv_output_size(x[2:], taps, self.geometry)
        self.dy = self.made(x[0], out, *spatial, dtype=dtype)

    def made(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if len(shape) == 3 and self.layout == torch.contiguous_format:  # channels innermost, by itself
            return torch.randn(shape[0], shape[2], shape[1]).to(dtype).transpose(1, 2)
        return torch.randn(*shape).to(dtype).contiguous(memory_format=self.layout)

    def forward(self, blocks: int = 2, **launch: Any) -> Tensor:
        y = torch.full_like(self.dy, torch.nan)
        self.multiply(y, self.x, self.biases, False, blocks, **launch)
        return y

    def dgrad(self, blocks: int = 2, **launch: Any) -> Tensor:
        dx = torch.full_like(self.x, torch.nan)
        self.multiply(dx, self.dy, None, True, blocks, **launch)
        return dx

    def multiply(
        self,
        out: Tensor,
        activation: Tensor,
        biases: list[Tensor] | None,
        transposed: bool,
        blocks: int,
        seed: int = 0,
        late: bool | None = None,
        edit: Edit | None = None,
    ) -> None:
        recipe = self.weights, self.coefficients, biases
        with emulated(seed, late, edit) as launched:
            multiply(out, activation, recipe, transposed, self.geometry, resident=(blocks, self.stages))
        assert launched and all(name.startswith("resident") for name in launched)

    @property
    def y(self) -> Tensor:
        """What the result should be."""
        bias = None if self.biases is None else mixed(self.biases, self.coefficients).double()
        return torch.ops.aten.convolution(operand(self.x), self.weight, bias, *self.arguments)

    @property
    def dx(self) -> Tensor:
        x = operand(self.x).requires_grad_()
        torch.ops.aten.convolution(x, self.weight, None, *self.arguments).backward(operand(self.dy))
        assert x.grad is not None
        return x.grad

    @property
    def weight(self) -> Tensor:
        return operand(mixed(self.weights, self.coefficients))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """A convolution's, as torch takes them."""
        stride, padding, dilation, groups = self.geometry
        return stride, padding, dilation, False, [0] * len(stride), groups


@pytest.mark.parametrize(
    ("x", "out", "taps", "dtype", "options"),
    [
        # Five tiles for two blocks, of images that end within them.
        ((3, 16, 14, 13), 40, (3, 3), BF16, {"padding": 1, "late": True}),
        ((2, 48, 9, 8), 64, (3, 3), BF16, {"stride": 2, "padding": 1, "stages": 4, "late": False}),
        ((1, 64, 12, 12), 20, (1, 1), BF16, {"sources": 1, "per_channel": True, "bias": True, "stages": 2}),
        ((1, 12, 6, 7), 20, (1, 1), BF16, {"padded": True}),
        ((2, 3, 11, 7), 16, (3, 3), F16, {"dilation": 2, "padding": 2, "channels_last": False, "bias": True}),
        ((2, 24, 10, 9), 48, (2, 3), F16, {"groups": 3, "padding": 1, "sources": 3, "per_channel": True}),
        ((2, 13, 150), 17, (5,), F16, {"stride": 3, "padding": 2, "channels_last": False, "stages": 4}),
        ((1, 12, 4, 5, 6), 8, (2, 2, 2), F32, {"padding": 1, "bias": True, "late": True}),
        ((2, 20, 8, 9), 36, (3, 2), F32, {"stride": 2, "padding": 1, "sources": 4, "stages": 2}),
        ((1, 7, 13, 6), 33, (3, 3), F32, {"padding": 1, "channels_last": False, "per_channel": True}),
    ],
)
def test_resident(x: Sequence[int], out: int, taps: Sequence[int], dtype: torch.dtype, options: dict[str, Any]) -> None:
    late = options.get("late")
    problem = Problem(x, out, taps, dtype, **{name: value for name, value in options.items() if name != "late"})
    assert_near(problem.forward(seed=1, late=late), problem.y)
    assert_near(problem.dgrad(seed=2, late=late), problem.dx)


def infinite(dtype: torch.dtype, edit: Edit | None = None) -> None:
    """An infinite coefficient makes everything infinite, and nothing nan; channels and steps are filled up with 0."""
    problem = Problem((1, 13, 6, 7), 13, (3, 3), dtype)
    for tensor in (*problem.weights, problem.x, problem.dy):
        tensor.abs_().add_(0.5)
    problem.coefficients.copy_(torch.tensor([torch.inf, 1.0]))
    assert (problem.forward(edit=edit) == torch.inf).all()
    # All taps meet dy only there.
    assert (problem.dgrad(edit=edit)[:, :, 2:-2, 2:-2] == torch.inf).all()


@pytest.mark.parametrize("dtype", [F16, F32])
def test_infinite_coefficients(dtype: torch.dtype) -> None:
    infinite(dtype)


def test_infinite_values() -> None:
    problem = Problem((1, 13, 6, 7), 13, (3, 3), F16)
    problem.x[0, 0, 3, 3] = problem.dy[0, 0, 3, 3] = torch.inf
    for found, expected in ((problem.forward(), problem.y), (problem.dgrad(), problem.dx)):
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found.isnan(), expected.isnan())


def test_repeats() -> None:
    """The result has the same bits, however many blocks there are, and in whatever order they run."""
    problem = Problem((2, 12, 13, 12), 16, (3, 3), F32, padding=1)
    assert torch.equal(problem.forward(blocks=1, seed=1), problem.forward(blocks=3, seed=2))


@pytest.mark.parametrize(
    ("old", "new", "caught"),
    [
        ("Operand::offset(feature, chunk % CHUNKS)", "feature * 64 + chunk % CHUNKS * 16", AssertionError),
        ("__syncthreads(); // the pipeline has one before", "// the pipeline has one before", Fault),
    ],
)
def test_planted_faults(old: str, new: str, caught: type[Exception]) -> None:
    problem = Problem((2, 12, 13, 12), 16, (3, 3), F32, padding=1)
    assert_near(problem.forward(blocks=1), problem.y)
    with pytest.raises(caught):
        assert_near(problem.forward(blocks=1, edit=("resident.cuh", old, new)), problem.y)


def test_a_planted_fault_past_the_last_channel() -> None:
    mask = "{e < inside ? mixed[r].x : 0.0f, e + 1 < inside ? mixed[r].y : 0.0f}"
    with pytest.raises(AssertionError):
        infinite(F32, ("resident.cuh", mask, "mixed[r]"))
