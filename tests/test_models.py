"""Peers: who gets which view, where they start, and what branches share."""

import copy

import pytest
import torch
from tasks import TINY, make_peers
from torch import nn

from cutnmix.models import NETWORKS, build_network
from cutnmix.models.network import Network
from cutnmix.models.peers import Peers


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_peer_is_a_function_of_seed_and_j_alone():
    torch.manual_seed(1)
    three = Peers(["resnet20"] * 3, num_classes=10, seed=95)
    torch.manual_seed(2)
    one = Peers(["resnet20"] * 1, num_classes=10, seed=95)
    other = Peers(["resnet20"] * 1, num_classes=10, seed=96)
    torch.testing.assert_close(dict(one.nets[0].state_dict()), dict(three.nets[0].state_dict()), rtol=0, atol=0)
    starts = [weights(net) for net in (*three.nets, *other.nets)]
    for a in range(len(starts)):
        for b in range(a):
            assert not torch.equal(starts[a], starts[b])


def test_building_peers_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Peers(["resnet20"] * 2, num_classes=10, seed=95)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_building_peers_leaves_the_cuda_generator_alone():
    before = torch.cuda.get_rng_state()
    Peers(["resnet20"] * 2, num_classes=10, seed=95)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_view_v_goes_to_peer_v_and_one_view_to_all():
    peers = Peers(["resnet20"] * 2, num_classes=5, seed=0).eval()
    assert len(peers) == 2 and peers.feature_dims == (64, 64) and peers.trunk_dim is None
    image_VBCHW = images(2, 3, 3, 32, 32)
    with torch.no_grad():
        own, shared = peers(image_VBCHW), peers(image_VBCHW[:1])
        for j, net in enumerate(peers.nets):
            torch.testing.assert_close((own.logits_JBK[j], own.features[j]), net(image_VBCHW[j]))
            torch.testing.assert_close((shared.logits_JBK[j], shared.features[j]), net(image_VBCHW[0]))
    with pytest.raises(RuntimeError):  # never a silent zip of the shorter
        peers(images(3, 1, 3, 32, 32))


def test_a_peer_gets_no_gradient_from_another():
    peers = Peers(["resnet20"] * 2, num_classes=5, seed=0)
    peers(images(1, 2, 3, 32, 32)).logits_JBK[0].square().sum().backward()
    mine, theirs = ([p.grad for p in net.parameters()] for net in peers.nets)
    assert all(grad is not None and grad.any() for grad in mine)
    assert all(grad is None or not grad.any() for grad in theirs)


def test_peers_count_must_be_positive():
    with pytest.raises(ValueError, match=r"peers\.count.*at least 1.*0"):
        Peers([], num_classes=10, seed=0)


BRANCHED = ["resnet20", "vgg16_bn", "wrn40_2", "densenet40_12"]  # one of each family


@pytest.mark.parametrize("name", BRANCHED)
def test_branches_are_whole_networks_with_one_trunk(name):
    peers = Peers([name] * 3, num_classes=5, seed=0, form="branches").eval()
    whole = [peers.network(j) for j in range(3)]
    image_VBCHW = images(3, 2, 3, 32, 32)
    with torch.no_grad():
        own, shared = peers(image_VBCHW), peers(image_VBCHW[:1])
        for j, net in enumerate(whole):
            assert isinstance(net, Network) and net.trunk is peers.trunk
            torch.testing.assert_close((own.logits_JBK[j], own.features[j]), net(image_VBCHW[j]))
            torch.testing.assert_close((shared.logits_JBK[j], shared.features[j]), net(image_VBCHW[0]))
            assert own.shared_VBE is not None and shared.shared_VBE is not None
            torch.testing.assert_close(own.shared_VBE[j], net.trunk(image_VBCHW[j]).mean((2, 3)))
        assert shared.shared_VBE.shape == (1, 2, peers.trunk_dim)
    plain = build_network(name, 5)
    plain.load_state_dict(whole[1].state_dict())


@pytest.mark.parametrize("name", BRANCHED)
def test_branches_share_nothing_but_the_trunk(name):
    peers = Peers([name] * 3, num_classes=5, seed=0, form="branches")
    modules = [{id(m) for m in net.modules()} for net in peers.nets]
    tensors = [{t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()} for net in peers.nets]
    for sets in (modules, tensors):
        assert all(sets[a].isdisjoint(sets[b]) for a in range(3) for b in range(a))
    starts = [weights(net) for net in peers.nets]
    assert not any(torch.equal(starts[a], starts[b]) for a in range(3) for b in range(a))


def test_a_branch_starts_as_the_network_of_its_peer_does():
    nets, branches = (Peers(["resnet20"] * 2, num_classes=5, seed=3, form=form) for form in ("nets", "branches"))
    for j in range(2):
        for part, other in ((0, "trunk"), (j, "branch")):
            expected = getattr(nets.nets[part], other).state_dict()
            torch.testing.assert_close(dict(getattr(branches.network(j), other).state_dict()), dict(expected))


def test_all_views_pass_the_trunk_at_once_so_its_statistics_are_of_all():
    peers = Peers(["resnet20"] * 2, num_classes=5, seed=0, form="branches")
    trunk, image_VBCHW = copy.deepcopy(peers.trunk), images(2, 3, 3, 32, 32)
    peers(image_VBCHW)
    assert trunk is not None and peers.trunk is not None
    trunk(image_VBCHW.flatten(0, 1))
    torch.testing.assert_close(dict(peers.trunk.state_dict()), dict(trunk.state_dict()))


def test_the_trunk_gets_the_gradients_of_all_branches_and_a_branch_its_own():
    peers = make_peers(2, "branches")
    peers(images(1, 2, 3, 4, 4)).logits_JBK[0].square().sum().backward()
    assert peers.trunk is not None
    assert all(p.grad is not None and p.grad.any() for p in (*peers.trunk.parameters(), *peers.nets[0].parameters()))
    assert all(p.grad is None or not p.grad.any() for p in peers.nets[1].parameters())


def test_peers_of_several_architectures(monkeypatch):
    for name, network in TINY.items():
        monkeypatch.setitem(NETWORKS, name, network)
    peers = Peers(["tiny", "tiny_wide"], num_classes=4, seed=0)
    outputs = peers(images(2, 3, 3, 4, 4))
    assert peers.feature_dims == (6, 12) and [f.shape for f in outputs.features] == [(3, 6), (3, 12)]
    for j, net in enumerate(peers.nets):
        torch.testing.assert_close(outputs.logits_JBK[j], net(images(2, 3, 3, 4, 4)[j])[0])


@pytest.mark.parametrize(
    ("networks", "form", "message"),
    [
        (["resnet20", "resnet32"], "branches", r"peers\.form: branches share one trunk.*resnet20.*resnet32"),
        (["plain"] * 2, "branches", r"peers\.form: plain cannot be cut.*use nets"),
        (["resnet20"] * 2, "twigs", r"peers\.form must be one of nets, branches, got 'twigs'"),
    ],
)
def test_forms_that_cannot_be_are_refused(networks, form, message, monkeypatch):
    monkeypatch.setitem(NETWORKS, "plain", lambda num_classes: nn.Linear(1, num_classes))
    with pytest.raises(ValueError, match=message):
        Peers(networks, num_classes=5, seed=0, form=form)
