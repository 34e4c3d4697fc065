"""What a record decides, and which record is in force."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from rl_kernels.backends import Case, record_store, records, streamed
from rl_kernels.backends.record_store import RecordStore
from rl_kernels.backends.records import NO_RECORD, Here, Point, Record, Verdict, describe, nearest, why_stale, why_worse
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call, Recipe

OP, CPU = "mixed_linear", torch.device("cpu")
CASE = Case(OP, "cpu", torch.float32)
HERE = Here("sm_90", 13000, "triton 3.8", "abc")


def point(tokens: int, ratio: float, kind: str = "linear", op: str = OP) -> Point:
    return Point(op, "float32", kind, (tokens, 768, 768), ratio, {"streamed": 1.0, "mix then vendor": 0.5})


def record(*points: Point, passed: bool = True, **changes: object) -> Record:
    verdict = Verdict(OP, "float32", passed, "" if passed else "default configuration: y: RMS ratio 9.00")
    made = Record("planted", *HERE[:1], "a device", HERE.driver, HERE.compiler, HERE.sources, "2026", "qualify")
    return replace(made, verdicts=(verdict,), points=points, **changes)  # type: ignore[arg-type]


def decision(tokens: int, found: Record | None, kind: str = "linear") -> str | None:
    return why_worse(OP, "float32", kind, (tokens, 768, 768), found)


def test_the_nearest_measured_size_decides() -> None:
    found = record(point(1, 1.5), point(64, 0.5), point(4096, 1.23))
    assert decision(5, found) == "slower than streamed at the nearest measured size (x1.50)"
    assert decision(16, found) is None
    assert decision(10**9, found) == "slower than streamed at the nearest measured size (x1.23)"
    assert decision(0, found) is not None
    assert decision(64, found, "dense contiguous") == "not measured: dense contiguous"


def test_of_two_that_are_as_near_the_worse_decides() -> None:
    two = [point(4, 0.5), point(16, 1.5)]
    for points in (two, two[::-1]):
        chosen = nearest(OP, "float32", "linear", (8, 768, 768), record(*points))
        assert chosen is not None and chosen.sizes[0] == 16


def test_a_win_is_a_win_within_the_tolerance_and_against_what_auto_could_run() -> None:
    assert point(1, 1.02).won and not point(1, 1.03).won
    assert point(1, 0.9).fastest == "streamed"


def test_what_is_not_right_is_not_used() -> None:
    assert decision(1, None) == NO_RECORD
    assert decision(1, record(point(1, 0.5), passed=False)) == (
        "failed its qualification: default configuration: y: RMS ratio 9.00"
    )
    assert why_worse(OP, "bfloat16", "linear", (1, 1, 1), record()) == "not qualified: the record does not have it"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"schema": 0}, "the record has schema 0, expected 1"),
        ({"architecture": "sm_80"}, "the record is of sm_80, this is sm_90"),
        ({"sources": "other"}, "the record is of other kernel sources"),
        ({"compiler": "triton 3.6"}, "the record is of triton 3.6, this is triton 3.8"),
        ({"driver": 13010}, "the record is of a driver for CUDA 13010, this one supports 13000"),
        ({"driver": 12080}, None),
    ],
    ids=str,
)
def test_what_a_record_has_to_fit(changes: dict[str, object], reason: str | None) -> None:
    assert why_stale(record(**changes), HERE) == reason


def test_a_record_survives_its_file() -> None:
    found = record(point(1, 0.5), point(64, 1.5), versions={"torch": "2.13.0"})
    text = found.as_json()
    assert Record.from_json(text) == found
    assert len(text.splitlines()) < 30
    later = json.loads(text) | {"schema": 2, "points": "of another form"}
    assert Record.from_json(json.dumps(later)).schema == 2


def test_calls_are_described_alike_whatever_the_op() -> None:
    x, dy, weight = torch.empty(2, 3, 8), torch.empty(2, 3, 5), torch.empty(5, 8)
    masks = ([True], True, [])
    for op, arguments in {
        "mixed_linear": (x, [weight], None, None),
        "mixed_linear_dgrad": (dy, [weight], None),
        "mixed_linear_wgrad": (dy, x, [weight], None, None, *masks),
    }.items():
        assert describe(Call.of(op, arguments)) == ("linear", (6, 5, 8))
    x, weight = torch.empty(2, 8, 9, 9).to(memory_format=torch.channels_last), torch.empty(6, 4, 3, 3)
    dy = torch.empty(2, 6, 5, 5).to(memory_format=torch.channels_last)
    geometry = ([2, 2], [1, 1], [1, 1], 2)
    for op, arguments in {
        "mixed_conv": (x, [weight], None, None, *geometry),
        "mixed_conv_dgrad": (dy, [weight], None, [*x.shape], *geometry),
        "mixed_conv_wgrad": (dy, x, [weight], None, None, *masks, *geometry),
    }.items():
        assert describe(Call.of(op, arguments)) == ("grouped channels_last strided", (50, 3, 4, 9, 2))
    arguments = (torch.empty(1, 6, 4), [torch.empty(6, 1, 1)], None, None, [1], [0], [1], 6)
    assert describe(Call.of("mixed_conv", arguments)) == (
        "depthwise contiguous",
        (4, 1, 1, 1, 6),
    )


# Files.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own records, and one of committed ones beside it."""
    monkeypatch.setenv(record_store.CACHE_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(record_store, "COMMITTED", tmp_path / "committed")
    for folder in ("own", "committed"):
        (tmp_path / folder).mkdir()
    yield tmp_path / "own"
    record_store.forget()


def planted(needed: bool = True) -> RecordStore:
    return RecordStore("planted", needed, files=lambda: [Path(streamed.__file__)])


def put(folder: Path, found: Record, store: RecordStore, **changes: object) -> Path:
    """Write ``found`` as a record of this machine, but for ``changes``."""
    path = folder / record_store.file_name("planted", record_store.architecture(CPU))
    path.write_text(replace(found, **(store.here(CPU)._asdict() | changes)).as_json())  # type: ignore[arg-type]
    record_store.forget()
    return path


def test_without_a_record(cache: Path) -> None:
    assert planted().worse(CASE) == NO_RECORD
    assert planted(needed=False).worse(CASE) is None


def test_the_users_record_beats_a_committed_one(cache: Path) -> None:
    store = planted()
    put(cache.parent / "committed", record(point(1, 0.5)), store)
    assert store.worse(CASE) is None
    put(cache, record(passed=False), store)
    reason = store.worse(CASE)
    assert reason is not None and reason.startswith("failed its qualification")
    put(cache, record(passed=False), store, sources="older")
    assert store.worse(CASE) is None, "a record that does not fit hides one that does"


def test_a_record_of_other_sources_says_so(cache: Path) -> None:
    store = planted()
    put(cache, record(point(1, 0.5)), store, sources="other")
    reason = store.worse(CASE)
    assert reason == "not qualified: the record is of other kernel sources; run python -m rl_kernels qualify"


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"schema": 1}', '{"schema": 1, "points": 3, "verdicts": []}'])
def test_a_broken_file_is_named_and_passed_over(cache: Path, text: str) -> None:
    store = planted()
    path = put(cache, record(point(1, 0.5)), store)
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"{path.name}: cannot be read as a record"):
        assert store.worse(CASE) == NO_RECORD


def test_a_record_decides_by_the_calls_sizes(cache: Path) -> None:
    points = (point(1, 1.5), point(64, 0.5))
    recipe = Recipe([torch.empty(768, 768)], torch.empty(1))
    calls = {tokens: Call(OP, torch.empty(tokens, 768), recipe) for tokens in (1, 64)}
    for needed in (True, False):
        store = planted(needed)
        put(cache, record(*points), store)
        assert store.worse(CASE) is None
        assert store.worse(CASE, calls[64]) is None
        assert store.worse(CASE, calls[1]) == "slower than streamed at the nearest measured size (x1.50)"
        assert store.lost(CASE) == "not near 1 of 2 measured sizes, where a rival was faster"
        put(cache, record(points[0]), store)
        assert store.worse(CASE) == "slower than streamed at every measured size (x1.50 at best)"


def test_what_a_record_is_silent_on(cache: Path) -> None:
    for needed, reasons in (
        (True, ("not measured", "not qualified: the record does not have it")),
        (False, (None,) * 2),
    ):
        store = planted(needed)
        put(cache, record(), store)
        assert store.worse(CASE) == reasons[0]
        assert store.worse(Case(OP, "cpu", torch.float16)) == reasons[1]


def test_a_record_settles_what_it_has_every_kind_of(cache: Path) -> None:
    """The fast path asks it for a case alone."""
    conv, kinds = Case("mixed_conv", "cpu", torch.float32), ("dense channels_last", "grouped channels_last")

    def settles(*kinds_won: tuple[str, bool], needed: bool = True) -> bool:
        store = replace(planted(needed), kinds=kinds)
        points = [replace(point(8, 0.5 if won else 1.5), op=conv.op, kind=kind) for kind, won in kinds_won]
        found = record(*points)
        put(cache, replace(found, verdicts=(replace(found.verdicts[0], op=conv.op),)), store)
        return store.settles(conv)

    first, second = ((kind, True) for kind in kinds)
    assert settles(first, second) and settles(first, second, ("dense contiguous", True))
    assert not settles(first) and not settles() and not settles(first, (kinds[1], False))
    assert settles(first, needed=False) and settles(needed=False)
    assert not settles(first, (kinds[1], False), needed=False)


def test_nothing_is_read_at_import() -> None:
    program = (
        "import rl_kernels as rl, torch; from rl_kernels.backends import record_store\n"
        "assert record_store.find.cache_info().currsize == 0\n"
        "rl.functional.mixed_linear(torch.ones(2, 3), (torch.ones(4, 3),), (1.0,))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_op_can_be_described() -> None:
    assert all("linear" in op or "conv" in op for op in OPS)
    assert records.SCHEMA == 1


def test_gpus_of_two_kinds_have_a_record_each(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is current: a case is passed over where every GPU's record says so, a call where its own GPU's does."""
    store, names = planted(), ("sm_80", "sm_90")
    here = store.here(CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(record_store, "architecture", lambda device: names[device.index or 0])
    monkeypatch.setattr(RecordStore, "here", lambda self, device: here._replace(architecture=names[device.index or 0]))
    gpus = Case(OP, "cuda", torch.float32)
    assert store.worse(gpus) == NO_RECORD
    for name, found in zip(names, (record(passed=False), record(point(64, 0.5))), strict=True):
        stated = replace(found, **here._replace(architecture=name)._asdict())
        (cache / record_store.file_name("planted", name)).write_text(stated.as_json())
    record_store.forget()
    assert store.worse(gpus) is None
    weight = torch.empty(768, 768)
    reasons = []
    for index in range(2):
        on_gpu = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, shape=(64, 768))
        on_gpu.numel = lambda: 64 * 768
        call = Call(OP, cast(torch.Tensor, on_gpu), Recipe([weight], torch.empty(1)))
        reasons.append(store.worse(gpus, call))
    assert reasons[0] is not None and reasons[0].startswith("failed its qualification")
    assert reasons[1] is None
    assert not store.settles(gpus), "calls on the other one, too"
    (cache / record_store.file_name("planted", "sm_90")).unlink()
    record_store.forget()
    reason = store.worse(gpus)
    assert reason is not None and reason.startswith("failed its qualification")
