"""A trained peer, or the mean of all, as one file for other programs.

safetensors    the weights of the plain network, and what they need to be used, as metadata
torch_export   a program (.pt2) that plain PyTorch runs: cutnmix need not be installed
onnx           the same for the runtimes of ONNX

A program maps `image`, float32 (B, C, H, W) in [0, 1] with any B >= 1, to `logits`, float32 (B, K): normalisation is
inside, batch norms use their running statistics, nothing asks for gradients. Images come at `image_size`; scaling and
cutting them to it is the caller's. The arithmetic is float32 whatever the run's precision was: the weights were float32
all along, and only the rounding of autocast is not in a program.

Every file carries the same strings: `classes`, `mean`, `std`, `image_size` (JSON), `network`, `num_classes`, `peer`,
`cutnmix` (its version). When training ends, `export_peers` writes them into peers/*.safetensors, and `export` reads
them there: a finished run needs no data set to be exported, one that still trains or was cut off does.
"""

import io
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cutnmix.models.peers import Peers
from cutnmix.pipeline.dataset import Dataset
from cutnmix.pipeline.distort import view_size
from cutnmix.pipeline.laws import Distort
from cutnmix.trainer.build import Parts, load_data
from cutnmix.trainer.checkpoint import load, load_peers
from cutnmix.trainer.folder import Position, RunError, RunFolder, expect_writable, write_atomically
from cutnmix.trainer.keys import Config, ConfigError


class Facts(NamedTuple):
    """What a network must be told of its data."""

    classes: tuple[str, ...]  # K names
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    image_size: tuple[int, int]  # (H, W)


class Ensemble(nn.Module):
    """log mean_j softmax(logits_j): what the evaluation calls the ensemble, as logits (their softmax is that mean).

    The second output is the peers' features side by side, so that it is a network as each peer is.
    """

    def __init__(self, peers: Peers) -> None:
        super().__init__()
        self.peers = peers

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_BK, feature_BD), D the sum of the peers'."""
        outputs = self.peers(image_BCHW[None])
        log_prob_JBK = outputs.logits_JBK.float().log_softmax(-1)
        return log_prob_JBK.logsumexp(0) - math.log(len(log_prob_JBK)), torch.cat(outputs.features, -1)


class Program(nn.Module):
    """logits_BK of network((image - mean) / std), for images in [0, 1]."""

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, network: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.network = network
        mean_C, std_C = torch.tensor(facts.mean, dtype=torch.float64), torch.tensor(facts.std, dtype=torch.float64)
        self.register_buffer("scale_C11", (1 / std_C).float()[:, None, None])
        self.register_buffer("shift_C11", (-mean_C / std_C).float()[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.network(image * self.scale_C11 + self.shift_C11)[0]


def export_peers(parts: Parts, folder: Path) -> None:
    """peerJ.safetensors: the state dict of each own peer's plain network, and what it needs to be used, as metadata."""
    facts = _facts_of(parts.splits.train, parts.config.distort)
    if parts.mesh.data_index:
        return  # others have the same peers
    for j in parts.own:
        metadata = _metadata(facts, parts.config.peers.networks[j], str(j))
        content = _safetensors(parts.learner.peers.network(j), facts, metadata)
        write_atomically(folder / f"peer{j}.safetensors", content)


def export(run: Path, format: str, peer: str, out: Path | None = None, checkpoint: str = "last") -> tuple[Path, str]:
    """The path of the file that was written, whole or not at all, and a line on what it holds.

    Args:
        run: a run's folder.
        format: safetensors, torch_export or onnx.
        peer: a peer's number from 0 on; `mean`, all of them as one `Ensemble`; or `best`, the peer with the best top-1
            of the last evaluation on record. That choice is made ON TEST IMAGES, so its score there is optimistic.
        out: the file; None: RUN/export/, and a name that tells the peer and whether the checkpoint is not the last.
        checkpoint: last, or best: best.pt, chosen on the test images too. `best` of it is the best peer of that epoch.

    Raises: RunError, ConfigError, DataError before anything is written, naming what is wrong and what is allowed.
    """
    if format not in FORMATS:
        raise RunError(f"--format: {format!r} is none of {', '.join(FORMATS)}")
    if checkpoint not in ("last", "best"):
        raise RunError(f"--checkpoint: {checkpoint!r} is neither last nor best")
    suffix, content_of = FORMATS[format]
    if out is not None and out.suffix != suffix:
        raise RunError(f"--out: {out} must end in {suffix}, as files of the format {format} do")
    if format == "onnx" and not all(find_spec(name) for name in ("onnx", "onnxscript")):
        raise RunError('--format: onnx needs two packages more: pip install "cutnmix[onnx]"')
    folder = RunFolder(run)
    config = folder.read_config()
    path = folder.best if checkpoint == "best" else folder.last
    if not path.exists():
        raise RunError(f"{path} is not there: the run has not saved that checkpoint")
    state = load(path, torch.device("cpu"))
    j = _choose(folder, config.peers.count, peer, Position(*state["position"]) if checkpoint == "best" else None)

    expect_writable(out.parent if out else folder.path / "export")
    facts = _facts(folder, config)
    form, networks = config.peers.form, config.peers.networks
    try:
        peers = Peers(networks, num_classes=len(facts.classes), seed=config.seed, form=form)
    except ValueError as error:  # a network of a library that is not here
        raise ConfigError(str(error)) from error
    load_peers(state, peers)
    if j is None:
        network, metadata = Ensemble(peers), _metadata(facts, json.dumps(networks), "mean") | {"form": form}
        name, what = "mean", f"the mean of {len(peers)} peers ({', '.join(networks)})"
    else:
        network, metadata = peers.network(j), _metadata(facts, networks[j], str(j))
        name, what = f"peer{j}", f"peer {j} ({networks[j]})"
    if peer == "best":
        what += ", the best on the test images,"
    if checkpoint == "best":
        name += "-best-epoch"
    out = out or folder.path / "export" / (name + suffix)
    write_atomically(out, content_of(network.eval().requires_grad_(False), facts, metadata))
    shape = ", ".join(map(str, (len(facts.mean), *facts.image_size)))
    use = "weights" if format == "safetensors" else f"image (B, {shape}) in [0, 1] -> logits (B, {len(facts.classes)})"
    return out, f"{what} of {path.name}: {use}"


def _choose(folder: RunFolder, count: int, peer: str, best: Position | None) -> int | None:
    """The number of the peer; None for the mean of all. `best`: where best.pt was written, if it is of that."""
    if peer == "mean":
        return None
    if peer.isdecimal() and int(peer) < count:
        return int(peer)
    if peer != "best":
        raise RunError(f"--peer: {peer!r} is none of best, mean, {', '.join(map(str, range(count)))}")
    tests, what = folder.records("test"), "evaluation yet"
    if best is not None:  # not always the best on record: checkpoint.best may have been turned off meanwhile
        tests = [record for record in tests if record["epoch"] == best.epoch + 1]
        what = "evaluation on record of best.pt's epoch"
    if not tests:
        raise RunError(f"--peer: best is not known, for {folder.path} has no {what}; name a peer, or mean")
    scores = tests[-1]["scores"]
    return max(range(count), key=lambda j: scores[f"peer{j}"]["top1"])


def _facts(folder: RunFolder, config: Config) -> Facts:
    """From what a finished run left; of another one, from its data set."""
    if (finished := folder.peers / "peer0.safetensors").exists():
        try:
            with safe_open(finished, "pt") as file:
                metadata = file.metadata()
            return Facts(*(tuple(json.loads(metadata[field])) for field in Facts._fields))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{finished} is damaged ({error}); remove it, and the data set is asked instead") from error
    return _facts_of(load_data(config.data).train, config.distort)


def _facts_of(train: Dataset, distort: Distort) -> Facts:
    return Facts(train.classes, train.mean, train.std, view_size(train, distort))


def _metadata(facts: Facts, network: str, peer: str) -> dict[str, str]:
    return {
        "network": network,
        "peer": peer,
        "num_classes": str(len(facts.classes)),
        **{field: json.dumps(value) for field, value in facts._asdict().items()},
        "cutnmix": version("cutnmix"),
    }


# The formats: (network, facts, metadata) -> the file's content.


def _safetensors(network: nn.Module, facts: Facts, metadata: dict[str, str]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, metadata)


def _torch_export(network: nn.Module, facts: Facts, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_trace(network, facts), file, extra_files=metadata)
    return file.getvalue()


def _onnx(network: nn.Module, facts: Facts, metadata: dict[str, str]) -> bytes:
    made = torch.onnx.export(
        _trace(network, facts),
        dynamo=True,
        output_names=["logits"],
        dynamic_shapes={"image": {0: "batch"}},  # of a program: only the axis's name
        verbose=False,
    )
    assert made is not None
    made.model.metadata_props.update(metadata)
    return made.model_proto.SerializeToString()


FORMATS: dict[str, tuple[str, Callable[[nn.Module, Facts, dict[str, str]], bytes]]] = {
    "safetensors": (".safetensors", _safetensors),
    "torch_export": (".pt2", _torch_export),
    "onnx": (".onnx", _onnx),
}


def _trace(network: nn.Module, facts: Facts) -> torch.export.ExportedProgram:
    """The graph of Program; the example's 2 images leave B open (a batch of 1 would be taken for a constant)."""
    image_BCHW = torch.zeros(2, len(facts.mean), *facts.image_size)
    sizes = {"image": {0: torch.export.Dim("batch")}}
    return torch.export.export(Program(network, facts).eval(), (image_BCHW,), dynamic_shapes=sizes)
