"""A run's curves, and what all figures have in common: colours, labels at the ends of lines, how a file is written.

matplotlib's objects only, never pyplot: no global state changes and no display is needed. A file appears whole or not
at all. Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; one thing has one colour.
"""

import io
import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from cutnmix.trainer.folder import write_atomically
from cutnmix.trainer.metrics import peer_names

Style = dict[str, Any]
Curve = tuple[str, np.ndarray, np.ndarray, Style]  # label ("" for none), x, y, style

INK, SKY, BLUE, ORANGE = "#222222", "#56b4e9", "#0072b2", "#e69f00"
GREEN, PURPLE, VERMILLION = "#009e73", "#cc79a7", "#d55e00"
LOSS_STYLES: dict[str, Style] = {
    "ce": {"color": BLUE},
    "dml": {"color": ORANGE},
    "mmd": {"color": PURPLE},
    "pt": {"color": GREEN},
    "pt_ce": {"color": GREEN, "linestyle": "--"},
    "total": {"color": INK, "linewidth": 2},
}
SCORE_STYLES: dict[str, Style] = {
    "teacher": {"color": GREEN, "linewidth": 1.6},
    "ensemble": {"color": VERMILLION, "linewidth": 1.6},
    "mean": {"color": INK, "linewidth": 2.6},
}
MAX_PEERS = 4  # drawn as pictures, or labelled one by one


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """A run's metrics.jsonl as a PNG 1500 pixels wide: losses, learning rate, test accuracy and test NLL by epoch.

    A value that is not finite is a cross on the upper edge of its panel; one that is missing leaves no point.
    Of records of one kind and step, as a run cut off and resumed may leave them, the last counts.
    """
    latest = {(record["kind"], record["step"]): record for record in records}
    ordered = sorted(latest.values(), key=lambda record: record["step"])
    train, test = ([record for record in ordered if record["kind"] == kind] for kind in ("train", "test"))
    figure = Figure((15, 9.2), dpi=100)
    grid = {"left": 0.06, "right": 0.88, "bottom": 0.065, "top": 0.9, "wspace": 0.44, "hspace": 0.16}
    (loss, accuracy), (lr, nll) = figure.subplots(2, 2, sharex=True, gridspec_kw=grid | {"height_ratios": (3, 2)})
    figure.text(0.02, 0.965, title, fontsize=15, weight="bold", va="center", parse_math=False)
    end = max((record["epoch"] for record in ordered), default=0) or 1
    loss.set_xlim(-0.01 * end, 1.01 * end)

    others = cycle([{"color": color, "linestyle": ":"} for color in (VERMILLION, SKY, INK)])
    names = dict.fromkeys(name for record in train for name in record["loss"])
    points = {name: [(record["epoch"], record["loss"].get(name)) for record in train] for name in names}
    losses = [_curve(name, "{:.3g}", points[name], LOSS_STYLES.get(name) or next(others)) for name in names]
    losses = [line for curve in losses for line in _smoothed(curve)]
    _panel(loss, losses, "Training loss: total = sum of the weighted terms", "loss (nats; mmd: squared)", log=True)

    style = {"color": INK, "drawstyle": "steps-pre"}  # a record has the rate of the last step until then
    rate = _curve("lr", "{:.3g}", [(record["epoch"], record["lr"]) for record in train], style)
    values = np.unique(rate[2])
    milestones = 1 < len(values) <= 5 and values[0] > 0  # otherwise constant, or a smooth schedule
    _panel(lr, [rate], "Learning rate", "learning rate", log=milestones)
    if milestones:
        lr.set_yticks(values, [f"{value:g}" for value in values])
    _panel(accuracy, _scores(test, "top1", "{:.1f}"), "Test accuracy", "top-1 accuracy (%)")
    _panel(nll, _scores(test, "nll", "{:#.4g}"), "Test negative log-likelihood", "NLL (nats)")
    lr.set_xlabel("epoch")
    nll.set_xlabel("epoch")
    save(figure, path)


def _scores(test: list[dict], key: str, form: str) -> list[Curve]:
    """A line a peer, their mean, ensemble and teacher. A single peer is its own mean and ensemble."""
    points: dict[str, list] = {}
    for record in test:
        for name, scores in record["scores"].items():
            points.setdefault(name, []).append((record["epoch"], scores.get(key)))
    peers = peer_names(points)
    if len(peers) == 1:
        styles = {"teacher": SCORE_STYLES["teacher"], peers[0]: SCORE_STYLES["mean"]}
    else:
        above = 3 if len(peers) <= MAX_PEERS else 1.9  # few lines cannot hide the mean, and it must not hide them
        styles = {name: {"color": SKY, "linewidth": 1, "zorder": above} for name in peers} | SCORE_STYLES
    curves = {name: _curve(name, form, points[name], style) for name, style in styles.items() if name in points}
    drawn = [name for name in peers if curves[name][0]]
    if len(peers) > MAX_PEERS and drawn:
        low, *_, high = ranked = sorted(drawn, key=lambda name: curves[name][2][-1])
        label = f"{len(peers)} peers\n{form.format(curves[low][2][-1])} to {form.format(curves[high][2][-1])}"
        middle = ranked[len(ranked) // 2]
        curves |= {name: (label if name == middle else "", *curves[name][1:]) for name in peers}
    return list(curves.values())


def _curve(name: str, form: str, points: list, style: Style) -> Curve:
    """A curve labelled with its last value; None stands for what was not recorded."""
    x, y = np.array([point for point in points if point[1] is not None], dtype=float).reshape(-1, 2).T
    return (f"{name}  {form.format(y[-1])}" if len(y) else "", x, y, style)


def _smoothed(curve: Curve) -> list[Curve]:
    """The curve; if it has more than 400 points, faint, and over it the means of 200 groups of its finite points."""
    label, x, y, style = curve
    if len(y) <= 400:
        return [curve]
    means = ([group.mean() for group in np.array_split(values[np.isfinite(y)], 200) if len(group)] for values in (x, y))
    coarse_x, coarse_y = map(np.array, means)
    return [("", x, y, style | {"alpha": 0.25, "linewidth": 0.8}), (label, coarse_x, coarse_y, style)]


def _panel(axes: Axes, curves: list[Curve], title: str, unit: str, log: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_ylabel(unit)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for _, x, y, style in curves:
        finite = np.isfinite(y)
        marker = {"marker": "o", "markersize": 4} if finite.sum() <= 12 else {}
        shown: Style = {"linewidth": 1.4} | marker | style
        axes.plot(x[finite], y[finite], **shown)
        edge: Style = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": style["color"]}
        axes.plot(x[~finite], np.ones((~finite).sum()), "x", **edge)
    values = np.concatenate([np.empty(0), *(y[np.isfinite(y)] for _, _, y, _ in curves)])
    positive = values[values > 0]
    if not values.size:
        axes.text(0.5, 0.5, "no finite values yet", ha="center", color="#888888", transform=axes.transAxes)
        axes.set_yticks([])
    elif log and len(positive) and values.max() > 5 * positive.min() and values.min() > -1e-3 * values.max():
        axes.set_yscale("log")  # a term that vanishes may round to below 0, or to next to nothing
        low, high = max(positive.min(), 1e-5 * np.median(positive)) / 1.5, values.max() * 1.5
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    label_ends(axes, [curve for curve in curves if curve[0]])


def label_ends(axes: Axes, curves: list[Curve]) -> None:
    """Each curve's label to the right of its end, moved as little as keeps the labels apart."""
    from sklearn.isotonic import isotonic_regression  # here, because importing it takes a second

    if not curves:
        return
    low, high = axes.get_ylim()  # settles the limits, on which the transform depends
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = np.ones((len(curves), 2))
    for end, (_, x, y, _) in zip(ends, curves, strict=True):
        if np.isfinite(y).any():
            last = np.flatnonzero(np.isfinite(y))[-1]
            end[:] = to_axes.transform((x[last], np.clip(y[last], low, high)))
    order = np.argsort(ends[:, 1], kind="stable")
    lines = np.array([curves[i][0].count("\n") + 1 for i in order])
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points, of which a line of text takes 13
    offset = np.concatenate([[0], np.cumsum(lines[1:] + lines[:-1]) / 2]) * 13 / height
    offset *= min(1, 1 / max(offset[-1], 1e-9))
    at = isotonic_regression(ends[order, 1] - offset, y_min=0, y_max=1 - offset[-1]) + offset
    for i, y in zip(order, at, strict=True):
        label, _, _, style = curves[i]
        lead = {"color": style["color"], "linestyle": style.get("linestyle", "-"), "linewidth": 1}
        axes.plot([ends[i, 0], 1.03, 1.055], [ends[i, 1], y, y], transform=axes.transAxes, clip_on=False, **lead)
        axes.text(1.065, y, label, va="center", fontsize=10, transform=axes.transAxes, parse_math=False)


def save(figure: Figure, path: Path) -> None:
    """PNG, whole or not at all: what another process reads meanwhile is the old file. Raises: RunError."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # class names in other scripts
        FigureCanvasAgg(figure).print_png(drawn)
    write_atomically(path, drawn.getvalue())
