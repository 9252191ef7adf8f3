"""What a plan will cost: images and FLOPs by arithmetic, time from a few real steps of each network.

    FLOP of training = images x MACs x 2 x 3, over the networks that are trained: 2 a MAC, backward = 2 x forward
    FLOP of a network that only predicts, such as a teacher, and of the evaluations = images x MACs x 2; a teacher's
    images are the views, which several peers may share
    seconds = FLOP / (FLOP of a step / its seconds), each network at the rate of its own measured step

MACs as models/cost.py counts them. The optimizer, the norms and starting up are not counted.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cutnmix.benchmarks.reproduce.grid import IMAGES_PER_CLASS, Planned
from cutnmix.models.cost import branches_cost, cost
from cutnmix.models.saved import network_name
from cutnmix.pipeline.dataset import DataError
from cutnmix.pipeline.distort import view_size
from cutnmix.pipeline.laws import Distort
from cutnmix.trainer.build import load_data
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.keys import Config, ConfigError, Data
from cutnmix.trainer.overview import stepping

CIFAR = {"cifar10": 10, "cifar100": 100}  # classes; sizes by heart, so that a plan needs no data set
CIFAR_TEST = 10_000
STEPS, SECONDS = 3, 10.0  # a measurement: so many steps, or as many as fit into SECONDS


class Sizes(NamedTuple):
    """Of a data set as a run sees it."""

    train: int
    test: int
    classes: int
    size: tuple[int, int]  # (H, W) of the views


class Work(NamedTuple):
    """Of one run, or of several together."""

    images: int  # training images, a second view of one counted too
    train_flops: int
    test_flops: int
    disk_bytes: int  # checkpoints and exported peers: 5 x 4 bytes a parameter

    @property
    def flops(self) -> int:
        """All."""
        return self.train_flops + self.test_flops


class Measured(NamedTuple):
    """A training step of a run: the median of a few."""

    seconds: float
    flops_per_s: float


def sizes(config: Config) -> Sizes:
    """How many images a run trains and tests on; CIFAR's without a look at the files."""
    data = config.data
    if data.name not in CIFAR:
        return _loaded_sizes(data.model_dump_json(), config.distort.image_size)
    every = CIFAR[data.name]
    classes = every if data.classes is None else data.classes if isinstance(data.classes, int) else len(data.classes)
    images = IMAGES_PER_CLASS[data.name] if data.images_per_class is None else data.images_per_class
    return Sizes(images * classes, CIFAR_TEST // every * classes, classes, (32, 32))


@cache
def _loaded_sizes(data: str, image_size: int) -> Sizes:
    """Of the keys under `data` as JSON, which has a hash."""
    train, test = load_data(Data.model_validate_json(data).model_copy(update={"download": False}))
    return Sizes(len(train), len(test), len(train.classes), view_size(train, Distort(image_size=image_size)))


def work(config: Config) -> Work:
    """Of a whole run.

    Raises: ConfigError for a network that is unknown or does not take the images.
    """
    data = sizes(config)
    macs, parameters = _peers_cost(config, data)
    teacher = _teacher_macs(config, data)
    views = 2 if config.needs.second == "image" else 1  # of an image and peer, trained on
    seen = data.train * config.epochs
    evaluations = -(-config.epochs // config.eval_every)  # the last epoch is always evaluated
    return Work(
        images=seen * (2 if config.needs.second else 1),
        train_flops=2 * seen * (macs * (3 * views + config.needs.predicts) + teacher * config.num_views),
        test_flops=2 * data.test * evaluations * (macs + teacher),
        disk_bytes=5 * 4 * parameters,
    )


def _peers_cost(config: Config, data: Sizes) -> tuple[int, int]:
    """(MACs of an image through all peers, parameters)."""
    peers = config.peers
    try:
        if peers.form == "nets":
            costs = [_cost(name, data.classes, data.size) for name in peers.networks]
            return sum(c.macs for c in costs), sum(c.parameters for c in costs)
        branches = _branches_cost(peers.networks[0], peers.count, data.classes, data.size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    cut = branches.shared if config.views == "shared" else branches.per_peer
    return cut.macs, cut.parameters


def _teacher_macs(config: Config, data: Sizes) -> int:
    """MACs of a view through a trained teacher, or 0; one that is not there yet counts as the first peer's network."""
    teacher, own = config.method.get("teacher"), config.peers.networks[0]
    if not teacher:
        return 0
    with suppress(ValueError):
        own = network_name(Path(os.path.expanduser(str(teacher))), peer=config.method.get("teacher_peer", 0))
    return _cost(own, data.classes, data.size).macs


_cost, _branches_cost = cache(cost), cache(branches_cost)


def left(config: Config) -> float:
    """The share of a run that is still to do, by what is on record."""
    folder = RunFolder(config.folder)
    if folder.result.exists():
        return 0.0
    records = folder.records() if folder.last.exists() else []
    return 1 - records[-1]["epoch"] / config.epochs if records else 1.0


def measure(config: Config) -> Measured:
    """A few of the run's own training steps here, data and update included: one batch of its loader after another.

    Raises: ConfigError, DataError as building the run does.
    """
    step_flops = work(config).train_flops / (sizes(config).train * config.epochs) * config.batch_size
    with stepping(config, loading=True) as step:
        _timed(step, config.loader.prefetch + 1)  # not counted: their batches, but one, were ready beforehand
        seconds = statistics.median(_timed(step, STEPS))
    return Measured(seconds, step_flops / seconds)


def _timed(step: Callable[[], float], most: int) -> list[float]:
    """Seconds of so many steps, or of as many as fit into SECONDS."""
    began = time.perf_counter()
    taken = [step()]
    while len(taken) < most and time.perf_counter() - began < SECONDS:
        taken.append(step())
    return taken


def absent_data(plan: Iterable[Planned], download: bool) -> dict[str, str]:
    """The data sets of the plan that cannot be had, each with the reason. Loads every one of the others once.

    `download` false keeps a look at the plan from downloading anything.
    Raises: DataError, naming the row, for keys that do not fit a data set which is there.
    """
    there: set[str] = set()
    refused: dict[str, tuple[Planned, str]] = {}
    different = {run.config.data.model_dump_json(): run for run in plan}
    for run in different.values():
        if reason := _refusal(run.config.data, download):
            refused.setdefault(run.cell.data, (run, reason))
        else:
            there.add(run.cell.data)
    for name, (run, reason) in refused.items():
        whole = run.config.data.model_copy(update={"classes": None, "images_per_class": None})
        if name in there or not _refusal(whole, download):
            raise DataError(f"row {run.cell.row.name}: {reason}")
    return {name: reason for name, (_, reason) in refused.items()}


def _refusal(data: Data, download: bool) -> str:
    """Why it cannot be loaded, or ""."""
    try:
        load_data(data.model_copy(update={"download": data.download and download}))
    except DataError as error:
        return str(error)
    return ""
