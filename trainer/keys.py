"""The keys of a run, their defaults, and what each may be.

A method's own keys stand with it, in methods/; those of `distort` and `mix` in pipeline/laws.py.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cutnmix.pipeline.laws import Distort, Mix
from cutnmix.trainer.method import Needs
from cutnmix.trainer.methods import METHODS


class ConfigError(Exception):
    """The configuration is wrong; the message names the key, where it was set, and what is allowed."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _without_nul(path: Any) -> Any:
    if "\0" in str(path):
        raise ValueError("no file can have a name with a null character")
    return path


_can_name_a_file = AfterValidator(_without_nul)
FileName = Annotated[str, _can_name_a_file]
PathName = Annotated[Path, _can_name_a_file]


class Data(_Group):
    """Which images."""

    name: str = "cifar100"  # an entry of cutnmix.pipeline.datasets.DATASETS
    root: PathName | None = None
    classes: Annotated[int, Field(ge=2)] | list[int | str] | None = None
    images_per_class: Annotated[int, Field(ge=1)] | None = None
    download: bool = True
    train: str | None = None  # webdataset: patterns of the shards below root; None: train/*.tar and val/*.tar
    val: str | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"  # image files; skip: leave out, counted, what does not decode

    @property
    def own_files(self) -> bool:
        """Whether the images are files of the user's own: nothing but root says which they are."""
        return self.name in ("folder", "webdataset")

    @property
    def absolute_root(self) -> Path | None:
        """The same place from any working folder."""
        return self.root and Path(os.path.expanduser(self.root)).absolute()


class Loader(_Group):
    """How they reach the device. auto: dali where it is installed, resident elsewhere; both give the same pixels."""

    name: Literal["auto", "dali", "resident"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = (
        None  # of DALI; None: 1 beside CPU training, else a share of the cores
    )
    prefetch: Annotated[int, Field(ge=1)] = 2


class PeersGroup(_Group):
    """Who learns."""

    network: str | Annotated[list[str], Field(min_length=1)] = "resnet32"  # a list: one each
    count: Annotated[int, Field(ge=1)] = 2  # of a list: its length
    form: Literal["nets", "branches"] = "nets"  # branches share all but their last stage and head

    @model_validator(mode="before")
    @classmethod
    def _count_of_a_list(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("network"), list) and tree["network"]:
            tree = {"count": len(tree["network"]), **tree}
        return tree

    @model_validator(mode="after")
    def _one_network_each(self) -> "PeersGroup":
        if isinstance(self.network, list) and len(self.network) != self.count:
            raise ValueError(
                f"{self.count} peers, but network lists {len(self.network)}: leave count out, or make it so"
            )
        return self

    @property
    def networks(self) -> list[str]:
        """The network of each peer."""
        return self.network if isinstance(self.network, list) else [self.network] * self.count


class MeshGroup(_Group):
    """Over how many processes of torchrun, data * peer in all; 1 x 1 is one process, without torchrun."""

    data: Annotated[int, Field(ge=1)] = 1  # parts of a batch
    peer: Annotated[int, Field(ge=1)] = 1  # parts of the peers
    sync_batch_norm: bool = False  # statistics over the whole batch; False: over the images of a process
    timeout_s: Annotated[float, Field(gt=0)] = 600.0  # how long a process waits for another before the run ends


class Optimizer(_Group):
    """SGD. `accumulate` batches, of equal weight, make one update."""

    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    accumulate: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optimizer":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum > 0")
        return self


class Schedule(_Group):
    """The factor on lr over time, see trainer/schedule.py. Milestones and warm-up in epochs."""

    name: Literal["step", "cosine", "constant"] = "step"
    milestones: list[Annotated[float, Field(ge=0)]] = [150, 180, 210]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0


class Checkpoint(_Group):
    """When the state is written; always at the end of the run and on SIGTERM."""

    every_epochs: Annotated[int, Field(ge=1)] = 1
    every_steps: Annotated[int, Field(ge=1)] | None = None  # at the first update so many steps after the last time
    best: bool = True  # keep best.pt too: the best TEST accuracy of the peers' mean, named as such


_KEYS_OF_MIX = {
    "none": set(),
    "cutmix": {"alpha", "probability", "box_rule", "groups"},
    "cutnmix": {"alpha", "probability", "box_rule", "groups"},
    "mixup": {"alpha", "probability", "groups"},
    "cutout": {"length"},
}


def idle_distortions(data: Data) -> set[str]:
    """The keys under `distort` that do nothing for images of that data set."""
    return {"pad"} if data.own_files else {"image_size", "crop_scale", "crop_ratio", "region"}


def refuse_stray(group: str, values: BaseModel, keys: set[str], under: str) -> None:
    """Refuse keys of a group that do nothing here, where they are not at their defaults. For a validator to call."""
    fields = type(values).model_fields
    if stray := [f"{group}.{key}" for key in sorted(keys) if getattr(values, key) != fields[key].default]:
        raise PydanticCustomError("stray", "would do nothing under {under}", {"under": under, "keys": stray})


class Config(_Group):
    """All of a run. The defaults are the paper's recipe."""

    name: FileName | None = None  # the run's folder under `runs`; None: made from the keys that tell runs apart
    runs: PathName = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 95
    epochs: Annotated[int, Field(ge=1)] = 240
    batch_size: Annotated[int, Field(ge=1)] = 64
    drop_last: bool = False  # the last batch of an epoch, if it is not full
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    views: Literal["shared", "per_peer"] = "per_peer"
    mix: Mix = Mix(name="cutnmix")
    method: dict[str, Any] = {"name": "cutnmix"}
    data: Data = Data()
    distort: Distort = Distort()
    loader: Loader = Loader()
    peers: PeersGroup = PeersGroup()
    mesh: MeshGroup = MeshGroup()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    channels_last: bool = True
    compile: Literal["auto", "none", "peers", "step", "graph"] = "auto"  # see trainer/device.py
    deterministic: bool = False
    resume: Literal["never", "auto"] = "never"
    log_every: Annotated[int, Field(ge=1)] = 50  # steps
    eval_every: Annotated[int, Field(ge=1)] = 1  # epochs; the last one is always evaluated
    imports: list[str] = []  # modules to import first: what adds entries to METHODS, NETWORKS or DATASETS

    @property
    def num_views(self) -> int:
        """V."""
        return self.peers.count if self.views == "per_peer" else 1

    @property
    def num_processes(self) -> int:
        """How many share the run."""
        return self.mesh.data * self.mesh.peer

    @property
    def needs(self) -> Needs:
        """What the method asks of the other keys."""
        return METHODS[self.method["name"]].needs

    @property
    def images_per_step(self) -> int:
        """Images that the loader reads a training step: the batch, and its second views where the method needs them."""
        return self.batch_size * (2 if self.needs.second else 1)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        network = self.peers.network
        peers = "-".join(network) if isinstance(network, list) else f"{network}x{self.peers.count}"
        if self.peers.form != "nets":
            peers += f"-{self.peers.form}"
        parts = (self.data.name, peers, self.method["name"], self.mix.name, self.views, f"seed{self.seed}")
        return Path(os.path.expanduser(self.runs)) / (self.name or "-".join(parts))

    @model_validator(mode="after")
    def _keys_that_belong_together(self) -> "Config":
        unused = set(Mix.model_fields) - {"name"} - _KEYS_OF_MIX[self.mix.name]
        refuse_stray("mix", self.mix, unused, f"mix.name: {self.mix.name}")
        if self.mix.name == "cutout":
            refuse_stray("distort", self.distort, {"cutout"}, "mix.name: cutout, which has its own length")
        refuse_stray("distort", self.distort, idle_distortions(self.data), f"data.name: {self.data.name}")
        files = self.data.own_files
        unused = ({"corrupt"} if not files else set()) | ({"train", "val"} if self.data.name != "webdataset" else set())
        refuse_stray("data", self.data, unused, f"data.name: {self.data.name}")
        if self.schedule.name != "step":
            refuse_stray("schedule", self.schedule, {"milestones", "gamma"}, f"schedule.name: {self.schedule.name}")
        return self
