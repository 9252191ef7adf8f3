"""What a network costs, and which images it takes, found on the meta device: no weights are made, nothing is computed.

    MACs = FLOPs / 2 of the training forward of one image, of its convolutions and matrix products only

Norms, activations and pooling are not counted, as is usual in tables of networks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cutnmix.models import NETWORKS, build_network
from cutnmix.models.library import Borrowed, describe, on_meta
from cutnmix.models.network import Network


class Cost(NamedTuple):
    """Of one network, or of several together."""

    parameters: int
    macs: int  # per image
    feature_dim: int


class BranchesCost(NamedTuple):
    """Of J peers of one architecture; whole networks cost the same with shared views and with one each."""

    nets: Cost
    shared: Cost  # branches, `views: shared`: the trunk sees an image once
    per_peer: Cost  # branches, `views: per_peer`: the trunk sees J views of it, and no MACs are saved


def cost(name: str, num_classes: int, size: tuple[int, int]) -> Cost:
    """Parameters, MACs and D of a network on images of (H, W) pixels.

    Raises: ValueError, naming the key `peers.network`, for an unknown network or one that does not take such images.
    """
    net = blueprint(name, num_classes)
    _, feature_BD, macs = _try(net, name, size)
    return Cost(parameters(net), macs, feature_BD.shape[1])


def branches_cost(name: str, J: int, num_classes: int, size: tuple[int, int]) -> BranchesCost:
    """What J branches on one trunk cost, beside J whole networks.

        parameters: trunk + J branch, instead of J (trunk + branch)
        MACs: trunk + J branch with shared views, J (trunk + branch) with a view each

    Raises: ValueError as `cost`, and for a network that has no trunk, naming the key `peers.form`.
    """
    net = blueprint(name, num_classes)
    if not isinstance(net, Network):
        raise ValueError(f"peers.form: {name} cannot be cut into trunk and branches; use nets")
    _, feature_BD, macs = _try(net, name, size)
    _, trunk_macs = _forward(net.trunk, size)
    whole, cut, D = parameters(net), parameters(net) + (J - 1) * parameters(net.branch), feature_BD.shape[1]
    return BranchesCost(
        nets=Cost(J * whole, J * macs, D),
        shared=Cost(cut, J * macs - (J - 1) * trunk_macs, D),
        per_peer=Cost(cut, J * macs, D),
    )


def check_image_size(name: str, num_classes: int, size: tuple[int, int]) -> None:
    """Raise ValueError, naming the key `peers.network`, if a network does not take images of (H, W) pixels.

    The message has the library's own words, and the size that the network is made for, if it says so.
    """
    _try(blueprint(name, num_classes), name, size)


def trains_on_one(name: str, num_classes: int, size: tuple[int, int]) -> bool:
    """Whether a network that takes such images can train on a batch of one.

    Not where a batch norm would see a single value a channel, as on a map of one pixel.
    """
    try:
        _forward(blueprint(name, num_classes), size, images=1)
    except ValueError:
        return False
    return True


def parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters())


def blueprint(name: str, num_classes: int) -> nn.Module:
    """`build_network` on the meta device."""
    return on_meta(lambda: build_network(name, num_classes))


def made_for(name: str) -> tuple[int, int]:
    """(H, W): 32 x 32 for our own networks; for those of a library what they say, or else 224 x 224."""
    side = 32 if name in NETWORKS else _image_size(blueprint(name, 10)) or 224
    return side, side


def source(name: str) -> str:
    """The plan or the paper of a network in one line."""
    return (NETWORKS[name].__doc__ or "").strip().partition("\n")[0] if name in NETWORKS else describe(name)


def _image_size(net: nn.Module) -> int | None:
    return net.image_size if isinstance(net, Borrowed) else None


def _try(net: nn.Module, name: str, size: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    """(logits, feature, MACs), or a ValueError in words for the user."""
    try:
        (logits, feature_BD), macs = _forward(net, size)
    except Exception as error:  # each network of a library has its own
        made = _image_size(net)
        advice = f"; it is made for {made} x {made}" if made else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"peers.network: {name} does not take images of {size[0]} x {size[1]} pixels{advice} ({reason})"
        ) from error
    return logits, feature_BD, macs


def _forward(module: nn.Module, size: tuple[int, int], images: int = 2) -> tuple[Any, int]:
    """What it makes of so many images, in training, and the MACs of one.

    Two unless asked, because a batch norm over a single value is an error of the batch, not of the network.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(torch.empty(images, 3, *size, device="meta"))
    return out, counter.get_total_flops() // (2 * images)
