"""Tables as plain text, for everything that prints itself."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 140


def simple_table(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table with a rule under its header; the columns ``numbers`` are set to the right and never wrapped."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def as_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """What rich would print, without colours, in lines of so many characters at most."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")
