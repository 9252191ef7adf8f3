import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cutnmix.models import NETWORKS, build_network
from cutnmix.models.peers import Peers, Sizes
from cutnmix.models.resnet import ResNet, basic, bottleneck

# name: parameters at K = 10 and K = 100, feature size, convolutions (shortcuts included), MACs at K = 100
PUBLISHED = {
    "resnet32": (466_906, 472_756, 64, 33, 69.1e6),
    "resnet110": (1_147_738, 1_170_868, 256, 112, 167.5e6),
}
BLOCKS = pytest.mark.parametrize("block", [basic, bottleneck])


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_network_is_the_published_one(name):
    at_10, at_100, feature_dim, num_convs, macs = PUBLISHED[name]
    net: Any = build_network(name, 100)
    assert (num_parameters(build_network(name, 10)), num_parameters(net)) == (at_10, at_100)
    assert net.feature_dim == feature_dim
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == num_convs
    with FlopCounterMode(display=False) as flops, torch.device("meta"):  # tells where the strides sit
        net.to("meta").eval()(torch.empty(1, 3, 32, 32))
    assert flops.get_total_flops() / 2 == pytest.approx(macs, rel=1e-3)


def test_resnet20_is_two_blocks_a_stage_less_than_resnet32():
    one_block_of_each_width = 2 * 9 * (16**2 + 32**2 + 64**2) + 4 * (16 + 32 + 64)
    assert num_parameters(build_network("resnet20", 10)) == 466_906 - 2 * one_block_of_each_width


@BLOCKS
def test_initial_weights(block):
    torch.manual_seed(0)
    net = ResNet(block, [2, 2, 2], num_classes=10)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            std = (2 / (m.out_channels * m.kernel_size[0] ** 2)) ** 0.5
            assert m.bias is None and m.weight.std().item() == pytest.approx(std, rel=0.2)
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()


@BLOCKS
def test_logits_are_the_head_on_the_pooled_last_stage(block):
    net = ResNet(block, [1, 2, 1], num_classes=7, in_channels=4)
    x, sizes = net.stem(images(3, 4, 32, 32)), []
    for stage in net.stages:
        x = stage(x)
        sizes.append(x.shape[-1])
    logits_BK, feature_BD = net(images(3, 4, 32, 32))
    assert sizes == [32, 16, 8]
    assert logits_BK.shape == (3, 7) and feature_BD.shape == (3, net.feature_dim)
    assert (feature_BD >= 0).all() and (feature_BD > 0).any()
    torch.testing.assert_close(feature_BD, x.mean((2, 3)))
    torch.testing.assert_close(logits_BK, net.head(feature_BD))


def test_bfloat16_channels_last_is_float32_within_its_precision():
    net = build_network("resnet20", 10).eval()
    image_BCHW = images(4, 3, 32, 32)
    with torch.no_grad():
        expected = net(image_BCHW)
        nhwc = copy.deepcopy(net).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            actual = nhwc(image_BCHW.to(memory_format=torch.channels_last))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - e).norm() < 0.03 * e.norm()


@BLOCKS
def test_compiles_to_one_graph(block):
    net = ResNet(block, [1, 1, 1], num_classes=10)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    logits, feature = torch.compile(net, fullgraph=True, backend="aot_eager")(images(2, 3, 32, 32))
    expected_logits, expected_feature = twin(images(2, 3, 32, 32))
    torch.testing.assert_close((logits, feature), (expected_logits, expected_feature))
    logits.square().sum().backward()
    expected_logits.square().sum().backward()
    torch.testing.assert_close(net.stem[0][0].weight.grad, twin.stem[0][0].weight.grad, rtol=1e-4, atol=1e-4)


def test_unknown_network_names_key_nearest_and_all():
    with pytest.raises(ValueError, match=r"peers\.network.*'resnet_32'.*did you mean 'resnet32'") as error:
        build_network("resnet_32", 10)
    assert all(name in str(error.value) for name in NETWORKS)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_peer_is_a_function_of_seed_and_j_alone():
    torch.manual_seed(1)
    three = Peers("resnet20", count=3, num_classes=10, seed=95)
    torch.manual_seed(2)
    one = Peers("resnet20", count=1, num_classes=10, seed=95)
    other = Peers("resnet20", count=1, num_classes=10, seed=96)
    torch.testing.assert_close(dict(one.nets[0].state_dict()), dict(three.nets[0].state_dict()), rtol=0, atol=0)
    starts = [weights(net) for net in (*three.nets, *other.nets)]
    for a in range(len(starts)):
        for b in range(a):
            assert not torch.equal(starts[a], starts[b])


def test_building_peers_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Peers("resnet20", count=2, num_classes=10, seed=95)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_building_peers_leaves_the_cuda_generator_alone():
    before = torch.cuda.get_rng_state()
    Peers("resnet20", count=2, num_classes=10, seed=95)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_view_v_goes_to_peer_v_and_one_view_to_all():
    peers = Peers("resnet20", count=2, num_classes=5, seed=0).eval()
    assert peers.sizes == Sizes(J=2, K=5, D=64)
    image_VBCHW = images(2, 3, 3, 32, 32)
    with torch.no_grad():
        own, shared = peers(image_VBCHW), peers(image_VBCHW[:1])
        for j, net in enumerate(peers.nets):
            torch.testing.assert_close((own.logits_JBK[j], own.feature_JBD[j]), net(image_VBCHW[j]))
            torch.testing.assert_close((shared.logits_JBK[j], shared.feature_JBD[j]), net(image_VBCHW[0]))
    with pytest.raises(RuntimeError):  # never a silent zip of the shorter
        peers(images(3, 1, 3, 32, 32))


def test_a_peer_gets_no_gradient_from_another():
    peers = Peers("resnet20", count=2, num_classes=5, seed=0)
    peers(images(1, 2, 3, 32, 32)).logits_JBK[0].square().sum().backward()
    mine, theirs = ([p.grad for p in net.parameters()] for net in peers.nets)
    assert all(grad is not None and grad.any() for grad in mine)
    assert all(grad is None or not grad.any() for grad in theirs)


def test_peers_count_must_be_positive():
    with pytest.raises(ValueError, match=r"peers\.count.*at least 1.*0"):
        Peers("resnet20", count=0, num_classes=10, seed=0)
