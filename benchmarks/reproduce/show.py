"""What the command prints: the grids, the plan with its cost, how it ended."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple, get_args

from rich import box
from rich.table import Table

from cutnmix.benchmarks.reproduce import estimate
from cutnmix.benchmarks.reproduce.drive import State, Summary, state
from cutnmix.benchmarks.reproduce.grid import Grid, Planned, grids, load_grid
from cutnmix.pipeline.dataset import DataError
from cutnmix.trainer.device import choose
from cutnmix.trainer.display import Display
from cutnmix.trainer.run import hardware


def grids_table() -> Table:
    """A row a shipped grid."""
    table = Table("grid", "title", "runs")
    for name in grids():
        grid = load_grid(name)
        runs = len(grid.data) * len(grid.networks) * len(grid.rows) * len(grid.seeds)
        table.add_row(name.replace("/", " "), grid.title, str(runs))
    return table


def plan(
    grid: Grid,
    runs: Sequence[Planned],
    scale: float,
    where: str,
    *,
    absent: Mapping[str, str],
    measure: bool,
    dry: bool,
    display: Display,
) -> None:
    """A row a network: what is done, what is left, and what that costs. A `dry` look lists the runs one by one too.

    `absent` are the data sets that are not there, each with the reason; in the cost they count in a dry look only, if
    their size is known by heart. Neither that of what is done nor that of what is left out asks for data.
    Raises: ConfigError for an unknown network, RunError for a folder of another run, both before anything is measured.
    """
    states: list[State] = [state(run) for run in runs]
    works = [_UNKNOWN if _images(run) is None else estimate.work(run.config) for run in runs]
    rows = [
        _Row(run, kept, work, estimate.left(run.config)) for run, kept, work in zip(runs, states, works, strict=True)
    ]
    display.note(f"{grid.title}{_stamp(scale)}")
    display.note(f"{len(runs)} runs ({_lengths(runs)}), {where}")
    if dry:
        for row in rows:
            left = f", {row.left:.0%} left" if row.state == "cut off" else ""
            display.note(f"{row.state:8} {row.run.config.folder.name}{left}")
    costs = [
        _cost([row for row in rows if row.run.cell.network == network], absent, measure, dry)
        for network in dict.fromkeys(run.cell.network for run in runs)
    ]
    display.console.print(_costs_table(costs))
    display.note(
        f"To do: {_number(sum(cost.flops for cost in costs) / 1e15)} PFLOP = MACs x 2 x 3 (forward, and twice that "
        f"backward) x training images x epochs, and MACs x 2 of each evaluation, over all networks of a run."
    )
    if seconds := [cost.seconds for cost in costs if cost.seconds is not None]:
        display.note(
            f"About {_time(sum(seconds))}, one run after another: an estimate from a few real steps of the first "
            f"unfinished run of each network, timed just now on {hardware(choose(runs[0].config).device)}. "
            f"What goes on beside it, and starting up, comes on top."
        )
    display.note(f"Disk: about {_bytes(work.disk_bytes for work in works)} of checkpoints and weights.")
    for data, reason in absent.items():
        what = "would be downloaded, or its runs left out" if dry else "its runs are left out"
        display.note(f"{data} is not there, {what}: {reason}")


class _Row(NamedTuple):
    """A run of the plan."""

    run: Planned
    state: State
    work: estimate.Work
    left: float  # share of the work


class _Cost(NamedTuple):
    """What is left of a network's runs."""

    network: str
    states: Sequence[State]
    images: float
    flops: float
    measured: estimate.Measured | None

    @property
    def seconds(self) -> float | None:
        """One run after another; None where nothing was measured."""
        return None if self.measured is None else self.flops / self.measured.flops_per_s


def _cost(rows: Sequence[_Row], absent: Container[str], measure: bool, dry: bool) -> _Cost:
    """Of the rows of one network. The first run that can be trained here is measured."""
    to_do = [row for row in rows if dry or row.run.cell.data not in absent]
    there = [row.run.config for row in rows if row.state != "done" and row.run.cell.data not in absent]
    return _Cost(
        network=rows[0].run.cell.network,
        states=[row.state for row in rows],
        images=sum(row.work.images * row.left for row in to_do),
        flops=sum(row.work.flops * row.left for row in to_do),
        measured=estimate.measure(there[0]) if measure and there else None,
    )


def _costs_table(costs: Iterable[_Cost]) -> Table:
    heads = ("network", "runs", *get_args(State), "images", "PFLOP", "a step", "time")
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits into 80 columns
    for column in table.columns[1:]:
        column.justify = "right"
    for cost in costs:
        counts = (str(cost.states.count(state)) for state in get_args(State))
        step = "-" if cost.measured is None else f"{1000 * cost.measured.seconds:,.0f} ms"
        time = "-" if cost.seconds is None else _time(cost.seconds)
        work = (_number(cost.images), _number(cost.flops / 1e15))
        table.add_row(cost.network, str(len(cost.states)), *counts, *work, step, time)
    return table


_UNKNOWN = estimate.Work(0, 0, 0, 0)


def _images(run: Planned) -> int | None:
    """How many it trains on; None where its data set is not there to be counted."""
    try:
        return estimate.sizes(run.config).train
    except DataError:
        return None


def summary(ended: Summary, grid: Grid, scale: float, absent: Iterable[str], display: Display) -> None:
    """What ended how, and where the page is."""
    counts = [f"{len(ended.finished)} finished", f"{len(ended.failed)} failed"]
    counts += [f"those of {data} left out, as it is not there" for data in absent]
    if ended.taken:
        counts.append(f"{len(ended.taken)} left to another process: {', '.join(ended.taken)}")
    display.note(f"{grid.name}{_stamp(scale)}: {', '.join(counts)}")
    for name, reason in ended.failed.items():
        display.note(f"failed: {name}: {reason}")
    if ended.page:
        display.note(f"report: {ended.page}")


def _stamp(scale: float) -> str:
    return "" if scale == 1 else f", AT SCALE {scale:g}: short runs, not the paper's"


def _lengths(runs: Iterable[Planned]) -> str:
    """Such as 5 epochs of 1,000 images."""
    lengths = {(run.config.epochs, _images(run)): None for run in runs}
    return ", ".join(
        f"{epochs} epochs" + (f" of {images:,} images" if images is not None else "") for epochs, images in lengths
    )


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _bytes(counts: Iterable[int]) -> str:
    total = sum(counts)
    return f"{total / 1e9:.1f} GB" if total > 1e9 else f"{total / 1e6:.0f} MB"
