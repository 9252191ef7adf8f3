"""The methods at a glance: what each asks for, what it remembers, and what a step of it costs on this machine."""

import json
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count as count_up
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.table import Table
from safetensors.torch import save_file

from cutnmix.models.cost import blueprint
from cutnmix.models.network import Network
from cutnmix.models.peers import Peers, build_peer, seeded
from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer.build import Parts, build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.keys import Config, ConfigError
from cutnmix.trainer.method import Needs, Task, keys_of
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.step import Tally

CIFAR100 = {"num_images": 50_000, "num_classes": 100}  # what the state is made for
WARMUP = 2  # steps
CAPTION = (
    "State: parameters and buffers for CIFAR-100. Cost: a step / one of the baseline; of the baseline against itself "
    "it shows what the machine adds."
)


class Row(NamedTuple):
    """A method. What needs a network that can be cut into branches is None for one that cannot."""

    name: str
    needs: Needs
    keys: dict[str, Any]  # with their defaults
    peers: int  # J of the two figures
    state_mb: float | None  # 1e6 bytes of parameters and buffers, for the training set of CIFAR-100
    cost: float | None  # a step / a step of the baseline of as many whole networks; None too where not measured


def overview(network: str, peers: int, steps: int) -> list[Row]:
    """A row for each of METHODS, at `peers` peers or as many as it needs. `steps` = 0 measures no cost.

    A teacher, where one must be given, is an untrained network of the same architecture: it costs as much.
    Raises: ConfigError for an unknown network.
    """
    try:
        can_be_cut = isinstance(blueprint(network, 10), Network)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = []
    for name, method in METHODS.items():
        count = max(peers, method.needs.min_peers)
        fits = can_be_cut or method.needs.form != "branches"
        state_mb = state_bytes(name, network, count, **CIFAR100) / 1e6 if fits else None
        cost = cost_of(name, network, count, steps) if fits and steps else None
        rows.append(Row(name, method.needs, defaults(name), count, state_mb, cost))
    return rows


def defaults(name: str) -> dict[str, Any]:
    """The YAML keys of a method, with their defaults."""
    return {key: default for key, (_, default) in keys_of(METHODS[name]).items()}


def needed_keys(name: str, network: str, num_classes: int, folder: Path) -> dict[str, Any]:
    """The keys without which a method cannot be built: of kd a teacher, an untrained network left in the folder."""
    if name != "kd":
        return {}
    path = folder / f"{network}-{num_classes}.safetensors"
    weights = build_peer(network, num_classes, seed=0, j=0).state_dict()
    save_file(weights, path, {"network": network, "num_classes": str(num_classes), "peer": "0"})
    return {"teacher": str(path)}


def overrides(name: str, network: str, count: int, num_classes: int, folder: Path) -> list[str]:
    """What sets the method and its peers in a configuration of that many classes, without a mix: some refuse one."""
    keys = needed_keys(name, network, num_classes, folder)
    form = METHODS[name].needs.form or "nets"
    peers = [f"peers.network={network}", f"peers.count={count}", f"peers.form={form}"]
    return [f"method={name}", *(f"method.{key}={json.dumps(value)}" for key, value in keys.items()), "mix=none", *peers]


def state_bytes(name: str, network: str, count: int, *, num_images: int, num_classes: int) -> int:
    """Bytes of a method's parameters and buffers, by its defaults; those of the peers are not counted."""
    needs = METHODS[name].needs
    peers = Peers([network] * count, num_classes=num_classes, seed=0, form=needs.form or "nets")
    task = Task(count, num_classes, peers.feature_dims, peers.trunk_dim, num_images, epochs=240, peers=peers)
    with TemporaryDirectory() as folder, seeded(0):
        method: Any = METHODS[name](task, **needed_keys(name, network, num_classes, Path(folder)))
    return sum(x.numel() * x.element_size() for x in (*method.parameters(), *method.buffers()))


def cost_of(name: str, network: str, count: int, steps: int) -> float:
    """Time of a step / that of the baseline with as many whole networks, on handwritten digits of 32x32.

    Both train by the defaults of this machine on a batch that stays the same, without a mix, one step each in turn. The
    median over `steps` turns of a step of the method / the mean of the two of the baseline around it: the machine's
    speed drifts.
    """
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def enter(method: str) -> Callable[[], float]:
            keys = ["data=digits", "loader=resident", *overrides(method, network, count, 10, Path(folder))]
            return stack.enter_context(stepping(load_config("quickstart", keys)))

        baseline, method = enter("baseline"), enter(name)
        for step in (baseline, method) * WARMUP:
            step()
        _, ratios = beside(baseline, {name: method}, steps)
        return statistics.median(ratios[name])


def beside(
    plain: Callable[[], float], figures: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Each figure, and its ratio to the plain one, `rounds` times, in turn.

    `plain` is taken before and after each, and their mean is what it is compared with: the machine's speed drifts.
    """
    taken: dict[str, list[float]] = {name: [] for name in figures}
    ratios: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(rounds):
        before = plain()
        for name, figure in figures.items():
            value, after = figure(), plain()
            taken[name].append(value)
            ratios[name].append(2 * value / (before + after))
            before = after
    return taken, ratios


@contextmanager
def stepping(config: Config, *, loading: bool = False) -> Iterator[Callable[[], float]]:
    """What trains one step, update included, and returns its seconds.

    On the first batch again and again, or where it is `loading`, on one batch after another, with loader and plan.
    """
    torch.backends.cudnn.benchmark = True  # as a run has it
    parts = build(config)
    tally, loaded = Tally([]), batches(parts)
    given = loaded if loading else repeat(next(loaded))
    on_gpu = parts.setting.device.type == "cuda"

    def step() -> float:
        start = time.perf_counter()
        parts.step.train(parts.learner, *next(given), tally, lr=config.optimizer.lr, share=1.0, update=True)
        if on_gpu:
            torch.cuda.synchronize(parts.setting.device)
        return time.perf_counter() - start

    try:
        yield step
    finally:
        loaded.close()
        parts.close()
        if on_gpu:
            torch.cuda.empty_cache()  # what tuning took: others may share the GPU


def batches(parts: Parts) -> Generator[tuple[Views, Draws], None, None]:
    """The views of each training step with what the mix draws, epoch after epoch without an end."""
    for epoch in count_up():
        plan = parts.plan(epoch)
        for step, views in enumerate(parts.loader.epoch(plan)):
            yield views, plan.step(step)


def make_tables(rows: list[Row]) -> tuple[Table, Table]:
    """One line a method: what it needs and costs; then its keys, which are too long to stand beside that."""
    heads = ("method", "paper", "peers", "form", "second view", "refuses", "state, MB", "cost")
    table, keys = Table(*heads, caption=CAPTION, caption_justify="left"), Table("method", "keys")
    for column in (table.columns[2], *table.columns[-2:]):
        column.justify = "right"
    for column in (table.columns[0], table.columns[3], keys.columns[0]):
        column.no_wrap = True  # on a narrow terminal
    for row in rows:
        needs = row.needs
        table.add_row(
            row.name,
            needs.paper or "-",
            f">= {needs.min_peers}",
            needs.form or "any",
            needs.second or "-",
            ", ".join(needs.refuses) or "-",
            "-" if row.state_mb is None else f"{row.state_mb:.2f}",
            "-" if row.cost is None else f"{row.cost:.2f} (J = {row.peers})",
        )
        keys.add_row(row.name, ", ".join(f"{key}: {_yaml(value)}" for key, value in row.keys.items()) or "-")
    return table, keys


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
