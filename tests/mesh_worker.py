"""One process of a mesh: trains small networks in every mode that test_mesh.py compares, and leaves what came out.

`launch` starts N of them by torchrun's agent, as forks of a process that has imported everything.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor.debug import CommDebugMode

from cutnmix.benchmarks.scale_check import Sent
from cutnmix.models import NETWORKS
from cutnmix.trainer import checkpoint
from cutnmix.trainer.build import Parts, build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.keys import Config
from cutnmix.trainer.mesh import joined
from cutnmix.trainer.run import score
from cutnmix.trainer.step import Tally

STEPS = 20
COMMON = [
    "data.classes=9",
    "data.images_per_class=11",  # 99 images: six batches of 16, and one of 3, cut into parts of 1 and 2
    "epochs=3",
    "batch_size=16",
    "eval_batch_size=100",
    "peers.count=4",
    "peers.network=normed",
    "precision=fp32",
    "loader=resident",
    "mix.groups=2",
    "mesh.sync_batch_norm=true",
    "mesh.timeout_s=600",
]
MODES = {
    "baseline": ["method=baseline"],
    "dml": ["method=dml", "method.temperature=2"],
    "cutnmix": [],
    "cutnmix, nothing detached": ["method.mmd_detach=false", "method.pt_grad_to_peers=true", "method.feature_dim=5"],
    "kdcl mean": ["method=kdcl", "method.variant=mean", "views=shared", "mix=cutmix", "mix.groups=2"],
    "ddgsd": ["method=ddgsd", "method.mmd_weight=0.1", "mix=mixup", "mix.groups=2"],
    "cs_kd, accumulated": ["method=cs_kd", "mix=none", "optimizer.accumulate=2"],
}


class Normed(nn.Module):
    """A small network with batch norms, and without kinks, at which rounding would part two runs."""

    feature_dim = 8

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=3, bias=False), nn.BatchNorm2d(6), nn.Tanh(),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(8, num_classes)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        feature_BD = self.body(image_BCHW).mean((2, 3))
        return self.head(feature_BD), feature_BD


def config_of(mode: str, data: int, peer: int, *more: str) -> Config:
    keys = [key for key in COMMON if not (key.startswith("mix.") and "mix=" in " ".join(MODES[mode]))]
    return load_config("quickstart", [*keys, *MODES[mode], f"mesh.data={data}", f"mesh.peer={peer}", *more])


def trained(parts: Parts) -> dict:
    """20 steps: the losses of each, the state after them, its scores."""
    tally, mesh, losses, seen = Tally([]), parts.mesh, [], []
    accumulate = parts.config.optimizer.accumulate
    for epoch in range(3):
        plan = parts.plan(epoch)
        for s, views in enumerate(parts.loader.epoch(plan)):
            if len(losses) == STEPS:
                break
            draws = plan.step(s)
            update = (s + 1) % accumulate == 0 or s + 1 == len(plan)
            last = min(s - s % accumulate + accumulate, len(plan))
            parts.step.train(
                parts.learner, views, draws, tally, lr=0.02, share=1 / (last - (s - s % accumulate)), update=update,
                weight=plan.weight(s),
            )  # fmt: skip
            losses.append(tally.read(mesh))
            seen.append((epoch, draws.index_B[: len(draws.index_B) // (1 + plan.second)].clone()))
    state = {name: tensor.clone() for name, tensor in checkpoint._own_tensors(parts.learner).items()}
    return {"losses": losses, "state": state, "seen": seen, "scores": score(parts)}


def exchanged(parts: Parts) -> dict:
    """Collectives over the peer axis of one step's forward and losses: their number and bytes."""
    plan = parts.plan(0)
    views = next(iter(parts.loader.epoch(plan)))
    with CommDebugMode() as comms, Sent() as sent:
        parts.step.forward(parts.learner, views, plan.step(0))
    return {"count": comms.get_total_counts(), "bytes": sent.bytes}


SAVED = "cutnmix, nothing detached"


def saved(parts: Parts, path: Path) -> dict:
    """A checkpoint in mid-epoch after one step more, what is in it, and the running losses."""
    plan, tally = parts.plan(0), Tally([])
    views = next(iter(parts.loader.epoch(plan)))
    parts.step.train(parts.learner, views, plan.step(0), tally, lr=0.02, share=1.0, update=True)
    checkpoint.save(path, parts.learner, checkpoint.Position(1, 3), tally, 12.5, parts.mesh)
    state = {name: tensor.clone() for name, tensor in checkpoint._own_tensors(parts.learner).items()}
    return {"saved": state, "tally": tally.read(parts.mesh)}


def restored(parts: Parts, path: Path) -> tuple[dict[str, Tensor], checkpoint.Position, float, dict]:
    """What another mesh finds there."""
    state = checkpoint.load(path, torch.device("cpu"))
    position, tally, best = checkpoint.restore(state, parts.learner, parts.mesh)
    return checkpoint._own_tensors(parts.learner), position, best, tally.read(parts.mesh)


def main(folder: Path, data: int, peer: int) -> None:
    NETWORKS["normed"] = Normed
    config = config_of("baseline", data, peer)
    with joined(config) as mesh:
        made = {}
        for mode in MODES:
            parts = build(config_of(mode, data, peer), mesh)
            made[mode] = trained(parts)
            if mode == SAVED:
                (folder / f"{data}x{peer}").mkdir(exist_ok=True)
                made |= saved(parts, folder / f"{data}x{peer}" / "last.pt")
        made["restored"] = {
            path.parent.name: restored(build(config_of(SAVED, data, peer), mesh), path)
            for path in sorted(folder.glob("*/last.pt"))
        }
        if data == 1 and peer > 1:
            made["exchanged"] = {
                (mode, J): exchanged(build(config_of(mode, data, peer, f"peers.count={J}"), mesh))
                for mode in ("baseline", "dml", "cutnmix", "kdcl mean")
                for J in (2, 4, 8)
            }
        torch.save(made, folder / f"{data}x{peer}-rank{mesh.rank}.pt")


def each(folder: Path, meshes: Sequence[tuple[int, int]]) -> None:
    """What each process does: meshes of so many processes, one after another."""
    for start, mesh in enumerate(meshes):
        # Counted on as torchrun does when it starts processes anew, so that none looks for those of the former mesh.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start)
        main(folder, *mesh)


def launch(folder: Path, meshes: Sequence[tuple[int, int]]) -> None:
    """As torchrun --standalone, which takes a script for each process to start from nothing."""
    data, peer = meshes[0]
    config = LaunchConfig(
        1, 1, data * peer, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="fork", local_addr="127.0.0.1",
    )  # fmt: skip
    elastic_launch(config, each)(folder, meshes)
