"""Runs that are asked to stop: signals are noticed after a step, and a process that works for others passes them on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = [signal.SIGTERM, signal.SIGINT]
"""That a run stops for, after the step that it is in."""


class Stopped(Exception):
    """Training that was asked to stop by a signal, and has written where it is.

    Args:
        number: of the signal.
        how: what was done, and how to go on.
    """

    def __init__(self, number: int, how: str) -> None:
        super().__init__(number, how)  # As it travels between processes.
        self.number, self.how = number, how

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.how}"

    @property
    def code(self) -> int:
        """What a process ends with that this signal has ended."""
        return 128 + self.number


def leave_interrupts_to_the_parent() -> None:
    """In a process that works for another one: a terminal's Ctrl-C reaches both, and the other one passes it on."""
    SIGNALS[:] = [signal.SIGTERM]
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Listening:
    """Inside, signals are noted in ``number``, for the run to end after its step; a second one ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Listening:
        try:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # Not the main thread, which alone may ask.
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
