import itertools
from collections.abc import Iterator

import pytest
import torch

from benchmarks.contenders import Contender
from benchmarks.measure import Settings, extra_memory, quantile, ratios, summary, time_interleaved
from rl_kernels.testing import Clock
from rl_kernels.testing import clock as clock_module


def settings(**changes: object) -> Settings:
    values: dict[str, object] = {
        "warmup_calls": 1,
        "sample_seconds": 1e-9,
        "cell_seconds": 0,
        "min_rounds": 4,
        "max_rounds": 4,
    }
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that a test sets by hand."""
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    yield now


def test_rounds_are_interleaved_and_shuffled_alike_each_time(clock: list[float]) -> None:
    def order() -> list[str]:
        seen: list[str] = []
        contenders = [Contender(name, lambda name=name: seen.append(name)) for name in "abc"]
        time_interleaved(contenders, settings(sample_seconds=0.0))
        return seen[3 * 3 :]  # One call to warm up, two to see how long it takes.

    seen = order()
    rounds = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    assert len(rounds) == 4 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert seen == order()


def test_fast_calls_are_repeated_until_a_sample_is_long_enough(clock: list[float]) -> None:
    def takes(seconds: float) -> Contender:
        def call() -> None:
            clock[0] += seconds

        return Contender(f"{seconds}", call)

    samples, calls = time_interleaved([takes(1e-4), takes(0.5)], settings(sample_seconds=2e-3))
    assert calls == {"0.0001": 20, "0.5": 1}
    assert samples["0.0001"] == pytest.approx([1e-4] * 4) and samples["0.5"] == pytest.approx([0.5] * 4)


def test_rounds_stop_when_the_cells_time_is_over_but_not_before_the_least_number(clock: list[float]) -> None:
    def call() -> None:
        clock[0] += 1.0

    contender = Contender("slow", call)
    samples, _ = time_interleaved([contender], settings(min_rounds=3, max_rounds=50, cell_seconds=10.5))
    assert len(samples["slow"]) == 11
    samples, _ = time_interleaved([contender], settings(min_rounds=3, max_rounds=50, cell_seconds=0.5))
    assert len(samples["slow"]) == 3


def test_eviction_is_before_every_call_and_not_timed(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def evict(self: Clock) -> None:
        clock[0] += 100.0

    def call() -> None:
        clock[0] += 1.0

    monkeypatch.setattr(Clock, "evict", evict)
    assert Clock("cpu", cold=True).seconds(call, 3) == pytest.approx(1.0)
    assert clock[0] == pytest.approx(303.0)


def test_eviction_reads_more_than_the_last_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "last_level_cache", lambda device: 40 << 20)
    clock = Clock("cpu", cold=True)
    clock.evict()
    assert clock._buffer is not None and clock._buffer.nbytes == 80 << 20


def test_quantiles_and_summary() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0, 5.0], 0.2) == pytest.approx(1.8)
    assert quantile([7.0], 0.8) == 7.0
    assert summary([5.0, 1.0, 3.0]) == {"median": 3.0, "p20": pytest.approx(1.8), "p80": pytest.approx(4.2)}


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down threefold moves the seconds and not the ratios."""
    drift = [1.0, 2.0, 3.0]
    samples = {"ceiling": drift, "naive": [2 * value for value in drift]}
    assert ratios(samples, "ceiling")["naive"] == [2.0, 2.0, 2.0]


def test_extra_memory_leaves_out_what_is_returned_and_starts_without_old_gradients() -> None:
    leaf = torch.zeros(1 << 18, requires_grad=True)

    clean = []

    def call() -> torch.Tensor:
        clean.append(leaf.grad is None)
        temporary = leaf * 2.0
        temporary.sum().backward()
        return temporary.detach()[:0].clone()

    def release() -> None:
        leaf.grad = None

    contender = Contender("one", call, release, returned_bytes=leaf.nbytes)
    found = extra_memory(contender, "cpu")
    assert leaf.nbytes <= found["peak_extra_bytes"] <= 2 * leaf.nbytes
    assert leaf.grad is None and len(clean) > 1 and all(clean)


def test_gpu_timing_uses_events_and_waits(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is enqueued: work that outlasts the queueing, start, calls, end; cold, an eviction before each."""
    log: list[str] = []
    ids = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.id = next(ids)

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: "Event") -> float:
            assert other.id == self.id + 1
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(Clock, "evict", lambda self: log.append("evict"))
    busy: list[float] = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (log.append("busy"), busy.append(cycles)))

    def call() -> None:
        log.append("call")
        clock[0] += 1e-3  # On the host.

    assert Clock("cuda", cold=False).seconds(call, 3) == pytest.approx(2e-3)
    assert log == ["wait", "call", "wait", "busy", "event", "call", "call", "call", "event", "wait"]
    assert busy[-1] > 3 * 1e-3 * clock_module.CYCLES_A_SECOND
    log.clear()
    assert Clock("cuda", cold=True).seconds(call, 2) == pytest.approx(6e-3)
    assert log == ["wait", "call", "wait", *["evict", "busy", "event", "call", "event"] * 2, "wait"]
    assert busy[-1] > 1e-3 * clock_module.CYCLES_A_SECOND
    assert Clock("cuda", cold=True).host_seconds(call) == pytest.approx(1e-3)
