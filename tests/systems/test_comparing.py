"""Runs side by side: groups, differences with their intervals, the page, and experiments that go on."""

import html.parser
import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from rl_kernels.__main__ import main
from rl_kernels.systems import comparing, report
from rl_kernels.systems.comparing import Difference
from rl_kernels.systems.matrices import Matrix, carry_out
from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner.folder import RunError

CONFIG = {"model": {"name": "resnet20", "weights": None}, "data": {"name": "digits", "root": None}, "epochs": 2}
RUN = {
    "system": "replacement",
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "machine": {"processor": "a processor", "cores": 2, "gpus": []},
    "backend": "auto",
    "data": {"name": "digits", "sha256": "0", "training_images": 10, "test_images": 5},
    "begun": "2026-01-01T00:00:00+00:00",
}


def write(folder, accuracy, seed, finished=True, **changed):
    folder.mkdir(parents=True)
    files.write_json(folder / files.RUN, {**RUN, "config": {**CONFIG, "seed": seed, **changed}})
    lines = [
        {"event": "epoch", "epoch": n, "step": n, "train_loss": 1 / n, "test_accuracy": accuracy * n / 2, "seconds": n}
        for n in (1, 2)
    ]
    (folder / files.LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        files.write_json(folder / files.METRICS, {"accuracy": accuracy, "parameters": 1000, "step_seconds": 0.1})


@pytest.fixture
def runs(tmp_path):
    """Three variants: one clearly better than the first, one inside the noise."""
    for label, scores in {
        "whole": (0.90, 0.92, 0.91),
        "better": (0.93, 0.96, 0.94),
        "alike": (0.91, 0.91, 0.92),
    }.items():
        for seed, score in enumerate(scores):
            write(tmp_path / label / f"seed-{seed}", score, seed)
    files.write_json(tmp_path / files.ORDER, ["whole", "better", "alike"])
    return tmp_path


def test_differences_are_paired_and_their_intervals_students(runs):
    whole, better, alike = comparing.load_groups([runs])
    assert [group.label for group in (whole, better, alike)] == ["whole", "better", "alike"]
    found = comparing.difference(better, whole, "accuracy")
    expected = stats.ttest_rel(better.values("accuracy"), whole.values("accuracy")).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected)) and found.pairs == 3 and found.seen
    assert found.mean == pytest.approx(np.mean(better.values("accuracy")) - np.mean(whole.values("accuracy")))
    assert not comparing.difference(alike, whole, "accuracy").seen


def test_one_pair_shows_nothing():
    assert not Difference(0.5, None, None, 1).seen
    assert not Difference(0.0, 0.0, 0.0, 3).seen


def test_only_seeds_that_both_have_are_paired(runs):
    write(runs / "more" / "seed-2", 0.99, 2)
    write(runs / "more" / "seed-7", 0.10, 7)
    groups = {group.label: group for group in comparing.load_groups([runs])}
    found = comparing.difference(groups["more"], groups["whole"], "accuracy")
    assert found.pairs == 1 and found.mean == pytest.approx(0.08) and found.low is None


def test_what_cannot_be_compared_is_named(runs, tmp_path):
    write(tmp_path / "elsewhere" / "seed-0", 0.5, 0)
    run = files.read_json(tmp_path / "elsewhere" / "seed-0" / files.RUN)
    files.write_json(tmp_path / "elsewhere" / "seed-0" / files.RUN, {**run, "data": {**run["data"], "sha256": "1"}})
    with pytest.raises(RunError, match="elsewhere is of another data than whole"):
        comparing.load_groups([runs / "whole", tmp_path / "elsewhere"])
    write(tmp_path / "other" / "seed-0", 0.5, 0)
    write(tmp_path / "other" / "seed-1", 0.5, 1, epochs=3)
    with pytest.raises(RunError, match="differ in more than their seeds"):
        comparing.load_groups([tmp_path / "other"])
    write(tmp_path / "late", 0.5, 0, finished=False)
    with pytest.raises(RunError, match="late is not finished: `python -m rl_kernels resume"):
        comparing.load_groups([tmp_path / "late"])
    with pytest.raises(RunError, match="two groups are called whole"):
        comparing.load_groups([runs / "whole", runs / "whole"])
    with pytest.raises(RunError, match="holds no run"):
        comparing.load_groups([tmp_path / "nowhere"])


def test_the_table_names_no_winner_inside_the_noise(runs):
    found = CliRunner().invoke(main, ["compare", str(runs), "--json", str(runs / "record.json")])
    assert found.exit_code == 0, found.output
    lines = {line.split()[0]: line for line in found.output.splitlines() if line.strip() and "─" not in line}
    assert "(inside the noise)" in lines["alike"] and "(inside the noise)" not in lines["better"]
    assert "91.00 ± 1.00" in lines["whole"] and "+3.33" in lines["better"]
    record = json.loads((runs / "record.json").read_text())
    assert [each["label"] for each in record["groups"]] == ["whole", "better", "alike"]
    assert str(runs) not in (runs / "record.json").read_text()


def test_a_record_is_compared_as_the_runs_it_was_made_of(runs, tmp_path):
    record = tmp_path / "record.json"
    first = CliRunner().invoke(main, ["compare", str(runs), "--to", "0.92", "--json", str(record)])
    again = CliRunner().invoke(main, ["compare", str(record), "--to", "0.92"])
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert first.output == again.output and "…" not in first.output
    lines = {line.split()[0]: line.split() for line in first.output.splitlines() if line.strip() and "─" not in line}
    assert lines["better"][-2:] == ["2.0", "2.0"], "of all three"
    assert lines["whole"][-5:] == ["2.0", "(1", "of", "3)", "2.0"] and lines["alike"][-5:-3] == ["2.0", "(1"]
    page = CliRunner().invoke(main, ["report", str(record), "--output", str(tmp_path / "page.html")])
    assert page.exit_code == 0 and "91.00 ± 1.00" in (tmp_path / "page.html").read_text()
    never = CliRunner().invoke(main, ["compare", str(record), "--to", "1"])
    assert "never" in never.output
    record.write_text('{"groups": [{}]}')
    found = CliRunner().invoke(main, ["compare", str(record)])
    assert found.exit_code != 0 and "record.json is no record of a comparison: KeyError: 'config'" in found.output


class Page(html.parser.HTMLParser):
    """Collects a page's tags and text, and what it would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.loaded = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_the_page_holds_everything(runs):
    write(runs / "<b>odd & named" / "seed-0", 0.5, 0)
    found = CliRunner().invoke(main, ["report", str(runs)])
    assert found.exit_code == 0, found.output
    page = Page()
    page.feed((runs / report.NAME).read_text())
    assert "svg" in page.tags and "script" not in page.tags and "b" not in page.tags and not page.loaded
    for words in (
        "Replacement on digits",
        "91.00 ± 1.00",
        "training loss",
        "seconds",
        "a processor, 2 cores",
        "model.name",
    ):
        assert words in page.text, words
    assert "<b>odd & named" in page.text


def test_a_report_of_one_run(tmp_path):
    write(tmp_path / "run", 0.5, 0)
    report.write_report([tmp_path / "run"], tmp_path / "page.html")
    assert "1 variant, 1 runs" in (tmp_path / "page.html").read_text()


MATRIX = Matrix(
    "?",
    "replacement",
    "digits",
    2,
    {"whole": ("every=null",), "fitted": ("weights={whole}", "init=fit")},
    ("width=4", "limit=64", "batch_size=32", "epochs=1", "accelerator=cpu"),
)


def test_an_experiment_goes_on_where_it_was(tmp_path):
    folders = carry_out(MATRIX, tmp_path, jobs=1)
    groups = comparing.load_groups(folders)
    assert [(group.label, len(group.runs)) for group in groups] == [("whole", 2), ("fitted", 2)]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(files.METRICS)}
    (tmp_path / "fitted" / "seed-1" / files.METRICS).unlink()
    carry_out(MATRIX, tmp_path, jobs=1)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(files.METRICS)}
    assert {path.parent.parent.name for path in written if written[path] != again[path]} == {"fitted"}
    with pytest.raises(RunError, match="holds a run of another config"):
        carry_out(MATRIX, tmp_path, jobs=1, epochs=2)
    record = comparing.as_record(groups)
    assert record["groups"][1]["config"]["model"]["weights"] == "whole"
    epochs = [line["epoch"] for line in record["groups"][1]["curves"][0]]
    assert epochs == [0, 1], "what is left of a trained net at its conversion"


def test_the_command_line_from_training_to_a_page(tmp_path):
    def call(*arguments):
        found = CliRunner().invoke(main, [str(each) for each in arguments])
        assert found.exit_code == 0, found.output
        return found.output

    settings = [part for each in MATRIX.shared for part in ("--set", each)]
    out = tmp_path / "runs"
    said = call("train", "replacement", "--data", "digits", "--preset", "digits", *settings, "--seeds", 2, "--out", out)
    assert "accuracy %" in said and sorted(path.name for path in out.iterdir()) == ["seed-0", "seed-1"]
    assert "images = 360" in call("eval", out / "seed-0", "--checkpoint", "best")
    assert "accuracy" in call("resume", out)
    call("report", out, "--output", tmp_path / "page.html")
    assert "digits-resnet: " in call("compare", "--list")
    assert "optimizer.learning_rate = 0.005" in call("train", "replacement", "--list")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "replacemnt"], "system: got 'replacemnt', expected one of 'replacement'"),
        (["train", "replacement", "--set", "epoch=1"], "there is no 'epoch'"),
        (["train", "replacement", "--data", "cifar"], "expected a folder, or one of digits"),
        (["resume", "nowhere"], "nowhere: no run in it"),
        (["eval", "nowhere"], "run.json: not there"),
        (["compare"], "folders: got none"),
        (["compare", "--matrix", "e9"], "matrix: got 'e9', expected one of 'digits-resnet'"),
        (["report", "nowhere"], "nowhere holds no run"),
    ],
)
def test_a_wrong_request_is_a_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 1 and words in found.output and "Traceback" not in found.output
    assert not any(tmp_path.rglob(files.RUN))
