"""The README's tables, made from the records: text between <!-- bench:NAME --> and <!-- /bench --> is theirs.

Between <!-- runs:NAME --> and <!-- /runs --> it is made from NAME/runs.csv, the report.csv of a grid of runs.
Nobody types a figure, so none can differ from what was measured; a test checks that none does.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from cutnmix.benchmarks.records import Record, heads, sheets_of, text
from cutnmix.benchmarks.reproduce.grid import load_grid
from cutnmix.benchmarks.reproduce.results import value_of
from cutnmix.benchmarks.reproduce.sheets import value_text

Run = dict[str, str]  # a line of a report.csv
MARKED = re.compile(r"(<!-- (bench|runs):(\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
READINGS = {"mean": "mean of the peers", "ensemble": "their ensemble", "teacher": "peer teacher"}


def render(record: Record) -> str:
    """A record as Markdown: its plot, a table a sheet, what it was taken on. Ends in a newline."""
    name = record["benchmark"]
    parts = [f"![{record['command']}](benchmarks/results/{name}.png)"]
    for sheet in sheets_of(record):
        lines = [f"**{sheet.title}**: {sheet.unit}", ""]
        lines += [_line(["", *heads(sheet)]), _line(["---"] * (1 + len(sheet.columns)))]
        for row, cells in sheet.rows.items():
            bold = "**" if row.startswith("cutnmix") else ""
            values = [text(cells[column]) if column in cells else "" for column in sheet.columns]
            lines.append(_line([f"{bold}{row}{bold}", *values]))
        parts.append("\n".join(lines))
    parts += record["notes"]
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    parts.append(
        f"`{record['command']}` ({settings}) on {record['hardware']}; {record['versions']}; "
        f"commit {record['commit']}, {record['date']}."
    )
    return "\n\n".join(parts) + "\n"


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """Name -> the runs of a grid, of each NAME/runs.csv in the folder."""
    found = {}
    for path in sorted(folder.glob("*/runs.csv")):
        with path.open(newline="") as file:
            found[path.parent.name] = list(csv.DictReader(file))
    return found


def accuracies(runs: list[Run]) -> str:
    """The finished runs of a grid on one network as Markdown, a line a method: top-1 percent of the last epoch.

    The mean over n seeds, with the sample standard deviation where n > 1. A method without a finished run has no line.
    """
    labels = {row.name: row.label for row in load_grid(runs[0]["grid"]).rows}
    lines = [_line([runs[0]["stamp"], "n", *READINGS.values()]), _line(["---"] * (2 + len(READINGS)))]
    for method in dict.fromkeys(run["method"] for run in runs if run["state"] == "done"):
        done = [run for run in runs if (run["method"], run["state"]) == (method, "done")]
        found = {name: [run[f"last_epoch_{name}_top1"] for run in done] for name in READINGS}
        if found["ensemble"] == found["mean"]:  # of one network
            found["ensemble"] = []
        values = [value_of([float(cell) for cell in cells if cell]) for cells in found.values()]
        lines.append(_line([labels[method], str(len(done)), *(value_text(value) if value else "" for value in values)]))
    return "\n".join(lines) + "\n"


def fill(readme: str, records: Mapping[str, Record], runs: Mapping[str, list[Run]]) -> str:
    """The README with what stands between each pair of markers made anew.

    Raises:
        ValueError: for markers that have no record.
    """
    known = {"bench": records, "runs": runs}
    if missing := [name for _, kind, name, _ in MARKED.findall(readme) if name not in known[kind]]:
        raise ValueError(f"no record of {', '.join(missing)}: run it first")

    def made(found: re.Match[str]) -> str:
        body = render(records[found[3]]) if found[2] == "bench" else accuracies(runs[found[3]])
        return f"{found[1]}{body}{found[4]}"

    return MARKED.sub(made, readme)


def _line(cells: list[str]) -> str:
    return re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(cells)} |")
