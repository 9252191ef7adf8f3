"""The networks for 32x32 images: what was published of them, other builds of the same plans, and how they behave."""

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from cutnmix.models import NETWORKS
from cutnmix.models.densenet import densenet
from cutnmix.models.resnet import basic, bottleneck, resnet
from cutnmix.models.vgg import three_layers, vgg
from cutnmix.models.wrn import wrn

# name: parameters at K = 10 and K = 100, D, (E, h) of the map, convolutions (shortcuts included), MACs / 1e6 at K = 100
PUBLISHED = {
    "vgg16": (15_253_578, 15_299_748, 512, (512, 2), 13, 313.8),
    "vgg19": (20_565_834, 20_612_004, 512, (512, 2), 16, 398.7),
    "resnet32": (466_906, 472_756, 64, (32, 16), 33, 69.1),
    "resnet110": (1_147_738, 1_170_868, 256, (128, 16), 112, 167.5),
    "wrn20_8": (6_848_090, 6_871_220, 256, (128, 16), 22, 1022.8),
    "densenet40_12": (176_122, 188_092, 132, (60, 8), 39, 72.4),
    "resnet20": (272_474, 278_324, 64, (32, 16), 21, 40.8),
    "resnet44_basic": (661_338, 667_188, 64, (32, 16), 45, 97.4),
    "resnet56_basic": (855_770, 861_620, 64, (32, 16), 57, 125.8),
    "resnet110_basic": (1_730_714, 1_736_564, 64, (32, 16), 111, 253.2),
    "resnet18_cifar": (11_173_962, 11_220_132, 512, (256, 8), 20, 555.5),
    "wrn16_8": (10_961_370, 11_007_540, 512, (256, 16), 16, 1548.2),
    "wrn28_10": (36_479_194, 36_536_884, 640, (320, 16), 28, 5243.4),
    "wrn40_2": (2_243_546, 2_255_156, 128, (64, 16), 40, 327.6),
    "densenet40_12_plain": (1_019_722, 1_060_132, 448, (304, 8), 39, 264.9),
    "densenet100_12": (769_162, 800_032, 342, (150, 8), 99, 288.0),
    "vgg16_bn": (14_728_266, 14_774_436, 512, (512, 2), 13, 313.2),
}
# Every kind of block in as few layers as show it.
SMALL = {
    "basic": partial(resnet, basic, [1, 1, 1], in_channels=3),
    "bottleneck": partial(resnet, partial(bottleneck, widen=2), [2, 1, 1], in_channels=3),
    "wrn": lambda num_classes: wrn(10, 2, num_classes, 3),
    "densenet": lambda num_classes: densenet(10, 12, num_classes, 3, bc=True),
    "plain densenet": lambda num_classes: densenet(7, 12, num_classes, 3, bc=False),
    "vgg": lambda num_classes: vgg([1, 1, 1, 1, 1], three_layers(num_classes), 3),
}
ALL: dict[str, Callable[[int], Any]] = {**SMALL, **NETWORKS}
NAMES = pytest.mark.parametrize("name", PUBLISHED)
PAPER = ("vgg16", "vgg19", "resnet32", "resnet110", "wrn20_8", "densenet40_12")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PAPER]  # the rest have no other kind of block
SMALL_AND_SLOW = pytest.mark.parametrize("name", [*SMALL, *SLOW])


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def start(name: str, num_classes: int = 10) -> Any:
    torch.manual_seed(0)
    return ALL[name](num_classes)


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_every_name_is_here_and_resnet20_has_two():
    assert {*NETWORKS} == {*PUBLISHED, "resnet20_basic"} and NETWORKS["resnet20_basic"] is NETWORKS["resnet20"]


@NAMES
def test_network_is_the_published_one(name):
    at_10, at_100, feature_dim, (trunk_dim, side), num_convs, mmacs = PUBLISHED[name]
    with torch.device("meta"), torch.no_grad():
        net, image = ALL[name](100), torch.empty(1, 3, 32, 32)
        assert (num_parameters(NETWORKS[name](10)), num_parameters(net)) == (at_10, at_100)
        with FlopCounterMode(display=False) as flops:  # tells where the strides sit
            logits, feature = net.eval()(image)
        assert net.trunk(image).shape == (1, trunk_dim, side, side)
    assert logits.shape == (1, 100) and feature.shape == (1, feature_dim)
    assert (net.feature_dim, net.trunk_dim) == (feature_dim, trunk_dim)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == num_convs
    assert flops.get_total_flops() / 2e6 == pytest.approx(mmacs, abs=0.06)
    assert f"D = {feature_dim}" in (NETWORKS[name].__doc__ or "").splitlines()[0]  # the plan that a command shows


# The same from the papers' plans, layer by layer: (in, out, kernel, side) of the convolutions, widths of the norms, D.
Plan = tuple[list[tuple[int, int, int, int]], list[int], int]


def basic_plan(n: int) -> Plan:
    convs, norms, width = [(3, 16, 3, 32)], [16], 16
    for out, side in ((16, 32), (32, 16), (64, 8)):
        convs += [(width, out, 3, side)] + [(out, out, 3, side)] * (2 * n - 1) + [(width, out, 1, side)] * (width < out)
        norms, width = norms + [out] * (2 * n + (width < out)), out
    return convs, norms, width


def wide_plan(depth: int, k: int) -> Plan:
    convs, norms, width, n = [(3, 16, 3, 32)], [], 16, (depth - 4) // 6
    for out, side in ((16 * k, 32), (32 * k, 16), (64 * k, 8)):
        convs += [(width, out, 3, side), (width, out, 1, side)] + [(out, out, 3, side)] * (2 * n - 1)
        norms, width = norms + [width] + [out] * (2 * n - 1), out
    return convs, [*norms, width], width


def dense_plan(layers: int, bc: bool) -> Plan:
    width, k = (24 if bc else 16), 12
    convs, norms = [(3, width, 3, 32)], []
    for side in (32, 16, 8):
        for _ in range(layers):
            convs += [(width, 4 * k, 1, side), (4 * k, k, 3, side)] if bc else [(width, k, 3, side)]
            norms, width = norms + ([width, 4 * k] if bc else [width]), width + k
        norms.append(width)
        if side > 8:
            convs.append((width, width // 2 if bc else width, 1, side))
            width = convs[-1][1]
    return convs, norms, width


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, basic_plan(n)) for name, n in (("resnet20", 3), ("resnet32", 5), ("resnet44_basic", 7))),
        *((name, basic_plan(n)) for name, n in (("resnet56_basic", 9), ("resnet110_basic", 18))),
        *((name, wide_plan(d, k)) for name, d, k in (("wrn16_8", 16, 8), ("wrn28_10", 28, 10), ("wrn40_2", 40, 2))),
        *((name, dense_plan(n, True)) for name, n in (("densenet40_12", 6), ("densenet100_12", 16))),
        ("densenet40_12_plain", dense_plan(12, False)),
    ],
)
def test_published_numbers_follow_from_the_plan(name, plan):
    convs, norms, D = plan
    at_10, at_100, feature_dim, _, num_convs, mmacs = PUBLISHED[name]
    body = sum(i * o * kernel**2 for i, o, kernel, _ in convs) + 2 * sum(norms)
    assert (body + 10 * (D + 1), body + 100 * (D + 1), D) == (at_10, at_100, feature_dim)
    assert len(convs) == num_convs
    macs = sum(i * o * (kernel * side) ** 2 for i, o, kernel, side in convs) + 100 * D
    assert macs / 1e6 == pytest.approx(mmacs, abs=0.06)


# Other builds of the same plans: torchvision's blocks, and where it has none, the equations over a list of weights.


class Reference(nn.Module):
    """(logits, feature) of a body that ends in a map after its ReLU, and a head."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        feature = F.adaptive_avg_pool2d(self.body(image), 1).flatten(1)
        return self.head(feature), feature


def their_resnet(block: type[BasicBlock | Bottleneck], depths: list[int], width: int = 16, widen: int = 1) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        out = planes * block.expansion
        for stride in [1 if stage == 0 else 2] + [1] * (depth - 1):
            shortcut = None
            if stride > 1 or channels != out:
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            layers.append(block(channels, planes, stride, shortcut, base_width=64 * widen))
            channels = out
    return Reference(nn.Sequential(*layers), nn.Linear(channels, 10))


def their_vgg(plan: str, *head: nn.Module) -> nn.Module:
    vgg = torchvision.models.vgg
    return Reference(vgg.make_layers(vgg.cfgs[plan], batch_norm=True), nn.Sequential(*head))


def their_densenet(layers: int) -> nn.Module:
    plan: Any = (layers,) * 3
    net = torchvision.models.DenseNet(12, plan, 24, num_classes=10)
    net.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    net.features.norm0 = net.features.relu0 = net.features.pool0 = nn.Identity()
    return Reference(nn.Sequential(net.features, nn.ReLU()), net.classifier)


def their_resnet18() -> nn.Module:
    net: Any = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return Reference(nn.Sequential(*[*net.children()][:-2]), net.fc)


def three_layer_head() -> list[nn.Module]:
    layers = [[nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0)] for _ in range(2)]
    return [*layers[0], *layers[1], nn.Linear(512, 10)]


THEIRS = {
    "resnet20": lambda: their_resnet(BasicBlock, [3, 3, 3]),
    "resnet32": lambda: their_resnet(BasicBlock, [5, 5, 5]),
    "resnet44_basic": lambda: their_resnet(BasicBlock, [7, 7, 7]),
    "resnet56_basic": lambda: their_resnet(BasicBlock, [9, 9, 9]),
    "resnet110_basic": lambda: their_resnet(BasicBlock, [18, 18, 18]),
    "resnet110": lambda: their_resnet(Bottleneck, [12, 12, 12]),
    "wrn20_8": lambda: their_resnet(Bottleneck, [2, 2, 2], widen=8),
    "resnet18_cifar": their_resnet18,
    "vgg16": lambda: their_vgg("D", *three_layer_head()),
    "vgg19": lambda: their_vgg("E", *three_layer_head()),
    "vgg16_bn": lambda: their_vgg("D", nn.Linear(512, 10)),
    "densenet40_12": lambda: their_densenet(6),
    "densenet100_12": lambda: their_densenet(16),
}


@pytest.mark.parametrize("name", THEIRS)
def test_network_is_torchvisions_on_the_same_weights(name):
    """Names aside, both hold the same tensors in the same order, or nothing would load."""
    ours, theirs = start(name), THEIRS[name]()
    state = [*ours.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state, strict=True)))
    with torch.no_grad():
        for mode in (True, False):  # with the statistics of the batch, and with those that are left by it
            expected = theirs.train(mode)(images(4))
            torch.testing.assert_close(ours.train(mode)(images(4)), expected, rtol=1e-4, atol=1e-4)


def active(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, next(weights), next(weights), training=True))


def wide(x: Tensor, weights: Iterator[Tensor], n: int) -> Tensor:
    """Zagoruyko and Komodakis, Figure 1 (d) without dropout."""
    x = F.conv2d(x, next(weights), padding=1)
    for stage in range(3):
        for i in range(n):
            stride = 2 if stage and not i else 1
            before = active(x, weights)
            after = F.conv2d(before, next(weights), stride=stride, padding=1)
            after = F.conv2d(active(after, weights), next(weights), padding=1)
            x = after + (x if i else F.conv2d(before, next(weights), stride=stride))
    return active(x, weights).mean((2, 3))


def dense(x: Tensor, weights: Iterator[Tensor], layers: int) -> Tensor:
    """Huang et al., Equation 2: layer l sees the maps of all before it, [x_0, ..., x_(l-1)]."""
    x = F.conv2d(x, next(weights), padding=1)
    for stage in range(3):
        maps = [x]
        for _ in range(layers):
            maps.append(F.conv2d(active(torch.cat(maps, 1), weights), next(weights), padding=1))
        x = active(torch.cat(maps, 1), weights)
        if stage < 2:
            x = F.avg_pool2d(F.conv2d(x, next(weights)), 2)
    return x.mean((2, 3))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("wrn16_8", partial(wide, n=2)),
        ("wrn28_10", partial(wide, n=4)),
        ("wrn40_2", partial(wide, n=6)),
        ("densenet40_12_plain", partial(dense, layers=12)),
    ],
)
def test_network_is_its_equations_on_the_same_weights(name, body):
    net = start(name)
    weights = iter([*net.parameters()])
    with torch.no_grad():
        feature = body(images(), weights)
        expected = F.linear(feature, next(weights), next(weights)), feature
        torch.testing.assert_close(net(images()), expected, rtol=1e-4, atol=1e-4)
    assert next(weights, None) is None


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("resnet", name) for name in ("resnet20", "wrn20_8", "resnet18_cifar")),
        ("wrn", "wrn16_8"),
        *(("vgg", name) for name in ("vgg16", "vgg16_bn")),
        *(("densenet", name) for name in ("densenet40_12", "densenet40_12_plain")),
    ],
)
def test_initial_weights(family, name):
    net = start(name, 100)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            std = (2 / ((m.in_channels if family == "densenet" else m.out_channels) * m.kernel_size[0] ** 2)) ** 0.5
            assert m.weight.std().item() == pytest.approx(std, rel=0.15) and m.weight.abs().max() > 2.3 * std  # normal
            assert (m.bias is not None and not m.bias.any()) if family == "vgg" else m.bias is None
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
        if isinstance(m, nn.Linear):
            bound = m.in_features**-0.5  # torch's default is uniform within it
            largest = m.weight.abs().max()
            assert m.weight.std().item() == pytest.approx(0.01 if family == "vgg" else bound / 3**0.5, rel=0.05)
            assert (largest > 0.03) if family == "vgg" else (largest <= bound)
            assert (0 < m.bias.abs().max() <= bound) if family == "resnet" else not m.bias.any()


@pytest.mark.parametrize("name", [*SMALL, *PUBLISHED])
def test_logits_are_the_head_on_the_pooled_last_stage_and_gradient_reaches_every_parameter(name):
    net = start(name, 7)
    logits_BK, feature_BD = net(images())
    assert logits_BK.shape == (2, 7) and feature_BD.shape == (2, net.feature_dim)
    assert (feature_BD >= 0).all() and (feature_BD > 0).any()
    logits_BK.square().sum().backward()
    before_norm = {id(m.bias) for m in net.modules() if isinstance(m, nn.Conv2d)}  # VGG's: the norm takes them away
    for p in net.parameters():
        assert p.grad is not None and (p.grad.any() or id(p) in before_norm)
    with torch.no_grad():
        map_BEHW = net.trunk(images())
        kept = map_BEHW.clone()
        last = net.branch.stage(map_BEHW)
        assert torch.equal(map_BEHW, kept)  # branches share it, so none may write to it
        torch.testing.assert_close(feature_BD, last.mean((2, 3)))
        torch.testing.assert_close(logits_BK, net.branch.head(feature_BD))


@NAMES
def test_networks_of_a_name_share_nothing_and_repeat_nothing(name):
    with torch.device("meta"):
        nets: list[Any] = [NETWORKS[name](10, in_channels=1) for _ in range(2)]
        assert nets[0](torch.empty(2, 1, 32, 32))[0].shape == (2, 10)
    parts = [[*net.modules(), *net.parameters(), *net.buffers()] for net in nets]
    assert {*map(id, parts[0])}.isdisjoint(map(id, parts[1]))
    # Held once by one parent: a block that two branches share, as in the public DenseNet of OKDDip, has two.
    for net in nets:
        assert len([*net.named_modules(remove_duplicate=False)]) == len([*net.modules()])
        assert {*map(id, net.trunk.modules())}.isdisjoint(map(id, net.branch.modules()))


@NAMES
def test_bfloat16_channels_last_is_float32_within_its_precision(name):
    net = start(name).eval()
    with torch.no_grad():
        expected = net(images())
        nhwc, image_BCHW = net.to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
        torch.testing.assert_close(nhwc(image_BCHW), expected, rtol=1e-4, atol=1e-5 * expected[1].norm().item())
        with torch.autocast("cpu", torch.bfloat16):
            actual = nhwc(image_BCHW)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - e).norm() < (0.1 if name == "resnet110" else 0.03) * e.norm()


@SMALL_AND_SLOW
def test_compiles_to_one_graph(name):
    net = start(name)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    actual, expected = torch.compile(net, fullgraph=True, backend="aot_eager")(images()), twin(images())
    torch.testing.assert_close(actual, expected)
    for logits, _ in (actual, expected):
        logits.square().sum().backward()
    for a, e in zip(net.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and e.grad is not None
        assert (a.grad - e.grad).norm() <= 1e-3 * e.grad.norm() + 1e-6


@SMALL_AND_SLOW
def test_exports_with_an_open_batch_size(name):
    net, file = start(name).eval(), io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(net, (images(2),), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for size in (1, 3):
            torch.testing.assert_close(loaded(images(size)), net(images(size)))
