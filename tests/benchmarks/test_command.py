from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import benchmarks.run
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.record import Record
from tests.benchmarks import synthetic


def test_the_commands_are_listed() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in ("run", "plot", "verify", "readme"):
        assert name in result.output


@pytest.mark.parametrize(
    ("arguments", "option", "got", "expected"),
    [
        (["--cases", "linear,nonsense"], "--cases", "got nonsense", "attention"),
        (["--backend", "nonsense"], "--backend", "got nonsense", "streamed"),
        (["--rivals", "naive,nonsense"], "--rivals", "got nonsense", "two_products"),
        (["--dtype", "int8"], "--dtype", "got int8", "bfloat16"),
        (["--dtype", ","], "--dtype", "got nothing", "bfloat16"),
        (["--only", "("], "--only", "got '('", "regular expression"),
        (["--only", "no such case"], "--only", "'no such case'", "expected at least one"),
        (["--threads", "0"], "--threads", "0", "x>=1"),
    ],
)
def test_usage_errors_name_the_option_what_came_and_what_was_expected(
    arguments: list[str], option: str, got: str, expected: str
) -> None:
    result = CliRunner().invoke(main, ["run", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert option in result.output and got in result.output and expected in result.output


def test_a_gpu_that_is_not_there_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(main, ["run", "--device", "cuda"])
    assert result.exit_code == 2 and "got cuda, expected cpu" in result.output


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the command asks for, and what it prints."""
    asked: dict[str, Any] = {}

    def fake(cases: list[Case], rivals: list[str], backends: list[str], settings: Any, *rest: Any) -> Record:
        asked.update(cases=cases, rivals=rivals, backends=backends, settings=settings, output=rest[1])
        rest[2]("first cell")
        return synthetic.record(cases)

    monkeypatch.setattr(benchmarks.run, "benchmark", fake)
    result = CliRunner().invoke(main, ["run", "--output", str(tmp_path / "r.json"), *arguments])
    assert result.exit_code == 0, result.output
    return asked, result.output


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, output = run(
        *(monkeypatch, tmp_path, "--cases", "linear", "--only", "64x", "--dtype", "float32,bfloat16", "--cold"),
        *("--backend", "streamed", "--backend", "auto", "--rivals", "naive"),
    )
    assert [case.key for case in asked["cases"]] == [
        "linear 64x768x3072 float32",
        "linear 64x768x3072 bfloat16",
        "linear 64x4096x4096 float32",
        "linear 64x4096x4096 bfloat16",
    ]
    assert asked["backends"] == ["streamed", "auto"] and asked["rivals"] == ["naive"]
    assert asked["settings"].cold and not asked["settings"].quick
    assert "linear 64x768x3072 float32, forward" in output and "r.json" in output


def test_quick_is_quicker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full, _ = run(monkeypatch, tmp_path)
    quick, _ = run(monkeypatch, tmp_path, "--quick")
    assert len(quick["cases"]) < len(full["cases"]) and "compile" in full["rivals"]
    assert "compile" not in quick["rivals"] and quick["settings"].quick
    assert quick["settings"].cell_seconds < full["settings"].cell_seconds
    assert quick["settings"].max_rounds < full["settings"].max_rounds
    named, _ = run(monkeypatch, tmp_path, "--quick", "--rivals", "compile")
    assert named["rivals"] == ["compile"]


def test_an_interrupted_run_says_where_its_record_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: Any) -> Record:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks.run, "benchmark", interrupt)
    result = CliRunner().invoke(main, ["run", "--output", str(tmp_path / "r.json")])
    assert result.exit_code == 130 and "r.json" in result.output
