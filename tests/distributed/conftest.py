"""Processes that run a test's check together, over gloo."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = 240.0
"""Seconds a check may take, and the start of the processes beside it."""

IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint"]

Check = Callable[..., None]


class Ranks:
    """``size`` processes with one process group. They start with the first check, and again after one that failed:
    where one rank raises, the others are left waiting for it."""

    def __init__(self, folder: Path, size: int):
        self.size = size
        self._folder = folder
        self._starts = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        self._starts += 1
        # Forks of a process that has done nothing but import torch, which takes seconds.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        for rank in range(self.size):
            here, there = context.Pipe()
            store = str(self._folder / f"store{self._starts}")
            process = context.Process(target=_serve, args=(rank, self.size, store, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, check: Check, *args: Any, **options: Any) -> None:
        """Call ``check(*args, **options)``, a function of a module, on all ranks; fail with what any raised."""
        __tracebackhide__ = True
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((check, args, options))
        failures = []
        waiting = dict(enumerate(self._pipes))
        while waiting and not failures:
            ready = wait(list(waiting.values()), TIMEOUT)
            if not ready:
                failures.append(f"ranks {sorted(waiting)} have not answered within {TIMEOUT:.0f} s")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    error = waiting.pop(rank).recv()
                except EOFError:
                    error = "the process has died"
                if error is not None:
                    failures.append(f"rank {rank}: {error}")
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            check, args, options = pipe.recv()
            torch.manual_seed(0)
            try:
                check(*args, **options)
                pipe.send(None)
            except BaseException:
                pipe.send(traceback.format_exc())


def _started(tmp_path_factory: pytest.TempPathFactory, size: int) -> Iterator[Ranks]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    made = Ranks(tmp_path_factory.mktemp("ranks"), size)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    yield from _started(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    yield from _started(tmp_path_factory, 4)
