"""DenseNets for 32x32 images: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, arXiv:1608.06993.

    dense layer: cat(x, f(x)), f(x) = conv 3x3 (relu(BN(x))), with `growth` channels
    transition:  average 2x2 (conv 1x1 (relu(BN(x))))

Three blocks of (depth - 4) / 3 dense layers at 32, 16 and 8 pixels, a transition after the first and the second. The BC
form has half as many layers, each with a 1x1 convolution to 4 * growth channels before its 3x3 one (B), transitions
that halve the channels (C), and a wider stem. Parameters for K = 10 / 100 and feature size:

    densenet40_12          176,122 /   188,092    D = 132
    densenet100_12         769,162 /   800,032    D = 342
    densenet40_12_plain  1,019,722 / 1,060,132    D = 448

densenet40_12 is that of the online distillation literature (DefangChen/OKDDip, AAAI 2020): BC, though its name is that
of the paper's plain network. No dropout, as in the paper where images are distorted. Weights N(0, 2 / fan_in), bias of
the head 0, as in that zoo and in torchvision.
"""

import torch
from torch import Tensor, nn

from cutnmix.models.network import Network, preactivation


def conv(in_width: int, out_width: int, kernel: int) -> nn.Conv2d:
    """A convolution with 'same' padding, no bias, weights N(0, 2 / fan_in)."""
    conv2d = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv2d.weight)
    return conv2d


def norm_conv(in_width: int, out_width: int, kernel: int) -> nn.Sequential:
    """conv(relu(BN(x)))."""
    return nn.Sequential(nn.BatchNorm2d(in_width), nn.ReLU(inplace=True), conv(in_width, out_width, kernel))


class Dense(nn.Module):
    """cat(x, body(x))."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + growth, H, W)."""
        return torch.cat([x, self.body(x)], 1)


def densenet(depth: int, growth: int, num_classes: int, in_channels: int, *, bc: bool) -> Network:
    """Stem, three blocks, BN, relu, global average, one linear head; the last block is the branch."""
    num_layers, width = ((depth - 4) // 6, 2 * growth) if bc else ((depth - 4) // 3, 16)
    stages: list[nn.Module] = [conv(in_channels, width, 3)]
    trunk_dim = width
    for stage in range(3):
        layers, trunk_dim = [], width
        for _ in range(num_layers):
            inner = 4 * growth
            body = (norm_conv(width, inner, 1), norm_conv(inner, growth, 3)) if bc else (norm_conv(width, growth, 3),)
            layers.append(Dense(nn.Sequential(*body)))
            width += growth
        if stage < 2:
            out = width // 2 if bc else width
            layers += [norm_conv(width, out, 1), nn.AvgPool2d(2)]
            width = out
        stages.append(nn.Sequential(*layers))
    return preactivation(stages, width, trunk_dim, num_classes)


def densenet40_12(num_classes: int, in_channels: int = 3) -> Network:
    """DenseNet-BC, dense layers [6, 6, 6], growth 12, D = 132."""
    return densenet(40, 12, num_classes, in_channels, bc=True)


def densenet100_12(num_classes: int, in_channels: int = 3) -> Network:
    """DenseNet-BC, dense layers [16, 16, 16], growth 12, D = 342."""
    return densenet(100, 12, num_classes, in_channels, bc=True)


def densenet40_12_plain(num_classes: int, in_channels: int = 3) -> Network:
    """DenseNet, dense layers [12, 12, 12], growth 12, D = 448."""
    return densenet(40, 12, num_classes, in_channels, bc=False)
