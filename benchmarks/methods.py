"""What each method costs: its training step with J peers, beside J steps of one plain network."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cutnmix.benchmarks.measure import Clock, Spread, per_second
from cutnmix.benchmarks.records import Row, Sheet
from cutnmix.benchmarks.steps import keys, training
from cutnmix.pipeline import Dataset
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.overview import beside, overrides

PAPERS_PEERS = {"one": 3, "okddip": 3, "pcl": 3}  # with two, okddip is one peer and a leader
WARMUP = 1  # steps a turn: the data is ready at once
NOTES = [
    "Data and update included, no mix. J separate plain networks are J times one baseline of J = 1, on the same batch "
    "size, measured before and after each step.",
    "baseline is J plain networks in one step. one is J branches on a trunk, the others whole networks. cs_kd "
    "runs them on another image of each one's class too, ddgsd on a second view of each. kd has a teacher of the same "
    "architecture.",
]


def peers_of(name: str, count: int) -> int:
    """`count`, or PAPERS_PEERS where that is more."""
    return max(count, PAPERS_PEERS.get(name, 1), METHODS[name].needs.min_peers)


def measure(
    *,
    root: Path | None,
    data: Dataset,
    network: str,
    count: int,
    batch: int,
    rounds: int,
    seconds: float,
    device: torch.device,
) -> list[Sheet]:
    """Milliseconds of a step of each method, and its ratio to J times the step of one plain network, in turn."""
    clock, classes = Clock(device), len(data.classes)
    counts = {f"{name}, J = {peers_of(name, count)}": peers_of(name, count) for name in METHODS}
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def enter(name: str, peers: int) -> Callable[[], float]:
            method = overrides(name, network, peers, classes, Path(folder))
            overridden = keys(root, network, batch, peers, device, "loader=resident", *method)
            step = stack.enter_context(training(overridden))
            return lambda: 1000 / per_second(step, clock, seconds=seconds, warmup=WARMUP)

        plain = enter("baseline", 1)
        figures = {row: enter(name, counts[row]) for row, name in zip(counts, METHODS, strict=True)}
        for figure in (plain, *figures.values()):  # what is made at first use
            figure()
        ms, ratios_to_one = beside(plain, figures, rounds)
    times: dict[str, Row] = {row: {"step": Spread.of(values)} for row, values in ms.items()}
    ratios: dict[str, Row] = {
        row: {"step": Spread.of([ratio / counts[row] for ratio in values])} for row, values in ratios_to_one.items()
    }
    return [
        Sheet(f"A training step, {network}, batch {batch}, {data.name}", "ms", "", times),
        Sheet("The same / (J x a plain step of one network)", "ratio", "", ratios),
    ]
