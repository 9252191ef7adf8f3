"""Views in, Batch out: mix, normalise, erase the holes of cutout, make the targets. One pass, entirely on the device.

The images arrive as uint8 in channels_last memory, so everything per pixel is done on rows of R = W * C contiguous
bytes: pasting (which commutes with normalisation) happens on bytes, and floats are written once. Compiled, it is one
loop, with the resident loader's crops in it; on a CPU, eagerly, a gather of images, a select and one multiply-add.
"""

import torch
from torch import Tensor, nn

from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.cutnmix import mix_target, one_hot
from cutnmix.pipeline.plan import Draws


class MixBatch(nn.Module):
    """(Views, Draws) -> Batch: image = (pixel / 255 - mean) / std of the mixed pixels, target by Eq. 6.

    Executes the draws' mix (boxes where they have `box_M4`, a blend where they have `lam_L` alone, else none) and owns
    no random state. Float views are clamped to [0, 255] first. A cutout hole is 0 after normalisation, the mean colour,
    and moves with the pixels that it belongs to. Second views (see Views) are mixed with the same draws as the first.

    Args:
        mean, std: per channel, of pixel values scaled to [0, 1].
        size: (H, W).
        num_classes: K.
        dtype: of the images that come out.
        channels_last: their memory format, which costs nothing; False copies them to contiguous.
    """

    scale_HR: Tensor
    shift_HR: Tensor
    x_R: Tensor  # int32, where in the image each entry of a row is
    y_H: Tensor

    def __init__(
        self,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int],
        num_classes: int,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ):
        super().__init__()
        self.height, self.width = size
        self.channels = len(mean)
        self.num_classes = num_classes
        self.dtype = dtype
        self.channels_last = channels_last
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        rows = self.height, self.width  # one a pixel row and one a channel, so that eager loops run over whole images
        self.register_buffer("scale_HR", (1 / (255 * std_C)).float().repeat(rows), persistent=False)
        self.register_buffer("shift_HR", (-mean_C / std_C).float().repeat(rows), persistent=False)
        x_R = torch.arange(self.width * self.channels, dtype=torch.int32) // self.channels
        self.register_buffer("x_R", x_R, persistent=False)
        self.register_buffer("y_H", torch.arange(self.height, dtype=torch.int32), persistent=False)

    def compile(self, *, backend: str = "inductor", fullgraph: bool = False, dynamic: bool | None = None) -> None:
        """Compile in place, as nn.Module.compile: on a GPU all of it, on a CPU all but the boxes' masks.

        Inductor 2.14 does not vectorise a loop over bytes that compares with a box: on a CPU such a graph is 10 times
        slower than no graph, and one that reads the mask from memory faster. On a GPU pixels and targets are loops of
        different sizes, which only `combo_kernels` puts into one kernel.
        """
        if self.scale_HR.device.type == "cpu":
            self._batch = torch.compile(self._batch, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
        else:
            options = {"combo_kernels": True} if backend == "inductor" else None
            super().compile(backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options)

    def forward(self, views: Views, draws: Draws) -> Batch:
        """Mix and normalise. No gradients (the pixels are data)."""
        return self._batch(views, draws, None if draws.box_M4 is None else self._inside(draws.box_M4))

    def _batch(self, views: Views, draws: Draws, bits_M1HR: Tensor | None) -> Batch:
        parts = 1 + draws.second
        label_B, index_B = (field.chunk(parts)[0] for field in (views.label_B, views.index_B))
        target_LBK = one_hot(label_B, self.num_classes)[None]
        if draws.partner_B is not None and draws.lam_L is not None:
            target_LBK = mix_target(label_B, draws.partner_B, draws.lam_L, self.num_classes)
        image_VBHR, hole_VBHR = views.image_VBCHW.permute(0, 1, 3, 4, 2).flatten(3), views.hole_VBHW
        if hole_VBHR is not None:  # a flag a channel, so that it runs along the bytes
            hole_VBHR = hole_VBHR.unsqueeze(-1).expand(*hole_VBHR.shape, self.channels).flatten(3)
        holes = [None] * parts if hole_VBHR is None else hole_VBHR.chunk(parts, 1)
        images = [self._image(*part, draws, bits_M1HR) for part in zip(image_VBHR.chunk(parts, 1), holes, strict=True)]
        return Batch(images[0], target_LBK, label_B, index_B, draws.epoch, images[1] if draws.second else None)

    def _inside(self, box_M4: Tensor) -> Tensor:
        """(M, 1, H, R) uint8, all bits set inside. As cutnmix.box_mask, but of rows, and from a few small loops."""
        x0, y0, x1, y1 = box_M4.unsqueeze(-1).unbind(1)
        x_MR, y_MH = ((at >= low) & (at < high) for at, low, high in ((self.x_R, x0, x1), (self.y_H, y0, y1)))
        return (-y_MH.to(torch.uint8))[:, None, :, None] & (-x_MR.to(torch.uint8))[:, None, None]

    def _image(self, image_VBHR: Tensor, hole_VBHR: Tensor | None, draws: Draws, bits_M1HR: Tensor | None) -> Tensor:
        """Of the batch, or of its second views: mixed, normalised, erased, (V, B, C, H, W)."""
        if draws.partner_B is not None and bits_M1HR is not None:
            image_VBHR = _select(bits_M1HR, image_VBHR, draws.partner_B)
            hole_VBHR = None if hole_VBHR is None else _select(bits_M1HR, hole_VBHR, draws.partner_B)
        pixel_VBHR = image_VBHR.clamp(0, 255) if image_VBHR.is_floating_point() else image_VBHR.float()
        pixel_VBHR.mul_(self.scale_HR).add_(self.shift_HR)  # in place: either line above made the copy
        if hole_VBHR is not None:
            pixel_VBHR = pixel_VBHR.masked_fill_(hole_VBHR, 0.0)
        if draws.partner_B is not None and draws.lam_L is not None and bits_M1HR is None:
            pixel_VBHR = torch.lerp(pixel_VBHR.index_select(1, draws.partner_B), pixel_VBHR, draws.lam_L)
        image_VBHWC = pixel_VBHR.to(self.dtype).unflatten(-1, (self.width, self.channels))
        image_VBCHW = image_VBHWC.permute(0, 1, 4, 2, 3)
        return image_VBCHW if self.channels_last else image_VBCHW.contiguous()


def _select(bits_M1HR: Tensor, own_VBHR: Tensor, partner_B: Tensor) -> Tensor:
    """Eq. 5 on rows of bytes. index_select, unlike [:, partner], copies whole images: 15 times as fast on a CPU."""
    other_VBHR = own_VBHR.index_select(1, partner_B)
    if own_VBHR.dtype != torch.uint8:
        return torch.where(bits_M1HR.bool(), other_VBHR, own_VBHR)
    # 10 times as fast as torch.where on a CPU: where the mask has all bits set, own ^ (own ^ other) = other.
    return (other_VBHR.bitwise_xor_(own_VBHR) & bits_M1HR).bitwise_xor_(own_VBHR)
