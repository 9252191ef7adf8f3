"""Networks and the peers made of them. A network maps image_BCHW to (logits_BK, feature_BD) and has a `feature_dim`."""

from collections.abc import Callable
from difflib import get_close_matches

from torch import nn

from cutnmix.models.resnet import resnet20, resnet32, resnet110

# name -> builder(num_classes, in_channels=3)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet110": resnet110,
}


def build_network(name: str, num_classes: int) -> nn.Module:
    """The network NETWORKS[name], its weights drawn from torch's global generator.

    Raises: ValueError for an unknown name, with the key `peers.network`, the nearest name and all of them.
    """
    if name not in NETWORKS:
        nearest = get_close_matches(name, NETWORKS, n=1, cutoff=0)
        raise ValueError(f"peers.network: no {name!r}, did you mean {nearest[0]!r}? Allowed: {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes)
