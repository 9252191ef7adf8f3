"""What a plan means, as plainly and slowly as can be: NumPy loops over images and pixels, in float64.

Also `Dispatches`, which looks at the aten calls of the fast code.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cutnmix.pipeline.dataset import Dataset
from cutnmix.pipeline.plan import Draws


def images(count: int, height: int = 12, width: int = 16, seed: int = 0) -> Dataset:
    """A data set of noise in which every pixel tells where it comes from."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 5, count)
    return Dataset("noise/train", pixels, labels, tuple("abcde"), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def pixel(image_HWC: np.ndarray, x: int, y: int) -> np.ndarray:
    """The pixel in column x and row y, black outside the image."""
    height, width, channels = image_HWC.shape
    return image_HWC[y, x].astype(float) if 0 <= x < width and 0 <= y < height else np.zeros(channels)


def sample(image_HWC: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear at the point (x, y), where the first pixel is the square from (0, 0) to (1, 1)."""
    column, row = math.floor(x - 0.5), math.floor(y - 0.5)
    right, down = x - 0.5 - column, y - 0.5 - row
    above = (1 - right) * pixel(image_HWC, column, row) + right * pixel(image_HWC, column + 1, row)
    below = (1 - right) * pixel(image_HWC, column, row + 1) + right * pixel(image_HWC, column + 1, row + 1)
    return (1 - down) * above + down * below


def recolour(rgb: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Saturation scales the chroma and hue turns it, contrast stretches about 128, brightness scales."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    luma, i, q = to_yiq @ rgb
    cos, sin = math.cos(math.radians(hue)), math.sin(math.radians(hue))
    turned = np.array([luma, saturation * (cos * i + sin * q), saturation * (cos * q - sin * i)])
    return brightness * (128 + contrast * (np.linalg.solve(to_yiq, turned) - 128))


def view(image_HWC: np.ndarray, pad: int, draws: Draws, v: int, b: int) -> np.ndarray:
    """View v of image b of a step, (H, W, C) float64 and not clamped: crop, flip, turn, then colour."""
    height, width, _ = image_HWC.shape
    left, top = draws.crop_VB2[v, b].tolist()
    flipped = bool(draws.flip_VB[v, b])
    made = np.zeros(image_HWC.shape)
    for row in range(height):
        for column in range(width):
            if draws.angle_VB is None:
                x = width - 1 - column if flipped else column
                made[row, column] = pixel(image_HWC, x + left - pad, row + top - pad)
            else:
                # Turning the picture by +angle shows, at a point, what lay at that point turned by -angle; y up.
                angle = math.radians(draws.angle_VB[v, b].item())
                x, y = column + 0.5 - width / 2, height / 2 - (row + 0.5)
                x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
                x, y = (-x if flipped else x) + width / 2, height / 2 - y
                made[row, column] = sample(image_HWC, x + left - pad, y + top - pad)
            if draws.colour_VB4 is not None:
                made[row, column] = recolour(made[row, column], *draws.colour_VB4[v, b].tolist())
    return made


def views(dataset: Dataset, pad: int, draws: Draws) -> np.ndarray:
    """All views of a step, (V, B, H, W, C) float64."""
    assert isinstance(dataset.images, np.ndarray)
    chosen = [dataset.images[i] for i in draws.index_B.tolist()]
    num_views = draws.flip_VB.shape[0]
    return np.array([[view(image, pad, draws, v, b) for b, image in enumerate(chosen)] for v in range(num_views)])


def holes(draws: Draws, height: int, width: int) -> np.ndarray:
    """(V, B, H, W) bool: what cutout removed."""
    assert draws.hole_VB4 is not None
    removed = np.zeros((*draws.hole_VB4.shape[:2], height, width), dtype=bool)
    for (v, b, y, x), _ in np.ndenumerate(removed):
        x0, y0, x1, y1 = draws.hole_VB4[v, b].tolist()
        removed[v, b, y, x] = x0 <= x < x1 and y0 <= y < y1
    return removed


def paste(image_VBCHW: np.ndarray, box_M4: Tensor, partner_B: Tensor) -> np.ndarray:
    """Eq. 5, pixel by pixel: (max(V, M), B, C, H, W)."""
    boxes, partners = box_M4.tolist(), partner_B.tolist()
    num_peers = max(len(image_VBCHW), len(boxes))
    own = np.broadcast_to(image_VBCHW, (num_peers, *image_VBCHW.shape[1:]))
    mixed = own.copy()
    height, width = own.shape[-2:]
    for j in range(num_peers):
        x0, y0, x1, y1 = boxes[j if len(boxes) > 1 else 0]
        for b, partner in enumerate(partners):
            for y in range(height):
                for x in range(width):
                    if x0 <= x < x1 and y0 <= y < y1:
                        mixed[j, b, :, y, x] = own[j, partner, :, y, x]
    return mixed


def mix(image_VBCHW: np.ndarray, draws: Draws) -> np.ndarray:
    """What the draws' mix makes of normalised images, holes erased: boxes pasted, or blended image by image."""
    if draws.partner_B is None or draws.lam_L is None:
        return image_VBCHW
    if draws.box_M4 is not None:
        return paste(image_VBCHW, draws.box_M4, draws.partner_B)
    (lam,) = draws.lam_L.tolist()
    mixed = np.empty_like(image_VBCHW)
    for b, partner in enumerate(draws.partner_B.tolist()):
        mixed[:, b] = lam * image_VBCHW[:, b] + (1 - lam) * image_VBCHW[:, partner]
    return mixed


def targets(labels: list[int], partners: list[int], lams: list[float], num_classes: int) -> np.ndarray:
    """Eq. 6, image by image: (L, B, K)."""
    target_LBK = np.zeros((len(lams), len(labels), num_classes))
    for row_BK, lam in zip(target_LBK, lams, strict=True):
        for b, (label, partner) in enumerate(zip(labels, partners, strict=True)):
            row_BK[b, label] += lam
            row_BK[b, labels[partner]] += 1 - lam
    return target_LBK


class Dispatches(TorchDispatchMode):
    """Counts aten calls, and notes every one that would make the host wait for a GPU or copies between devices."""

    WAITS = frozenset(
        "_local_scalar_dense item is_nonzero equal nonzero nonzero_static masked_select unique _unique _unique2 "
        "unique_dim unique_consecutive bincount randperm repeat_interleave allclose record_stream".split()
    )

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.calls.append(name)
        made = func(*args, **kwargs)
        if name in self.WAITS or self._by_mask(name, args) or self._across(args, kwargs, made):
            self.waits.append(str(func))
        return made

    @staticmethod
    def _by_mask(name: str, args: tuple) -> bool:
        """Indexing by a bool mask counts its True values on the host."""
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)

    @staticmethod
    def _across(args: tuple, kwargs: dict, made) -> bool:
        """Whether what came out lies on another device than something that went in (0-D host numbers apart)."""
        if not isinstance(made, Tensor):
            return False
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        return any(tensor.device.type != made.device.type and tensor.dim() > 0 for tensor in given)
