import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import verify
from benchmarks.cases import LinearCase
from benchmarks.record import Record
from benchmarks.verify import (
    BROKEN,
    FASTER,
    NOISE,
    SLOWER,
    Incomparable,
    compare,
    merged,
    move,
    refusal,
    verify_command,
)
from tests.benchmarks import synthetic
from tests.benchmarks.synthetic import OURS

CASES = [LinearCase(name=f"linear {n}", group="linear", m=2, n=n, k=3) for n in (2, 4)]
PASSES, FAILS = "python -c pass", "python -c 'raise SystemExit(3)'"


def changed(record: Record, *factors: float, measures: tuple[str, ...] = ("seconds", "ratio")) -> Record:
    """The record with this package's times multiplied, cell by cell."""
    after = copy.deepcopy(record)
    for cell, factor in zip(after.cells, factors, strict=False):
        for measure in measures:
            for name in cell["rivals"][OURS][measure]:
                cell["rivals"][OURS][measure][name] *= factor
    return after


def verdicts(before: Record, after: Record) -> list[str]:
    return [change.verdict for change in compare(before, after)]


def test_the_noise_rule() -> None:
    def interval(p20: float, p80: float) -> dict[str, float]:
        return {"median": (p20 + p80) / 2, "p20": p20, "p80": p80}

    assert move(interval(10, 12), interval(8, 9)) == FASTER
    assert move(interval(10, 12), interval(8, 10)) == NOISE
    assert move(interval(10, 12), interval(12, 14)) == NOISE
    assert move(interval(10, 12), interval(13, 14)) == SLOWER


def test_cells_are_compared_one_by_one() -> None:
    before = synthetic.record(CASES)
    # The intervals are 2 % wide on each side.
    assert verdicts(before, changed(before, 0.5, 0.97, 1.03, 2.0)) == [FASTER, NOISE, NOISE, SLOWER]


@pytest.mark.parametrize("measure", ["seconds", "ratio"])
def test_seconds_and_ratio_must_agree(measure: str) -> None:
    """A machine that was faster the second time, or a ceiling that was slower, is no speed-up."""
    before = synthetic.record(CASES)
    changes = compare(before, changed(before, 0.5, measures=(measure,)))
    assert changes[0].verdict == NOISE and "overlap" in changes[0].detail


def test_what_failed_since_is_reported_and_others_are_not_compared() -> None:
    before = synthetic.record(CASES)
    after = changed(before, 0.5)
    after.cells[1]["rivals"][OURS] = {"failed": "CannotServe: no"}
    del after.cells[3]
    changes = compare(before, after)
    assert [change.verdict for change in changes] == [FASTER, BROKEN, NOISE]
    assert {change.rival for change in changes} == {OURS}
    assert "became slower or failed" in str(refusal(changes))


def test_refusals() -> None:
    before = synthetic.record(CASES)
    assert refusal(compare(before, changed(before, 0.5))) is None
    assert "inside the noise" in str(refusal(compare(before, changed(before, 0.97))))
    assert "1 of 4 became slower" in str(refusal(compare(before, changed(before, 0.5, 2.0))))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("machine", "processor", "another"),
        ("machine", "threads", 64),
        ("versions", "torch", "0.1"),
        ("settings", "cold", True),
    ],
)
def test_records_that_were_made_differently_are_not_compared(part: str, name: str, value: Any) -> None:
    before = synthetic.record(CASES)
    after = changed(before, 0.5)
    getattr(after, part)[name] = value
    with pytest.raises(Incomparable, match=f"{part}: {name}: got {value!r}, expected"):
        compare(before, after)


def test_another_version_of_this_package_is_what_is_compared() -> None:
    before = synthetic.record(CASES)
    after = changed(before, 0.5)
    before.versions["rl_kernels"], after.versions["rl_kernels"] = "0.1.0", "0.2.0"
    assert FASTER in verdicts(before, after)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(Incomparable, match="got none"):
        compare(synthetic.record(CASES[:1]), synthetic.record(CASES[1:]))


def test_repeated_runs_widen_the_interval() -> None:
    first = synthetic.record(CASES)
    second = changed(first, 1.5)
    both = merged([first, second]).cells[0]["rivals"][OURS]["seconds"]
    low, high = (record.cells[0]["rivals"][OURS]["seconds"] for record in (first, second))
    assert (both["p20"], both["p80"]) == (low["p20"], high["p80"])
    assert low["median"] < both["median"] < high["median"]
    second.cells[0]["rivals"][OURS] = {"failed": "once"}
    assert merged([first, second]).cells[0]["rivals"][OURS] == {"failed": "once"}


def run(tmp_path: Path, after: Record, *options: str) -> Result:
    synthetic.record(CASES).save(tmp_path / "a.json")
    after.save(tmp_path / "b.json")
    return CliRunner().invoke(verify_command, [str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])


def test_a_real_speed_up_is_accepted_and_one_in_the_noise_or_with_failing_tests_is_not(tmp_path: Path) -> None:
    before = synthetic.record(CASES)
    fast, same = changed(before, 0.5), changed(before, 0.97, 0.97, 0.97, 0.97)
    accepted = run(tmp_path, fast, "--tests", PASSES)
    assert accepted.exit_code == 0 and "accepted" in accepted.output and "faster" in accepted.output
    noisy = run(tmp_path, same, "--tests", PASSES)
    assert noisy.exit_code == 1 and "inside the noise" in noisy.output
    failing = run(tmp_path, fast, "--tests", FAILS)
    assert failing.exit_code == 1 and "refused: the tests fail" in failing.output
    assert run(tmp_path, fast, "--tests", FAILS, "--no-tests").exit_code == 0
    slower = run(tmp_path, changed(before, 0.5, 2.0), "--no-tests")
    assert slower.exit_code == 1 and "slower" in slower.output
    other = copy.deepcopy(fast)
    other.machine["processor"] = "another"
    refused = run(tmp_path, other, "--no-tests")
    assert refused.exit_code == 1 and "machine: processor: got 'another'" in refused.output


def test_arguments_are_two_of_a_kind(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    mixed = CliRunner().invoke(verify_command, [str(tmp_path / "a.json"), "main"])
    assert mixed.exit_code == 2 and "got one record and one git ref" in mixed.output
    untested = CliRunner().invoke(verify_command, ["main", "other", "--no-tests"])
    assert untested.exit_code == 2 and "--no-tests" in untested.output


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of a package of one line, tagged old and new."""
    root = tmp_path / "repository"
    (root / "rl_kernels").mkdir(parents=True)
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, env=environment, capture_output=True)

    git("init", "-q")
    for tag in ("old", "new"):
        (root / "rl_kernels" / "__init__.py").write_text(f"name = '{tag}'\n")
        git("add", ".")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    return root


def test_refs_are_tested_then_measured_in_turns(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measure(tree: Path, harness: Path, options: str, output: Path) -> Record:
        name = (tree / "rl_kernels" / "__init__.py").read_text().split("'")[1]
        order.append(name)
        assert (harness / "benchmarks" / "verify.py").exists() and options == "--quick"
        record = synthetic.record(CASES)
        return record if name == "old" else changed(record, 0.5)

    monkeypatch.setattr(verify, "_measure", measure)
    check = "python -c \"import rl_kernels; raise SystemExit(rl_kernels.name != 'new')\""
    before, after = verify.measure_refs("old", "new", repository, check, "--quick", 2)
    assert order == ["old", "new", "new", "old"]
    assert verdicts(before, after)[0] == FASTER
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


def test_a_candidate_whose_tests_fail_is_not_measured(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_measure", lambda *arguments: pytest.fail("it was measured"))
    monkeypatch.setattr(verify, "repository_root", lambda: repository)
    result = CliRunner().invoke(verify_command, ["old", "new", "--tests", FAILS])
    assert result.exit_code == 1 and "refused: the tests fail in new" in result.output
    unknown = CliRunner().invoke(verify_command, ["old", "nonsense", "--tests", PASSES])
    assert unknown.exit_code == 1 and "nonsense" in unknown.output
