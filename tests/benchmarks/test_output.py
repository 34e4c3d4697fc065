"""What a record is turned into: pictures, README's section, the terminal's table."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cases import CASES
from benchmarks.plot import picture_path, pictures_of, plot_command
from benchmarks.readme import END, START, readme_command, replaced
from benchmarks.record import Record
from benchmarks.report import best_rival, table
from rl_kernels._tables import as_text
from tests.benchmarks import synthetic
from tests.benchmarks.synthetic import OURS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record with its pictures, one rival failed."""
    path = tmp_path_factory.mktemp("results") / "r.json"
    record = synthetic.record(seed=1)
    record.cells[3]["rivals"]["compile"] = {"failed": "RuntimeError: no compiler"}
    record.save(path)
    result = CliRunner().invoke(plot_command, [str(path)])
    assert result.exit_code == 0, result.output
    return path


def test_one_small_picture_a_group(drawn: Path) -> None:
    pictures = pictures_of(Record.load(drawn))
    assert pictures == ["linear", "conv-NCHW", "conv-channels_last", "blocks", "model", "modulated"]
    for picture in pictures:
        content = picture_path(drawn, picture).read_bytes()
        assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 150_000


def test_plot_refuses_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("{}")
    result = CliRunner().invoke(plot_command, [str(path)])
    assert result.exit_code == 2 and "got no benchmark record" in result.output
    synthetic.record([]).save(path)
    result = CliRunner().invoke(plot_command, [str(path)])
    assert result.exit_code == 2 and "without cells" in result.output


def test_readme_is_written_once_and_checked(drawn: Path, tmp_path: Path) -> None:
    readme = drawn.parent / "README.md"
    readme.write_text(f"# Before\n\n{START}\nold\n{END}\n\nAfter\n")
    arguments = [str(drawn), "--readme", str(readme)]
    stale = CliRunner().invoke(readme_command, [*arguments, "--check"])
    assert stale.exit_code == 1 and "differs" in stale.output and "old" in readme.read_text()
    assert CliRunner().invoke(readme_command, arguments).exit_code == 0
    text = readme.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n\nAfter\n") and "old" not in text
    record = Record.load(drawn)
    for part in (
        record.machine["processor"],
        record.created[:10],
        record.command,
        "0123456789",
        OURS,
        "(r-linear.png)",
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("| linear 8x8x8")]
    ratio = record.cells[0]["rivals"][OURS]["ratio"]["median"]
    assert len(rows) == 1 and f"| {ratio:.2f} |" in rows[0]
    assert {line.count("|") for line in text.splitlines() if line.startswith("| linear")} == {rows[0].count("|")}
    assert CliRunner().invoke(readme_command, [*arguments, "--check"]).exit_code == 0
    readme.write_text(text.replace(f"| {ratio:.2f} |", "| 0.01 |"))
    assert CliRunner().invoke(readme_command, [*arguments, "--check"]).exit_code == 1


def test_readme_needs_its_markers_and_the_pictures(drawn: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    result = CliRunner().invoke(readme_command, [str(drawn), "--readme", str(readme)])
    assert result.exit_code == 2 and "expected one of each" in result.output
    alone = tmp_path / "alone.json"
    alone.write_text(drawn.read_text())
    result = CliRunner().invoke(readme_command, [str(alone), "--readme", str(readme)])
    assert result.exit_code == 2 and "run `plot` first" in result.output
    with pytest.raises(ValueError, match="got 1"):
        replaced(f"{END}{START}", "x")


def test_the_table_shows_ratios_memory_and_failures() -> None:
    record = synthetic.record()
    record.cells[0]["rivals"]["compile"] = {"failed": "RuntimeError: no compiler"}
    assert best_rival(record.cells[0]) == OURS
    text = as_text(table(record))
    assert "[cpu]" in text and "1.07" in text and "2.20" in text
    assert "no compiler" in text and text.count("failed") >= 2
    assert "linear 512x4096x4096 float32, forward+backward" in text


def test_the_best_is_bold() -> None:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(table(synthetic.record(CASES[:2])))
    assert "\x1b[1m1.07" in capture.get() and "\x1b[1m2.20" not in capture.get()
