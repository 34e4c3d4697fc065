"""Converted models in long runs, in threads, in worker processes, and where nothing but torch is installed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import get_all_start_methods
from torch.utils.data import DataLoader, Dataset

import rl_kernels as rl
from tests.conversion.toys import encoder
from tests.hostile import BACKENDS, converted, train, using

KINDS = ("resnet", "encoder")


@pytest.fixture
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_repeats_bit_for_bit(backend: str, kind: str) -> None:
    """Under ``torch.use_deterministic_algorithms(True)``: nothing refuses, and two runs have the same bits."""
    with using(backend):
        one, other = (train(*converted(kind)) for _ in range(2))
    assert one[2] < one[0]
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)


# Of the process beyond what it was, in MiB: the allocator keeps some of what is freed. A tenth of what is lost where
# each step loses one weight's gradient.
MARGIN = 4.0


def resident() -> float:
    """MiB of memory that the process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_steps_take_no_memory(backend: str) -> None:
    """Neither tensors that Python sees, nor memory that it does not."""
    model = encoder(4, 160)
    model = rl.replace(model, rl.plan(model, every=3))
    weight = model.layers[0].linear1.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor) and 100 * weight.nbytes / 2**20 > 4 * MARGIN
    x = torch.randn(2, 3, 160)
    with using(backend):
        train(model, x, 20)
        # Weakly, and each by itself: tensors that earlier tests left behind may go meanwhile.
        known, before = {id(tensor): weakref.ref(tensor) for tensor in live_tensors()}, resident()
        train(model, x, 100)
        grown = resident() - before
        new = [tensor for tensor in live_tensors() if id(tensor) not in known or known[id(tensor)]() is not tensor]
    assert len(new) == len(list(model.parameters()))  # The gradients of the last step.
    assert grown < MARGIN, f"{grown:.1f} MiB"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_train_as_one_does(backend: str) -> None:
    """A model of each kind, whose steps interleave: the bits are those of either alone."""

    def run(kind: str) -> list[Tensor]:
        return train(*models[kind], 20)

    with using(backend):
        models = {kind: converted(kind) for kind in KINDS}
        with ThreadPoolExecutor(1) as pool:
            alone = list(pool.map(run, KINDS))
        models = {kind: converted(kind) for kind in KINDS}
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, KINDS))
    for one, other in zip(alone, together, strict=True):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first, second)


class Steps(Dataset[Tensor]):
    """Runs a model forward and backward for each item, wherever it is asked for one."""

    def __init__(self, model: nn.Module, x: Tensor):
        self.model, self.x = model, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        y = self.model((1 + index) * self.x)
        gradients = torch.autograd.grad(y.square().sum(), list(self.model.parameters()), allow_unused=True)
        return torch.cat([y.detach().flatten(), *(g.flatten() for g in gradients if g is not None)])


@pytest.mark.parametrize("context", [c for c in ("fork", "spawn") if c in get_all_start_methods()])
@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_a_data_loader(kind: str, context: str) -> None:
    """Which run a model that has run in the parent already, on several threads."""
    steps = Steps(*converted(kind))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [steps[index] for index in range(len(steps))]
        options: dict[str, Any] = {"multiprocessing_context": context, "timeout": 100}
        found = list(DataLoader(steps, batch_size=None, num_workers=2 if context == "fork" else 1, **options))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


PROGRAM = """
import sys
sys.modules["triton"] = None  # As if it were not installed.
import torch
import rl_kernels as rl
from tests.hostile import converted, train

try:
    import triton
except ImportError:
    pass
else:
    raise AssertionError("triton was imported")
for kind in ("resnet", "encoder"):
    losses = train(*converted(kind))[:3]
    assert losses[-1] < losses[0], losses
print({s.backend for s in rl.services("cpu") if s.serves})
print([s.reason for s in rl.services("cpu") if s.backend == "cpu"][0])
"""


def test_without_extension_and_without_triton(tmp_path: Path) -> None:
    environment = {**os.environ, "RL_KERNELS_EXTENSION": str(tmp_path)}
    environment.pop("RL_KERNELS_BACKEND", None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    served, why = result.stdout.splitlines()
    assert served == "{'streamed'}" and "not built" in why
