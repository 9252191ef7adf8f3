"""What the tests of methods are made of: a task, tiny peers, outputs and batches with nothing trained in them."""

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cutnmix.models import NETWORKS
from cutnmix.models.network import Branch, Network
from cutnmix.models.peers import Outputs, Peers, build_peer
from cutnmix.models.resnet import basic, resnet
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.method import Method, Task
from cutnmix.trainer.methods import METHODS

B, K, D, E, N, EPOCHS = 5, 4, 6, 3, 8, 10


def tiny(num_classes: int, width: int = D) -> Network:
    """Convolutions of one pixel, no norm: image (B, 3, h, w) -> trunk (B, E, h, w) -> branch."""
    trunk = nn.Sequential(nn.Conv2d(3, E, 1), nn.ReLU())
    return Network(
        trunk, Branch(nn.Sequential(nn.Conv2d(E, width, 1), nn.ReLU()), nn.Linear(width, num_classes), width), E
    )


def small(num_classes: int) -> Network:
    """A ResNet-8 on images of half the side: batch norms, shortcuts and strides as the large ones have them.

    Of their widths too: a strided 1x1 convolution of 4 channels, channels_last, writes where it must not on a CPU with
    AVX2 (oneDNN#6035: of fewer channels than a vector holds).
    """
    net = resnet(basic, [1, 1, 1], num_classes, 3)
    return Network(nn.Sequential(nn.AvgPool2d(2), net.trunk), net.branch, net.trunk_dim)


def dropping(num_classes: int) -> Network:
    """`small` with a network's only draws while it trains: dropout before its head."""
    net = small(num_classes)
    net.branch.head = nn.Sequential(nn.Dropout(0.5), net.branch.head)
    return net


TINY = {"tiny": tiny, "tiny_wide": lambda num_classes: tiny(num_classes, 2 * D)}


def make_peers(J: int, form: str = "nets") -> Peers:
    """J tiny peers, with weights that do not depend on the caller's random state."""
    with patch.dict(NETWORKS, TINY):
        return Peers(["tiny"] * J, num_classes=K, seed=0, form=form)


def make_task(J: int, peers: Peers | None = None) -> Task:
    """A task for J peers: N images, EPOCHS epochs."""
    return Task(J, K, (D,) * J, E, num_images=N, epochs=EPOCHS, peers=peers or make_peers(J))


def build(name: str, J: int = 3, peers: Peers | None = None, **keys) -> Method:
    """The method in float32 with parameters from seed 0, as trainer/build.py makes it."""
    torch.manual_seed(0)
    with patch.dict(NETWORKS, TINY):
        return METHODS[name](make_task(J, peers), **keys)


def make_outputs(J: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Outputs:
    """Leaves that ask for gradients: logits, features (never negative), and a shared map's average."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(J, B, K, generator=g, dtype=torch.float64)
    features = torch.randn(J, B, D, generator=g, dtype=torch.float64).relu()
    shared = torch.randn(1, B, E, generator=g, dtype=torch.float64).relu()
    return Outputs(
        logits.to(dtype).requires_grad_(),
        tuple(feature.to(dtype).requires_grad_() for feature in features),
        shared.to(dtype).requires_grad_(),
    )


def make_batch(L: int = 1, V: int = 1, epoch: float = 3.25, seed: int = 0, soft: bool = True) -> Batch:
    """B distinct images of N with their second views; targets soft, or the labels' own."""
    g = torch.Generator().manual_seed(seed + 9)
    label_B = torch.randint(K, (B,), generator=g)
    target_LBK = torch.randn(L, B, K, generator=g).softmax(-1)
    if not soft:
        target_LBK = torch.eye(K)[label_B].expand(L, B, K)
    first, second = torch.randn(2, V, B, 3, 2, 2, generator=g)
    index_B = torch.randperm(N, generator=g)[:B]
    return Batch(first, target_LBK, label_B, index_B, torch.tensor(epoch, dtype=torch.float64), second)


def leaves(outputs: Outputs) -> list[Tensor]:
    """Every tensor of the outputs that there is."""
    return [x for x in (outputs.logits_JBK, *outputs.features, outputs.shared_VBE) if x is not None]


def keys_of(name: str, folder: Path) -> dict[str, object]:
    """The keys without which a method cannot be built; files that they name are written to the folder."""
    return {"teacher": str(save_network(folder / "teacher.safetensors"))} if name == "kd" else {}


def save_network(path: Path, network: str = "tiny", num_classes: int = K, seed: int = 5, says: Mapping = {}) -> Path:
    """A file as a run leaves it at its end, of a network with the weights of this seed; `says` is other metadata."""
    with patch.dict(NETWORKS, TINY):
        weights = build_peer(network, num_classes, seed=seed, j=0).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, {"network": network, "num_classes": str(num_classes), "peer": "0", **says})
    return path
