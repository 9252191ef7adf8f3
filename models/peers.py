"""J peers of one architecture, each with weights of its own, side by side."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from cutnmix.models import build_network

PEER_STREAM = 0x70656572  # "peer": keeps these seeds apart from all others that are derived from the run's seed


class Sizes(NamedTuple):
    """What a method must know to build its own parameters: J peers, K classes, features of D numbers."""

    J: int
    K: int
    D: int


class Outputs(NamedTuple):
    """What the peers made of one batch."""

    logits_JBK: Tensor
    feature_JBD: Tensor  # penultimate, after its ReLU


def build_peer(network: str, num_classes: int, *, seed: int, j: int) -> nn.Module:
    """Peer j, a pure function of (network, num_classes, seed, j); the caller's random state stays as it was.

    Peers must start apart: equal peers have KL = 0 and nothing to tell one another.
    Build on the CPU and move the result: under another default device the weights come from that device's generator.
    """
    with seeded(seed, PEER_STREAM, j):
        return build_network(network, num_classes)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within it, torch's CPU generator starts from a pure function of the key; after it, it is as it was before."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators' generators too, which the fork does not give back.
        torch.default_generator.manual_seed(int(state[0]))
        yield


class Peers(nn.Module):
    """J networks; view v goes to peer v, or the only view to all of them.

    Peer j starts from the same weights whatever J is. A Python loop, no vmap: stacked weights turn convolutions into
    grouped ones, which are far slower in channels_last.

    Args: `network` names an entry of NETWORKS, `count` is J, `seed` >= 0 the run's seed.
    Raises: ValueError if `peers.count` < 1 or `peers.network` is unknown.
    """

    def __init__(self, network: str, *, count: int, num_classes: int, seed: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"peers.count must be at least 1, got {count}")
        self.nets = nn.ModuleList(build_peer(network, num_classes, seed=seed, j=j) for j in range(count))
        self.num_classes = num_classes

    @property
    def sizes(self) -> Sizes:
        """(J, K, D)."""
        return Sizes(len(self.nets), self.num_classes, cast(int, self.nets[0].feature_dim))

    def forward(self, image_VBCHW: Tensor) -> Outputs:
        """Outputs of all peers, stacked; V is J or 1."""
        image_JBCHW = image_VBCHW.expand(len(self.nets), -1, -1, -1, -1)
        outputs = [net(image_BCHW) for net, image_BCHW in zip(self.nets, image_JBCHW, strict=True)]
        logits, features = zip(*outputs, strict=True)
        return Outputs(torch.stack(logits), torch.stack(features))
