"""A record as a picture: a panel a sheet, lines with direct labels where the columns are numbers, else bars.

The look is that of cutnmix.trainer.figures: matplotlib's objects only, the colours of Okabe and Ito (2008), one row one
colour. This package's rows are thick, the others thin, bounds dashed. `draw_compared` has points, one seed one colour.
"""

from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cutnmix.benchmarks.measure import Spread
from cutnmix.benchmarks.records import Cell, Record, Sheet, middle, number, sheets_of
from cutnmix.benchmarks.tables import Differences
from cutnmix.trainer.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, save

Style = dict[str, Any]
SEED_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
OURS, OTHERS = (BLUE, GREEN, SKY, "#004c6d", "#7fbf7b"), (VERMILLION, ORANGE, PURPLE, "#a0522d", "#888888")
# Inches: the height of lines, of one bar, one seed's point and one label, and of what is around them.
PANEL, BAR, SEED, LABEL, MARGIN = 2.8, 0.32, 0.1, 0.36, 1.1


def draw_record(record: Record, path: Path) -> None:
    """The record as a PNG 1000 pixels wide. What is not installed is left out."""
    sheets = sheets_of(record)
    names = dict.fromkeys(name for sheet in sheets for name in sheet.rows)
    ours, others = cycle(OURS), cycle(OTHERS)
    styles = {name: _style(name, next(ours) if name.startswith("cutnmix") else next(others)) for name in names}
    heights = [PANEL if _points(sheet) else BAR * len(_bars(sheet)) for sheet in sheets]
    figure = Figure((10, sum(heights) + MARGIN * len(sheets) + 0.75), dpi=100)
    inch = 1 / figure.get_figheight()
    figure.text(0.02, 1 - 0.25 * inch, record["command"], fontsize=15, weight="bold", va="center", parse_math=False)
    figure.text(0.02, 1 - 0.52 * inch, f"{record['hardware']}; {record['versions']}", fontsize=8, va="center")
    top = 1 - 0.75 * inch
    for sheet, height in zip(sheets, heights, strict=True):
        axes = figure.add_axes((0.09, top - (height + 0.45) * inch, 0.5, height * inch))
        top -= (height + MARGIN) * inch
        axes.set_title(sheet.title, loc="left", fontsize=12, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_lines if _points(sheet) else _draw_bars)(axes, sheet, styles)
    save(figure, path)


def draw_compared(found: Differences, path: Path) -> None:
    """Methods less the first of them as a PNG 1000 pixels wide: a point a seed, with its standard error over images."""
    first, *others = found.rows
    height = max(SEED * (len(found.seeds) + 1), LABEL) * len(others)
    figure = Figure((10, height + MARGIN), dpi=100)
    inch = 1 / figure.get_figheight()
    axes = figure.add_axes((0.42, 0.65 * inch, 0.55, height * inch))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.axvline(0, color=INK, linewidth=1)
    for place, (seed, color, marker) in enumerate(zip(found.seeds, cycle(SEED_COLORS), cycle("osD^"), strict=False), 1):
        shift = place / (len(found.seeds) + 1) - 0.5
        points = [(y + shift, found.rows[label].get(seed)) for y, label in enumerate(others)]
        there = [(y, point.less, point.error) for y, point in points if point and point.less is not None]
        for y, less, error in there:
            if error is not None:
                axes.hlines(y, less - error, less + error, color=color, linewidth=1.2)
        y, x = [y for y, _, _ in there], [less for _, less, _ in there]
        axes.plot(x, y, linestyle="", marker=marker, markersize=5.5, color=color, label=f"seed {seed}")
    axes.set_yticks(range(len(others)), [fill(label, 45) for label in others], fontsize=10, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    told = f"top-1 percent less that of {first} with the same seed, and its standard error where that is on record"
    figure.text(0.97, 0.15 * inch, told, ha="right", va="center", parse_math=False)
    figure.text(0.02, 1 - 0.22 * inch, found.what, fontsize=12, va="center", parse_math=False)
    figure.legend(loc="upper right", bbox_to_anchor=(0.98, 1 - 0.05 * inch), ncols=len(found.seeds), frameon=False)
    save(figure, path)


def _style(name: str, color: str) -> Style:
    if name.startswith("copy limit"):
        return {"color": INK, "linestyle": "--", "linewidth": 1.2}
    return {"color": color, "linewidth": 2.6 if name.startswith("cutnmix") else 1.4}


def _points(sheet: Sheet) -> list[float]:
    """The columns as numbers, if all are and there are several: what lines are drawn over."""
    numbers = [float(column) for column in sheet.columns if column.replace(".", "", 1).isdigit()]
    return numbers if len(numbers) == len(sheet.columns) > 1 else []


def _draw_lines(axes: Axes, sheet: Sheet, styles: dict[str, Style]) -> None:
    ends = []
    for name, row in sheet.rows.items():
        found = [(float(column), cell) for column, cell in row.items() if middle(cell) is not None]
        if not found:
            continue
        x, y = [at for at, _ in found], [middle(cell) or 0 for _, cell in found]
        axes.plot(x, y, marker="o", markersize=4, **styles[name])
        for at, cell in found:
            if isinstance(cell, Spread):
                axes.vlines(at, cell.low, cell.high, color=styles[name]["color"], linewidth=1, alpha=0.5)
        ends.append((name, x[-1], y[-1]))
    columns = _points(sheet)
    axes.set_xscale("log", base=2)
    axes.set_xticks(columns, [f"{column:g}" for column in columns])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(columns) / 1.1, max(columns) * 1.1)
    axes.set_xlabel(sheet.axis)
    axes.set_ylabel(sheet.unit)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    low, high = axes.dataLim.intervaly
    if low > 0 and high > 4 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif sheet.unit != "ratio":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value) if high >= 1e6 else f"{value:,.9g}"))
    _label_ends(axes, ends, styles)


def _short(value: float) -> str:
    """10k, 2.5M: a number for the little room to the left of an axis."""
    size, unit = (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 1e3 else (1, "")
    return f"{value / size:g}{unit}"


def _label_ends(axes: Axes, ends: list[tuple[str, float, Any]], styles: dict[str, Style]) -> None:
    """Each line's name and last figure to the right of its end, pushed apart upwards from the lowest."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((*to_axes.transform((x, y)), name, y) for name, x, y in ends)
    placed.sort(key=lambda end: end[1])
    gap = 13 / (axes.get_window_extent().height / axes.figure.dpi * 72)  # a line of text takes 13 points
    heights = [at for _, at, _, _ in placed]
    for _ in range(100):  # neighbours that overlap move half the overlap each, until none does
        for i in range(1, len(heights)):
            if (short := gap - (heights[i] - heights[i - 1])) > 1e-4:
                heights[i - 1], heights[i] = heights[i - 1] - short / 2, heights[i] + short / 2
    for (x, y, name, value), at in zip(placed, heights, strict=True):
        lead = {**styles[name], "linewidth": 0.8}
        axes.plot([x, 1.03, 1.05], [y, at, at], transform=axes.transAxes, clip_on=False, **lead)
        axes.text(
            1.06,
            at,
            f"{name}  {number(value)}",
            va="center",
            fontsize=10,
            transform=axes.transAxes,
            weight="bold" if name.startswith("cutnmix") else "normal",
            parse_math=False,
        )


def _bars(sheet: Sheet) -> list[tuple[str, str, Cell]]:
    """(row, column, cell) of all figures that there are."""
    cells = [(name, column, cell) for name, row in sheet.rows.items() for column, cell in row.items()]
    return [(name, column, cell) for name, column, cell in cells if middle(cell) is not None]


def _end(cell: Cell) -> float:
    return cell.high if isinstance(cell, Spread) else cell or 0


def _draw_bars(axes: Axes, sheet: Sheet, styles: dict[str, Style]) -> None:
    bars = _bars(sheet)
    longest = max((_end(cell) for _, _, cell in bars), default=1) or 1
    for y, (name, column, cell) in enumerate(bars):
        value = middle(cell) or 0
        axes.barh(y, value, height=0.6, color=styles[name]["color"], alpha=1 if name.startswith("cutnmix") else 0.6)
        if isinstance(cell, Spread):
            axes.hlines(y, cell.low, cell.high, color=INK, linewidth=1)
        label = name if len(sheet.columns) == 1 else f"{name}, {column}"
        axes.text(
            _end(cell) + 0.015 * longest, y, f"{label}  {number(value)}", va="center", fontsize=10, parse_math=False
        )
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * longest)
    axes.set_yticks([])
    axes.set_xlabel(sheet.unit)
