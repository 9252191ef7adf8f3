"""Post-activation ResNets for 32x32 images: He et al., "Deep Residual Learning", CVPR 2016, arXiv:1512.03385.

The variants of the online distillation literature (the model zoo of OKDDip, AAAI 2020, reused by the CutnMix authors):
resnet20 and resnet32 are built of basic blocks, resnet110 of bottlenecks. Parameters for K = 10 / 100 and feature size:

    resnet32    466,906 /   472,756    D =  64
    resnet110 1,147,738 / 1,170,868    D = 256

Deviation from He et al.: a block that changes shape has a learned 1x1 shortcut, theirs is padded with zeros; and their
CIFAR ResNet-110 is built of basic blocks (1.73 M parameters), which is not what the published tables were made with.
The stride of a bottleneck sits on its 3x3 convolution, as in torchvision.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def conv(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """BN(conv(x)): 'same' padding, no bias (the norm has one), weights N(0, 2 / fan_out)."""
    conv2d = nn.Conv2d(in_width, out_width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv2d.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv2d, nn.BatchNorm2d(out_width))


def basic(in_width: int, inner: int, stride: int) -> tuple[nn.Sequential, int]:
    """Two 3x3 convolutions, and the width they end with."""
    body = nn.Sequential(conv(in_width, inner, 3, stride), nn.ReLU(inplace=True), conv(inner, inner, 3))
    return body, inner


def bottleneck(in_width: int, inner: int, stride: int) -> tuple[nn.Sequential, int]:
    """1x1 down to `inner`, 3x3, 1x1 up to 4 * `inner`, and that width."""
    body = nn.Sequential(
        conv(in_width, inner, 1),
        nn.ReLU(inplace=True),
        conv(inner, inner, 3, stride),
        nn.ReLU(inplace=True),
        conv(inner, 4 * inner, 1),
    )
    return body, 4 * inner


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the shortcut is the identity unless the body changes the shape."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """image -> stem -> stages -> global average -> head.

    Args: `block` is `basic` or `bottleneck`, `depths` the blocks of each stage; stage s has inner width 16 * 2^s and
    from the second on halves the resolution.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], tuple[nn.Sequential, int]],
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        width = 16
        self.stem = nn.Sequential(conv(in_channels, width, 3), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                body, out_width = block(width, 16 * 2**stage, stride)
                same_shape = stride == 1 and out_width == width
                blocks.append(Residual(body, nn.Identity() if same_shape else conv(width, out_width, 1, stride)))
                width = out_width
            self.stages.append(nn.Sequential(*blocks))
        self.feature_dim = width
        self.head = nn.Linear(width, num_classes)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_BK, feature_BD); the feature is the global average after the last ReLU, so it is never negative."""
        x = self.stem(image_BCHW)
        for stage in self.stages:
            x = stage(x)
        feature_BD = x.mean((2, 3))
        return self.head(feature_BD), feature_BD


def resnet20(num_classes: int, in_channels: int = 3) -> ResNet:
    """Basic blocks [3, 3, 3], D = 64."""
    return ResNet(basic, [3, 3, 3], num_classes=num_classes, in_channels=in_channels)


def resnet32(num_classes: int, in_channels: int = 3) -> ResNet:
    """Basic blocks [5, 5, 5], D = 64."""
    return ResNet(basic, [5, 5, 5], num_classes=num_classes, in_channels=in_channels)


def resnet110(num_classes: int, in_channels: int = 3) -> ResNet:
    """Bottlenecks [12, 12, 12], D = 256."""
    return ResNet(bottleneck, [12, 12, 12], num_classes=num_classes, in_channels=in_channels)
