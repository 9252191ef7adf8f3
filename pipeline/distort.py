"""What a drawn distortion means, as plain formulae that every loader shares."""

import math

import numpy as np
import torch
from torch import Tensor

from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.laws import Distort


def view_size(dataset: Dataset, distort: Distort) -> tuple[int, int]:
    """(H, W) of the views: the images' own size, or `image_size` for files of any size."""
    if not dataset.in_memory:
        return distort.image_size, distort.image_size
    height, width = dataset.array.shape[1:3]
    return height, width


def source_images(dataset: Dataset, distort: Distort) -> np.ndarray:
    """What views of an array are cut from: (N, H + 2 pad, 2 (W + 2 pad), C), or (N, H + 2 pad, W + 2 pad, C) to turn.

    Zero (black) padding on all four sides, as torchvision's RandomCrop pads before normalisation, and then each image
    with its mirror image to the right, so that a flipped crop is only another crop. But a rotated view reads beyond the
    edge of its image, where there must be no mirror image but black. C-contiguous, whatever the data set's array is.

    Raises: DataError where colour is to be drawn for images that are not RGB.
    """
    image_NHWC, pad = dataset.array, distort.pad
    if distort.colour.active and (channels := image_NHWC.shape[-1]) != 3:
        raise DataError(f"distort.colour: {dataset.name} has {channels} channel(s), and colour is drawn for RGB, 3")
    if pad:
        image_NHWC = np.pad(image_NHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    if not distort.rotation:
        image_NHWC = np.concatenate([image_NHWC, image_NHWC[:, :, ::-1]], axis=2)
    return np.ascontiguousarray(image_NHWC)  # loaders read the memory; NumPy keeps the order of axes that it got


def crop_start(crop_VB2: Tensor, flip_VB: Tensor, width: int, pad: int) -> Tensor:
    """(V, B, 2) int32 (x, y): where a crop begins in a padded image that has its mirror image beside it.

    A flipped crop at x is the crop of the mirror image that ends x before its right edge.
    """
    x_VB, y_VB = crop_VB2.unbind(-1)
    mirrored_x_VB = 2 * (width + 2 * pad) - width - x_VB
    return torch.stack([torch.where(flip_VB, mirrored_x_VB, x_VB), y_VB], dim=-1)


def view_matrix(crop_VB2: Tensor, flip_VB: Tensor, angle_VB: Tensor, size: tuple[int, int]) -> Tensor:
    """(V, B, 2, 3) float32: maps a point (x, y) of the view to its point in the padded image.

    The view is the crop, flipped, then rotated by `angle` degrees counter-clockwise about its centre; one matrix and so
    one interpolation for all three, and corners show real neighbours where the padded image has them. Pixel centres
    stand at half-integers.
    """
    height, width = size
    angle_VB = angle_VB.float() * (math.pi / 180)
    cos_VB, sin_VB = angle_VB.cos(), angle_VB.sin()
    sign_VB = 1 - 2 * flip_VB.float()
    centre_x, centre_y = width / 2, height / 2
    # y points down, so a counter-clockwise turn of the picture reads the source at R(angle) (p - c) with this sign.
    row_x = torch.stack([sign_VB * cos_VB, -sign_VB * sin_VB], dim=-1)
    row_y = torch.stack([sin_VB, cos_VB], dim=-1)
    offset_x = centre_x + crop_VB2[..., 0] - row_x[..., 0] * centre_x - row_x[..., 1] * centre_y
    offset_y = centre_y + crop_VB2[..., 1] - row_y[..., 0] * centre_x - row_y[..., 1] * centre_y
    return torch.stack([torch.cat([row_x, offset_x[..., None]], -1), torch.cat([row_y, offset_y[..., None]], -1)], -2)


# The NTSC luma/chroma axes (FCC 1953), in which saturation scales chroma and hue turns it.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
# inv(YIQ) @ [[1, 0, 0], [0, c, s], [0, -s, c]] @ YIQ = KEPT + c * SCALED + s * TURNED. Numbers, not tensors: a copy of
# constants to a device would make the host wait.
_KEPT, _SCALED, _TURNED = (
    (np.linalg.inv(_TO_YIQ) @ np.array(part) @ _TO_YIQ).tolist()
    for part in (
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, 1], [0, -1, 0]],
    )
)


def colour_matrix(colour_VB4: Tensor) -> Tensor:
    """(V, B, 3, 4) float32 [A | b] with rgb' = A rgb + b for pixel values in [0, 255], not clamped.

    A = brightness * contrast * inv(YIQ) @ chroma(hue, saturation) @ YIQ and b = brightness * 128 * (1 - contrast):
    the formula of DALI's color_twist on 8-bit images.
    """
    brightness, contrast, saturation, hue = colour_VB4.float().unbind(-1)
    hue = hue * (math.pi / 180)
    cos, sin = saturation * hue.cos(), saturation * hue.sin()
    gain, offset = brightness * contrast, brightness * 128 * (1 - contrast)
    rows = [
        torch.stack([*(gain * (k + c * cos + s * sin) for k, c, s in zip(*row, strict=True)), offset], -1)
        for row in zip(_KEPT, _SCALED, _TURNED, strict=True)
    ]
    return torch.stack(rows, -2)


def hole_mask(hole_VB4: Tensor, size: tuple[int, int]) -> Tensor:
    """(V, B, H, W) bool, True inside the half-open boxes (x0, y0, x1, y1)."""
    height, width = size
    x_W, y_H = (torch.arange(n, device=hole_VB4.device) for n in (width, height))
    x0, y0, x1, y1 = hole_VB4[..., None].unbind(-2)
    in_x_VBW, in_y_VBH = (x_W >= x0) & (x_W < x1), (y_H >= y0) & (y_H < y1)
    return in_y_VBH[..., :, None] & in_x_VBW[..., None, :]
