"""Every random number of an epoch's data, drawn as a pure function of (seed, epoch).

Loaders and the mix only execute a plan; they own no random state. Each kind of draw has its own counter-based stream,
keyed by (seed, epoch, kind, view): so peer j's draws do not change when J does, switching one distortion on leaves all
others as they were, and "resume at step s" is "continue the plan at step s".

| draw | law | stream |
|---|---|---|
| order | uniform permutation of the N images, cut into batches; the last one may be smaller | ORDER |
| crop | offset uniform over the (2 pad + 1)^2 positions of the image in its zero-padded self | CROP, view |
| flip | left-right with probability `flip` | FLIP, view |
| region | scale ~ U(crop_scale), log ratio ~ U(log crop_ratio), place ~ U inside; clamped to the image | REGION, view |
| colour | brightness, contrast, saturation ~ U(1 - a, 1 + a), hue ~ U(-a, a) degrees | COLOUR, view |
| angle | ~ U(-rotation, rotation) degrees about the centre of the view | ROTATION, view |
| hole | a square around a uniform pixel, clipped (DeVries and Taylor 2017, arXiv:1708.04552) | CUTOUT, view |
| partner | uniform permutation within each batch, or within each of `groups` parts of it | PARTNER |
| lam | l ~ Beta(alpha, alpha) with probability `probability`, else 1; then the box rule, if boxes are cut | LAMBDA |
| box | see boxes.py; one for all peers under `cutmix`, one a peer under `cutnmix` | PLACE, peer |
| second | of each image a second view, or a view of a uniformly drawn image of its class (itself included) | SECOND |

The distortions of the second views have streams of their own, so that those of the first stay as they were.
"""

from enum import IntEnum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutnmix.pipeline.boxes import place_boxes
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.plan import Plan

_SECOND_VIEWS = 1 << 16  # added to a view's number: the streams of the second views


class Stream(IntEnum):
    """The kinds of draws. The numbers are part of a run's identity: never renumber."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    REGION = 3
    COLOUR = 4
    ROTATION = 5
    CUTOUT = 6
    PARTNER = 7
    LAMBDA = 8
    PLACE = 9
    SECOND = 10


def generator(seed: int, epoch: int, stream: Stream, view: int = 0) -> np.random.Generator:
    """The counter-based (Philox) generator of one kind of draw."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, int(stream), view])))


def make_plan(
    *,
    seed: int,
    epoch: int,
    num_images: int,
    size: tuple[int, int],
    batch_size: int,
    distort: Distort,
    mix: Mix,
    num_views: int,
    num_peers: int,
    second: Literal["image", "class"] | None = None,
    label_N: np.ndarray | None = None,
    files: bool = False,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Plan:
    """The plan of one epoch on the host: a pure function of its arguments.

    Args:
        seed: the run's seed, >= 0.
        epoch: the epoch's number, >= 0.
        num_images: N, the size of the data set.
        size: (H, W) of a view.
        batch_size: B; the last batch holds what is left over, unless `drop_last`.
        distort: the law of the distortions.
        mix: the law of the mix.
        num_views: V, J or 1 (all peers share one view).
        num_peers: J, the number of boxes under cutnmix.
        second: what each image's second view shows, if it has one: the same image or one of its class.
        label_N: the images' labels; for `second: class` only.
        files: whether the images are files of any size (then regions are drawn, and no crop of a padded array).
        shuffle: False keeps the data set's order (evaluation).
        drop_last: drop the last batch if it is not full.
    """
    height, width = size
    order_N = np.arange(num_images)
    if shuffle:
        order_N = generator(seed, epoch, Stream.ORDER).permutation(num_images)
    if drop_last:
        order_N = order_N[: num_images // batch_size * batch_size]
    count = len(order_N)
    steps = -(-count // batch_size)
    step_N = np.arange(count) // batch_size
    index_N, position_N = order_N, np.arange(count)
    if second:
        other_N = order_N if second == "image" else _classmates(seed, epoch, order_N, label_N)
        # Within a step the batch comes first: a stable sort by step of all firsts, then all seconds.
        position_N = np.argsort(np.concatenate([step_N, step_N]), kind="stable")
        index_N = np.concatenate([order_N, other_N])[position_N]

    def stacked(stream: Stream, draw) -> Tensor:
        """draw(generator) for each view, and for the second ones, stacked: (V, N, ...)."""

        def of_view(view: int) -> np.ndarray:
            drawn = [draw(generator(seed, epoch, stream, view))]
            if second:
                drawn.append(draw(generator(seed, epoch, stream, _SECOND_VIEWS + view)))
            return np.concatenate(drawn)[position_N]

        return torch.from_numpy(np.stack([of_view(view) for view in range(num_views)]))

    pad = 0 if files else distort.pad
    crop_VN2 = stacked(Stream.CROP, lambda g: g.integers(0, 2 * pad + 1, (count, 2), dtype=np.int32))
    flip_VN = stacked(Stream.FLIP, lambda g: g.random(count) < distort.flip)
    region_VN4 = colour_VN4 = angle_VN = hole_VN4 = None
    if files and distort.region == "random":
        region_VN4 = stacked(Stream.REGION, lambda g: _regions(g, count, distort)).float()
    if distort.colour.active:
        colour_VN4 = stacked(Stream.COLOUR, lambda g: _colours(g, count, distort.colour)).float()
    if distort.rotation:
        angle_VN = stacked(Stream.ROTATION, lambda g: g.uniform(-distort.rotation, distort.rotation, count)).float()
    if hole := (mix.length or 16) if mix.name == "cutout" else distort.cutout:
        hole_VN4 = stacked(Stream.CUTOUT, lambda g: _holes(g, count, hole, width, height))

    partner_N = lam_SL = box_SM4 = None
    if mix.has_partner:
        partner_N = _partners(seed, epoch, count, batch_size, mix.groups or 1)
        box_SM4, lam_SL = _boxes(seed, epoch, steps, mix, num_peers if mix.name == "cutnmix" else 1, width, height)
    return Plan(
        distort=distort,
        size=(height, width),
        batch_size=batch_size * (2 if second else 1),
        second=second is not None,
        files=files,
        index_N=torch.from_numpy(index_N),
        crop_VN2=crop_VN2,
        flip_VN=flip_VN,
        region_VN4=region_VN4,
        colour_VN4=colour_VN4,
        angle_VN=angle_VN,
        hole_VN4=hole_VN4,
        partner_N=partner_N,
        lam_SL=lam_SL,
        box_SM4=box_SM4,
        epoch_S=torch.from_numpy(epoch + np.arange(steps) / max(steps, 1)),
    )


def _partners(seed: int, epoch: int, count: int, batch_size: int, groups: int) -> Tensor:
    """Each image's partner, by its place in the batch: a uniform permutation of every group (part_of) of each batch."""
    place_N, step_N = np.arange(count) % batch_size, np.arange(count) // batch_size
    size_N = np.minimum(batch_size, count - step_N * batch_size)
    group_N = ((place_N + 1) * groups - 1) // size_N
    key_N = generator(seed, epoch, Stream.PARTNER).random(count)
    return torch.from_numpy(np.lexsort((key_N, group_N, step_N)) - step_N * batch_size)  # all at once


def _classmates(seed: int, epoch: int, index_N: np.ndarray, label_N: np.ndarray | None) -> np.ndarray:
    """For each image a uniformly drawn one of its class, itself included, as CS-KD's authors draw them."""
    if label_N is None:
        raise ValueError("second='class' needs label_N")
    by_class = np.argsort(label_N, kind="stable")
    sizes_K = np.bincount(label_N)
    starts_K = np.cumsum(sizes_K) - sizes_K
    label = label_N[index_N]
    draw_N = generator(seed, epoch, Stream.SECOND).random(len(index_N))
    return by_class[starts_K[label] + (draw_N * sizes_K[label]).astype(np.int64)]


def _boxes(
    seed: int, epoch: int, steps: int, mix: Mix, num_boxes: int, width: int, height: int
) -> tuple[Tensor | None, Tensor]:
    """box_SM4 and lam_SL: one lambda and one centre a step, one placement a step and box. No boxes under mixup."""
    rng = generator(seed, epoch, Stream.LAMBDA)
    drawn_S, mixed_S = rng.beta(mix.alpha, mix.alpha, steps), rng.random(steps) < mix.probability
    nominal_S = torch.from_numpy(np.where(mixed_S, drawn_S, 1.0))
    if not mix.has_boxes:
        return None, nominal_S.float()[:, None]
    centre_S2 = rng.random((steps, 2))
    places = [generator(seed, epoch, Stream.PLACE, peer).random((steps, 2)) for peer in range(num_boxes)]
    return place_boxes(
        mix.rule,
        nominal_lam=nominal_S,
        centre_2=torch.from_numpy(centre_S2),
        place_J2=torch.from_numpy(np.stack(places, axis=1)),
        width=width,
        height=height,
    )


def _regions(rng: np.random.Generator, count: int, distort: Distort) -> np.ndarray:
    scale = rng.uniform(*distort.crop_scale, count)
    low, high = np.log(distort.crop_ratio)
    ratio = np.exp(rng.uniform(low, high, count))
    return np.concatenate([np.stack([scale, ratio], axis=1), rng.random((count, 2))], axis=1)


def _colours(rng: np.random.Generator, count: int, colour: Colour) -> np.ndarray:
    factors = [rng.uniform(1 - a, 1 + a, count) for a in (colour.brightness, colour.contrast, colour.saturation)]
    return np.stack([*factors, rng.uniform(-colour.hue, colour.hue, count)], axis=1)


def _holes(rng: np.random.Generator, count: int, length: int, width: int, height: int) -> np.ndarray:
    size = np.array([width, height])
    start = np.floor(rng.random((count, 2)) * size).astype(np.int32) - length // 2
    return np.concatenate([np.clip(start, 0, size), np.clip(start + length, 0, size)], axis=1).astype(np.int32)
