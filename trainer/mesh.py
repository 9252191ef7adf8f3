"""The processes of a run: a mesh of data x peer under torchrun, or one process alone, which needs no torch.distributed.

Rank = data index * peer + peer index: neighbours, on one machine as a rule, hold different peers of the same images.
Collectives of tensors on a GPU go through NCCL, all others through gloo; a process that does not answer within
`mesh.timeout_s` ends the run of all, and torchrun, if it may, starts them anew.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cutnmix.trainer.device import find_device
from cutnmix.trainer.exchange import ALONE, Exchange
from cutnmix.trainer.folder import Stopped
from cutnmix.trainer.keys import Config, ConfigError

_ROLL_CALL_S = 5.0  # how long the processes that notice a loss wait for one another, to tell who is missing
_LINGER_S = 5.0

T = TypeVar("T")


class LostError(Exception):
    """Another process of the run has died or does not answer."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Where this process stands, and what it can ask of all others. Every process must ask, in the same order."""

    data: int = 1
    peer: int = 1
    rank: int = 0
    devices: DeviceMesh | None = None  # None: alone

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data * self.peer

    @property
    def data_index(self) -> int:
        """The part of every batch that this process sees."""
        return self.rank // self.peer

    @property
    def peer_index(self) -> int:
        """The part of the peers that it holds."""
        return self.rank % self.peer

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the run's folder and talks to the user."""
        return self.rank == 0

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The processes that hold the same peers."""
        return None if self.devices is None else self.devices.get_group("data")

    @property
    def over(self) -> Exchange:
        """What methods, losses and the step see of this."""
        if self.devices is None:
            return ALONE
        peer, data = (self.devices.get_group(axis).group_name for axis in ("peer", "data"))
        return Exchange(
            peer if self.peer > 1 else None, self.peer_index, self.peer, data if self.data > 1 else None, self.data
        )

    def agree(self, signum: int) -> int:
        """The largest of all processes' numbers."""
        if self.devices is None:
            return signum
        largest = torch.tensor([signum])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def same(self, value: T) -> T:
        """The first process's value."""
        if self.devices is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def of_all_peers(self, value: T) -> list[T]:
        """The values of the processes that see the same images, in the order of their peers."""
        if self.devices is None:
            return [value]
        values: list[Any] = [None] * self.peer
        dist.all_gather_object(values, value, group=self.devices.get_group("peer"))
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.devices is None:
            return values
        self.wait()  # over gloo, which tells who is missing: for a sum of GPUs the host would wait without an end
        values = values.clone()
        dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)

    def share_buffers(self, *modules: nn.Module) -> None:
        """Give all processes that hold the same peers the buffers of the first of them."""
        if self.devices is None or self.data == 1:
            return
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=self.peer_index, group=self.data_group)


ONE = Mesh()


def leave_it_to_the_first() -> NoReturn:
    """End a process that is refused for the same reason as the first one, which says so.

    Not at once: torchrun stops all others when one has ended, and would cut the message short.
    """
    time.sleep(_LINGER_S)
    raise SystemExit(2)


@contextmanager
def joined(config: Config) -> Iterator[Mesh]:
    """The mesh of a run, while it lasts; without torchrun this process alone.

    Where all processes leave together, its threads end here: one that still holds a tensor when Python ends aborts the
    process, which then exits with -6 instead of its own code (pytorch#179291).

    Raises:
        ConfigError: if torchrun has not started data * peer processes, or there is no device for each.
        LostError: within, when another process does not answer.
    """
    mesh, started = config.mesh, int(os.environ.get("WORLD_SIZE", 1))
    if config.num_processes != started:
        raise ConfigError(
            f"mesh: data={mesh.data} x peer={mesh.peer} needs {config.num_processes} processes, not {started}: "
            f"torchrun --nproc-per-node {config.num_processes} -m cutnmix.trainer train ..."
        )
    if started == 1:
        yield ONE
        return
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=mesh.timeout_s)
    try:
        _meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout)
        devices = init_device_mesh(device.type, (mesh.data, mesh.peer), mesh_dim_names=("data", "peer"))
        for axis in ("data", "peer"):
            dist.distributed_c10d.set_timeout(timeout, devices.get_group(axis))
        yield Mesh(mesh.data, mesh.peer, dist.get_rank(), devices)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise LostError(_roll_call(mesh.timeout_s, str(error))) from error
    except (Stopped, SystemExit):  # all leave together: nobody waits in a collective, which would hold up the end of it
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meet(backend: str, timeout: timedelta) -> None:
    """init_process_group, but apart from former starts of the same run.

    torchrun's own store outlives the processes that it starts anew, which would read the addresses of the dead in it
    (pytorch#135712).
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store = dist.PrefixStore(f"start{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _roll_call(timeout_s: float, reason: str) -> str:
    """Who is missing, in words. Those who noticed sign in torchrun's store, which outlives them."""
    missing, keys = "unknown", {each: f"cutnmix/here/{each}" for each in range(int(os.environ["WORLD_SIZE"]))}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[int(os.environ["RANK"])], "here")
        end = time.monotonic() + _ROLL_CALL_S
        while time.monotonic() < end and not store.check([*keys.values()]):
            time.sleep(0.1)
        missing = ", ".join(str(each) for each, key in keys.items() if not store.check([key])) or "none at roll call"
    except (RuntimeError, ValueError):  # the store is gone, with the process that held it, or never was
        pass
    return (
        f"mesh: another process died or did not answer for {timeout_s:g} s (mesh.timeout_s); "
        f"no sign of life from rank: {missing} ({reason.splitlines()[0][:200]})"
    )
