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
    feature_dim, macs = _try(net, name, num_classes, size)
    return Cost(parameters(net), macs, feature_dim)


def branches_cost(name: str, J: int, num_classes: int, size: tuple[int, int]) -> BranchesCost:
    """What J branches on one trunk cost, beside J whole networks.

        parameters: trunk + J branch, instead of J (trunk + branch)
        MACs: trunk + J branch with shared views, J (trunk + branch) with a view each

    Raises: ValueError as `cost`, and for a network that has no trunk, naming the key `peers.form`.
    """
    net = blueprint(name, num_classes)
    if not isinstance(net, Network):
        raise ValueError(f"peers.form: {name} cannot be cut into trunk and branches; use nets")
    D, macs = _try(net, name, num_classes, size)
    _, trunk_macs = _forward(net.trunk, size)
    whole, cut = parameters(net), parameters(net) + (J - 1) * parameters(net.branch)
    return BranchesCost(
        nets=Cost(J * whole, J * macs, D),
        shared=Cost(cut, J * macs - (J - 1) * trunk_macs, D),
        per_peer=Cost(cut, J * macs, D),
    )


def check_image_size(name: str, num_classes: int, size: tuple[int, int]) -> None:
    """Raise ValueError, naming the key `peers.network`, if a network does not take images of (H, W) pixels.

    The message has the library's own words, and the size that the network is made for, if it says so. One that takes
    them and does not answer as every network does is refused too: it may be anybody's.
    """
    _try(blueprint(name, num_classes), name, num_classes, size)


def trains_on_one(name: str, num_classes: int, size: tuple[int, int]) -> bool:
    """Whether a network that takes such images can train on a batch of one.

    Not where a batch norm would see a single value a channel, as on a map of one pixel, or where the axis of the batch
    is lost with others of length 1.
    """
    net: Any = blueprint(name, num_classes)
    try:
        out, _ = _forward(net, size, images=1)
    except Exception:  # it may be anybody's code
        return False
    return _shapes(out) == ((1, num_classes), (1, net.feature_dim))


def parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters())


def blueprint(name: str, num_classes: int) -> nn.Module:
    """`build_network` on the meta device. Raises: ValueError, naming the key `peers.network`, if it cannot be built."""
    try:
        net: Any = on_meta(lambda: build_network(name, num_classes))
    except ValueError:  # in words for the user: an unknown name, a head that cannot be cut off
        raise
    except Exception as error:  # it may be anybody's code
        raise ValueError(
            f"peers.network: {name} cannot be built of a number of classes, {num_classes} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"peers.network: {name} is built as a {type(net).__name__}, which is no torch.nn.Module")
    return net


def made_for(name: str) -> tuple[int, int]:
    """(H, W): 32 x 32 for our own networks; for those of a library what they say, or else 224 x 224."""
    side = 32 if name in NETWORKS else _image_size(blueprint(name, 10)) or 224
    return side, side


def source(name: str) -> str:
    """The plan or the paper of a network in one line."""
    return (NETWORKS[name].__doc__ or "").strip().partition("\n")[0] if name in NETWORKS else describe(name)


def _image_size(net: nn.Module) -> int | None:
    return net.image_size if isinstance(net, Borrowed) else None


def _try(net: nn.Module, name: str, num_classes: int, size: tuple[int, int]) -> tuple[int, int]:
    """(D, MACs), or a ValueError in words for the user."""
    try:
        out, macs = _forward(net, size)
    except Exception as error:  # each network of a library has its own
        made = _image_size(net)
        advice = f"; it is made for {made} x {made}" if made else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"peers.network: {name} does not take images of {size[0]} x {size[1]} pixels{advice} ({reason})"
        ) from error
    D: Any = getattr(net, "feature_dim", None)
    shapes = _shapes(out)
    if shapes != ((2, num_classes), (2, D)):
        raise ValueError(
            f"peers.network: {name} with feature_dim {D} makes {shapes} of 2 images; a network makes (logits, feature) "
            f"of shapes (2, {num_classes}) and (2, D), and D is its feature_dim"
        )
    return D, macs


def _shapes(out: Any) -> Any:
    """Of what a network makes: the shape of a tensor, those of several, the type of what is none."""
    if isinstance(out, tuple | list):
        return tuple(map(_shapes, out))
    return tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__


def _forward(module: nn.Module, size: tuple[int, int], images: int = 2) -> tuple[Any, int]:
    """What it makes of so many images, in training, and the MACs of one.

    Two unless asked, because a batch norm over a single value is an error of the batch, not of the network.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(torch.empty(images, 3, *size, device="meta"))
    return out, counter.get_total_flops() // (2 * images)
