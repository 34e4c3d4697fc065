"""One HTML page about runs, with everything in it: tables, curves, configs, versions."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_kernels.systems import comparing
from rl_kernels.systems.comparing import Group
from rl_kernels.systems.config import flatten
from rl_kernels.systems.runner.folder import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "report.html"
MOST_BANDS = 6  # More of them hide one another.

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #dbe2ea; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figure { margin: 0 } svg { max-width: 100%; height: auto } .note { color: #5a6b7b; font-size: .9rem }
</style>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<table><tr>{% for each in headings %}<th>{{ each }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for each in row %}<td>{{ each }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p class="note">Mean ± standard deviation over seeds, of the last epoch, on test images. {% if rows|length > 1 -%}
Differences, in points of a percent, are against {{ rows[0][0] }}, seed by seed, with Student's interval at 95 %;
"inside the noise": the interval holds zero; "one pair": there is none.{%- endif %}</p>
<h2>Curves</h2>
<figure>{{ curves|safe }}</figure>
<p class="note">Lines: mean over seeds{% if rows|length <= bands %}; bands: lowest to highest{% endif %}.
Seconds are of the machine below, evaluation included.</p>
<h2>Configuration</h2>
<table><tr><th>field</th>{% for each in labels %}<th>{{ each }}</th>{% endfor %}</tr>
{% for name, values in fields %}<tr><td>{{ name }}</td>{% for each in values %}<td>{{ each }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Made with</h2>
<table>{% for name, value in made %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</html>
"""


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page about the runs in ``folders`` to ``path``.

    Raises:
        RunError: a folder without a finished run, or a path that cannot be written.
        ImportError: matplotlib or jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report needs jinja2 and matplotlib: make systems, or rl_kernels[systems]") from error
    groups = comparing.load_groups(folders)
    headings, rows = comparing.table(groups)
    first = groups[0].runs[0].run
    data = first["data"]
    title = f"{first['system'].capitalize()} on {data['name']}"
    summary = (
        f"{len(groups)} {'variant' if len(groups) == 1 else 'variants'}, "
        f"{sum(len(group.runs) for group in groups)} runs; {data['training_images']:,} training images, "
        f"{data['test_images']:,} test images."
    )
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        title=title,
        summary=summary,
        headings=headings,
        rows=rows,
        curves=_curves(groups),
        bands=MOST_BANDS,
        labels=[group.label for group in groups],
        fields=_fields(groups),
        made=_made(first),
    )
    write_whole(path, lambda file: file.write(text.encode()))


def _fields(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """The config's fields; those in which groups differ first."""
    flat = [flatten(group.runs[0].run["config"]) for group in groups]
    for each, group in zip(flat, groups, strict=True):
        each["seed"] = ", ".join(str(run.seed) for run in group.runs)
    names = list(dict.fromkeys(name for each in flat for name in each))
    rows = [(name, [str(each.get(name, "")) for each in flat]) for name in names]
    return sorted(rows, key=lambda row: len(set(row[1])) == 1)


def _made(run: dict[str, Any]) -> list[tuple[str, str]]:
    machine = run["machine"]
    return [
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("GPUs", ", ".join(machine["gpus"]) or "none"),
        *((f"version of {name}", value) for name, value in run["versions"].items()),
        ("commit", run["commit"] or "not a checkout"),
        ("backend", run["backend"]),
        ("data, sha256", run["data"]["sha256"]),
        ("begun", run["begun"]),
    ]


def _curves(groups: Sequence[Group]) -> str:
    """Loss and accuracy against epochs and seconds, as SVG."""
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines = [line for group in groups for run in group.runs for line in run.epochs]
    score = comparing.score_of(groups)
    scored = next((key for key in lines[-1] if key.endswith(f"_{score}")), None)
    wanted: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
        ("training loss", "log", lambda line: line.get("train_loss")),
    ]
    if scored is not None:
        kind = scored.partition("_")[0]
        wanted.append((f"{kind} {score}, %", "linear", lambda line: 100 * line[scored]))
    colors = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    # Text as outlines would be unreadable for search and screen readers.
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(12, 4.2 * len(wanted)), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(len(wanted), 2, squeeze=False, sharey="row")
        for row, (name, scale, value) in zip(panels, wanted, strict=True):
            for axes, along in zip(row, ("epoch", "seconds"), strict=True):
                axes.set_prop_cycle(color=[colors(index) for index in range(colors.N)])
                for group in groups:
                    _draw(axes, group, along, value, band=len(groups) <= MOST_BANDS)
                axes.set(yscale=scale, xlabel=along)
                axes.grid(alpha=0.25, linewidth=0.6)
                axes.spines[["top", "right"]].set_visible(False)
            row[0].set_ylabel(name)
        if len(groups) > 1:
            handles, labels = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        written = io.StringIO()
        figure.savefig(written, format="svg")
    text = written.getvalue()
    return text[text.index("<svg") :]


def _draw(axes: Axes, group: Group, along: str, value: Callable[[dict[str, Any]], Any], band: bool) -> None:
    curves = [[line for line in run.epochs if value(line) is not None] for run in group.runs]
    by_epoch = list(zip(*curves, strict=False))
    if not by_epoch:
        return
    across = [statistics.fmean(line[along] for line in lines) for lines in by_epoch]
    up = [[value(line) for line in lines] for lines in by_epoch]
    (drawn,) = axes.plot(
        across, [statistics.fmean(each) for each in up], label=group.label, linewidth=1.8, marker="o", markersize=3
    )
    if band:
        color = drawn.get_color()
        axes.fill_between(across, [min(each) for each in up], [max(each) for each in up], alpha=0.15, color=color)
