"""What C++ launches for a call: equal to what Python planned before it, and to what Python's heuristics choose."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_kernels.backends.cuda import BACKEND, kernels
from rl_kernels.backends.cuda.extension import EXTENSION, is_older_than_its_sources
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import H100
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import Launch, recorded
from tests.emulated.plans import DEVICES, Case, Drawn, digest, named
from tests.emulated.problems import BF16, call_of, execute
from tests.emulated.structs import Product

pytestmark = pytest.mark.skipif(
    EXTENSION.module is None or is_older_than_its_sources(), reason="the CUDA extension is not built from these sources"
)

REFERENCE = Path(__file__).parent / "plans.json"
"""The launches of ``Drawn`` cases, by their numbers, that Python planned until C++ did; less those that end a wgrad.

17 of them are later: tiles and splits that counting a multiprocessor's blocks by registers changed.
"""


@pytest.fixture(autouse=True)
def unfilled() -> Iterator[None]:
    """Nothing is computed here: tensors may hold anything."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def planned(case: Case) -> list[list[Any]]:
    """The launches of a case, digested."""
    capability, device = DEVICES[case.device]
    forced = contextlib.nullcontext() if case.forced is None else heuristics.use_config(*case.forced)
    with forced, recorded((capability, device.multiprocessors, device.shared_bytes)) as launches:
        found = execute(case.call)
    tensors = named(case.call, found)
    return [
        digest(launch.kernel, launch.grid, launch.shared_bytes, launch.params, tensors)
        for launch in launches
        if not launch.kernel.startswith("finish")
    ]


def test_launches_are_those_of_the_reference() -> None:
    reference = json.loads(REFERENCE.read_text())
    assert len(reference) > 200
    different = [number for number, launches in reference.items() if planned(Drawn(int(number)).case()) != launches]
    assert different == []


def test_cpp_chooses_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, stages and splits, over works, types and devices."""
    asked = []
    for number in range(2000, 2300):
        case = Drawn(number).case()._replace(forced=None)
        by_cpp = planned(case)
        with monkeypatch.context() as patch:
            patch.setattr(heuristics, "device_of", lambda _, case=case: DEVICES[case.device][1])

            def settings(device: torch.device) -> kernels.Settings:
                choose = kernels.chooser(device)
                return lambda *work: asked.append(work) or choose(*work), (0, 0, 0, 0)

            patch.setattr(kernels, "settings", settings)
            assert planned(case) == by_cpp, number
    assert len(asked) > 200


def launches_of(op: str, problem: Problem, dtype: torch.dtype = BF16) -> list[Launch]:
    with recorded() as launches:
        execute(call_of(op, problem, dtype))
    return launches


@pytest.mark.parametrize("way", ["", "_dgrad"])
def test_the_kernel_that_is_chosen(way: str) -> None:
    def first(op: str, problem: Problem) -> str:
        return launches_of(op + way, problem)[0].kernel

    kind = "dgrad" if way else "forward"
    assert first("mixed_linear", Problem(8, 64, 64)) == f"skinny_{kind}_pair_8_bf16"
    assert first("mixed_linear", Problem(16, 64, 64, sources=3)) == f"skinny_{kind}_general_16_bf16"
    assert first("mixed_linear", Problem(17, 64, 64)).startswith(f"linear_{kind}_pair_")
    assert first("mixed_linear", Problem(2048, 2048, 512)) == f"linear_{kind}_pair_128x256_bf16"
    layer = Problem(64, 32, 32, (3, 3), (56, 56), padding=1, layout="channels_last", biased=False)
    assert first("mixed_conv", layer) == f"resident_{kind}_pair_32_bf16"
    assert first("mixed_conv", dataclasses.replace(layer, batch=1)).startswith(f"conv_{kind}_pair_")
    assert first("mixed_conv", dataclasses.replace(layer, kernel=(1, 1), padding=0)).startswith(f"linear_{kind}")


@pytest.mark.parametrize("op", ["mixed_linear", "mixed_linear_dgrad"])
def test_few_tokens_fill_the_device_once(op: str) -> None:
    main, reduction = launches_of(op, Problem(4, 1024, 1024))
    x, y, splits = main.grid
    assert main.threads == 256
    assert y == 1 and main.shared_bytes == 0 and splits > 1 and x * splits <= 2 * H100.multiprocessors
    assert reduction.kernel == "linear_reduce_bf16"


def test_divisors_divide() -> None:
    """Every quotient that kernels may ask for, by the arithmetic that they use."""
    numbers = [1, 2, 3, 5, 6, 7, 31, 32, 33, 640, 641, 65535]
    for by in numbers:
        call = call_of("mixed_conv", Problem(1, 1, by, (3, 3), (3, 3)), BF16)
        with recorded() as launches:
            execute(call)
        divisor = Product.from_buffer_copy(launches[0].params).correlation.by_channels
        assert divisor.divisor == by
        for n in {*numbers, (1 << 31) - 1, *(by * k + d for k in (1, 2, 3, 1000) for d in (-1, 0, 1))}:
            quotient = n if by == 1 else n * divisor.multiplier >> (32 + divisor.shift)
            assert quotient == n // by, (n, by)


@pytest.mark.parametrize(
    ("change", "vector"),
    [
        (lambda base: base, True),
        (lambda base: base[:, :37], True),
        (lambda base: base[3:], True),
        (lambda base: base.t(), False),
        (lambda base: base[:, 1:], False),  # the address
        (lambda base: torch.zeros(64, 37, dtype=BF16), False),  # the rows
        (lambda base: torch.zeros(1, 37, dtype=BF16), True),  # there is one row
    ],
)
def test_vectors_are_where_16_bytes_lie_together(change: Any, vector: bool) -> None:
    x = change(torch.zeros(64, 64, dtype=BF16))
    call = call_of("mixed_linear", Problem(x.shape[0], 40, x.shape[1]), BF16)._replace(activation=x)
    with recorded() as launches:
        execute(call)
    assert Product.from_buffer_copy(launches[0].params).vector_activation == vector


def test_backend_serves_by_these_kernels() -> None:
    assert {BACKEND.kernel(op).__module__ for op in BACKEND.kernels} == {kernels.__name__}
