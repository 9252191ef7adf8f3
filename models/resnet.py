"""Post-activation ResNets for 32x32 images: He et al., "Deep Residual Learning", CVPR 2016, arXiv:1512.03385.

    image -> conv 3x3, BN, relu -> stages of blocks, each but the first at half the resolution -> average -> head

Those of the online distillation literature (the model zoo of DefangChen/OKDDip, AAAI 2020, which the CutnMix authors
use again in Meta-knowledge-Lab/DLB), and the textbook forms beside them:

    the zoo                                     textbook
    name         K = 10    K = 100    D         name                   K = 10     K = 100    D
    resnet32    466,906    472,756   64         resnet20              272,474     278,324   64
    resnet110 1,147,738  1,170,868  256         resnet44_basic        661,338     667,188   64
    wrn20_8   6,848,090  6,871,220  256         resnet56_basic        855,770     861,620   64
                                                resnet110_basic     1,730,714   1,736,564   64
                                                resnet18_cifar     11,173,962  11,220,132  512

The zoo's ResNet-110 is built of bottlenecks, He et al.'s of basic blocks: that is `resnet110_basic`. With basic blocks
the zoo and the textbook agree, so `resnet20_basic` is another name of `resnet20`. The zoo's WRN-20-8 is a ResNet of
bottlenecks whose inner widths are 8 times as large; it is none of Zagoruyko and Komodakis, whose are in wrn.py.

Deviation from He et al.: a block that changes shape has a learned 1x1 shortcut with a BN, theirs is padded with zeros
(2,752 parameters fewer with basic blocks of widths 16, 32, 64). The stride of a bottleneck sits on its 3x3 convolution,
as in torchvision.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from cutnmix.models.network import Branch, Network


def conv(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with 'same' padding, no bias (the norm has one), weights N(0, 2 / fan_out)."""
    conv2d = nn.Conv2d(in_width, out_width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv2d.weight, mode="fan_out", nonlinearity="relu")
    return conv2d


def conv_norm(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """BN(conv(x))."""
    return nn.Sequential(conv(in_width, out_width, kernel, stride), nn.BatchNorm2d(out_width))


def basic(in_width: int, width: int, stride: int) -> tuple[nn.Sequential, int]:
    """Two 3x3 convolutions, and the width they end with."""
    body = nn.Sequential(
        conv_norm(in_width, width, 3, stride),
        nn.ReLU(inplace=True),
        conv_norm(width, width, 3),
    )
    return body, width


def bottleneck(in_width: int, width: int, stride: int, widen: int = 1) -> tuple[nn.Sequential, int]:
    """1x1 to the inner width widen * `width`, 3x3, 1x1 to 4 * `width`, and that width."""
    inner = widen * width
    body = nn.Sequential(
        conv_norm(in_width, inner, 1),
        nn.ReLU(inplace=True),
        conv_norm(inner, inner, 3, stride),
        nn.ReLU(inplace=True),
        conv_norm(inner, 4 * width, 1),
    )
    return body, 4 * width


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the shortcut is the identity unless the body changes the shape."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet(
    block: Callable[[int, int, int], tuple[nn.Sequential, int]],
    depths: Sequence[int],
    num_classes: int,
    in_channels: int,
    width: int = 16,
) -> Network:
    """Stem, stages, global average, one linear head; the last stage is the branch.

    `block` is `basic` or `bottleneck`, `depths` the blocks of each stage; stage s is built for `width` * 2^s, and from
    the second on halves the resolution.
    """
    channels = width
    stages: list[nn.Module] = [nn.Sequential(conv_norm(in_channels, channels, 3), nn.ReLU(inplace=True))]
    trunk_dim = channels
    for stage, depth in enumerate(depths):
        blocks, trunk_dim = [], channels
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            body, out = block(channels, width * 2**stage, stride)
            same_shape = stride == 1 and out == channels
            blocks.append(Residual(body, nn.Identity() if same_shape else conv_norm(channels, out, 1, stride)))
            channels = out
        stages.append(nn.Sequential(*blocks))
    branch = Branch(stages[-1], nn.Linear(channels, num_classes), feature_dim=channels)
    return Network(nn.Sequential(*stages[:-1]), branch, trunk_dim)


def resnet20(num_classes: int, in_channels: int = 3) -> Network:
    """Basic blocks [3, 3, 3], D = 64."""
    return resnet(basic, [3, 3, 3], num_classes, in_channels)


def resnet32(num_classes: int, in_channels: int = 3) -> Network:
    """Basic blocks [5, 5, 5], D = 64."""
    return resnet(basic, [5, 5, 5], num_classes, in_channels)


def resnet44_basic(num_classes: int, in_channels: int = 3) -> Network:
    """Basic blocks [7, 7, 7], D = 64."""
    return resnet(basic, [7, 7, 7], num_classes, in_channels)


def resnet56_basic(num_classes: int, in_channels: int = 3) -> Network:
    """Basic blocks [9, 9, 9], D = 64."""
    return resnet(basic, [9, 9, 9], num_classes, in_channels)


def resnet110_basic(num_classes: int, in_channels: int = 3) -> Network:
    """Basic blocks [18, 18, 18], D = 64."""
    return resnet(basic, [18, 18, 18], num_classes, in_channels)


def resnet110(num_classes: int, in_channels: int = 3) -> Network:
    """Bottlenecks [12, 12, 12], D = 256."""
    return resnet(bottleneck, [12, 12, 12], num_classes, in_channels)


def wrn20_8(num_classes: int, in_channels: int = 3) -> Network:
    """Bottlenecks [2, 2, 2] with inner widths 128, 256, 512, D = 256; not the WRN of Zagoruyko and Komodakis."""
    return resnet(partial(bottleneck, widen=8), [2, 2, 2], num_classes, in_channels)


def resnet18_cifar(num_classes: int, in_channels: int = 3) -> Network:
    """Basic blocks [2, 2, 2, 2] of widths 64 to 512, D = 512.

    ResNet-18 with a 3x3 stem of stride 1 and no max-pool.
    """
    return resnet(basic, [2, 2, 2, 2], num_classes, in_channels, width=64)
