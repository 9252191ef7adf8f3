"""Checkpoints: written atomically, loadable with weights_only=True, exact.

The plan makes data a function of (seed, epoch, step), so the position and the learner are the whole state; torch's
generators are kept for methods and networks that draw (dropout).
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cutnmix.trainer.step import Learner, Tally


class Position(NamedTuple):
    """Steps `step` of epoch `epoch` are done; both count from 0."""

    epoch: int
    step: int


def save(path: Path, learner: Learner, position: Position, tally: Tally, best_top1: float) -> None:
    """Write the state beside `path`, flush it to the disk, rename: a reader sees the old or the new, never half."""
    state = {
        "learner": learner.state_dict(),
        "position": tuple(position),
        "tally": {"names": tally.names, "sums": tally.sums, "steps": tally.steps},
        "best_top1": best_top1,
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """The state dict of a checkpoint, tensors on `device`. Never unpickles code."""
    return torch.load(path, map_location=device, weights_only=True)


def restore(state: dict[str, Any], learner: Learner) -> tuple[Position, Tally, float]:
    """Put a loaded state into the learner and torch's generators; returns where training goes on."""
    learner.load_state_dict(state["learner"])
    torch.set_rng_state(state["rng_cpu"].cpu())
    if torch.cuda.is_available() and state["rng_cuda"]:
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["rng_cuda"]])
    return Position(*state["position"]), Tally(**state["tally"]), state["best_top1"]
