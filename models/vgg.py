"""VGGs with batch norm for 32x32 images: Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556.

    image -> five stages of 3x3 convolutions of widths 64, 128, 256, 512, 512, each ended by a 2x2 max-pool -> head

Parameters for K = 10 / 100; D = 512, the feature before the head:

    vgg16     15,253,578 / 15,299,748
    vgg19     20,565,834 / 20,612,004
    vgg16_bn  14,728,266 / 14,774,436

vgg16 and vgg19 are those of the online distillation literature (the model zoo of DefangChen/OKDDip, AAAI 2020). There
Dropout(0) stands between the layers of the head: it is the identity, and left out here. vgg16_bn has the one linear
layer that is usual elsewhere (HobbitLong/RepDistiller). That one leaves out the fourth of the five max-pools at 32
pixels: its last stage works at 4x4, ours at 2x2, which is 84.9 M MACs less with the same parameters.

A convolution has a bias although the BN behind it takes it away again, as in torchvision and in both sources: it starts
at 0 and gets no gradient but rounding. Weights N(0, 2 / fan_out), of a linear layer N(0, 0.01^2) and bias 0.
"""

from collections.abc import Sequence

from torch import nn

from cutnmix.models.network import Branch, Network


def conv(in_width: int, out_width: int) -> list[nn.Module]:
    """relu(BN(conv(x))), 3x3 with 'same' padding and a bias."""
    conv2d = nn.Conv2d(in_width, out_width, 3, padding=1)
    nn.init.kaiming_normal_(conv2d.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv2d.bias)  # pyright: ignore[reportArgumentType]
    return [conv2d, nn.BatchNorm2d(out_width), nn.ReLU(inplace=True)]


def linear(in_width: int, out_width: int) -> nn.Linear:
    """Weights N(0, 0.01^2), bias 0."""
    layer = nn.Linear(in_width, out_width)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def vgg(depths: Sequence[int], head: nn.Module, in_channels: int) -> Network:
    """Five stages of `depths` convolutions each, global average, head; the last stage is the branch.

    At 32 pixels the last max-pool leaves 1x1, so the global average is the identity.
    """
    stages, width, trunk_dim = [], in_channels, in_channels
    for depth, out_width in zip(depths, (64, 128, 256, 512, 512), strict=True):
        layers, trunk_dim = [], width
        for _ in range(depth):
            layers += conv(width, out_width)
            width = out_width
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return Network(nn.Sequential(*stages[:-1]), Branch(stages[-1], head, feature_dim=width), trunk_dim)


def three_layers(num_classes: int) -> nn.Sequential:
    """512 -> 512 -> 512 -> K, with a ReLU between them."""
    return nn.Sequential(
        linear(512, 512), nn.ReLU(inplace=True), linear(512, 512), nn.ReLU(inplace=True), linear(512, num_classes)
    )


def vgg16(num_classes: int, in_channels: int = 3) -> Network:
    """Convolutions [2, 2, 3, 3, 3], three linear layers, D = 512."""
    return vgg([2, 2, 3, 3, 3], three_layers(num_classes), in_channels)


def vgg19(num_classes: int, in_channels: int = 3) -> Network:
    """Convolutions [2, 2, 4, 4, 4], three linear layers, D = 512."""
    return vgg([2, 2, 4, 4, 4], three_layers(num_classes), in_channels)


def vgg16_bn(num_classes: int, in_channels: int = 3) -> Network:
    """Convolutions [2, 2, 3, 3, 3], one linear layer, D = 512."""
    return vgg([2, 2, 3, 3, 3], linear(512, num_classes), in_channels)
