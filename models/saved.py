"""Networks that a run has saved: read back from its files, and held still as teachers."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cutnmix.models.peers import build_peer


def load_network(
    path: Path, *, peer: int = 0, num_classes: int | None = None, data: Mapping[str, Sequence[str | float]] = {}
) -> nn.Module:
    """The network in a .safetensors file, or peer `peer` of a finished run's folder, in eval mode on the CPU.

    The file says itself which network it is, in the metadata `network` and `num_classes` that every exported peer has.
    Those of `data` (classes, mean, std) it may say too. The caller's random state stays as it was.

    Raises: ValueError, naming the file, if it is not there or cannot be read, does not say what it is, is the mean of
    several peers, or has another number of classes than `num_classes` or says something else than `data`, where those
    are given.
    """
    path, metadata, weights = _read(path, peer)
    name, told = metadata["network"], metadata["num_classes"]
    if num_classes is not None and told != str(num_classes):
        raise ValueError(f"{path} tells {told} classes apart, not {num_classes}")
    for key, own in data.items():
        if key in metadata:
            _check_same(path, key, _list(path, key, metadata[key]), own)
    try:
        its_classes = int(told)
        network = build_peer(name, its_classes, seed=0, j=0)
        network.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no {name!r} of this version: {error}") from error
    return network.eval()


def network_name(path: Path, *, peer: int = 0) -> str:
    """Which network it is that load_network reads there. Raises: ValueError where that cannot read it."""
    _, metadata, _ = _read(path, peer)
    return metadata["network"]


def _read(path: Path, peer: int) -> tuple[Path, dict[str, str], dict[str, Tensor]]:
    """The file, what it says of itself, and its weights."""
    if path.is_dir():
        path = _file_of(path, peer)
    if not path.exists():
        raise ValueError(f"{path} is not there")
    try:
        with safe_open(path, "pt") as file:
            metadata, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a .safetensors file: {error}") from error
    if missing := {"network", "num_classes"} - metadata.keys():
        raise ValueError(f"{path} does not say what it is: its metadata lack {', '.join(sorted(missing))}")
    if metadata.get("peer") == "mean":
        raise ValueError(f"{path} is the mean of several peers, and no network; export one of them")
    return path, metadata, weights


def _list(path: Path, key: str, text: str) -> list[str | float]:
    """What the metadata say under a key that holds a list."""
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, list):
        raise ValueError(f"{path} is damaged: its {key} is {text!r}, which is no list in JSON")
    return told


def _check_same(path: Path, key: str, its: Sequence[str | float], own: Sequence[str | float]) -> None:
    """Refuse a network of other data, naming the first difference: there may be a thousand classes."""
    for i, (a, b) in enumerate(zip_longest(its, own)):
        if isinstance(a, float) and isinstance(b, float):  # a mean that another machine made may be rounded otherwise
            same = math.isclose(a, b, rel_tol=1e-6)
        else:
            same = a == b
        if not same:
            raise ValueError(f"{path} was trained on other data: its {key}[{i}] is {a!r}, not {b!r}")


def _file_of(run: Path, peer: int) -> Path:
    """Where a finished run has left a peer."""
    files = sorted(path.name for path in (run / "peers").glob("*.safetensors"))
    if not files:
        raise ValueError(f"{run} has no peers/peer{peer}.safetensors: it is no run, or one that has not ended")
    if f"peer{peer}.safetensors" not in files:
        raise ValueError(f"{run} has no peer {peer}, only {', '.join(files)}")
    return run / "peers" / f"peer{peer}.safetensors"


class Frozen(nn.Module):
    """The logits of a network that nothing changes: no gradients, and eval mode whatever its owner's mode is.

    Its weights are in the owner's state dict, as parameters that ask for no gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, image_VBCHW: Tensor) -> Tensor:
        """(V, B, C, H, W) -> (V, B, K), all views in one pass."""
        with torch.no_grad():
            logits_BK, _ = self.network(image_VBCHW.flatten(0, 1))
        return logits_BK.unflatten(0, image_VBCHW.shape[:2])
