"""J peers side by side: whole networks of one or several architectures, or branches on a trunk that they share."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from cutnmix.models import build_network
from cutnmix.models.network import Branch, Network

PEER_STREAM = 0x70656572  # "peer": keeps these seeds apart from all others that are derived from the run's seed
FORMS = ("nets", "branches")


class Outputs(NamedTuple):
    """What the peers made of one batch."""

    logits_JBK: Tensor
    features: tuple[Tensor, ...]  # of peer j: (B, D_j), what its head sees
    shared_VBE: Tensor | None = None  # of branches: the global average of the trunk's map


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


def by_number(numbers: range, modules: Iterable[nn.Module]) -> nn.ModuleList:
    """A list to iterate over, whose modules are named by these numbers instead of 0, 1, ..."""
    named = nn.ModuleList()
    for number, module in zip(numbers, modules, strict=True):
        named.add_module(str(number), module)
    return named


class Peers(nn.Module):
    """J networks; view v goes to peer v, or the only view to all of them.

    Peer j starts from the same weights whatever J is. A Python loop, no vmap: stacked weights turn convolutions into
    grouped ones, which are far slower in channels_last.

    Form `nets`: whole networks, of any architectures. Form `branches`: the peers are the branches of J networks of one
    architecture, on the trunk of the first. The trunk sees the views of a step in one pass, so its batch norms take
    their statistics over all of them. Built from whole networks, branches can share no module by mistake.

    Args: `networks` names the network of each of the J peers, `seed` >= 0 is the run's. `own`: the numbers of those
    that live here, None for all; the others live in other processes. A peer's weights are called nets.j, j its number
    among all, wherever it lives.
    Raises: ValueError, naming the key, for no peers, an unknown network or form, or branches of networks that have no
    trunk or are not all the same.
    """

    def __init__(
        self, networks: Sequence[str], *, num_classes: int, seed: int, form: str = "nets", own: range | None = None
    ) -> None:
        super().__init__()
        if not networks:
            raise ValueError("peers.count must be at least 1, got 0")
        if form not in FORMS:
            raise ValueError(f"peers.form must be one of {', '.join(FORMS)}, got {form!r}")
        own = range(len(networks)) if own is None else own
        nets = [build_peer(networks[j], num_classes, seed=seed, j=j) for j in own]
        self.trunk: nn.Module | None = None
        self.trunk_dim: int | None = None
        if form == "branches":
            if len(set(networks)) > 1:
                raise ValueError(f"peers.form: branches share one trunk, so peers.network must be one name: {networks}")
            cut = [net for net in nets if isinstance(net, Network)]
            if len(cut) < len(nets):
                raise ValueError(f"peers.form: {networks[0]} cannot be cut into trunk and branches; use nets")
            self.trunk, self.trunk_dim = cut[0].trunk, cut[0].trunk_dim
            nets = [net.branch for net in cut]
        self.nets = by_number(own, nets)

    def __len__(self) -> int:
        """J, or how many of the J live here."""
        return len(self.nets)

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """(D_0, ..., D_{J-1}), of those that live here."""
        return tuple(cast(int, net.feature_dim) for net in self.nets)

    def network(self, j: int) -> nn.Module:
        """Peer j as the plain network that `build_network` gives, its weights shared with this module."""
        net = self.nets.get_submodule(str(j))
        if self.trunk is None:
            return net
        return Network(self.trunk, cast(Branch, net), cast(int, self.trunk_dim))

    def compile_units(self) -> list[nn.Module]:
        """The modules to compile one by one, so that the time it takes does not grow with J where they are alike."""
        return [*self.nets] if self.trunk is None else [self.trunk, *self.nets]

    def forward(self, image_VBCHW: Tensor) -> Outputs:
        """Outputs of all peers; V is J or 1."""
        shared_VBE = None
        if self.trunk is not None:
            views = image_VBCHW.shape[:2]
            image_VBCHW = self.trunk(image_VBCHW.flatten(0, 1)).unflatten(0, views)  # its maps, from here on
            shared_VBE = image_VBCHW.mean((-2, -1))
        image_JBCHW = image_VBCHW.expand(len(self.nets), -1, -1, -1, -1)
        outputs = [net(image_BCHW) for net, image_BCHW in zip(self.nets, image_JBCHW, strict=True)]
        logits, features = zip(*outputs, strict=True)
        return Outputs(torch.stack(logits), features, shared_VBE)
