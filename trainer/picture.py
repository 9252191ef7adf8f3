"""A picture of one batch, from which CutnMix can be understood at a glance: views, masks, mixes and targets.

A column an image; for each peer a row of views with those of their partners, a row of mixes, and what they are to be
called. Lengths are in inches, y runs downwards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer.figures import BLUE, INK, MAX_PEERS, VERMILLION, save

MARGIN, GAP = 1.45, 0.16
CELL = (15 - MARGIN) / 7 - GAP  # so that a mask and 6 images make 15 inches


def draw_batch(
    views: Views,
    batch: Batch,
    draws: Draws,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    num_images: int = 6,
) -> None:
    """The first images of a batch as a PNG: a column an image, with its view and its partner's view above their mix.

    Args:
        views, batch: before and after the mix, on any device. Peers 0 to 3 are drawn.
        draws: what the mix executed; where it has no partners, only the views are drawn. Second views are not.
        classes: K names.
        mean, std: per channel, of pixels scaled to [0, 1], as the batch was normalised.
        path: of the file.
        num_images: columns, at most the batch's size.
    """
    shown = _shown(views, batch, draws, mean, std, min(num_images, len(batch.label_B)))
    canvas = _Canvas(max(9, shown.columns[-1] + CELL + GAP))
    _write_heading(canvas, shown)
    last = len(shown.mixed_VBCHW) - 1
    for j in range(last + 1):
        if j < len(shown.view_VBCHW):
            _show_views(canvas, shown, j)
        if shown.mixes:
            _show_mixes(canvas, shown, j)
        if j == last or j < len(shown.target_LBK) - 1:  # a target of all peers stands below the last one
            _write_targets(canvas, shown, j, classes)
        canvas.top += GAP
    canvas.save(path)


class _Shown(NamedTuple):
    """What is drawn, on the CPU: n images of at most MAX_PEERS peers, pixels in [0, 1]."""

    view_VBCHW: Tensor  # image i and, n further on, its partner, if the batch has partners
    mixed_VBCHW: Tensor
    target_LBK: Tensor
    label_B: list[int]
    boxes: list[list[int]]  # (M, 4); none where the mix has none
    lams: list[float]
    mixes: bool
    num_peers: int  # of the batch

    @property
    def columns(self) -> list[float]:
        """Where each image's column begins. Before the first, if there are mixes, is the masks' column."""
        return [MARGIN + (CELL + GAP) * (i + self.mixes) for i in range(len(self.label_B))]

    @property
    def own(self) -> str:
        """The colour of what is an image's own, as VERMILLION is that of what its partner gives."""
        return BLUE if self.mixes else INK

    def box(self, j: int) -> list[int]:
        """x0, y0, x1, y1 of peer j; of no pixel where the mix has no boxes."""
        return self.boxes[j % len(self.boxes)] if self.boxes else [0, 0, 0, 0]


def _shown(
    views: Views, batch: Batch, draws: Draws, mean: Sequence[float], std: Sequence[float], num_images: int
) -> _Shown:
    boxes, partners, lams = (
        [] if draw is None else draw.tolist() for draw in (draws.box_M4, draws.partner_B, draws.lam_L)
    )
    mean_C11, std_C11 = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    needed = [*range(num_images), *partners[:num_images]]
    view_VBCHW = views.image_VBCHW[:MAX_PEERS, needed].cpu().float() / 255
    if views.hole_VBHW is not None:
        view_VBCHW = torch.where(views.hole_VBHW[:MAX_PEERS, needed, None].cpu(), mean_C11, view_VBCHW)
    return _Shown(
        view_VBCHW,
        batch.image_VBCHW[:MAX_PEERS, :num_images].cpu().float() * std_C11 + mean_C11,
        batch.target_LBK[:MAX_PEERS, :num_images].cpu(),
        views.label_B[:num_images].tolist(),
        boxes,
        lams,
        mixes=bool(partners),
        num_peers=len(batch.image_VBCHW),
    )


class _Canvas:
    """A page that grows: `top` is where the next row begins, and at last the page's height."""

    def __init__(self, width: float):
        self.figure, self.top = Figure((width, 1), dpi=100), 0.0
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()

    def write(self, x: float, y: float, text: str, color: str = INK, **style: Any) -> None:
        """In the middle of the line y."""
        self.axes.text(x, y, text, color=color, parse_math=False, **{"fontsize": 10, "va": "center"} | style)

    def show(self, image_CHW: Tensor, x: float, width: float, color: str, box: Sequence[int] = (0, 0, 0, 0)) -> None:
        """An image in the row at `top`, in a frame of this colour; the box's edge on it, if it has a pixel."""
        scale, height = width / image_CHW.shape[-1], width * image_CHW.shape[-2] / image_CHW.shape[-1]
        pixels = image_CHW.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy()
        extent = (x, x + width, self.top + height, self.top)
        self.axes.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")
        self.axes.add_patch(Rectangle((x, self.top), width, height, fill=False, color=color, linewidth=1.5))
        x0, y0, x1, y1 = (scale * pixel for pixel in box)
        if x0 < x1 and y0 < y1:
            at = (x + x0, self.top + y0)
            edge = Rectangle(at, x1 - x0, y1 - y0, fill=False, color=VERMILLION, linewidth=2)
            edge.set_path_effects([withStroke(linewidth=4, foreground="white")])
            self.axes.add_patch(edge)

    def save(self, path: Path) -> None:
        self.figure.set_figheight(self.top)
        self.axes.set(xlim=(0, self.figure.get_figwidth()), ylim=(self.top, 0))
        save(self.figure, path)


def _write_heading(canvas: _Canvas, shown: _Shown) -> None:
    title = "One training batch, " + ("mixed with lam = " if shown.mixes else "not mixed")
    title += ", ".join(f"{lam:.2f}" for lam in shown.lams[:MAX_PEERS])
    canvas.write(GAP, 0.3, title, fontsize=15, weight="bold")
    notes = []
    if shown.mixes:
        blend = "image: lam x the view + (1 - lam) x its partner's view"
        notes += ["image: the view, with its partner's pixels inside the box" if shown.boxes else blend]
        notes += ["target: lam x the view's label + (1 - lam) x its partner's label"]
    if shown.num_peers > MAX_PEERS:
        notes += [f"peers 0 to {MAX_PEERS - 1} of {shown.num_peers}"]
    for n, note in enumerate(notes):
        canvas.write(GAP, 0.6 + 0.2 * n, note)
    canvas.top = 0.6 + 0.2 * len(notes)


def _show_views(canvas: _Canvas, shown: _Shown, j: int) -> None:
    """Each image's view, and beside it, where they are mixed, its partner's."""
    views_BCHW, before = shown.view_VBCHW[j], shown.columns[0] - GAP
    width = (CELL - GAP / 2) / 2 if shown.mixes else CELL
    height = width * views_BCHW.shape[-2] / views_BCHW.shape[-1]
    middle = canvas.top + height / 2 - 0.11 * shown.mixes
    whose = f"peer {j}" if len(shown.view_VBCHW) > 1 else "all peers"
    canvas.write(before, middle, f"{whose}: view", shown.own, ha="right")
    if shown.mixes:
        canvas.write(before, middle + 0.22, "its partner's view", VERMILLION, ha="right")
    for i, x in enumerate(shown.columns):
        canvas.show(views_BCHW[i], x, width, shown.own)
        if shown.mixes:
            partner_CHW = views_BCHW[len(shown.columns) + i]
            canvas.show(partner_CHW, x + CELL - width, width, VERMILLION, shown.box(j))
    canvas.top += height + GAP / 2


def _show_mixes(canvas: _Canvas, shown: _Shown, j: int) -> None:
    """The peer's mask, if it has one, and each image's mix."""
    mixed_BCHW, (x0, y0, x1, y1) = shown.mixed_VBCHW[j], shown.box(j)
    size = mixed_BCHW.shape[-2:]
    height = CELL * size[0] / size[1]
    middle = canvas.top + height / 2
    whose = f"peer {j}" if shown.num_peers > 1 else "all peers"
    canvas.write(MARGIN - GAP, middle - 0.11, f"{whose}: mixed", ha="right")
    if shown.boxes:
        mask_HW = torch.zeros(size, dtype=torch.bool)
        mask_HW[y0:y1, x0:x1] = True
        own_C11, other_C11 = (torch.tensor(to_rgb(color))[:, None, None] for color in (shown.own, VERMILLION))
        kept = 1 - mask_HW.float().mean().item()
        canvas.write(MARGIN - GAP, middle + 0.11, f"mask: {kept:.0%} kept", ha="right")
        canvas.show(torch.where(mask_HW, other_C11, own_C11), MARGIN, CELL, INK)
    for image_CHW, x in zip(mixed_BCHW, shown.columns, strict=True):
        canvas.show(image_CHW, x, CELL, INK, shown.box(j))
    canvas.top += height


def _write_targets(canvas: _Canvas, shown: _Shown, j: int, classes: Sequence[str]) -> None:
    """Each image's target, its own label first: at most two classes."""
    target_BK = shown.target_LBK[min(j, len(shown.target_LBK) - 1)]
    for x, label, target_K in zip(shown.columns, shown.label_B, target_BK, strict=True):
        weights = {label: target_K[label].item()} | dict(enumerate(target_K.tolist()))
        for n, (k, weight) in enumerate([part for part in weights.items() if part[1] > 0][:2]):
            text = f"{'+ ' * (n > 0)}{weight:.2f} {classes[k]}"
            text = text if len(text) <= 22 else text[:18] + "..."
            canvas.write(x, canvas.top + 0.15 + 0.2 * n, text, shown.own if k == label else VERMILLION)
    canvas.top += 0.45
