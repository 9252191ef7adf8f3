"""Accuracy against epoch, as the paper's Figure 1 has it: the mean over seeds as a line, the deviation as a shade.

matplotlib's objects, as in cutnmix.trainer.figures, written as SVG for a page: text stays text, and ink takes the
page's own colour, so that a figure can be read on a dark page too. Lines are named at their ends, and told apart by
dashes as well as by the colours of Okabe and Ito (2008).
"""

import hashlib
import io
import re
from functools import lru_cache
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cutnmix.benchmarks.reproduce.paper import OURS
from cutnmix.benchmarks.reproduce.results import Outcome, Run
from cutnmix.trainer.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, label_ends

GRID = "#e4e4e4"
SOLID, DASHED, DOTTED, MIXED = "-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))
OTHERS = (
    (VERMILLION, SOLID),
    (GREEN, DASHED),
    (ORANGE, SOLID),
    (PURPLE, DASHED),
    (SKY, SOLID),
    (INK, DOTTED),
    (VERMILLION, MIXED),
    (GREEN, DOTTED),
    (ORANGE, MIXED),
    (PURPLE, DOTTED),
)
TITLE_ROOM = 0.62  # inches
LEAST = 0.13  # of a figure's width is for its axes, however long the labels beside them are


class Line(NamedTuple):
    """One curve: (epoch, mean, deviation or None) a point."""

    label: str
    points: tuple[tuple[float, float, float | None], ...]
    color: str
    dash: str | tuple
    width: float = 1.5
    so_far: bool = False  # of runs that are not finished


def mean_lines(cells: list[Outcome]) -> tuple[Line, ...]:
    """A line a method: the mean and the sample standard deviation over its finished runs.

    Where none is finished, over those that have begun, as far as all of them are.
    """
    others = iter(OTHERS * len(cells))
    lines = []
    for cell in cells:
        bold = cell.row.name == OURS
        color, dash = (BLUE, SOLID) if bold else (INK, SOLID) if cell.row.name == "baseline" else next(others)
        if points := _points(cell.done or [run for run in cell.runs if run.curve]):
            lines.append(Line(cell.row.label, points, color, dash, 2.6 if bold else 1.5, not cell.done))
    return tuple(lines)


def seed_lines(cell: Outcome) -> tuple[Line, ...]:
    """A line a seed."""
    begun = [run for run in cell.runs if run.curve]
    styles = zip(begun, ((BLUE, SOLID), *OTHERS), strict=False)
    return tuple(
        Line(f"seed {run.seed}", _points([run]), color, dash, so_far=not run.done) for run, (color, dash) in styles
    )


def _points(runs: list[Run]) -> tuple[tuple[float, float, float | None], ...]:
    curves = [dict(run.curve) for run in runs]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    if not shared:
        return ()
    top1_SE = np.array([[curve[epoch] for epoch in shared] for curve in curves])  # seeds, epochs
    means = top1_SE.mean(0).tolist()
    spreads = top1_SE.std(0, ddof=1).tolist() if len(curves) > 1 else [None] * len(shared)
    return tuple(zip(shared, means, spreads, strict=True))


@lru_cache(maxsize=1024)  # a page is written again after each run, and a run changes few of its figures
def svg(lines: tuple[Line, ...], width: float, height: float, title: str = "") -> str:
    """The figure as an <svg> element to stand in a page; inches, 72 units each. At least one line."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cutnmix"}):
        FigureCanvasSVG(_figure(lines, width, height)).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _tenths, text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same in each figure, and a page may have an id only once
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="f{key}-', text).replace("#", "\0")
    text = re.sub(r"\0(?=[mpCh][0-9a-f]{8,})", f"#f{key}-", text).replace("\0", "#")
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", text)
    text = text.replace(f"fill: {INK}", "fill: currentColor").replace(f"stroke: {INK}", "stroke: currentColor")
    text = text.replace(GRID, "var(--line)")
    ends = "; ".join(f"{line.label} {line.points[-1][1]:.1f} %" for line in lines)
    says = escape(f"{title}: test accuracy against epoch. Last: {ends}")
    size = f'viewBox="0 0 {72 * width:g} {72 * height:g}" style="width: {86 * width:.0f}px" role="img"'
    return re.sub(r"<svg [^>]*>", lambda _: f'<svg {size} aria-label="{says}">', text, count=1)


def _tenths(tag: re.Match[str]) -> str:
    """The tag with one decimal a number: a tenth of a unit is less than a pixel. The text between tags is a label's."""
    return re.sub(r"(?<=\d\.\d)\d+(?= |\n|\")", "", tag[0])


@lru_cache(maxsize=128)
def png(lines: tuple[Line, ...], title: str) -> bytes:
    """The figure as a PNG 1500 pixels wide, for pages that are not HTML, with a title of two lines."""
    file = io.BytesIO()
    FigureCanvasAgg(_figure(lines, 7.5, 4, title, dpi=200)).print_png(file)
    return file.getvalue()


def _figure(lines: tuple[Line, ...], width: float, height: float, title: str = "", dpi: int = 72) -> Figure:
    figure = Figure((width, height), dpi=dpi)
    if not title:
        figure.patch.set_alpha(0)
    last = max(line.points[-1][0] for line in lines)
    tail = 6 + 7 * any(line.so_far for line in lines)  # characters after a label: the last value, so far
    most = int((width * (1 - LEAST) - 0.66 - 0.25) / 0.085) - tail
    labels = [line.label if len(line.label) <= most else f"{line.label[: most - 1]}\u2026" for line in lines]
    left, right = 0.66 / width, 1 - (0.25 + 0.085 * (max(map(len, labels)) + tail)) / width
    top = 1 - (TITLE_ROOM if title else 0.08) / height
    axes = figure.add_axes((left, 0.46 / height, right - left, top - 0.46 / height))
    axes.patch.set_alpha(0)
    if title:
        head, _, below = title.partition("\n")
        put = {"color": INK, "va": "center", "parse_math": False}
        figure.text(0.02, 1 - 0.2 / height, head, fontsize=12, weight="bold", **put)
        figure.text(0.02, 1 - 0.42 / height, below, fontsize=9, **put)
    late = [(mean - (s or 0), mean + (s or 0)) for line in lines for epoch, mean, s in line.points if epoch >= last / 4]
    low, high = min(pair[0] for pair in late), max(pair[1] for pair in late)
    room = 0.06 * max(high - low, 1)
    axes.set_ylim(low - room, high + room)
    ends = []
    for line, label in zip(lines, labels, strict=True):
        x, y, spread = np.array([[np.nan if v is None else v for v in point] for point in line.points]).T
        style = {"color": line.color, "linestyle": line.dash}
        marker = {"marker": "o", "markersize": 3.5} if len(x) <= 12 else {}
        axes.plot(x, y, linewidth=line.width, **style, **marker)
        if np.isfinite(spread).any():
            axes.fill_between(x, y - spread, y + spread, color=line.color, alpha=0.15, linewidth=0)
        ends.append((f"{label}  {y[-1]:.1f}" + " so far" * line.so_far, x, y, style))
    axes.set_xlim(0, last * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("epoch", fontsize=10, color=INK)
    axes.set_ylabel("top-1 accuracy (%)", fontsize=10, color=INK)
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    label_ends(axes, ends)
    for text in axes.texts:
        text.set_color(INK)
    return figure
