"""The README's tables, made from benchmarks/results: what stands between two markers is theirs.

<!-- bench:NAME -->     NAME.json, the record of a benchmark
<!-- runs:NAME -->      NAME/runs.csv, the report.csv of cutnmix reproduce
<!-- compared:NAME -->  NAME/compared.csv, of cutnmix compare

Nobody types a figure, so none can differ from what was measured; a test checks that none does.
"""

import csv
import re
from pathlib import Path

from cutnmix.benchmarks.records import Record, heads, read_records, sheets_of, text
from cutnmix.benchmarks.reproduce.grid import load_grid
from cutnmix.benchmarks.reproduce.results import value_of
from cutnmix.benchmarks.reproduce.sheets import value_text
from cutnmix.trainer.compare import told

Line = dict[str, str]  # of a CSV
MARKED = re.compile(r"(<!-- (bench|runs|compared):(\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
READINGS = {"mean": "mean of the peers", "ensemble": "their ensemble", "teacher": "peer teacher"}


def render(record: Record) -> str:
    """A record as Markdown: its plot, a table a sheet, what it was taken on. Ends in a newline."""
    name = record["benchmark"]
    parts = [f"![{record['command']}](benchmarks/results/{name}.png)"]
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
    """
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


def compared(lines: list[Line]) -> str:
    """Runs beside the first of them on the same images as Markdown, a line a run: percent +- standard error."""
    runs = list(dict.fromkeys(line["run"] for line in lines))
    rows = []
    for run in runs:
        row = [f"`{run}`"]
        for name in ("mean", "ensemble"):
            (line,) = [line for line in lines if (line["run"], line["prediction"]) == (run, name)]
            row.append(_with_error(line["top1"], line["error"]))
            row.append(_with_error(line["difference"], line["difference_error"], "+") if line["difference"] else "")
        rows.append(row)
    first = f"less `{runs[0]}`"
    what = told(lines[0]["on"], int(lines[0]["images"]))
    return _table([what, READINGS["mean"], first, READINGS["ensemble"], first], rows)


def fill(readme: str, folder: Path) -> str:
    """The README with what stands between each pair of markers made anew, from what lies in the folder.

    Raises:
        ValueError: for markers that have no record there.
    """
    records = read_records(folder)

    def made(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        if kind == "bench" and name in records:
            return f"{begin}{render(records[name])}{end}"
        path = folder / name / f"{kind}.csv"
        if kind == "bench" or not path.is_file():
            raise ValueError(f"no record of {kind}:{name} in {folder}: run it first")
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        return f"{begin}{accuracies(lines) if kind == 'runs' else compared(lines)}{end}"

    return MARKED.sub(made, readme)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"{_line(line)}\n" for line in [head, ["---"] * len(head), *rows])


def _with_error(value: str, error: str, sign: str = "") -> str:
    return f"{float(value):{sign}.2f} \u00b1 {float(error):.2f}"


def _line(cells: list[str]) -> str:
    return re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(cells)} |")
