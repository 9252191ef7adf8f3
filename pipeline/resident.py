"""The resident loader: a data set that fits on the device lives there as uint8, and views are gathered from it.

The fastest loader for CIFAR-like arrays, and the one for platforms without DALI. It executes the same plan with the
same pixels as the DALI loader.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.distort import (
    colour_matrix,
    crop_start,
    hole_mask,
    source_images,
    view_matrix,
    view_size,
)
from cutnmix.pipeline.laws import Distort
from cutnmix.pipeline.plan import Draws, Plan


class ResidentPixels(NamedTuple):
    """One step's views, made from the resident images where they are read."""

    source_NHWC: Tensor  # uint8, padded; each image with its mirror image beside it, but for rotated views
    size: tuple[int, int]  # (H, W) of a view
    draws: Draws
    first_VB: Tensor | None  # see first_pixel; None for rotated views

    @property
    def image_VBCHW(self) -> Tensor:
        """Crop and flip as bytes; with rotation or colour, float32, not clamped to [0, 255]. channels_last."""
        draws = self.draws
        if self.first_VB is not None:
            image_VBHWC = gather_crops(self.source_NHWC, self.first_VB, self.size)
        else:
            assert draws.angle_VB is not None
            matrix_VB23 = view_matrix(draws.crop_VB2, draws.flip_VB, draws.angle_VB, self.size)
            image_VBHWC = gather_warped(self.source_NHWC, draws.index_B, matrix_VB23, self.size)
        if draws.colour_VB4 is not None:
            matrix_VB34 = colour_matrix(draws.colour_VB4)
            rgb_VBHWC = image_VBHWC.float() @ matrix_VB34[:, :, None, :, :3].transpose(-1, -2)
            image_VBHWC = rgb_VBHWC + matrix_VB34[:, :, None, None, :, 3]
        return image_VBHWC.permute(0, 1, 4, 2, 3)

    @property
    def hole_VBHW(self) -> Tensor | None:
        """The holes of cutout."""
        return None if self.draws.hole_VB4 is None else hole_mask(self.draws.hole_VB4, self.size)


class ResidentLoader:
    """Yields the Views of a plan from images that stay on the device.

    A step of it is a look-up: crops, flips and all else happen where the views are read, in the same kernel as the mix
    where that is compiled.

    Args:
        dataset: images as an array.
        distort: which distortions the plans to come will draw.
        device: where images live and views are made.

    Raises:
        DataError: for a data set of image files, and for colours of images that are not RGB.
    """

    def __init__(self, dataset: Dataset, distort: Distort, device: torch.device | str = "cpu"):
        if not dataset.in_memory:
            raise DataError(
                f"loader.name: resident holds images of one size in memory, and {dataset.name} is a set of "
                f"image files with random resized crops: use loader.name=dali"
            )
        self.device = torch.device(device)
        self.distort = distort
        self.size = view_size(dataset, distort)
        self.label_N = torch.from_numpy(dataset.labels).to(self.device)
        self.source_NHWC = torch.from_numpy(source_images(dataset, distort)).to(self.device)

    def epoch(self, plan: Plan, start: int = 0) -> Iterator[Views]:
        """The views of steps start, start + 1, ... of a plan that is on this loader's device.

        Labels and the places of the crops are looked up for the whole epoch at once: a step of small images is paid for
        by the call, not by the byte.

        Raises: ValueError for a plan that this loader was not made for.
        """
        plan.check(self.distort, self.size, files=False)
        if start >= len(plan):
            return
        label_N, first_VN = self._look_up(plan.positions(0, len(plan.index_N)))
        for step in range(start, len(plan)):
            part = slice(step * plan.batch_size, (step + 1) * plan.batch_size)
            yield self._views(plan.step(step), label_N[part], None if first_VN is None else first_VN[:, part])

    def views(self, draws: Draws) -> Views:
        """One step's views."""
        return self._views(draws, *self._look_up(draws))

    def _look_up(self, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Labels, and the first pixel of each crop in the flat data set; no crops where views are turned."""
        label_B = self.label_N[draws.index_B]
        if draws.angle_VB is not None:
            return label_B, None
        start_VB2 = crop_start(draws.crop_VB2, draws.flip_VB, self.size[1], self.distort.pad)
        return label_B, first_pixel(self.source_NHWC, draws.index_B, start_VB2)

    def _views(self, draws: Draws, label_B: Tensor, first_VB: Tensor | None) -> Views:
        return Views(ResidentPixels(self.source_NHWC, self.size, draws, first_VB), None, label_B, draws.index_B)

    def close(self) -> None:
        """Nothing to release: the other loaders have threads."""


def first_pixel(source_NHWC: Tensor, index_B: Tensor, start_VB2: Tensor) -> Tensor:
    """(V, B) int64: where in the flat data set, in pixels, the crop begins that has (x, y) as its first corner."""
    _, height, width, _ = source_NHWC.shape
    x_VB, y_VB = start_VB2.long().unbind(-1)
    return (index_B * height + y_VB) * width + x_VB


def gather_crops(source_NHWC: Tensor, first_VB: Tensor, size: tuple[int, int]) -> Tensor:
    """(V, B, H, W, C) uint8 crops that begin at the given pixels, each output row copied as one run of bytes.

    Rows, not pixels: an overlapping view of the flat data set makes every possible start of a row a row of its own, and
    index_select copies whole rows. Advanced indexing of the same elements is 15 to 40 times slower on a CPU.
    """
    _, _, source_width, channels = source_NHWC.shape
    height, width = size
    row_H = torch.arange(height, device=first_VB.device) * source_width
    starts = (first_VB[..., None] + row_H).flatten()
    run = width * channels
    num_starts = (source_NHWC.numel() - run) // channels + 1
    rows = torch.as_strided(source_NHWC, (num_starts, run), (channels, 1))
    return rows.index_select(0, starts).view(*first_VB.shape, height, width, channels)


def gather_warped(padded_NHWC: Tensor, index_B: Tensor, matrix_VB23: Tensor, size: tuple[int, int]) -> Tensor:
    """(V, B, H, W, C) float32: bilinear samples of padded images at matrix @ (x + 0.5, y + 0.5, 1), black outside."""
    height, width = size
    views, batch = matrix_VB23.shape[:2]
    source_BCHW = padded_NHWC[index_B].permute(0, 3, 1, 2).float()
    full_height, full_width = source_BCHW.shape[-2:]
    y_H, x_W = (torch.arange(n, device=index_B.device) + 0.5 for n in (height, width))
    centre_HW3 = torch.stack(
        [x_W.expand(height, width), y_H[:, None].expand(height, width), torch.ones_like(x_W).expand(height, width)], -1
    )
    at_VBHW2 = centre_HW3 @ matrix_VB23[:, :, None].transpose(-1, -2)
    # grid_sample counts in units of half an image from its centre: -1 is the left edge, 1 the right edge.
    grid_VBHW2 = torch.stack([at_VBHW2[..., 0] * (2 / full_width) - 1, at_VBHW2[..., 1] * (2 / full_height) - 1], -1)
    warped = F.grid_sample(
        source_BCHW.repeat(views, 1, 1, 1), grid_VBHW2.flatten(0, 1), padding_mode="zeros", align_corners=False
    )
    return warped.unflatten(0, (views, batch)).permute(0, 1, 3, 4, 2).contiguous()  # channels_last, as all views
