"""What a run writes down while it goes: a JSON line a step and an epoch, a progress bar, TensorBoard if wanted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rl_kernels.systems.runner.folder import LOG, RunError, read_log, write_whole


def cut_log(folder: Path, step: int, epochs: int) -> None:
    """Keep the lines of the first ``step`` steps and ``epochs`` epochs: what follows is about to be done again."""
    kept = [
        line
        for line in read_log(folder)
        if (line["event"] == "step" and line["step"] <= step) or (line["event"] == "epoch" and line["epoch"] <= epochs)
    ]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_whole(folder / LOG, lambda file: file.write(text.encode()))


class Record:
    """Writes ``log.jsonl`` and shows a progress bar, for the process that does so; for others it does nothing.

    Args:
        folder: of the run; None writes nothing.
        total: steps of the run.
        done: of them, before it began.
        batch_size: images of a step.
        show: the bar, or a line an epoch where there is no terminal.
        tensorboard: write TensorBoard's files, too.
    """

    def __init__(
        self, folder: Path | None, total: int, done: int, batch_size: int, *, show: bool, tensorboard: bool
    ) -> None:
        self.folder, self.batch_size, self.show = folder, batch_size, show
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=self._console,
            disable=not (show and self._console.is_terminal),
        )
        self._task = self._progress.add_task("steps", total=total, completed=done, said="")
        self._file: IO[str] | None = None
        self._board: Any = None
        self._tensorboard = tensorboard
        self._rate = 0.0

    def __enter__(self) -> Record:
        if self.folder is not None:
            with self._errors_in_words():
                self._file = (self.folder / LOG).open("a", encoding="utf-8")
            if self._tensorboard:
                self._board = _summary_writer(self.folder / "tensorboard")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # What was lost has been said where it was written.
                self._file.close()

    def step(self, line: dict[str, Any]) -> None:
        """Record an update: ``step``, ``epoch``, ``loss``, ``learning_rate``, ``seconds``."""
        self._write({"event": "step", **line})
        rate = self.batch_size / max(line["seconds"], 1e-9)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        said = f"loss {line['loss']:.4f}  {self._rate:,.0f} images/s"
        self._progress.update(self._task, completed=line["step"], description=f"epoch {line['epoch']}", said=said)
        self._scalars(line, ("loss", "learning_rate"))

    def epoch(self, line: dict[str, Any]) -> None:
        """Record the end of an epoch and its evaluation."""
        self._write({"event": "epoch", **line})
        self._scalars(line, tuple(key for key in line if key not in ("epoch", "step", "seconds")))
        if self.show:
            figures = "  ".join(
                f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float) and key != "seconds"
            )
            self._progress.console.print(
                f"epoch {line['epoch']:>3}  {figures}  {line['seconds']:.1f} s", highlight=False
            )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self._progress.console.print(text, highlight=False)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            with self._errors_in_words():
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()

    @contextlib.contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.folder}/{LOG}: not written: {error}; the last checkpoint is whole") from error

    def _scalars(self, line: dict[str, Any], keys: tuple[str, ...]) -> None:
        if self._board is not None:
            for key in keys:
                if isinstance(line[key], float):
                    self._board.add_scalar(key, line[key], line["step"])


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("runtime.tensorboard: it is not installed: pip install tensorboard") from error
    return SummaryWriter(str(folder))
