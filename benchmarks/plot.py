"""``python -m benchmarks plot``: one picture a group: time beside the baseline's, forward and both ways, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.contenders import BOTH, FORWARD, STEP
from benchmarks.record import Record, timed
from benchmarks.rivals import is_ours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEBI = 1 << 20
DPI = 110
# Okabe and Ito's colours, which colour-blind readers tell apart; the warm ones are this package's.
OURS = ("#D55E00", "#E69F00", "#F0C94A", "#8C3B00")
OTHERS = {
    "ceiling": "#4D4D4D",
    "end-to-end": "#4D4D4D",
    "naive": "#0072B2",
    "add": "#56B4E9",
    "compile": "#009E73",
    "two_products": "#CC79A7",
    "parametrize": "#A6A6A6",
}
TITLES = {
    "linear": "Linear layers (tokens × outputs × inputs)",
    "conv-NCHW": "Convolutions, NCHW (kernel, channels, image, batch)",
    "conv-channels_last": "Convolutions, channels_last (kernel, channels, image, batch)",
    "blocks": "Attention and residual block",
    "model": "Training steps of whole models, a block in four replaced",
}


@dataclass(frozen=True)
class Panel:
    """One column of a picture.

    Attributes:
        title: above it.
        mode: of the cells that it draws.
        value: of a timed rival: the bar's length and the whiskers' ends; None where there is nothing to draw.
        line: where the baseline is 1 by definition and drawn as a line.
        unit: written under the axis.
    """

    title: str
    mode: str
    value: Callable[[dict[str, Any]], tuple[float, float, float] | None]
    line: bool
    unit: str


def _time(rival: dict[str, Any]) -> tuple[float, float, float] | None:
    ratio = rival["ratio"]
    return None if ratio is None else (ratio["median"], ratio["p20"], ratio["p80"])


def _bytes(name: str) -> Callable[[dict[str, Any]], tuple[float, float, float] | None]:
    def value(rival: dict[str, Any]) -> tuple[float, float, float] | None:
        return None if rival.get(name) is None else (rival[name] / MEBI,) * 3

    return value


def panels_of(picture: str) -> list[Panel]:
    """The columns of a group's picture."""
    if picture == "model":
        return [
            Panel("time of a step", STEP, _time, True, "time / end-to-end's"),
            Panel("peak memory of a step", STEP, _bytes("peak_bytes"), False, "MiB"),
            Panel("optimizer state", STEP, _bytes("optimizer_bytes"), False, "MiB"),
        ]
    memory = "extra memory, forward + backward"
    return [
        Panel("forward", FORWARD, _time, True, "time / plain layer's"),
        Panel("forward + backward", BOTH, _time, True, "time / plain layer's"),
        Panel(memory, BOTH, _bytes("peak_extra_bytes"), False, "MiB beyond outputs and gradients, at the peak"),
    ]


def pictures_of(record: Record) -> list[str]:
    """The groups that the record has cells of, each one picture."""
    return list(dict.fromkeys(cell["case"]["picture"] for cell in record.cells))


def picture_path(record_path: Path, picture: str) -> Path:
    """Where a group's picture is saved: beside the record."""
    return record_path.with_name(f"{record_path.stem}-{picture}.png")


def draw(record: Record, picture: str, path: Path) -> None:
    """Save one group's picture as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from PIL import Image

    cells = [cell for cell in record.cells if cell["case"]["picture"] == picture]
    rows = list(dict.fromkeys(cell["case"]["key"] for cell in cells))
    present = list(dict.fromkeys(name for cell in cells for name in cell["rivals"]))
    baseline = cells[0]["baseline"]
    names = sorted(present, key=lambda name: (name != baseline, not is_ours(name)))
    colours = _colours(names)
    columns = panels_of(picture)
    height = max(2.0, len(rows) * (0.125 * len(names) + 0.14)) + 1.7
    figure = Figure(figsize=(14, height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    found = {(cell["case"]["key"], cell["mode"]): cell for cell in cells}
    for one, panel in zip(axes, columns, strict=True):
        _draw_panel(one, panel, [found.get((row, panel.mode)) for row in rows], names, colours, baseline)
    axes[0].set_yticks(range(len(rows)), [_label(row, picture, record) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    patches = [Patch(color=colours[name], label=name, alpha=_alpha(name, baseline)) for name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(names)), frameon=False)
    figure.suptitle(f"{TITLES.get(picture, picture)}\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 1 - 0.52 / height, _subtitle(record), ha="center", va="bottom", fontsize=9, color="#555555")
    figure.set_dpi(DPI)
    canvas.draw()
    # A palette is enough for flat colours, and a third of the file.
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(96).save(path, optimize=True)


def _alpha(name: str, baseline: str) -> float:
    return 1.0 if is_ours(name) or name == baseline else 0.8


def _colours(names: Sequence[str]) -> dict[str, str]:
    own = [name for name in names if is_ours(name)]
    return {name: OURS[own.index(name) % len(OURS)] if name in own else OTHERS.get(name, "#000000") for name in names}


def _label(key: str, picture: str, record: Record) -> str:
    """A row's label: without what the title says, and without the dtype where all rows have the same."""
    dtypes = {cell["case"]["dtype"] for cell in record.cells}
    name, dtype = key.rsplit(" ", 1)
    for said in ("linear ", "conv ", " NCHW" if picture == "conv-NCHW" else " channels_last"):
        name = name.replace(said, "") if picture != "blocks" else name
    words = name.split(" ")
    middle = (len(words) + 1) // 2
    name = name if len(name) <= 18 else " ".join(words[:middle]) + "\n" + " ".join(words[middle:])
    return name if len(dtypes) == 1 else f"{name}\n{dtype}"


def _subtitle(record: Record) -> str:
    place = record.machine["gpus"][0] if record.settings["device"] == "cuda" else record.machine["processor"]
    threads = record.machine["threads"]
    dtypes = ", ".join(dict.fromkeys(cell["case"]["dtype"] for cell in record.cells))
    details = [
        place,
        f"{threads} thread{'s' if threads > 1 else ''}",
        f"torch {record.versions.get('torch', '?')}",
        dtypes,
    ]
    caches = "cold caches" if record.settings["cold"] else "warm caches"
    return ", ".join([*details, caches, record.created[:10]]) + "; medians, whiskers p20 to p80, shorter is better"


def _draw_panel(
    axes: Axes,
    panel: Panel,
    cells: Sequence[dict[str, Any] | None],
    names: Sequence[str],
    colours: dict[str, str],
    baseline: str,
) -> None:
    shown = [name for name in names if not (panel.line and name == baseline)]
    thickness = 0.84 / max(1, len(names))
    values = {
        (row, name): value
        for row, cell in enumerate(cells)
        if cell is not None
        for name, rival in timed(cell)
        if name in shown and (value := panel.value(rival)) is not None
    }
    medians = [value[0] for value in values.values()]
    logarithmic = panel.line and bool(medians) and max(medians) > 5 * min(medians)
    far = max([*(value[2] for value in values.values()), 1e-9])
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(0.8, 0.8 * min(value[1] for value in values.values())), 1.6 * far)
    elif panel.line:
        axes.set_xlim(0, 1.18 * max(far, 1))
    elif far > 30 * max(1.0, min(medians, default=1.0)):
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, 3 * far)
    else:
        axes.set_xlim(0, 1.18 * far)
    for row, cell in enumerate(cells):
        axes.axhline(row + 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
        if cell is None:
            continue
        for place, name in enumerate(shown):
            y = row + (place - (len(shown) - 1) / 2) * thickness
            value = values.get((row, name))
            style: dict[str, Any] = {"fontsize": 7, "va": "center_baseline"}
            if value is None:
                if "failed" in cell["rivals"].get(name, {}):
                    start = axes.get_xlim()[0] if not panel.line else 1.0
                    axes.annotate("failed", (start, y), (3, 0), textcoords="offset points", color="#888888", **style)
                continue
            own = is_ours(name)
            # On a log axis a bar grows from the baseline's line, where it starts to mean something.
            left = 1.0 if logarithmic else 0.0
            axes.barh(
                y, value[0] - left, thickness * 0.92, left=left, color=colours[name], alpha=_alpha(name, baseline)
            )
            if value[1] != value[2]:
                axes.plot(value[1:], (y, y), color="#222222", linewidth=0.9, solid_capstyle="butt")
            text = f"{value[0]:.2f}" if panel.line else _mebibytes(value[0])
            end = max(value[2], 1.0 if panel.line else 0.0)  # Never across the baseline's line.
            weight, colour = ("bold", "#000000") if own else ("normal", "#777777")
            axes.annotate(text, (end, y), (3, 0), textcoords="offset points", fontweight=weight, color=colour, **style)
    if panel.line:
        axes.axvline(1.0, color=colours.get(baseline, "#4D4D4D"), linewidth=1.6, zorder=3)
    _tidy(axes, panel, logarithmic)


def _tidy(axes: Axes, panel: Panel, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if logarithmic:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif not panel.line:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.unit + (", logarithmic" if axes.get_xscale() != "linear" else ""), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="both", labelsize=9)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _mebibytes(value: float) -> str:
    if 0 < value < 0.01:
        return "<0.01"
    return "0" if value == 0 else f"{value:.0f}" if value >= 100 else f"{value:.2g}"


@click.command("plot")
@click.argument("records", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def plot_command(records: tuple[Path, ...]) -> None:
    """Draw a record's pictures, one a group of cases, and save them beside it as PNG."""
    for path in records:
        try:
            record = Record.load(path)
            if not record.cells:
                raise click.BadParameter(f"got {path.name} without cells, expected at least one", param_hint="RECORDS")
            for picture in pictures_of(record):
                draw(record, picture, picture_path(path, picture))
                click.echo(picture_path(path, picture))
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="RECORDS") from error
        except ImportError as error:
            raise click.ClickException(
                f"pictures need matplotlib: pip install 'rl_kernels[bench]' ({error})"
            ) from error
