"""Networks of torchvision and timm by name, what networks cost, and `cutnmix models`."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cutnmix.models import NETWORKS, build_network, library
from cutnmix.models.cost import (
    blueprint,
    branches_cost,
    check_image_size,
    cost,
    made_for,
    parameters,
    trains_on_one,
)
from cutnmix.models.peers import Peers
from cutnmix.trainer import cli
from cutnmix.trainer.norm import synchronise

# name, image side, keys of its builder, path of its head
LIBRARY = [
    ("torchvision.resnet18", 32, {}, "fc"),
    ("torchvision.mobilenet_v3_small", 32, {}, "classifier.3"),
    ("torchvision.vgg11", 64, {}, "classifier.6"),
    ("torchvision.densenet121", 32, {}, "classifier"),
    ("torchvision.convnext_tiny", 32, {}, "classifier.2"),
    ("torchvision.swin_t", 32, {}, "head"),
    ("torchvision.regnet_x_400mf", 32, {}, "fc"),
    ("torchvision.googlenet", 32, {"aux_logits": False, "init_weights": True}, "fc"),
    ("timm.resnet18", 32, {}, "fc"),
    ("timm.vit_tiny_patch16_224", 224, {}, "head"),
    ("timm.convnext_atto", 32, {}, "head.fc"),
]
# methods.md, section 3: K = 10, K = 100, feature, millions of MACs at K = 100
PAPER = {
    "vgg16": (15_253_578, 15_299_748, 512, 313.8),
    "vgg19": (20_565_834, 20_612_004, 512, 398.7),
    "resnet32": (466_906, 472_756, 64, 69.1),
    "resnet110": (1_147_738, 1_170_868, 256, 167.5),
    "wrn20_8": (6_848_090, 6_871_220, 256, 1022.8),
    "densenet40_12": (176_122, 188_092, 132, 72.4),
}


def plain(name: str, num_classes: int, keys: dict) -> nn.Module:
    """The network as its library builds it."""
    source, rest = name.split(".")
    if source == "torchvision":
        return torchvision.models.get_model(rest, weights=None, num_classes=num_classes, **keys)
    return timm.create_model(rest, pretrained=False, num_classes=num_classes)


@pytest.mark.parametrize(("name", "side", "keys", "path"), LIBRARY, ids=[row[0] for row in LIBRARY])
def test_the_cut_changes_neither_weights_nor_logits(name, side, keys, path):
    torch.manual_seed(3)
    expected = plain(name, 5, keys).eval()
    torch.manual_seed(3)
    net = build_network(name, 5).eval()
    names = [
        (f"head.{key[len(path) + 1 :]}" if key.startswith(f"{path}.") else f"body.{key}")
        for key in expected.state_dict()
    ]
    weights = dict(zip(names, expected.state_dict().values(), strict=True))
    torch.testing.assert_close(dict(net.state_dict()), weights, rtol=0, atol=0)

    seen = []
    expected.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image_BCHW = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BK, feature_BD = net(image_BCHW)
        torch.testing.assert_close(logits_BK, expected(image_BCHW), rtol=0, atol=0)
        torch.testing.assert_close(feature_BD, seen[0], rtol=0, atol=0)
        torch.testing.assert_close(logits_BK, net.head(feature_BD), rtol=0, atol=0)
    assert logits_BK.shape == (2, 5) and feature_BD.shape == (2, net.feature_dim)


def test_peers_of_a_library_start_apart_train_and_have_no_branches():
    names = ["torchvision.shufflenet_v2_x0_5", "torchvision.shufflenet_v2_x0_5", "resnet20"]
    before = torch.get_rng_state()
    peers, again = (Peers(names, num_classes=5, seed=seed) for seed in (7, 7))
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(dict(peers.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    first, second = (torch.cat([p.flatten() for p in net.parameters()]) for net in peers.nets[:2])
    assert not torch.equal(first, second)
    assert peers.feature_dims == (1024, 1024, 64)
    peers(torch.randn(1, 2, 3, 32, 32)).logits_JBK.square().sum().backward()
    assert all(p.grad is not None for p in peers.parameters())
    with pytest.raises(ValueError, match=r"peers\.form: torchvision.* cannot be cut into trunk and branches"):
        Peers(names[:2], num_classes=5, seed=7, form="branches")


class Toy(nn.Module):
    """`tail` is what it makes of the outputs of its heads; with dims=3 there is a feature for each pixel."""

    def __init__(self, num_classes: int, tail: Callable, heads: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3, num_classes) for _ in range(heads))
        self.tail, self.dims = tail, dims

    def forward(self, image_BCHW):
        feature = image_BCHW.mean((2, 3)) if self.dims == 2 else image_BCHW.flatten(2).mT
        return self.tail(*(head(feature) for head in self.heads))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda K: Toy(K, torch.softmax, heads=0), "its classifier is no Linear layer"),
        (lambda K: nn.Sequential(nn.Conv2d(3, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "is no Linear layer"),
        (lambda K: Toy(K, lambda z: z, heads=2), r"it has 2 heads \(heads\.0, heads\.1\)"),
        (lambda K: Toy(K, torch.sigmoid), r"not that of its last Linear layer, heads\.0"),
        (lambda K: Toy(K, lambda z: (z, z)), r"not that of its last Linear layer, heads\.0"),
        (lambda K: Toy(K, lambda z: z, dims=3), r"heads\.0, for one feature each"),
    ],
    ids=["no head", "a convolution", "two heads", "a sigmoid after it", "auxiliary outputs", "a head per pixel"],
)
def test_what_cannot_be_cut_is_refused_with_its_reason(monkeypatch, build, reason):
    monkeypatch.setattr(library, "_make", lambda name, num_classes: build(num_classes))
    with pytest.raises(ValueError, match=rf"peers\.network: toy cannot be cut into .*: .*{reason}"):
        library.find_head.__wrapped__("toy")


def test_a_plain_head_is_found(monkeypatch):
    monkeypatch.setattr(library, "_make", lambda name, num_classes: Toy(num_classes, lambda z: z))
    assert library.find_head.__wrapped__("toy") == "heads.0"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision.squeezenet1_1", "no Linear layer"),
        ("timm.resnetv2_18", "no Linear layer"),
        ("timm.levit_128", r"2 heads \(head\.linear, head_dist\.linear\)"),
    ],
)
def test_networks_of_the_libraries_that_are_refused(name, reason):
    with pytest.raises(ValueError, match=rf"^peers\.network: {name} cannot be cut .*{reason}"):
        build_network(name, 5)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnt20", "resnet20"),
        ("resnet21", "resnet20"),
        ("resnet111", "resnet110"),
        ("resnet33", "resnet32"),
        ("resnet56", "resnet56_basic"),
        ("torchvision.resnet51", "torchvision.resnet"),
        ("timm.vit_tinny_patch16_224", "timm.vit_tiny_patch16_224"),
        ("resnet18", "resnet18_cifar"),  # torchvision's is made for 224 pixels
        ("resnet50", "torchvision.resnet50"),
        ("torchvison.resnet18", "torchvision.resnet18"),
        ("timm.resnt18", "timm.resnet18"),
        ("timm.resnet18.a1_in1k", "timm.resnet18"),
        ("timm.hf-hub:timm/resnet18", "timm.resnet18"),  # nothing may be fetched
        ("vit_tiny_patch16_224", "timm.vit_tiny_patch16_224"),
        ("torchvision.deeplabv3_resnet50", None),  # torchvision has it, but it does not classify images
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(name, near):
    with pytest.raises(ValueError) as error:
        build_network(name, 5)
    start, _, allowed = str(error.value).partition("? Allowed: ")
    assert start.startswith(f"peers.network: no {name!r}, did you mean '{near or ''}")
    assert allowed.split(", ") == [*NETWORKS, "torchvision.NAME", "timm.NAME"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "one of your own? Name its module in imports"),
        ("foo", "one of your own? Name its module in imports"),
        ("resnet20,resnet32", "for several write a list, [resnet20, resnet32]"),
    ],
)
def test_where_no_name_is_near_none_is_guessed(name, said):
    with pytest.raises(ValueError) as error:
        build_network(name, 5)
    allowed = ", ".join([*NETWORKS, "torchvision.NAME", "timm.NAME"])
    assert str(error.value) == f"peers.network: no {name!r}; {said}. Allowed: {allowed}"


def test_without_timm_its_networks_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda name: None if name == "timm" else name)
    with pytest.raises(ValueError, match=r'^peers\.network: timm is not installed: pip install "cutnmix\[timm\]"$'):
        build_network("timm.resnet18", 5)
    with pytest.raises(ValueError, match=r"did you mean 'torchvision\.vit_b_16'"):
        build_network("vit_tiny_patch16", 5)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("torchvision.vit_b_16", (32, 32), r"32 x 32 pixels; it is made for 224 x 224 \(Wrong image height"),
        ("timm.vit_tiny_patch16_224", (224, 32), r"224 x 32 pixels; it is made for 224 x 224 \(Input width \(32\)"),
        ("torchvision.vgg11", (8, 8), r"8 x 8 pixels \(.*Output size is too small\)"),
        ("torchvision.vgg11", (32, 8), r"32 x 8 pixels \("),
        ("torchvision.inception_v3", (32, 32), r"32 x 32 pixels \("),
    ],
)
def test_a_size_that_a_network_cannot_take_is_refused(name, size, reason):
    with pytest.raises(ValueError, match=rf"^peers\.network: {name} does not take images of {reason}"):
        check_image_size(name, 5, size)


class Own(nn.Module):
    """What somebody may write: (logits, feature) of these sizes, `feature_dim` of that one or none."""

    def __init__(self, K: int, D: int = 3, feature_dim: int | None = 3, alone: bool = False) -> None:
        super().__init__()
        self.head, self.D, self.alone = nn.Linear(3, K), D, alone
        if feature_dim is not None:
            self.feature_dim = feature_dim

    def forward(self, image_BCHW):
        feature_BD = image_BCHW.mean((2, 3))
        logits_BK = self.head(feature_BD)
        return logits_BK if self.alone else (logits_BK, feature_BD.expand(-1, 3)[:, : self.D])


WANTED = r"; a network makes \(logits, feature\) of shapes \(2, 5\) and \(2, D\), and D is its feature_dim$"


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda K: Own(K, feature_dim=None),
            r"with feature_dim None makes \(\(2, 5\), \(2, 3\)\) of 2 images" + WANTED,
        ),
        (lambda K: Own(K, feature_dim=4), r"with feature_dim 4 makes \(\(2, 5\), \(2, 3\)\) of 2 images" + WANTED),
        (lambda K: Own(7), r"with feature_dim 3 makes \(\(2, 7\), \(2, 3\)\) of 2 images" + WANTED),
        (lambda K: Own(K, alone=True), r"with feature_dim 3 makes \(2, 5\) of 2 images" + WANTED),
        (lambda: Own(5), r"cannot be built of a number of classes, 5 \(TypeError: .*takes 0 positional arguments"),
        (lambda K: None, "is built as a NoneType, which is no torch.nn.Module"),
    ],
    ids=["no feature_dim", "another feature_dim", "another K", "logits alone", "no argument", "nothing"],
)
def test_a_network_of_ones_own_is_held_to_the_contract(monkeypatch, build, said):
    monkeypatch.setitem(NETWORKS, "own", build)
    with pytest.raises(ValueError, match=rf"^peers\.network: own {said}"):
        check_image_size("own", 5, (8, 8))


def test_a_network_that_keeps_the_contract_is_taken(monkeypatch):
    monkeypatch.setitem(NETWORKS, "own", Own)
    check_image_size("own", 5, (8, 8))
    assert cost("own", 5, (8, 8)).feature_dim == 3
    assert trains_on_one("own", 5, (8, 8))


class Rates(Own):
    """Reads numbers off a tensor while it is built, as many do for stochastic depth."""

    def __init__(self, K: int) -> None:
        super().__init__(K)
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]


class Squeezed(Own):
    """Loses the axis of a batch of one: at once, or where it is wanted."""

    def __init__(self, K: int, axis: int = 0) -> None:
        super().__init__(K)
        self.axis = axis

    def forward(self, image_BCHW):
        feature_BD = image_BCHW.mean((2, 3)).squeeze()
        return self.head(feature_BD), torch.cat([feature_BD], self.axis)


def test_a_network_that_reads_numbers_while_it_is_built_is_taken(monkeypatch):
    monkeypatch.setitem(NETWORKS, "own", Rates)
    assert cost("own", 5, (8, 8)).feature_dim == 3


@pytest.mark.parametrize("axis", [0, 1])
def test_a_network_that_loses_a_batch_of_one_does_not_train_on_it(monkeypatch, axis):
    monkeypatch.setitem(NETWORKS, "own", partial(Squeezed, axis=axis))
    check_image_size("own", 5, (8, 8))
    assert not trains_on_one("own", 5, (8, 8))


@pytest.mark.parametrize(
    "name", ["torchvision.densenet121", "torchvision.mobilenet_v3_small", "timm.test_vit", "resnet20"]
)
def test_the_check_of_sizes_agrees_with_real_forwards(name):
    net = build_network(name, 5).train()
    for side in (1, 24, 32):
        try:
            net(torch.zeros(2, 3, side, side))
        except (AssertionError, RuntimeError, ValueError):
            with pytest.raises(ValueError, match=rf"{side} x {side} pixels"):
                check_image_size(name, 5, (side, side))
        else:
            check_image_size(name, 5, (side, side))


@pytest.mark.parametrize("name", ["resnet20", "torchvision.vgg19", "torchvision.regnet_x_400mf", "timm.resnet18"])
def test_a_blueprint_has_no_numbers_and_draws_none(name):
    before = torch.get_rng_state()
    net = blueprint(name, 5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize(
    "name", ["resnet18", "wide_resnet50_2", "densenet121", "vgg11", "mobilenet_v3_small", "vit_b_16", "convnext_tiny"]
)
def test_cost_is_what_torchvision_publishes(name):
    """Its own counts, made with another tool, in billions with three decimals."""
    meta = torchvision.models.get_model_weights(name).DEFAULT.meta
    found = cost(f"torchvision.{name}", 1000, made_for(f"torchvision.{name}"))
    assert found.parameters == meta["num_params"]
    assert found.macs / 1e9 == pytest.approx(meta["_ops"], abs=1e-3)


def test_sizes_that_networks_are_made_for():
    expected = {"resnet20": 32, "torchvision.resnet18": 224, "torchvision.vit_b_16": 224, "timm.test_vit": 160}
    assert {name: made_for(name) for name in expected} == {name: (side, side) for name, side in expected.items()}


@pytest.mark.parametrize("J", [1, 3])
def test_branches_cost_what_peers_that_are_built_cost(J):
    found = branches_cost("resnet20", J, 10, (32, 32))
    for form, views, row in (
        ("nets", 1, found.nets),
        ("nets", J, found.nets),
        ("branches", 1, found.shared),
        ("branches", J, found.per_peer),
    ):
        peers = Peers(["resnet20"] * J, num_classes=10, seed=0, form=form)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            peers.to("meta")(torch.empty(views, 1, 3, 32, 32, device="meta"))
        assert row == (parameters(peers), counter.get_total_flops() // 2, 64)


def test_a_network_without_a_trunk_has_no_branches_to_count():
    with pytest.raises(ValueError, match=r"^peers\.form: torchvision\.resnet18 cannot be cut into trunk and branches"):
        branches_cost("torchvision.resnet18", 2, 10, (32, 32))


@pytest.fixture
def models(monkeypatch, capsys):
    """The rows of the table that `cutnmix models` prints, by name; (exit code, standard error)."""

    def call(*arguments: str) -> tuple[dict[str, list[str]], int, str]:
        monkeypatch.setattr(sys, "argv", ["cutnmix", "models", *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines() if line[0] == "│"]
        return {row[0]: row[1:] for row in rows}, int(left.value.code or 0), err

    return call


def test_models_prints_the_figures_of_the_paper_s_networks(models):
    rows, *_ = models()
    assert list(rows) == [*NETWORKS]
    found = {
        name: (
            int(ten.replace(",", "")),
            int(hundred.replace(",", "")),
            int(feature),
            float(macs.removesuffix(" M").replace(",", "")),
        )
        for name, (ten, hundred, macs, _, feature, _) in rows.items()
    }
    assert {name: found.get(name) for name in PAPER} == PAPER
    assert all(
        size == "32 x 32" and plan == (NETWORKS[name].__doc__ or "").splitlines()[0]
        for name, (*_, size, _, plan) in rows.items()
    )


def test_models_takes_names_and_classes(models):
    rows, *_ = models("timm.test_vit", "torchvision.resnet18", "--classes", "1000")
    assert list(rows) == ["timm.test_vit", "torchvision.resnet18"]
    assert rows["torchvision.resnet18"] == [
        "11,181,642",
        "11,689,512",
        "1,814.1 M",
        "224 x 224",
        "512",
        "ResNet-18 from Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.",
    ]
    _, code, err = models("resnt20")
    assert code == 2 and err.startswith("error: no 'resnt20', did you mean 'resnet20'?")


def test_norms_that_are_more_than_norms_are_not_synchronised():
    """torch's conversion would leave their activations out, and so train another network."""
    nobody: Any = None  # it is refused before a group is asked for
    with pytest.raises(ValueError, match=r"^mesh\.sync_batch_norm: a network has BatchNormAct2d, which does more"):
        synchronise(blueprint("timm.efficientnet_b0", 4), nobody)
