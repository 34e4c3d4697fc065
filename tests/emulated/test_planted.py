"""Faults planted in the CUDA kernels: each is caught by what test_linear.py and test_conv.py do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rl_kernels.qualify.problems import Problem
from tests.emulated import test_linear
from tests.emulated.machine.memory import Fault
from tests.emulated.problems import BF16, run

CONV = Problem(2, 24, 24, (3, 3), (5, 6), padding=1, layout="channels_last")


def odd_linear(op: str, **options: Any) -> None:
    """Five stages' worth of the sum, and tiles that are not full."""
    run(op, Problem(70, 40, 136), BF16, **options)


def padded_conv(op: str, **options: Any) -> None:
    run(op, CONV, BF16, **options)


def wide_conv(op: str, **options: Any) -> None:
    """Steps that lie within a tap."""
    run(op, Problem(2, 32, 32, (3, 3), (5, 6), padding=1, layout="channels_last"), BF16, **options)


SWAPPED = "offset(first + lane % 16, lane / 16)"


FAULTS: dict[str, tuple[Callable[..., object], str, str, str, str]] = {
    "wait removed": (odd_linear, "mixed_linear", "tile.cuh", "ptx::cp_async_wait_group<1>();", ";"),
    "wait weakened": (odd_linear, "mixed_linear", "tile.cuh", "cp_async_wait_group<1>", "cp_async_wait_group<2>"),
    "main loop's barrier removed": (
        odd_linear,
        "mixed_linear",
        "tile.cuh",
        "__syncthreads(); // this stage has arrived",
        "; // this stage has arrived",
    ),
    "stage overwritten too early": (
        odd_linear,
        "mixed_linear",
        "tile.cuh",
        "load(step + stages - 1, free)",
        "load(step + stages - 1, stage)",
    ),
    "barrier before the epilogue removed": (
        odd_linear,
        "mixed_linear",
        "tile.cuh",
        "__syncthreads(); // all that was copied",
        "; // all that was copied",
    ),
    "mask of a copy removed": (
        test_linear.rows_with_padding,
        "mixed_linear",
        "tile.cuh",
        "max(inside, 0) * Element<T>::BYTES",
        "16",
    ),
    "swizzle bit": (odd_linear, "mixed_linear", "tile.cuh", SWAPPED, SWAPPED + " ^ 16"),
    "swizzle bit of rows across the sum": (
        odd_linear,
        "mixed_linear_dgrad",
        "tile.cuh",
        "offset(lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2)",
        "offset(lane / 16 * 8 + (lane % 8 ^ 4), first / 8 + lane / 8 % 2)",
    ),
    "swizzle bit of a step": (
        odd_linear,
        "mixed_linear",
        "tile.cuh",
        "16 * DOWN * STEP_BYTES>(to, at ^ 2 * STEP * CHUNK_BYTES)",
        "16 * DOWN * STEP_BYTES>(to, at)",
    ),
    "halves of a chunk": (odd_linear, "mixed_linear", "tile.cuh", "from + (swapped ? 4 : 0)", "from"),
    "step of the pointers": (odd_linear, "mixed_linear", "product.cuh", "pixels_[i] += E::TILE_DEPTH", ""),
    "step of the pointers of wgrad": (
        odd_linear,
        "mixed_linear_wgrad",
        "wgrad.cuh",
        "x_from_ += STEP * p_.x_strides[0]",
        "x_from_ += p_.x_strides[0]",
    ),
    "tap kept": (wide_conv, "mixed_conv", "product.cuh", "if (channel_ >= p_.channels) {", "if (first_k == 0) {"),
    "padding copied": (wide_conv, "mixed_conv", "product.cuh", "inside ? CHUNK_BYTES : 0", "CHUNK_BYTES"),
    "padding copied by wgrad": (wide_conv, "mixed_conv_wgrad", "wgrad.cuh", "inside ? x_bytes_ : 0", "x_bytes_"),
    "mask of the epilogue removed": (
        odd_linear,
        "mixed_linear",
        "product.cuh",
        "if (pixel >= p_.pixels || inside <= 0)",
        "if (inside <= 0)",
    ),
    "barrier of the dot products removed": (
        odd_linear,
        "mixed_linear_wgrad",
        "wgrad.cuh",
        "warps[j][threadIdx.x / 32] = dot;\n    }\n    __syncthreads();",
        "warps[j][threadIdx.x / 32] = dot;\n    }",
    ),
    "mask of dy's tokens removed": (
        test_linear.infinite_gradient,
        "mixed_linear_wgrad",
        "wgrad.cuh",
        "pixel < p_.pixels ? min(p_.features - feature_, E::IN_CHUNK) : 0",
        "min(p_.features - feature_, E::IN_CHUNK)",
    ),
    "padding read": (
        padded_conv,
        "mixed_conv",
        "product.cuh",
        "exists && Addressing::meets(c, pixel, at) ? min",
        "exists ? min",
    ),
    "padding read by wgrad": (
        padded_conv,
        "mixed_conv_wgrad",
        "wgrad.cuh",
        "exists && Addressing::meets(c, pixel, at) ? min",
        "exists ? min",
    ),
}
"""What shows it, the op, and what is replaced by what in a file of csrc/cuda."""


@pytest.mark.parametrize("fault", FAULTS)
def test_is_caught(fault: str) -> None:
    problem, op, *edit = FAULTS[fault]
    with pytest.raises((Fault, AssertionError)):
        for seed, late in ((0, True), (1, False), (2, None)):
            problem(op, seed=seed, late=late, edit=tuple(edit))
