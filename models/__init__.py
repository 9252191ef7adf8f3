"""Networks and the peers made of them. A network maps image_BCHW to (logits_BK, feature_BD) and has a `feature_dim`.

NETWORKS are those for 32x32 images, one family a file (resnet.py, wrn.py, vgg.py, densenet.py), each a `Network` of a
trunk and a branch (network.py). The six of the paper's tables come first. Three names of theirs mean something else
elsewhere: resnet110 is built of bottlenecks, wrn20_8 is no WRN of Zagoruyko and Komodakis, and densenet40_12 is of the
BC form. The textbook networks stand below them.
"""

from collections.abc import Callable

from torch import nn

from cutnmix.models.densenet import densenet40_12, densenet40_12_plain, densenet100_12
from cutnmix.models.library import LIBRARIES, borrow, library_names, nearest
from cutnmix.models.resnet import (
    resnet18_cifar,
    resnet20,
    resnet32,
    resnet44_basic,
    resnet56_basic,
    resnet110,
    resnet110_basic,
    wrn20_8,
)
from cutnmix.models.vgg import vgg16, vgg16_bn, vgg19
from cutnmix.models.wrn import wrn16_8, wrn28_10, wrn40_2

# name -> builder(num_classes, in_channels=3)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet32": resnet32,
    "resnet110": resnet110,
    "wrn20_8": wrn20_8,
    "densenet40_12": densenet40_12,
    # textbook
    "resnet20": resnet20,
    "resnet20_basic": resnet20,
    "resnet44_basic": resnet44_basic,
    "resnet56_basic": resnet56_basic,
    "resnet110_basic": resnet110_basic,
    "resnet18_cifar": resnet18_cifar,
    "wrn16_8": wrn16_8,
    "wrn28_10": wrn28_10,
    "wrn40_2": wrn40_2,
    "densenet40_12_plain": densenet40_12_plain,
    "densenet100_12": densenet100_12,
    "vgg16_bn": vgg16_bn,
}


def build_network(name: str, num_classes: int) -> nn.Module:
    """NETWORKS[name], or the network `torchvision.NAME` or `timm.NAME`; its weights come from torch's global generator.

    Raises: ValueError, with the key `peers.network`, for an unknown name (with the nearest one), where timm is needed
    and missing, and for a network of a library that does not end in one linear head.
    """
    check_name(name)
    return NETWORKS[name](num_classes) if name in NETWORKS else borrow(name, num_classes)


def check_name(name: str) -> None:
    """Raise ValueError, with the key `peers.network`, for an unknown network, or where timm is needed and missing."""
    library, _, rest = name.partition(".")
    if name not in NETWORKS and not (library in LIBRARIES and rest in library_names(library)):
        if "," in name:
            meant = f"; for several write a list, [{', '.join(map(str.strip, name.split(',')))}]."
        elif near := nearest(name, NETWORKS):
            meant = f", did you mean {near!r}?"
        else:
            meant = "; one of your own? Name its module in imports."
        raise ValueError(
            f"peers.network: no {name!r}{meant} Allowed: {', '.join(NETWORKS)}, torchvision.NAME, timm.NAME"
        )
