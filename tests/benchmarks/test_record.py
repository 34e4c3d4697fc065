import json
import re
from pathlib import Path

import pytest

import benchmarks.run
from benchmarks.cases import LinearCase
from benchmarks.measure import Settings
from benchmarks.record import Record, reason, without_paths
from benchmarks.run import benchmark
from tests.benchmarks import synthetic

CASES = [LinearCase(name=f"linear {n}", group="linear", m=2, n=n, k=3) for n in (2, 4)]


def test_a_record_round_trips(tmp_path: Path) -> None:
    record = synthetic.record(seed=3)
    record.save(tmp_path / "new" / "r.json")
    assert Record.load(tmp_path / "new" / "r.json") == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record = synthetic.record(CASES)
    record.save(path)
    record.cells.append({"not JSON": object()})
    with pytest.raises(TypeError):
        record.save(path)
    assert len(Record.load(path).cells) == 4 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "expected what `run` writes"),
        ("no json", "expected what `run` writes"),
        ('{"schema": 99}', "got schema 99, expected 1"),
        ('{"schema": 1}', "other fields than expected"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=f"r.json: .*{re.escape(why)}"):
        Record.load(tmp_path / "r.json")


def test_each_cell_is_written_as_soon_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    measured = iter(synthetic.record(CASES).cells)
    on_disk: list[int] = []

    def measure_cell(*arguments: object) -> object:
        on_disk.append(len(Record.load(path).cells))
        if len(on_disk) == 4:
            raise KeyboardInterrupt
        return next(measured)

    monkeypatch.setattr(benchmarks.run, "measure_cell", measure_cell)
    monkeypatch.setattr(benchmarks.run, "measure_roofline", lambda *arguments: {"read_bytes_per_second": 1.0})
    with pytest.raises(KeyboardInterrupt):
        benchmark(CASES, ["naive"], ["auto"], Settings(), ["run"], path)
    assert on_disk == [0, 1, 2, 3]
    record = Record.load(path)
    assert len(record.cells) == 3 and not record.complete and record.roofline


def test_a_whole_run_on_tiny_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = {"flops_per_second": {"float32": 1e9}, "read_bytes_per_second": 1e9}
    monkeypatch.setattr(benchmarks.run, "measure_roofline", lambda *arguments: roofline)
    settings = Settings(sample_seconds=1e-6, cell_seconds=0, min_rounds=2, max_rounds=2)
    names: list[str] = []
    arguments = ["run", "--output", "/some/where/else.json"]
    benchmark(CASES, ["naive", "two_products"], ["auto"], settings, arguments, tmp_path / "r.json", names.append)
    record = Record.load(tmp_path / "r.json")
    assert record.complete and names == [f"{key}, {mode}" for key, mode in record.by_key()]
    assert record.rivals() == ["ceiling", "naive", "two_products", "rl_kernels[auto]"]
    assert record.command == "python -m benchmarks run --output else.json"
    assert {"processor", "threads"} <= record.machine.keys() and "torch" in record.versions
    commit = record.git["commit"]  # None where the sources are no repository.
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}", commit)
    assert record.created.endswith("+00:00") and record.settings["gradients"].startswith("fresh")
    for cell in record.cells:
        for name, rival in cell["rivals"].items():
            assert rival["seconds"]["median"] > 0 and rival["roofline"] > 0, name
    text = (tmp_path / "r.json").read_text()
    assert str(tmp_path) not in text and str(Path.home()) + "/" not in text
    assert json.loads(text)["schema"] == 1


def test_paths_are_cut_to_their_last_part() -> None:
    assert without_paths("in /tmp/user/x.cpp: no") == "in x.cpp: no"
    assert without_paths(r"C:\Users\me\x.json") == "x.json"
    assert without_paths("a/b benchmarks/results/x.json 3/4") == "a/b benchmarks/results/x.json 3/4"
    assert reason(ValueError("at /usr/lib/a.so\nmore")) == "ValueError: at a.so"
