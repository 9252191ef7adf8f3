"""The tables of the README and of RESULTS.md, made from benchmarks/results: what stands between two markers is theirs.

<!-- bench:NAME -->     NAME.json, the record of a benchmark
<!-- runs:NAME -->      NAME/runs.csv, the report.csv of cutnmix reproduce
<!-- compared:NAME -->  NAME/compared.csv, lines of cutnmix compare --csv on runs of cutnmix reproduce

Nobody types a figure, so none can differ from what was measured; a test checks that none in a table does. The same
differences make compared.png, see plots.py.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cutnmix.benchmarks.records import Record, heads, read_records, sheets_of, text
from cutnmix.benchmarks.reproduce.grid import load_grid
from cutnmix.benchmarks.reproduce.results import value_of
from cutnmix.benchmarks.reproduce.sheets import value_text
from cutnmix.trainer.compare import told

DOCUMENTS = ("README.md", "benchmarks/RESULTS.md")  # of a checkout
Line = dict[str, str]  # of a CSV
MARKED = re.compile(r"(<!-- (bench|runs|compared):(\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
LABELLED = ("s1", "ablation/views")  # the grids that say how a row is called here, the first one's word first
ROUNDING = 1e-9  # of a percentage that two machines made of the same hits
READINGS = {"mean": "mean of the peers", "ensemble": "their ensemble", "teacher": "peer teacher"}


class _Run(NamedTuple):
    """A run of cutnmix reproduce."""

    cell: str  # DATA-NETWORK
    row: str
    seed: int

    @property
    def name(self) -> str:
        """That of its folder."""
        return f"{self.cell}-{self.row}-seed{self.seed}"


class Point(NamedTuple):
    """A run of one seed on some images, in percent."""

    top1: float
    less: float | None = None  # the difference to the run of the first method with that seed, if both are there
    error: float | None = None  # its standard error over images; None where the two were not scored side by side


class Differences(NamedTuple):
    """Methods beside the first of them."""

    what: str  # the images
    seeds: list[int]
    rows: dict[str, dict[int, Point]]  # label -> seed -> point


def render(record: Record, plots: str) -> str:
    """A record as Markdown: its plot of the folder `plots`, a table a sheet, its conditions. Ends in a newline."""
    parts = [f"![{record['command']}]({plots}/{record['benchmark']}.png)"]
    for sheet in sheets_of(record):
        rows = []
        for row, cells in sheet.rows.items():
            bold = "**" if row.startswith("cutnmix") else ""
            values = [text(cells[column]) if column in cells else "" for column in sheet.columns]
            rows.append([f"{bold}{row}{bold}", *values])
        parts.append(f"**{sheet.title}**: {sheet.unit}\n\n{_table(['', *heads(sheet)], rows).rstrip()}")
    parts += record["notes"]
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    parts.append(
        f"`{record['command']}` ({settings}) on {record['hardware']}; {record['versions']}; "
        f"commit {record['commit']}, {record['date']}."
    )
    return "\n\n".join(parts) + "\n"


def accuracies(runs: list[Line]) -> str:
    """The finished runs of a grid on one network as Markdown, a line a method: top-1 percent of the last epoch.

    The mean over n seeds, with the sample standard deviation where n > 1. A method without a finished run has no line.

    Raises:
        ValueError: for runs of several grids, stamps, data sets or networks, or two of a method and seed.
    """
    for one in ("grid", "stamp", "data", "network"):
        if len(found := dict.fromkeys(run[one] for run in runs)) > 1:
            raise ValueError(f"its runs are of more than one {one}: {', '.join(found)}")
    counts = Counter((run["method"], run["seed"]) for run in runs)
    if twice := [f"{method} with seed {seed}" for (method, seed), count in counts.items() if count > 1]:
        raise ValueError(f"it has more than one run of {', '.join(twice)}")
    labels = {row.name: row.label for row in load_grid(runs[0]["grid"]).rows}
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs if run["state"] == "done"):
        done = [run for run in runs if (run["method"], run["state"]) == (method, "done")]
        found = {name: [run[f"last_epoch_{name}_top1"] for run in done] for name in READINGS}
        if found["ensemble"] == found["mean"]:  # of one network
            found["ensemble"] = []
        values = [value_of([float(cell) for cell in cells if cell]) for cells in found.values()]
        rows.append([labels[method], str(len(done)), *(value_text(value) if value else "" for value in values)])
    return _table([runs[0]["stamp"], "n", *READINGS.values()], rows)


def differences_of(lines: list[Line]) -> Differences:
    """Runs beside the method of the first line: the mean of the peers.

    Raises:
        ValueError: for runs that cutnmix reproduce would call otherwise, or lines that do not belong together.
    """
    lines = [line for line in lines if line["prediction"] == "mean"]
    runs = {line["run"]: _run(line["run"]) for line in lines}
    top1: dict[str, float] = {}
    pairs: dict[tuple[str, str], tuple[float, float]] = {}  # the difference of one run less another, and its error
    for line in lines:
        value = float(line["top1"])
        if abs(top1.setdefault(line["run"], value) - value) > ROUNDING:
            raise ValueError(f"{line['run']} has two values of top1: {top1[line['run']]} and {value}")
        if line["difference"]:
            difference, error = float(line["difference"]), float(line["difference_error"])
            pairs[line["run"], line["less"]] = difference, error
            pairs[line["less"], line["run"]] = -difference, error
    images, *others = {(line["on"], line["images"]) for line in lines}
    if others or len({run.cell for run in runs.values()}) > 1:
        raise ValueError("its lines are of other images, or of another data set or network, than its first one")

    def point(run: _Run) -> Point:
        value, reference = top1[run.name], run._replace(row=first.row).name
        if run.name == reference or reference not in top1:
            return Point(value)
        return Point(value, *pairs.get((run.name, reference), (value - top1[reference], None)))

    first, *_ = runs.values()
    known = [row for grid in LABELLED for row in load_grid(grid).rows]
    labels = {row.name: row.label for row in reversed(known)}
    found = [run.row for run in runs.values()]
    rows = [row for row in dict.fromkeys([first.row, *(row.name for row in known), *found]) if row in found]
    on, count = images
    return Differences(
        what=told(on, int(count)),
        seeds=sorted({run.seed for run in runs.values()}),
        rows={
            labels.get(row, f"`{row}`"): {run.seed: point(run) for run in runs.values() if run.row == row}
            for row in rows
        },
    )


def compared(found: Differences) -> str:
    """As Markdown, a line a method, a column a seed. In brackets the difference, with its error where there is one."""

    def shown(point: Point | None) -> str:
        if point is None or point.less is None:
            return "" if point is None else f"{point.top1:.2f}"
        spread = "" if point.error is None else f" \u00b1 {point.error:.2f}"
        return f"{point.top1:.2f} ({point.less:+.2f}{spread})"

    table = [[label, *(shown(points.get(seed)) for seed in found.seeds)] for label, points in found.rows.items()]
    return _table([found.what, *(f"seed {seed}" for seed in found.seeds)], table)


def read_compared(path: Path) -> Differences:
    """`differences_of` a file. Raises: ValueError that names it."""
    with _named(path):
        return differences_of(_lines(path))


def compared_files(document: Path, folder: Path) -> list[Path]:
    """The compared.csv that a document's markers ask for."""
    found = MARKED.findall(document.read_text())
    return [folder / name / "compared.csv" for _, kind, name, _ in found if kind == "compared"]


def fill(document: Path, folder: Path) -> str:
    """A document with what stands between each pair of markers made anew, from what lies in the folder.

    Raises:
        ValueError: for markers that have no record there, or one that cannot be read so.
    """
    records = read_records(folder)
    plots = Path(os.path.relpath(folder, document.parent)).as_posix()

    def made(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        if kind == "bench" and name in records:
            return f"{begin}{render(records[name], plots)}{end}"
        path = folder / name / f"{kind}.csv"
        if kind == "bench" or not path.is_file():
            raise ValueError(f"no record of {kind}:{name} in {folder}: run it first")
        with _named(path):
            lines = _lines(path)
            return f"{begin}{accuracies(lines) if kind == 'runs' else compared(differences_of(lines))}{end}"

    return MARKED.sub(made, document.read_text())


def _lines(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors raised within name the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} lacks the column {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _run(name: str) -> _Run:
    parts = re.fullmatch(r"(.+)-([a-z0-9_]+)-seed(\d+)", name)
    if not parts:
        raise ValueError(f"{name!r} is not of the form DATA-NETWORK-ROW-seedN, as cutnmix reproduce names its runs")
    return _Run(parts[1], parts[2], int(parts[3]))


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"{_line(line)}\n" for line in [head, ["---"] * len(head), *rows])


def _line(cells: list[str]) -> str:
    return re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(cells)} |")
