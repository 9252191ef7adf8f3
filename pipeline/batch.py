"""What travels from the data to the step, and the shape letters that name its axes everywhere.

J peers, V views (J, or 1 where every peer sees the same pixels), L target sets (1, or J under `clip_corrected`),
B batch, K classes, C channels, H W image size, D feature, N samples of a data set, S steps of an epoch.
A tensor's suffix lists its axes: `image_VBCHW`, `target_LBK`. Peers come first: peer j is a contiguous slice.
"""

from typing import NamedTuple

from torch import Tensor


class Views(NamedTuple):
    """V distorted copies of one batch of images, not yet mixed and not yet normalised.

    Where the plan asks for a second view of each image, B is twice the batch: the batch, then the second views.
    """

    image_VBCHW: Tensor  # channels_last strides; uint8, or float32 in [0, 255] after colour or rotation
    hole_VBHW: Tensor | None  # bool, True where cutout removed the pixel; None when cutout is off
    label_B: Tensor  # int64
    index_B: Tensor  # int64, the image's position in its data set


class Batch(NamedTuple):
    """What peers and methods see: normalised, mixed images and their soft targets."""

    image_VBCHW: Tensor  # floating point, channels_last; view v goes to peer v, or the only view to every peer
    target_LBK: Tensor  # float32, each row sums to 1
    label_B: Tensor  # int64, the label of the base image
    index_B: Tensor  # int64, the base image's position in its data set
    epoch: Tensor  # 0-D float64, epochs of training before this batch; a fraction within an epoch
    second_VBCHW: Tensor | None = None  # as image_VBCHW: what the plan's `second` asks for, for the same peers
