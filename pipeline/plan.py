"""The plan of an epoch: every random number of its data, as a pure function of (seed, epoch).

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

A plan is drawn for the whole batch and all peers. Where several processes share a step, `Plan.shard` gives each its
images and its peers' views: the same draws, wherever they are executed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cutnmix.pipeline.boxes import place_boxes
from cutnmix.pipeline.laws import Colour, Distort, Mix

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


class Draws(NamedTuple):
    """One step of a plan, on the device that executes it. A field is None where its distortion or the mix is off."""

    index_B: Tensor  # int64, position in the data set
    crop_VB2: Tensor  # int32, (x, y) offset into the padded image
    flip_VB: Tensor  # bool
    region_VB4: Tensor | None  # float32: scale, ratio, and position (x, y) in [0, 1]
    colour_VB4: Tensor | None  # float32: brightness, contrast, saturation factors; hue in degrees
    angle_VB: Tensor | None  # float32, degrees, counter-clockwise
    hole_VB4: Tensor | None  # int32 box (x0, y0, x1, y1), half open
    partner_B: Tensor | None  # int64, position in the batch
    lam_L: Tensor | None  # float32
    box_M4: Tensor | None  # int32 boxes; M = J under cutnmix, 1 under cutmix, None under mixup
    epoch: Tensor  # 0-D float64, epochs of training before this step
    second: bool = False  # whether the later half of the positions are the second views of the earlier


@dataclass(frozen=True, eq=False)
class Plan:
    """All draws of one epoch, as tensors. Fields as in Draws, over N positions or S steps instead of one batch."""

    distort: Distort  # the law of the distortions below
    size: tuple[int, int]  # (H, W) of a view
    batch_size: int  # images that a loader reads a step: B, or 2 B with second views
    second: bool  # whether each step's images are B of the batch, then their B second views
    files: bool  # whether they are files of any size
    index_N: Tensor
    crop_VN2: Tensor
    flip_VN: Tensor
    region_VN4: Tensor | None
    colour_VN4: Tensor | None
    angle_VN: Tensor | None
    hole_VN4: Tensor | None
    partner_N: Tensor | None
    lam_SL: Tensor | None
    box_SM4: Tensor | None
    epoch_S: Tensor  # float64
    weight_S: tuple[float, ...] | None = None  # of a shard's loss in the mean over all shards; None: 1
    _host: "Plan | None" = field(default=None, init=False)  # so that what `replace` makes has none

    def __len__(self) -> int:
        """S, the number of steps of the epoch."""
        return -(-self.index_N.shape[0] // self.batch_size)

    @property
    def num_views(self) -> int:
        """V."""
        return self.flip_VN.shape[0]

    def check(
        self,
        distort: Distort,
        size: tuple[int, int],
        files: bool,
        num_views: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Raises: ValueError that names what a loader made for these cannot execute.

        `files`: whether its images are files. `batch_size`: the most images of a step; None, as None views, for a
        loader that takes any number.
        """

        def told(law: Distort, size: tuple[int, int], files: bool) -> dict[str, Any]:
            shape = {
                "files": files,
                "distort.pad": law.pad,
                "distort.image_size": law.image_size,
                "distort.region": law.region,
            }
            return shape | {"distort.rotation": law.rotation > 0, "distort.colour": law.colour.active, "size": size}

        loader, plan = told(distort, size, files), told(self.distort, self.size, self.files)
        if num_views is not None:
            loader["num_views"], plan["num_views"] = num_views, self.num_views
        if batch_size is not None and (largest := min(self.batch_size, len(self.index_N))) > batch_size:
            loader["batch_size"], plan["batch_size"] = batch_size, largest
        if wrong := [key for key, value in plan.items() if value != loader[key]]:
            raise ValueError(
                "this plan was not drawn for this loader: "
                + "; ".join(f"{key} is {plan[key]} in the plan, {loader[key]} in the loader" for key in wrong)
            )

    def to(self, device: torch.device | str) -> "Plan":
        """The plan on a device: once an epoch, asynchronously (from pinned memory) where the device is a GPU."""
        device = torch.device(device)

        def move(field: Any) -> Any:
            if not isinstance(field, Tensor):
                return field
            if device.type == "cuda" and field.device.type == "cpu":
                return field.pin_memory().to(device, non_blocking=True)
            return field.to(device)  # towards the host it must wait: what was not yet copied could be read

        values = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        rows: dict[str, Any] = {}
        if device.type == "cuda":  # what a step reads a row of, and is short
            rows = {name: _in_rows(values[name], move) for name in ("lam_SL", "epoch_S") if values[name] is not None}
        moved = Plan(**{name: move(value) for name, value in values.items() if name not in rows}, **rows)
        if device.type != "cpu":
            object.__setattr__(moved, "_host", self.host)
        return moved

    @property
    def host(self) -> "Plan":
        """The plan on the host: the one that this was copied from. Only what was made elsewhere is copied back."""
        return self._host or (self if self.index_N.device.type == "cpu" else self.to("cpu"))

    def step(self, s: int) -> Draws:
        """The draws of step s: views of the plan's tensors, no copies, no host synchronisation."""
        size = self.batch_size // (1 + self.second)
        return self.positions(s * self.batch_size, (s + 1) * self.batch_size)._replace(
            partner_B=None if self.partner_N is None else self.partner_N[s * size : (s + 1) * size],
            lam_L=None if self.lam_SL is None else self.lam_SL[s],
            box_M4=None if self.box_SM4 is None else self.box_SM4[s],
            epoch=self.epoch_S[s],
        )

    def weight(self, s: int) -> float:
        """What the mean loss of step s weighs among those of all shards: 1, but where a short batch is cut unevenly."""
        return 1.0 if self.weight_S is None else self.weight_S[s]

    def shard(self, index: int, count: int, peers: range | None = None) -> "Plan":
        """What one of `count` processes executes: its contiguous part of every batch, its peers' views and boxes.

        Second views are cut as the first are. The parts of a batch whose size `count` does not divide, a short last
        one, differ by one image; then weight(s) = count part / size, so that the mean over the shards of their weighted
        means is the mean over the batch. Views, boxes and lambdas that all peers share stay with all.

        Args: on the host; `count` must divide the batch size; `peers`: the own ones, None for all.
        Raises: ValueError if a batch has fewer images than there are shards, or a partner lies in another part.
        """
        halves, kept, partners, weights = 1 + self.second, [], [], []
        for s in range(len(self)):
            start = s * self.batch_size
            size = min(self.batch_size, len(self.index_N) - start) // halves
            part = part_of(size, index, count)
            if not part:
                raise ValueError(f"a batch of {size} images cannot be cut into {count} parts")
            place = torch.arange(start + part.start, start + part.stop)
            kept += [place + half * size for half in range(halves)]
            if self.partner_N is not None:
                first = start // halves
                partners.append(self.partner_N[first + part.start : first + part.stop] - part.start)
                if partners[-1].min() < 0 or partners[-1].max() >= len(part):
                    raise ValueError(f"partners lie in other parts of the batch: groups must be a multiple of {count}")
            weights.append(count * len(part) / size)
        kept_N = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)

        def per_view(field: Tensor | None) -> Tensor | None:
            return None if field is None else _of_peers(field, 0, peers)[:, kept_N]

        return replace(
            self,
            batch_size=self.batch_size // count,
            index_N=self.index_N[kept_N],
            crop_VN2=_of_peers(self.crop_VN2, 0, peers)[:, kept_N],
            flip_VN=_of_peers(self.flip_VN, 0, peers)[:, kept_N],
            region_VN4=per_view(self.region_VN4),
            colour_VN4=per_view(self.colour_VN4),
            angle_VN=per_view(self.angle_VN),
            hole_VN4=per_view(self.hole_VN4),
            partner_N=torch.cat(partners) if partners else self.partner_N,
            lam_SL=None if self.lam_SL is None else _of_peers(self.lam_SL, 1, peers),
            box_SM4=None if self.box_SM4 is None else _of_peers(self.box_SM4, 1, peers),
            weight_S=tuple(weights),
        )

    def positions(self, start: int, stop: int) -> Draws:
        """The draws of a range of positions, whichever steps they belong to: what a loader needs, without the mix."""

        def per_view(field: Tensor | None) -> Tensor | None:
            return None if field is None else field[:, start:stop]

        return Draws(
            index_B=self.index_N[start:stop],
            crop_VB2=self.crop_VN2[:, start:stop],
            flip_VB=self.flip_VN[:, start:stop],
            region_VB4=per_view(self.region_VN4),
            colour_VB4=per_view(self.colour_VN4),
            angle_VB=per_view(self.angle_VN),
            hole_VB4=per_view(self.hole_VN4),
            partner_B=None,
            lam_L=None,
            box_M4=None,
            epoch=self.epoch_S[0],
            second=self.second,
        )


def _in_rows(field: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """move(field), every row at a multiple of 16 bytes: a compiled kernel is given a copy of what lies elsewhere."""
    flat = field if field.dim() > 1 else field[:, None]
    at_once = 16 // field.element_size()
    rows = field.new_zeros(len(field), -(-flat.shape[1] // at_once) * at_once)
    rows[:, : flat.shape[1]] = flat
    return move(rows)[:, : flat.shape[1]].view(field.shape)


def part_of(size: int, index: int, count: int) -> range:
    """Part `index` of `count` contiguous parts of range(size), whose sizes differ by at most one."""
    return range(size * index // count, size * (index + 1) // count)


def _of_peers(field: Tensor, axis: int, peers: range | None) -> Tensor:
    """The peers' part of a field that has an entry each; one that all share stays."""
    if peers is None or field.shape[axis] == 1:
        return field
    return field.narrow(axis, peers.start, len(peers))


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
