"""The plan of an epoch: all that is random in its data, as tensors, drawn (draw.py) before any of it is done.

A plan is drawn for the whole batch and all peers. Where several processes share a step, `Plan.shard` gives each its
images and its peers' views: the same draws, wherever they are executed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutnmix.pipeline.laws import Distort


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
