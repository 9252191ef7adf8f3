"""What the command prints: the grids, the plan with its cost, how it ended."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table

from cutnmix.benchmarks.reproduce import estimate
from cutnmix.benchmarks.reproduce.drive import Summary, state
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
    states = [state(run) for run in runs]
    works = [_UNKNOWN if _images(run) is None else estimate.work(run.config) for run in runs]
    shares = [estimate.left(run.config) for run in runs]
    rows = list(zip(runs, states, works, shares, strict=True))
    display.note(f"{grid.title}{_stamp(scale)}")
    display.note(f"{len(runs)} runs ({_lengths(runs)}), {where}")
    if dry:
        for run, kept, _, share in rows:
            display.note(f"{kept:8} {run.config.folder.name}" + (f", {share:.0%} left" if kept == "cut off" else ""))
    heads = ("network", "runs", "done", "cut off", "missing", "images", "PFLOP", "a step", "time")
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits into 80 columns
    for column in table.columns[1:]:
        column.justify = "right"
    flops, seconds = 0.0, []
    for network in dict.fromkeys(run.cell.network for run in runs):
        mine = [row for row in rows if row[0].cell.network == network]
        counts = Counter(kept for _, kept, _, _ in mine)
        to_do = [(work, share) for run, _, work, share in mine if dry or run.cell.data not in absent]
        images = sum(work.images * share for work, share in to_do)
        flops_left = sum(work.flops * share for work, share in to_do)
        step = time = "-"
        there = [run for run, kept, _, _ in mine if kept != "done" and run.cell.data not in absent]
        if measure and there:
            measured = estimate.measure(there[0].config)
            seconds.append(flops_left / measured.flops_per_s)
            step, time = f"{1000 * measured.seconds:,.0f} ms", _time(seconds[-1])
        cells = (str(counts[kept]) for kept in ("done", "cut off", "missing"))
        table.add_row(network, str(len(mine)), *cells, _number(images), _number(flops_left / 1e15), step, time)
        flops += flops_left
    display.console.print(table)
    display.note(
        f"To do: {_number(flops / 1e15)} PFLOP = MACs x 2 x 3 (forward, and twice that backward) x training images x "
        f"epochs, and MACs x 2 of each evaluation, over all networks of a run."
    )
    if seconds:
        display.note(
            f"About {_time(sum(seconds))}, one run after another: an estimate from a few real steps of the first "
            f"unfinished run of each network, timed just now on {hardware(choose(runs[0].config).device)}. "
            f"What goes on beside it, and starting up, comes on top."
        )
    display.note(f"Disk: about {_bytes(work.disk_bytes for work in works)} of checkpoints and weights.")
    for data, reason in absent.items():
        what = "would be downloaded, or its runs left out" if dry else "its runs are left out"
        display.note(f"{data} is not there, {what}: {reason}")


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
