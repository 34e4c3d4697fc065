"""The command on a small grid: what is right and wins is enabled, what is wrong or slow is not, and it says why."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import rl_kernels as rl
from rl_kernels._extension import EXTENSION, mixed_linear_call
from rl_kernels.backends import Case, record_store, registered, selection, streamed, triton
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.backends.records import Point, Record, Verdict
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Recipe, Wanted
from rl_kernels.qualify import command, correctness, problems, timing
from rl_kernels.qualify.problems import Problem
from tests.backends.planted import Planted

LINEAR = [Problem(4, 32, 32), Problem(64, 32, 32)]
CONV = [Problem(1, 8, 8, (3, 3), (6, 6), padding=1)]
Kernel = Callable[..., Any]


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[[Kernel], None]]:
    """Puts a backend before all others, on a small grid and with an empty cache folder; auto is asked for."""
    with pytest.MonkeyPatch.context() as patch, rl.use_backend("auto"):
        patch.setenv(record_store.CACHE_VARIABLE, str(tmp_path))
        for module in (command, correctness):
            patch.setattr(module, "grid", lambda op, device, quick: LINEAR if "linear" in op else CONV)
            patch.setattr(module, "checks", lambda op: problems.checks(op)[:3])

        def put(kernel: Kernel) -> None:
            store = RecordStore("planted", needed=True, files=lambda: [Path(__file__)])
            backend = Planted({"mixed_linear": kernel}, record=store)
            patch.setattr(selection, "_backends", {"planted": backend, **selection._backends})
            selection.refresh()

        yield put
    selection.refresh()


def run(*options: str) -> Result:
    options = ("--device", "cpu", "--dtype", "float32", "--quick", *options)
    return CliRunner().invoke(command.qualify_command, options, env={"COLUMNS": "250"})


def reason(backend: str = "planted", op: str = "mixed_linear") -> str:
    return next(s.reason for s in rl.services("cpu") if (s.backend, s.case.op) == (backend, op))


def serving() -> str:
    return next(s.backend for s in rl.services("cpu") if s.serves and s.case.op == "mixed_linear")


def fast(*arguments: Any) -> torch.Tensor:
    return streamed.mixed_linear(*arguments)


def test_a_kernel_that_is_right_and_fast_is_enabled(
    plant: Callable[[Kernel], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(fast)
    assert reason() == "not qualified: no record for this device; run python -m rl_kernels qualify"
    assert serving() != "planted"
    honest = timing.kernel_of

    def handicapped(name: str, op: str) -> Kernel:
        kernel = honest(name, op)
        return kernel if name == "reference" else lambda *arguments: (time.sleep(1e-3), kernel(*arguments))

    monkeypatch.setattr(timing, "kernel_of", handicapped)
    result = run("--backend", "planted", "--json")
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert record["backend"] == "planted" and len(record["points"]) == 2
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("planted-") and json.loads(path.read_text()) == record
    assert serving() == "planted" and reason() == "planted"
    Path(path).write_text(json.dumps(record | {"sources": "older"}))
    selection.refresh()
    assert "other kernel sources" in reason() and serving() != "planted"


def wrong(*arguments: Any) -> torch.Tensor:
    return fast(*arguments) * (1 + 1e-4)


def unstable(*arguments: Any) -> torch.Tensor:
    return fast(*arguments) * (1 + 1e-7 * torch.randint(0, 3, ()))


def unwritten(*arguments: Any) -> torch.Tensor:
    found = torch.empty_like(fast(*arguments))
    return found.copy_(fast(*arguments)) if found.shape[0] == 13 else found


def wrong_on_many(*arguments: Any) -> torch.Tensor:
    return wrong(*arguments) if len(arguments[0]) == LINEAR[1].batch else fast(*arguments)


def raising(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (wrong, "RMS ratio"),
        (wrong_on_many, "batch=64"),
        (unstable, "two runs differ in their bits"),
        (unwritten, "NaN or infinity"),
        (raising, "RuntimeError: planted"),
    ],
)
def test_a_wrong_kernel_fails_and_is_not_enabled(plant: Callable[[Kernel], None], kernel: Kernel, said: str) -> None:
    plant(kernel)
    result = run("--backend", "planted")
    assert result.exit_code == 1
    assert said in result.output and "Some kernels are wrong here" in result.output
    assert serving() != "planted"
    assert "failed its qualification" in reason() and said in reason()


def test_a_slower_kernel_is_passed_over(plant: Callable[[Kernel], None]) -> None:
    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(2e-2)
        return fast(*arguments)

    plant(slow)
    result = run("--backend", "planted")
    assert result.exit_code == 0, result.output
    assert "0 of 2" in result.output and "faster: streamed at" in result.output
    assert serving() != "planted"
    assert reason().startswith("slower than streamed at every measured size (x")


def test_auto_asks_by_call_where_some_sizes_were_lost(plant: Callable[[Kernel], None], tmp_path: Path) -> None:
    used = []

    def kernel(*arguments: Any) -> torch.Tensor:
        used.append(arguments[0].shape[0])
        return fast(*arguments)

    plant(kernel)
    points = (linear_point(4, 0.5), linear_point(64, 2.0))
    put_record(tmp_path, "planted", points)
    assert serving() == "planted"
    assert "not near 1 of 2 measured sizes, where a rival was faster" in reason()
    weight = torch.randn(32, 32)
    for tokens in (2, 64, 500, 4):
        rl.functional.mixed_linear(torch.randn(tokens, 32), (weight, weight), (0.5, 0.5))
    assert used == [2, 4]


def linear_point(tokens: int, seconds: float) -> Point:
    return Point("mixed_linear", "float32", "linear", (tokens, 32, 32), seconds, {"streamed": 1.0})


def put_record(folder: Path, name: str, points: tuple[Point, ...], passed: bool = True) -> None:
    store = next(backend.record for backend in registered() if backend.name == name)
    assert store is not None
    here = store.here(torch.device("cpu"))
    record = Record(name, here.architecture, "", here.driver, here.compiler, here.sources, "", "")
    verdict = Verdict("mixed_linear", "float32", passed, "planted")
    command.write(replace(record, verdicts=(verdict,), points=points), folder)
    selection.refresh()


@pytest.mark.skipif(EXTENSION.missing is not None, reason=f"the C++ kernels: {EXTENSION.missing}")
class TestCpu:
    def test_the_command(self, plant: Callable[[Kernel], None], tmp_path: Path) -> None:
        result = run("--backend", "cpu")
        assert result.exit_code == 0, result.output
        (path,) = tmp_path.iterdir()
        assert str(path) in result.output and "mixed_conv_wgrad" in result.output
        record = Record.from_json(path.read_text())
        assert {verdict.op for verdict in record.verdicts if verdict.passed} == {*registered()[0].kernels}
        assert {point.kind for point in record.points} == {"linear", "dense contiguous"}

    def test_the_fast_path_serves_only_what_was_never_slower(
        self, plant: Callable[[Kernel], None], tmp_path: Path
    ) -> None:
        call = (torch.randn(4, 32), [torch.randn(32, 32)] * 2, torch.ones(2), None)
        rl.functional.mixed_linear(*call)
        assert serving() == "cpu"
        assert mixed_linear_call(*call) is not None
        put_record(tmp_path, "cpu", (linear_point(4, 0.5), linear_point(64, 2.0)))
        assert mixed_linear_call(*call) is None and serving() == "cpu"
        double = tuple(v.double() if isinstance(v, torch.Tensor) else v for v in call)
        assert mixed_linear_call(double[0], [w.double() for w in call[1]], double[2], None) is not None
        with rl.use_backend("cpu"):
            assert mixed_linear_call(*call) is not None
        put_record(tmp_path, "cpu", (linear_point(4, 0.5),))
        assert mixed_linear_call(*call) is not None

    def test_a_failed_verdict_turns_it_off(self, plant: Callable[[Kernel], None], tmp_path: Path) -> None:
        put_record(tmp_path, "cpu", (), passed=False)
        assert serving() == "streamed" and reason("cpu") == "failed its qualification: planted"
        assert "failed" not in reason("cpu", "mixed_conv")


def test_what_cannot_be_qualified(plant: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "got 'nonsense', expected one of cpu, triton" in run("--backend", "nonsense").output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("--backend", "triton")
    assert result.exit_code == 1 and "no kernel to qualify on cpu" in result.output


def test_interpreted_triton_is_never_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = Case("mixed_linear", "cpu", torch.float32)
    assert triton.BACKEND.worse(case) == "interpreted (TRITON_INTERPRET=1)"


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it is imported."""
    pytest.importorskip("triton")
    for version, said in (("3.5.1", "triton 3.5.1 is older than 3.6"), ("3.6.0", None), ("4.0.0+git", None)):
        triton.backend._missing.cache_clear()
        monkeypatch.setattr(triton.backend.metadata, "version", lambda name, version=version: version)
        reason = triton.BACKEND.why_not(Case("mixed_linear", "cuda", torch.float32))
        assert reason == said or (said is None and reason in (None, "interpreted (TRITON_INTERPRET=1), on CPUs only"))
    triton.backend._missing.cache_clear()


@pytest.mark.parametrize("op", ["mixed_linear", "mixed_linear_wgrad", "mixed_conv", "mixed_conv_wgrad"])
def test_triton_runs_in_every_configuration_that_its_heuristic_has(op: str) -> None:
    pytest.importorskip("triton")
    from rl_kernels.backends.gpu import heuristics

    (name, _), *forced = triton.BACKEND.variants(op, torch.bfloat16)
    assert name == "" and len(forced) >= 12
    for name, context in forced:
        with context():
            chosen = heuristics.forced()
            assert chosen is not None
            config, splits = chosen
            assert name == f"configuration {'x'.join(map(str, config))}, {splits} splits"


@pytest.mark.parametrize("op", [*registered()[0].kernels])
def test_the_problems_are_calls_that_every_op_accepts(op: str) -> None:
    for problem in problems.checks(op):
        OPS[op].check(problems.make_call(problem, op, torch.bfloat16, torch.device("cpu")))
    for device in ("cpu", "cuda"):
        full, quick = (problems.grid(op, device, quick) for quick in (False, True))
        assert 0 < len(quick) < len(full)
        assert set(quick) <= set(full)
    first = problems.checks(op)[: correctness.FORCED_PROBLEMS]
    assert all(problem.sources == 2 and not problem.halved for problem in first)


def test_a_wgrad_that_loses_or_overwrites_what_it_should_add_to_fails() -> None:
    """Into is a parameter like any other: a kernel that takes it and does otherwise is seen."""

    def kept(dy: torch.Tensor, x: torch.Tensor, recipe: Recipe, wanted: Wanted, into: Any = None) -> Any:
        gradients = streamed.mixed_linear_wgrad(dy, x, recipe, wanted)
        for buffer, gradient in zip(into or [None] * len(gradients.weights), gradients.weights, strict=True):
            if buffer is not None:
                buffer.add_(gradient)
        return gradients

    def lost(dy: torch.Tensor, x: torch.Tensor, recipe: Recipe, wanted: Wanted, into: Any = None) -> Any:
        return streamed.mixed_linear_wgrad(dy, x, recipe, wanted)

    def overwritten(dy: torch.Tensor, x: torch.Tensor, recipe: Recipe, wanted: Wanted, into: Any = None) -> Any:
        for buffer in filter(lambda buffer: buffer is not None, into or ()):
            buffer.zero_()
        return kept(dy, x, recipe, wanted, into)

    case, device = Case("mixed_linear_wgrad", "cpu", torch.float32), torch.device("cpu")
    problem = problems.checks(case.op)[0]
    for kernel, right in ((kept, True), (lost, False), (overwritten, False)):
        backend = Planted({case.op: kernel}, accumulates=True)
        trials = [correctness.Trial(problem, "", contextlib.nullcontext)]
        wrong = list(correctness.failures(backend, trials, case, device))
        assert wrong == [] if right else "into[0]" in wrong[0]
