"""From run folders to results: what each run left, cells over seeds, differences, rankings.

The headline of a run is the LAST epoch's mean over peers. Best epoch (chosen on the test images, and named so), best
peer, ensemble and teacher stand beside it under their own names. A cell is the mean and the sample standard deviation
(n - 1 below the fraction) of the runs that are done; a run that is not done counts for nothing but its curve.
"""

import json
import re
import statistics
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cutnmix.benchmarks.reproduce.grid import Grid, Planned, Row, own_config
from cutnmix.benchmarks.reproduce.paper import DATA, Table, Value, load_table
from cutnmix.trainer.folder import RunError, RunFolder
from cutnmix.trainer.keys import Config, ConfigError

Curve = list[tuple[float, float]]  # (epoch, the peers' mean top-1 percent)
READINGS = {  # of the last epoch, by the name that the run has for them, and as it is shown
    "mean": "Mean of peers",
    "best_peer": "Best peer",
    "ensemble": "Ensemble",
    "teacher": "Teacher",
    "leader": "Leader",  # OKDDip's, which its paper reports
}

# The keys that the paper's figures hang on, beside epochs and images; others, such as precision, are a user's own.
HELD = ("batch_size", "distort", "drop_last", "method", "mix", "optimizer", "peers", "schedule", "views")


class Run(NamedTuple):
    """What a run has left so far."""

    seed: int
    epochs: int  # planned
    state: str  # "done", "begun", "to do", or why its folder holds another run
    curve: Curve
    result: dict[str, Any]  # of result.json; empty until the run is done

    @property
    def done(self) -> bool:
        """Whether it counts."""
        return bool(self.result)

    @property
    def known(self) -> bool:
        """Whether its folder is its own, or not there yet."""
        return self.state in ("done", "begun", "to do")

    @property
    def top1(self) -> float | None:
        """The headline."""
        return self.reading("mean")

    @property
    def best_epoch(self) -> tuple[int, float] | None:
        """The epoch whose mean over peers is best ON THE TEST IMAGES, and that mean."""
        best = self.result.get("best_epoch_on_test")
        return (best["epoch"], best["scores"]["mean"]["top1"]) if best else None

    def reading(self, name: str) -> float | None:
        """One of READINGS, top-1 percent; None where the run is not done or has none of that name."""
        scores = self.result.get("last_epoch", {}).get("scores", {})
        return scores[name]["top1"] if name in scores else None


class Outcome(NamedTuple):
    """The runs of one method on one network and data set."""

    data: str
    network: str
    row: Row
    runs: list[Run]

    @property
    def done(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.done]

    @property
    def value(self) -> Value | None:
        """The headline over seeds."""
        return value_of([run.top1 for run in self.runs])

    @property
    def best_epoch(self) -> Value | None:
        """The best epoch of each run, chosen on the test images, over seeds."""
        return value_of([run.best_epoch[1] if run.best_epoch else None for run in self.runs])

    def reading(self, name: str) -> Value | None:
        """One of READINGS over seeds."""
        return value_of([run.reading(name) for run in self.runs])

    def cost(self, key: str) -> float | None:
        """images_per_s, hours or peak_memory_bytes, the median of the runs that recorded it."""
        found = [run.result[key] for run in self.done if run.result.get(key) is not None]
        return statistics.median(found) if found else None


class Difference(NamedTuple):
    """One cell minus another, seed by seed, in points of top-1 percent."""

    mean: float
    n: int  # seeds that both have
    p: float | None  # two-sided paired t; None below three pairs, or where all pairs differ by the same
    low: float | None  # of the 95 % interval of the mean, where there is a p
    high: float | None


class Stamp(NamedTuple):
    """What kind of runs these are, for the top of every page and every row of the CSV."""

    text: str
    comparable: bool  # with the paper's figures


class Results(NamedTuple):
    """All of a grid, as far as it is done."""

    grid: Grid
    scale: float
    stamp: Stamp
    paper: Table | None
    cells: dict[tuple[str, str, str], Outcome]  # by data, network and the row's name

    @property
    def places(self) -> list[tuple[str, str]]:
        """(data, network), in the order of the grid."""
        return list(dict.fromkeys((data, network) for data, network, _ in self.cells))

    @property
    def runs(self) -> list[Run]:
        """Of all cells."""
        return [run for cell in self.cells.values() for run in cell.runs]

    def at(self, data: str, network: str) -> list[Outcome]:
        """The cells of one network on one data set, in the order of the grid's rows."""
        return [cell for cell in self.cells.values() if (cell.data, cell.network) == (data, network)]

    def ours(self, data: str, network: str, method: str) -> Value | None:
        """The value of a cell; None where no run is done."""
        cell = self.cells.get((data, network, method))
        return cell.value if cell else None

    def theirs(self, data: str, network: str, method: str) -> Value | None:
        """The value that the paper prints."""
        return self.paper.value(data, network, method) if self.paper else None

    def difference(self, data: str, network: str, one: str, other: str) -> Difference | None:
        """One method minus another, paired by seed."""
        cells = [self.cells.get((data, network, name)) for name in (one, other)]
        return paired(cells[0], cells[1]) if cells[0] and cells[1] else None

    @property
    def reference(self) -> str:
        """The row that the others' gains are over: the baseline, else the first."""
        names = list(dict.fromkeys(name for _, _, name in self.cells))
        return "baseline" if "baseline" in names else names[0]

    def label(self, method: str) -> str:
        """The name of a row, for people."""
        return next((row.label for row in self.grid.rows if row.name == method), method)

    def network(self, name: str) -> str:
        """The name of a network, the paper's if it has one."""
        return self.paper.networks.get(name, name) if self.paper else name

    def place(self, data: str, network: str) -> str:
        """The name of a place, for people."""
        return f"{DATA.get(data, data)}, {self.network(network)}"


def collect(grid: Grid, plan: list[Planned], scale: float) -> Results:
    """What the planned runs have left in their folders; those that are not there count as to do."""
    cells: dict[tuple[str, str, str], Outcome] = {}
    for planned in plan:
        data, network, row = planned.cell
        cell = cells.setdefault((data, network, row.name), Outcome(data, network, row, []))
        cell.runs.append(read_run(planned.seed, planned.config))
    paper = load_table(grid.paper) if grid.paper else None
    return Results(grid, scale, stamp(grid, plan, scale, paper), paper, cells)


def read_run(seed: int, config: Config) -> Run:
    """What is in the folder of a planned run.

    A folder that was started with other keys, such as another number of epochs, is not taken for this run.
    """
    folder = RunFolder(config.folder)
    if not folder.config.exists():
        return Run(seed, config.epochs, "to do", [], {})
    if reason := _foreign(folder.path, folder.config.stat().st_mtime_ns, config.model_dump_json()):
        return Run(seed, config.epochs, reason, [], {})
    metrics = folder.metrics.stat() if folder.metrics.exists() else None
    curve = _curve(folder.path, metrics.st_mtime_ns, metrics.st_size) if metrics else []
    result = json.loads(folder.result.read_text()) if folder.result.exists() else {}
    if result and result["last_epoch"]["epoch"] != config.epochs:
        return Run(seed, config.epochs, f"ended at epoch {result['last_epoch']['epoch']}", curve, {})
    return Run(seed, config.epochs, "done" if result else "begun", curve, result)


# A report is written again after each run; what has not changed since is not parsed again.


@lru_cache(maxsize=4096)
def _curve(path: Path, _written: int, _size: int) -> Curve:
    return [(record["epoch"], record["scores"]["mean"]["top1"]) for record in RunFolder(path).records("test")]


@lru_cache(maxsize=4096)
def _foreign(path: Path, _written: int, planned: str) -> str:
    """Why the folder holds another run than the planned one, or "" if it does not."""
    try:
        RunFolder(path).check(Config.model_validate_json(planned).model_copy(update={"resume": "auto"}))
    except (RunError, ConfigError) as error:
        return str(error)
    return ""


def stamp(grid: Grid, plan: list[Planned], scale: float, paper: Table | None) -> Stamp:
    """Scale, epochs and images of the planned runs, and overrides of keys that the paper's figures hang on.

    Comparable if all runs have the paper's data sets, epochs and images, and those keys as the rows have them.
    """
    configs = [planned.config for planned in plan]
    epochs = sorted({config.epochs for config in configs})
    images = {config.data.images_per_class for config in configs}
    classes = {None if config.data.classes is None else str(config.data.classes) for config in configs}
    parts = [f"{_range(epochs)} epochs" if epochs != [1] else "1 epoch"]
    if images != {None}:
        parts.append(f"{_range(_all_last(images))} images a class")
    if classes != {None}:
        parts.append(f"{', '.join(_all_last(classes))} classes")
    whole = images == classes == {None}
    if whole:
        parts.append("all images")
    of_all, told = (
        [text for text in texts if re.split("[.=]", text)[0] in HELD] for texts in (grid.overrides, plan[0].overrides)
    )
    parts += [*of_all, *told]
    comparable = scale == 1 and paper is not None and epochs == [paper.epochs] and whole
    comparable = comparable and not of_all and {planned.cell.data for planned in plan} <= {*DATA}
    comparable = comparable and (not told or all(_as_the_grid(grid, planned) for planned in plan))
    verdict = "the paper's schedule and data" if comparable else "not comparable to the paper"
    return Stamp(f"SCALE {scale:g}: {', '.join(parts)}; {verdict}", comparable)


def _as_the_grid(grid: Grid, planned: Planned) -> bool:
    try:
        own = own_config(grid, planned.cell)
    except ConfigError:  # it is no run without the user's overrides
        return False
    return all(getattr(planned.config, key) == getattr(own, key) for key in HELD)


def _all_last(limits: set[Any]) -> list[Any]:
    return [*sorted(limit for limit in limits if limit is not None), *(["all"] if None in limits else [])]


def _range(numbers: list[Any]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def value_of(numbers: list[float | None]) -> Value | None:
    """Mean, sample standard deviation and count of those that there are."""
    known = [number for number in numbers if number is not None]
    if not known:
        return None
    return Value(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def paired(one: Outcome, other: Outcome) -> Difference | None:
    """Mean over seeds s of one_s - other_s, with the two-sided paired t test where three or more seeds allow it.

    None where the two have no seed in common. With equal seeds both saw the same images in the same order, so that the
    pairs belong together.
    """
    theirs = {run.seed: run.top1 for run in other.runs}
    pairs = [(run.top1, theirs.get(run.seed)) for run in one.runs]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return None
    differences = [a - b for a, b in both]
    mean = statistics.fmean(differences)
    if len(both) < 3 or max(differences) - min(differences) < 1e-9:
        return Difference(mean, len(both), None, None, None)
    from scipy.stats import ttest_1samp  # here, because importing it takes a second

    test: Any = ttest_1samp(differences, 0)
    interval = test.confidence_interval(0.95)
    return Difference(mean, len(both), float(test.pvalue), float(interval.low), float(interval.high))


def ranks(values: dict[str, Value | None]) -> dict[str, int]:
    """1 for the highest mean; equal means, to the two digits shown, share a rank; without a value there is none."""
    shown = {name: round(value.mean, 2) for name, value in values.items() if value}
    return {name: 1 + sum(other > mean for other in shown.values()) for name, mean in shown.items()}


def pairs_in_order(ours: dict[str, Value | None], theirs: dict[str, Value | None]) -> tuple[int, int]:
    """How many pairs of names stand in the same order in both, and how many pairs there are to compare.

    Pairs that are equal in either are not compared.
    """
    ours_ranks, theirs_ranks = ranks(ours), ranks(theirs)
    names = [name for name in ours_ranks if name in theirs_ranks]
    same = total = 0
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = ours_ranks[one] - ours_ranks[other], theirs_ranks[one] - theirs_ranks[other]
            same += a * b > 0
            total += a * b != 0
    return same, total
