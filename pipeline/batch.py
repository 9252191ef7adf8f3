"""What travels from the data to the step, and the shape letters that name its axes everywhere.

J peers, V views (J, or 1 where every peer sees the same pixels), L target sets (1, or J under `clip_corrected`),
B batch, K classes, C channels, H W image size, D feature, N samples of a data set, S steps of an epoch.
A tensor's suffix lists its axes: `image_VBCHW`, `target_LBK`. Peers come first: peer j is a contiguous slice.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Pixels(Protocol):
    """Views that are made where they are read, so that whoever is compiled to read them makes them in the same loop."""

    @property
    def image_VBCHW(self) -> Tensor:
        """As of Views; made anew each time it is read."""
        ...

    @property
    def hole_VBHW(self) -> Tensor | None:
        """As of Views."""
        ...


class Views(NamedTuple):
    """V distorted copies of one batch of images, not yet mixed and not yet normalised.

    Where the plan asks for a second view of each image, B is twice the batch: the batch, then the second views.
    """

    pixels: Tensor | Pixels  # `image_VBCHW`, or what makes it and the holes
    holes: Tensor | None  # `hole_VBHW` of `pixels` that are a tensor
    label_B: Tensor  # int64
    index_B: Tensor  # int64, the image's position in its data set

    @property
    def image_VBCHW(self) -> Tensor:
        """channels_last strides; uint8, or after colour or rotation float32, which colour may take out of [0, 255]."""
        return self.pixels if isinstance(self.pixels, Tensor) else self.pixels.image_VBCHW

    @property
    def hole_VBHW(self) -> Tensor | None:
        """Bool, True where cutout removed the pixel; None when cutout is off."""
        return self.holes if isinstance(self.pixels, Tensor) else self.pixels.hole_VBHW

    def made(self) -> "Views":
        """The same, with its pixels as tensors in memory."""
        return Views(self.image_VBCHW, self.hole_VBHW, self.label_B, self.index_B)


class Batch(NamedTuple):
    """What peers and methods see: normalised, mixed images and their soft targets."""

    image_VBCHW: Tensor  # floating point, channels_last; view v goes to peer v, or the only view to every peer
    target_LBK: Tensor  # float32, each row sums to 1
    label_B: Tensor  # int64, the label of the base image
    index_B: Tensor  # int64, the base image's position in its data set
    epoch: Tensor  # 0-D float64, epochs of training before this batch; a fraction within an epoch
    second_VBCHW: Tensor | None = None  # as image_VBCHW: what the plan's `second` asks for, for the same peers
