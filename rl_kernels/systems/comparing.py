"""Runs side by side: mean and deviation over seeds, and paired differences with their intervals.

A difference is between runs of one seed, which share initial weights (of what both have) and the order of images. Its
interval is Student's, at 95 %. Where it holds zero, or where there are fewer than two pairs, nothing is said to be
better.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner.folder import RunError

CONFIDENCE = 0.95
SCORES = ("accuracy", "map", "map_50")
"""The figure that a system is judged by: the first of these that its runs have. More is better."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        seed: of it.
        run: ``run.json``.
        metrics: ``metrics.json``.
        epochs: the log's lines of epochs.
    """

    folder: Path
    seed: int
    run: dict[str, Any]
    metrics: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Group:
    """Runs of one config with several seeds.

    Attributes:
        label: a folder's name.
        runs: by seed.
    """

    label: str
    runs: tuple[Run, ...]

    def values(self, figure: str) -> list[float]:
        """Return a figure of every run that has it."""
        found = (run.metrics.get(figure) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, figure: str) -> float | None:
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A figure of one group minus that of another, over the seeds that both have.

    Attributes:
        mean: of the pairs.
        low: end of the interval; None with fewer than two pairs.
        high: the other end.
        pairs: how many.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def load_groups(folders: Iterable[Path]) -> list[Group]:
    """Read runs: each folder is a run, or holds runs (of several seeds), or folders of those; or is a record.

    Raises:
        RunError: a folder without a finished run, groups of one name, or of several systems or data sets.
    """
    groups: list[Group] = []
    for folder in map(Path, folders):
        groups += _recorded(folder) if folder.is_file() else _groups(folder)
    labels = [group.label for group in groups]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise RunError(f"compare: two groups are called {', '.join(twice)}: rename a folder")
    for group in groups[1:]:
        mine, first = group.runs[0].run, groups[0].runs[0].run
        for what in ("system", "data"):
            if mine[what] != first[what]:
                raise RunError(
                    f"compare: {group.label} is of another {what} than {groups[0].label}: {mine[what]}, {first[what]}"
                )
    return groups


def _groups(folder: Path) -> list[Group]:
    if (folder / files.RUN).exists():
        return [Group(folder.resolve().name, (_read(folder),))]
    inner = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    own = [path for path in inner if (path / files.RUN).exists()]
    if own:
        runs = sorted((_read(path) for path in own), key=lambda run: run.seed)
        _check_alike(folder, runs)
        return [Group(folder.resolve().name, tuple(runs))]
    if (folder / files.ORDER).exists():
        order = files.read_json(folder / files.ORDER)
        inner.sort(key=lambda path: order.index(path.name) if path.name in order else len(order))
    found = [group for path in inner for group in (_groups(path) if _holds_runs(path) else [])]
    if not found:
        raise RunError(f"compare: {folder} holds no run")
    return found


def _recorded(path: Path) -> list[Group]:
    """The groups of which :func:`as_record` made what the file holds."""
    record = files.read_json(path)
    try:
        about = {key: value for key, value in record.items() if key not in ("groups", "score", "confidence")}
        groups = []
        for group in record["groups"]:
            each = zip(group["config"]["seed"], group["metrics"], group["curves"], strict=True)
            runs = (
                Run(path, seed, {**about, "config": {**group["config"], "seed": seed}}, metrics, tuple(curve))
                for seed, metrics, curve in each
            )
            groups.append(Group(group["label"], tuple(runs)))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"compare: {path} is no record of a comparison: {type(error).__name__}: {error}") from error
    return groups


def _holds_runs(folder: Path) -> bool:
    return any(True for _ in folder.rglob(files.RUN))


def _read(folder: Path) -> Run:
    run = files.read_json(folder / files.RUN)
    if not (folder / files.METRICS).exists():
        raise RunError(f"compare: {folder} is not finished: `python -m rl_kernels resume {folder}`")
    metrics = files.read_json(folder / files.METRICS)
    epochs = tuple(line for line in files.read_log(folder) if line["event"] == "epoch")
    return Run(folder, run["config"]["seed"], run, metrics, epochs)


def _check_alike(folder: Path, runs: Sequence[Run]) -> None:
    configs = [{**_without_places(run), "seed": None, "system": run.run["system"]} for run in runs]
    if any(config != configs[0] for config in configs):
        raise RunError(f"compare: the runs in {folder} differ in more than their seeds: give each a folder of its own")


def difference(group: Group, baseline: Group, figure: str) -> Difference | None:
    """Compare two groups over the seeds that both have; None without any."""
    theirs = {run.seed: run.metrics.get(figure) for run in baseline.runs}
    pairs = [
        run.metrics[figure] - theirs[run.seed]
        for run in group.runs
        if run.metrics.get(figure) is not None and theirs.get(run.seed) is not None
    ]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, None, None, len(pairs))
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return Difference(mean, mean - half, mean + half, len(pairs))


def score_of(groups: Sequence[Group]) -> str:
    """Return the figure that these groups are judged by."""
    for figure in SCORES:
        if all(group.values(figure) for group in groups):
            return figure
    raise RunError(f"compare: the runs have no common figure of {', '.join(SCORES)}")


HEADINGS = ("", "seeds", "{score} %", "difference", "interval", "parameters", "optimizer", "peak", "ms a step")


def table(groups: Sequence[Group], level: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows; differences are against the first group, in points of a percent.

    With a ``level`` of the score also when an epoch's first reached it: mean epoch and seconds of the runs that did.
    """
    score = score_of(groups)
    more = [figure for figure in OF_SYSTEMS if any(group.values(figure) for group in groups)]
    rows = []
    for number, group in enumerate(groups):
        mean, deviation = group.mean(score), group.deviation(score)
        assert mean is not None
        against = difference(group, groups[0], score) if number else None
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}"),
                "" if against is None else _points(against),
                "" if against is None or against.low is None else _interval(against),
                _count(group.mean("parameters")),
                _mebibytes(group.mean("optimizer_bytes")),
                _mebibytes(group.mean("peak_bytes")),
                _milliseconds(group.mean("step_seconds")),
                *(OF_SYSTEMS[figure][1](group.mean(figure)) for figure in more),
                *(() if level is None else _reached(group, score, level)),
            ]
        )
    headings = [heading.format(score=score) for heading in HEADINGS] + [OF_SYSTEMS[figure][0] for figure in more]
    return headings + ([] if level is None else [f"epochs to {100 * level:g} %", "seconds"]), rows


def _reached(group: Group, score: str, level: float) -> tuple[str, str]:
    lines = [first for run in group.runs if (first := first_at(run, score, level)) is not None]
    if not lines:
        return "never", ""
    share = "" if len(lines) == len(group.runs) else f" ({len(lines)} of {len(group.runs)})"
    epochs, seconds = (statistics.fmean(line[key] for line in lines) for key in ("epoch", "seconds"))
    return f"{epochs:.1f}{share}", f"{seconds:.1f}"


def first_at(run: Run, score: str, level: float) -> dict[str, Any] | None:
    """Return the line of the first epoch whose score is ``level`` or more; None where none is."""
    for line in run.epochs:
        if any(key.endswith(f"_{score}") and value >= level for key, value in line.items()):
            return line
    return None


def _points(against: Difference) -> str:
    if against.low is None:
        return f"{100 * against.mean:+.2f} (one pair)"
    return f"{100 * against.mean:+.2f}" + ("" if against.seen else " (inside the noise)")


def _interval(against: Difference) -> str:
    assert against.low is not None and against.high is not None
    return f"{100 * against.low:+.2f} .. {100 * against.high:+.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.2f} MiB"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.1f}"


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


OF_SYSTEMS = {
    "auxiliary_parameters": ("auxiliary", _count),
    "step_flops": ("GFLOP a step", _giga),
    "task_parameters": ("of the task", _count),
    "task_share": ("share %", _percent),
}
"""Figures that only some systems have: what they are called in a table, and how they stand there."""


def _without_places(run: Run) -> dict[str, Any]:
    """A run's config, in which folders of this machine are names; a seed's folder goes by that of all seeds."""
    config = dict(run.run["config"])
    if (weights := config["model"]["weights"]) is not None:
        config["model"] = {**config["model"], "weights": Path(weights).parent.name}
    if config["data"]["root"] is not None:
        config["data"] = {**config["data"], "root": Path(config["data"]["root"]).name}
    return config


def as_record(groups: Sequence[Group]) -> dict[str, Any]:
    """Return everything that was compared as plain values, for a JSON file."""
    score = score_of(groups)
    recorded = []
    for number, group in enumerate(groups):
        against = difference(group, groups[0], score) if number else None
        recorded.append(
            {
                "label": group.label,
                "config": {**_without_places(group.runs[0]), "seed": [run.seed for run in group.runs]},
                "metrics": [run.metrics for run in group.runs],
                "curves": [list(run.epochs) for run in group.runs],
                "difference": None
                if against is None
                else {"mean": against.mean, "low": against.low, "high": against.high, "pairs": against.pairs},
            }
        )
    first = groups[0].runs[0].run
    kept = {key: first.get(key) for key in ("system", "versions", "commit", "machine", "backend", "data", "begun")}
    return {"score": score, "confidence": CONFIDENCE, **kept, "groups": recorded}
