"""Checkpoints: written atomically, exact, independent of the mesh that wrote them.

The plan makes data a function of (seed, epoch, step), so the position and the learner are the whole state; torch's
generators are kept for methods and networks that draw (dropout).

One process writes one file, which loads with weights_only=True. Several write a folder by torch.distributed.checkpoint,
each tensor once, under names that say of which peer it is (peers.nets.3.conv.weight), so that any mesh finds its own;
facts.json holds the rest. PATH is then a link to one of two such folders: the new one is written beside the old one,
and the link, renamed, points to the old or the new, never to half of one. Of what processes hold apart (generators,
running losses; batch norms that are not synchronised keep the statistics of the first process with that peer) each
takes back its own on the same mesh.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from cutnmix.models.peers import Peers
from cutnmix.trainer.folder import Position, RunError
from cutnmix.trainer.mesh import ONE, Mesh
from cutnmix.trainer.step import Learner, Tally

_FACTS = "facts.json"
_REASON = 160  # characters of torch's message
_OF_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors, and no fault of a file


def save(path: Path, learner: Learner, position: Position, tally: Tally, best_top1: float, mesh: Mesh = ONE) -> None:
    """Write the state beside `path`, flush it to the disk, rename: a reader sees the old or the new, never half.

    Raises: RunError where it cannot be written; what was there is still there.
    """
    if mesh.size > 1:
        try:
            _save_folder(path, learner, position, tally, best_top1, mesh)
        except (OSError, CheckpointException) as error:
            cause = _first(error)
            if not isinstance(cause, OSError | RuntimeError) or isinstance(cause, _OF_DEVICE):
                raise
            if mesh.first:
                with suppress(OSError):
                    _clear(path)  # what was begun
            raise _unwritable(path, error) from error
        return
    device = _device(learner)
    state = {
        "learner": learner.state_dict(),
        "position": tuple(position),
        "tally": {"names": tally.names, "sums": tally.sums, "steps": tally.steps},
        "best_top1": best_top1,
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }
    partial = path.with_suffix(".partial")
    try:
        partial.unlink(missing_ok=True)  # of several processes, a link to a folder
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except _OF_DEVICE:
        raise
    except (OSError, RuntimeError) as error:  # torch's own, of a disk that is full in the middle of a tensor
        partial.unlink(missing_ok=True)  # it would keep the disk full
        raise _unwritable(path, error) from error
    _clear(path)


def _unwritable(path: Path, error: BaseException) -> RunError:
    free = shutil.disk_usage(path.parent).free
    return RunError(f"{path} cannot be written, {free / 1e6:,.0f} MB are free there ({_told(error)})")


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What `restore` takes; of a file its state dict, tensors on `device`. A file's code is never unpickled.

    Raises: RunError for a checkpoint that is damaged.
    """
    path = _linked(path)
    try:
        if path.is_dir():
            return {"path": path, **json.loads((path / _FACTS).read_text())}
        return {"path": path, **torch.load(path, map_location=device, weights_only=True)}
    except _OF_DEVICE:
        raise
    except Exception as error:  # whatever the unpickler stumbles over: KeyError, EOFError, UnpicklingError and more
        _check_there(path, error)
        raise RunError(f"{path} is damaged, or no checkpoint ({_told(error)})") from error


def _linked(path: Path) -> Path:
    """The folder that a checkpoint of several processes is now: a run that trains on may turn the link at any time."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _check_there(path: Path, error: BaseException) -> None:
    """Raise RunError where a run that trains on has removed what is being read."""
    if not path.exists():
        raise RunError(f"{path} was replaced by a later one while it was read: try again") from error


def load_peers(state: dict[str, Any], peers: Peers) -> None:
    """The weights of a loaded state's peers, of those that live here.

    Raises: RunError where it holds others.
    """
    with _fitting(state["path"]):
        if "learner" in state:
            peers.load_state_dict(state["learner"]["peers"])
        else:
            _read(state["path"], {f"peers.{name}": tensor for name, tensor in peers.state_dict().items()})


def restore(state: dict[str, Any], learner: Learner, mesh: Mesh = ONE) -> tuple[Position, Tally, float]:
    """Put a loaded state into the learner and torch's generators; returns where training goes on.

    Raises: RunError where the learner is not the one that was saved.
    """
    with _fitting(state["path"]):
        return _restore(state, learner, mesh)


def _restore(state: dict[str, Any], learner: Learner, mesh: Mesh) -> tuple[Position, Tally, float]:
    position, best_top1 = Position(*state["position"]), state["best_top1"]
    one_file = "learner" in state  # several processes write a folder instead
    if one_file and mesh.size == 1:
        learner.load_state_dict(state["learner"])
        torch.set_rng_state(state["rng_cpu"].cpu())
        device, states = _device(learner), state["rng_cuda"]
        if device.type == "cuda" and states:  # one, or of an earlier version one for each GPU of a machine
            torch.cuda.set_rng_state(states[min(device.index, len(states) - 1)].cpu(), device)
        return position, Tally(**state["tally"]), best_top1
    targets = _own_tensors(learner)
    if one_file:
        found = _named(state["learner"], _of_peers(learner), None)
        for name, target in targets.items():
            target.copy_(found[name])
        learner.load_scaler(state["learner"]["scaler"])
        tally = Tally(**state["tally"])
    else:
        tally = Tally(state["tally"]["names"], None, state["tally"]["steps"])
        device = _device(learner)
        same, generators = state["mesh"] == [mesh.data, mesh.peer], _generators(mesh.rank, device)
        if tally.steps:
            tally.sums = targets["tally"] = torch.zeros(len(tally.names), device=device)
            if same:
                targets[f"rank{mesh.rank}.tally"] = targets.pop("tally")
        targets |= generators if same else {}
        _read(state["path"], targets)
        learner.load_scaler(state["scaler"])
        if same:
            _set_generators(generators, mesh.rank, device)
            return position, tally, best_top1
    if tally.sums is not None:
        tally.sums[:-1] /= mesh.peer  # losses: `over_all` adds them up over the peers' processes; the last is a mean
    return position, tally, best_top1


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """One line instead of torch's list of all names that it misses."""
    try:
        yield
    except _OF_DEVICE:
        raise
    except (RuntimeError, KeyError, ValueError, OSError, CheckpointException) as error:
        _check_there(path, error)
        raise RunError(
            f"{path} does not fit what this version of cutnmix makes of the run's keys: go on with the version that "
            f"wrote it, or train anew in another folder ({_told(error)})"
        ) from error


def _first(error: BaseException) -> BaseException:
    """Of many processes' errors in one the first."""
    if isinstance(error, CheckpointException):
        return next((failure for failure, _ in error.failures.values()), error)
    return error


def _told(error: BaseException) -> str:
    """An error of torch in a line, and its type where it says nothing."""
    error = _first(error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{reason[:_REASON]}{'...' * (len(reason) > _REASON)}"


def _save_folder(path: Path, learner: Learner, position: Position, tally: Tally, best_top1: float, mesh: Mesh) -> None:
    slots = [path.with_suffix(f".{i}") for i in range(2)]
    slot = slots[path.is_symlink() and os.readlink(path) == slots[0].name]
    if mesh.first:
        shutil.rmtree(slot, ignore_errors=True)
        slot.mkdir()
    slot = path.with_name(mesh.same(slot.name))
    tensors, sums = _own_tensors(learner) | _generators(mesh.rank, _device(learner)), tally.over_all(mesh)
    if sums is not None and tally.sums is not None:
        tensors |= {"tally": sums, f"rank{mesh.rank}.tally": tally.sums}
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # whose batch norms are kept does not change
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(slot), planner=planner)
    if mesh.first:
        facts = {
            "position": position,
            "best_top1": best_top1,
            "mesh": [mesh.data, mesh.peer],
            "tally": {"names": tally.names, "steps": tally.steps},
            "scaler": learner.scaler.state_dict(),
        }
        with (slot / _FACTS).open("w") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        link = path.with_suffix(".partial")
        link.unlink(missing_ok=True)
        link.symlink_to(slot.name)
        os.replace(link, path)
        _clear(path)
    mesh.wait()


def _clear(path: Path) -> None:
    """Remove the folders that `path` does not point to."""
    for i in range(2):
        slot = path.with_suffix(f".{i}")
        if slot.is_dir() and not (path.is_symlink() and os.readlink(path) == slot.name):
            shutil.rmtree(slot)


def _read(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill the targets in place, each from what has its name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself, on purpose
        dcp.load({**targets}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def _own_tensors(learner: Learner) -> dict[str, Tensor]:
    """All tensors of a learner by the names of a checkpoint; those of the optimizer are made if it has not stepped."""
    learner.make_momentum()
    own = [int(number) for number, _ in learner.peers.nets.named_children()]
    return _named(learner.state_dict(), _of_peers(learner), own)


def _of_peers(learner: Learner) -> Mapping[str, tuple[int, Sequence[int]]]:
    return getattr(learner.method, "of_peers", {})


def _named(
    state: dict[str, Any], of_peers: Mapping[str, tuple[int, Sequence[int]]], own: list[int] | None
) -> dict[str, Tensor]:
    """The tensors of Learner.state_dict by name, the same on any mesh. `own`: the peers that it is of, None for all."""
    named = {f"{part}.{name}": tensor for part in ("peers", "method") for name, tensor in state[part].items()}
    memory = state["optimizer"]["state"]
    for group in state["optimizer"]["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            entries = memory.get(number, {}).items()
            named |= {f"optimizer.{name}.{key}": entry for key, entry in entries if isinstance(entry, Tensor)}
    for part, (axis, sizes) in of_peers.items():
        own = [*range(len(sizes))] if own is None else own
        for name in (f"method.{part}", f"optimizer.method.{part}.momentum_buffer"):
            if name in named:
                pieces = named.pop(name).split([sizes[j] for j in own], axis)
                named |= {f"{name}.peer{j}": piece for j, piece in zip(own, pieces, strict=True)}
    return named


def _generators(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators, of the host and of the own GPU, which each process has for itself."""
    states = {f"rank{rank}.rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"rank{rank}.rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, Tensor], rank: int, device: torch.device) -> None:
    torch.set_rng_state(states[f"rank{rank}.rng_cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"rank{rank}.rng_cuda"], device)


def _device(learner: Learner) -> torch.device:
    return next(learner.peers.parameters()).device
