"""Draw deploy/grafana/dashboard.json with the data of a running Prometheus.

    python tools/draw_dashboard.py --prometheus http://127.0.0.1:9090 --minutes 60 dashboard.png

Rows, panels, places, titles, units, legends, thresholds and queries are the dashboard's; the rendering is
matplotlib's, not Grafana's. tools/dashboard_story.py makes the data of the picture in the documentation.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from PIL import Image

from dashboard_data import Series, Span, panel_series

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy/grafana/dashboard.json"
COLUMNS = 24
CELL_W, CELL_H = 66, 36
"""Pixels of one cell of the dashboard's grid."""
DPI = 100
MOST_COLUMNS = 4
"""In a legend."""
COLOURS = ("#3b7dd8", "#e8833a", "#3a9d5d", "#c94f6d", "#8661c1", "#b59a1f", "#4aa8b5", "#7a7f87")
INK, FAINT, PAPER = "#24292f", "#6e7781", "#f2f3f5"
NAMED = {"text": INK, "green": "#2e8b57", "red": "#c8323c", "orange": "#e8833a", "blue": "#3b7dd8"}

Query = Callable[[Mapping[str, Any]], list[Series]]
"""Returns the lines of a panel."""


def draw(dashboard: Mapping[str, Any], query: Query, span: Span) -> Image.Image:
    """Return the picture of `dashboard`; the time axis counts minutes from the start of `span`."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = Figure(figsize=(COLUMNS * CELL_W / DPI, height * CELL_H / DPI), dpi=DPI, facecolor=PAPER)
    for panel in dashboard["panels"]:
        place = _Place(panel["gridPos"], height)
        if panel["type"] == "row":
            x, y = place.point(8, CELL_H - 8)
            figure.text(x, y, panel["title"], color=INK, size=13, weight="bold", va="bottom")
            continue
        _box(figure, place, panel["title"])
        series = query(panel)
        if panel["type"] == "stat":
            _stat(figure, place, panel, series)
        else:
            legend_px = 16 * math.ceil(len(series) / MOST_COLUMNS)
            axes = figure.add_axes(place.inside(left=66, right=18, top=36, bottom=34 + legend_px))
            _lines(axes, panel, series, span)
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor=PAPER)
    return Image.open(buffer).convert("RGB")


class _Place:
    """A panel's place, as fractions of the figure, from pixels of the panel."""

    def __init__(self, grid: Mapping[str, int], height: int) -> None:
        self._left, self._top = grid["x"] * CELL_W, grid["y"] * CELL_H
        self.width, self.height = grid["w"] * CELL_W, grid["h"] * CELL_H
        self._all_w, self._all_h = COLUMNS * CELL_W, height * CELL_H

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Return the point `x` right of and `y` below the panel's upper left corner."""
        return (self._left + x) / self._all_w, 1 - (self._top + y) / self._all_h

    def inside(
        self, *, left: float, right: float, top: float, bottom: float
    ) -> tuple[float, float, float, float]:
        """Return left, bottom, width and height of what is left within these margins."""
        x, y = self.point(left, self.height - bottom)
        return (
            x,
            y,
            (self.width - left - right) / self._all_w,
            (self.height - top - bottom) / self._all_h,
        )


def _box(figure: Figure, place: _Place, title: str) -> None:
    x, y, width, height = place.inside(left=5, right=5, top=5, bottom=5)
    figure.patches.append(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.003",
            mutation_aspect=0.75,
            transform=figure.transFigure,
            facecolor="white",
            edgecolor="#d8dce1",
            linewidth=0.8,
            zorder=-1,
        )
    )
    figure.text(*place.point(14, 14), title, color=INK, size=10, weight="bold", va="top")


def _stat(figure: Figure, place: _Place, panel: Mapping[str, Any], series: Sequence[Series]) -> None:
    """Write the last value, in the colour of its threshold, over a faint line of how it came to it."""
    defaults = panel["fieldConfig"]["defaults"]
    last = [value for each in series for value in each.values if not math.isnan(value)]
    if not last:
        _no_data(figure, place)
        return
    reached = [step for step in _thresholds(defaults) if step["value"] is None or last[-1] >= step["value"]]
    colour = NAMED[reached[-1]["color"]]
    axes = figure.add_axes(place.inside(left=12, right=12, top=0.66 * place.height, bottom=10))
    axes.axis("off")
    for each in series:
        axes.fill_between(each.times, each.values, color=colour, alpha=0.15, linewidth=0)
        axes.plot(each.times, each.values, color=colour, alpha=0.5, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    text = formatted(last[-1], defaults["unit"])
    figure.text(
        *place.point(place.width / 2, 0.46 * place.height),
        text,
        color=colour,
        size=24,
        weight="bold",
        ha="center",
        va="center",
    )


def _lines(axes: Axes, panel: Mapping[str, Any], series: Sequence[Series], span: Span) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    minutes = [[(moment - span.start) / 60 for moment in each.times] for each in series]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(series))]
    if defaults["custom"]["stacking"]["mode"] == "normal" and series:
        axes.stackplot(
            minutes[0],
            [[0 if math.isnan(value) else value for value in each.values] for each in series],
            labels=[each.legend for each in series],
            colors=colours,
            alpha=0.7,
        )
    else:
        for each, x, colour in zip(series, minutes, colours, strict=True):
            axes.plot(x, each.values, label=each.legend, color=colour, linewidth=1.4)
            axes.fill_between(x, each.values, color=colour, alpha=0.06, linewidth=0)
    _axes_of(axes, defaults, span)
    if series:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.15, -0.09),
            ncols=math.ceil(len(series) / math.ceil(len(series) / MOST_COLUMNS)),
            fontsize=7.5,
            frameon=False,
            handlelength=1,
            columnspacing=1,
            labelcolor=INK,
        )
    else:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, color=FAINT, ha="center", va="center")


def _axes_of(axes: Axes, defaults: Mapping[str, Any], span: Span) -> None:
    axes.relim()  # lines that are 0 throughout, or none, have no height of their own
    top = defaults.get("max") or (axes.get_ylim()[1] if axes.dataLim.y1 > 0 else 1)
    axes.set_ylim(defaults["min"], top)
    for step in _thresholds(defaults):
        if step["value"] is not None and step["value"] <= top:
            axes.axhline(step["value"], color=NAMED[step["color"]], linewidth=1, linestyle="--")
    axes.set_xlim(0, (span.end - span.start) / 60)
    binary = defaults["unit"] == "bytes"
    axes.yaxis.set_major_locator(
        MultipleLocator(2 ** math.ceil(math.log2(top / 4))) if binary else MaxNLocator(4)
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, defaults["unit"])))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value)}:{round(value % 1 * 60):02}"))
    axes.tick_params(labelsize=7.5, colors=FAINT, length=0)
    axes.grid(color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _thresholds(defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(defaults.get("thresholds", {}).get("steps", []))


def _no_data(figure: Figure, place: _Place) -> None:
    x, y = place.point(place.width / 2, place.height / 2)
    figure.text(x, y, "No data", color=FAINT, ha="center", va="center")


def formatted(value: float, unit: str) -> str:
    """Write `value` as Grafana does in `unit`, one of those that the dashboard uses."""
    match unit:
        case "percentunit":
            return f"{100 * value:.3g} %"
        case "s":
            return _scaled(value, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)))
        case "bytes":
            return _scaled(value, (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024), ("B", 1)))
        case "Bps":
            return _scaled(value, (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3), ("B/s", 1)))
        case "reqps" | "ops":
            return f"{value:.3g} {'req/s' if unit == 'reqps' else 'ops/s'}"
        case "short":
            return _scaled(value, (("M", 1e6), ("k", 1e3), ("", 1)))
    raise ValueError(f"no way to write the unit {unit}")


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Write `value` in the largest of `units` (name and size) of which it is at least one; 0 without one."""
    if value == 0:
        return "0"
    name, size = next((each for each in units if abs(value) >= each[1]), units[-1])
    return f"{value / size:.3g} {name}".rstrip()


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG of 256 colours: as good to read, and a third of the bytes."""
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_from(url: str, span: Span, path: Path) -> None:
    """Draw the dashboard with the data of the Prometheus at `url` into the file `path`."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    with httpx2.Client(base_url=url, timeout=30) as prometheus:
        picture = draw(dashboard, lambda panel: panel_series(prometheus, dashboard, panel, span), span)
    save(picture, path)


def main() -> None:
    """Draw what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60, help="until now (default: %(default)s)")
    parser.add_argument(
        "--scrape-interval-s", type=float, default=5, metavar="S", help="as Prometheus has it"
    )
    parser.add_argument("output", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    now = time.time()
    span = Span(now - 60 * arguments.minutes, now, arguments.scrape_interval_s)
    draw_from(arguments.prometheus, span, arguments.output)


if __name__ == "__main__":
    main()
