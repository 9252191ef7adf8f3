"""Wide ResNets for 32x32 images: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.

    block: x + conv(relu(BN(conv(relu(BN(x))))))

WRN-d-k has three stages of n = (d - 4) / 6 such blocks, of widths 16k, 32k, 64k, and d convolutions in all; D = 64k.
Parameters for K = 10 / 100:

    wrn16_8   10,961,370 / 11,007,540
    wrn28_10  36,479,194 / 36,536,884
    wrn40_2    2,243,546 /  2,255,156

Shortcuts and initial weights are those of szagoruyko/wide-residual-networks. There is no dropout between the
convolutions: the paper has it as an option. The WRN-20-8 of the online distillation literature is another kind of
network: resnet.py has it.
"""

from torch import Tensor, nn

from cutnmix.models.network import Network, preactivation
from cutnmix.models.resnet import conv


class PreActivation(nn.Module):
    """shortcut + body(a), a = relu(BN(x)); the shortcut is x, and a 1x1 convolution of a where the shape changes."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(in_width), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            conv(in_width, out_width, 3, stride),
            nn.BatchNorm2d(out_width),
            nn.ReLU(inplace=True),
            conv(out_width, out_width, 3),
        )
        same_shape = stride == 1 and out_width == in_width
        self.shortcut = None if same_shape else conv(in_width, out_width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        active = self.norm(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


def wrn(depth: int, widen: int, num_classes: int, in_channels: int) -> Network:
    """WRN-depth-widen: stem, three stages, BN, relu, global average, one linear head; the last stage is the branch."""
    width, num_blocks = 16, (depth - 4) // 6
    stages: list[nn.Module] = [conv(in_channels, width, 3)]
    trunk_dim = width
    for stage in range(3):
        blocks, trunk_dim = [], width
        for i in range(num_blocks):
            blocks.append(PreActivation(width, 16 * widen * 2**stage, stride=2 if stage > 0 and i == 0 else 1))
            width = 16 * widen * 2**stage
        stages.append(nn.Sequential(*blocks))
    return preactivation(stages, width, trunk_dim, num_classes)


def wrn16_8(num_classes: int, in_channels: int = 3) -> Network:
    """Pre-activation blocks [2, 2, 2] of widths 128, 256, 512, D = 512."""
    return wrn(16, 8, num_classes, in_channels)


def wrn28_10(num_classes: int, in_channels: int = 3) -> Network:
    """Pre-activation blocks [4, 4, 4] of widths 160, 320, 640, D = 640."""
    return wrn(28, 10, num_classes, in_channels)


def wrn40_2(num_classes: int, in_channels: int = 3) -> Network:
    """Pre-activation blocks [6, 6, 6] of widths 32, 64, 128, D = 128."""
    return wrn(40, 2, num_classes, in_channels)
