"""What a benchmark leaves: a record of sheets, as a table on the terminal, as JSON and as a plot.

    {"benchmark": NAME, "command": WORDS, **header, "settings": {...}, "notes": [...],
     "sheets": [{"title", "unit", "axis", "rows": {row: {column: cell}}}, ...]}

A cell is [median, lowest, highest, n], a number that does not vary, or null: what it needs is not installed.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from cutnmix.benchmarks.measure import CPU, Spread, header
from cutnmix.trainer.folder import write_atomically

Cell = Spread | float | None
Row = dict[str, Cell]  # column -> cell
Record = dict[str, Any]


class Sheet(NamedTuple):
    """One table, and one panel of the plot: rows are contenders, columns what was varied."""

    title: str
    unit: str  # of every cell
    axis: str  # what the columns are, such as "J"; "" where they are names
    rows: dict[str, Row]

    @property
    def columns(self) -> list[str]:
        """All columns, in the order in which they first appear."""
        return list(dict.fromkeys(column for row in self.rows.values() for column in row))


def make_record(
    benchmark: str,
    sheets: list[Sheet],
    settings: dict[str, Any],
    notes: list[str] | None = None,
    device: torch.device = CPU,
    command: str | None = None,
) -> Record:
    """A record of here and now. `command` makes one, `cutnmix bench BENCHMARK` if not told otherwise."""
    return {
        "benchmark": benchmark,
        "command": command or f"cutnmix bench {benchmark}",
        **header(device),
        "settings": settings,
        "notes": notes or [],
        "sheets": [{**sheet._asdict(), "rows": _map(_plain, sheet.rows)} for sheet in sheets],
    }


def _map(change: Callable[[Any], Any], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {column: change(cell) for column, cell in row.items()} for name, row in rows.items()}


def _plain(cell: Cell) -> list[float] | float | None:
    """As JSON has it, to six digits: more are noise."""
    if isinstance(cell, Spread):
        return [*(float(f"{value:.6g}") for value in cell[:3]), cell.n]
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


def sheets_of(record: Record) -> list[Sheet]:
    """The sheets of a record, also of one that was read from a file."""

    def cell(value: Any) -> Cell:
        return Spread(*value) if isinstance(value, list) else value

    return [Sheet(**{**sheet, "rows": _map(cell, sheet["rows"])}) for sheet in record["sheets"]]


def write_json(path: Path, content: Record | list[Record]) -> None:
    """JSON, whole or not at all; a cell on a line, so that a diff shows which one changed."""
    text = json.dumps(content, indent=1)
    write_atomically(path, re.sub(r"\[\s+([-+\d.e,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")


def read_records(folder: Path) -> dict[str, Record]:
    """Benchmark -> record, of the JSON files of a folder that are records."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {record["benchmark"]: record for record in found if isinstance(record, dict) and "sheets" in record}


def number(value: float, like: float | None = None) -> str:
    """Three digits that count, four near 1 (where ratios are), integers whole: 0.0123, 0.957, 1.019, 12.3, 4,043.

    `like`: with as many decimals as that number has.
    """
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value if like is None else like)
    digits = 3 if size == 0 or 0.9995 <= size < 2 else 2 - math.floor(math.log10(size))
    return f"{value:,.{max(0, digits)}f}"


def text(cell: Cell) -> str:
    """A cell for people: median (lowest..highest)."""
    if cell is None:
        return "not installed"
    if not isinstance(cell, Spread):
        return number(cell)
    if cell.n == 1:
        return number(cell.median)
    low, high = (number(end, like=cell.median) for end in (cell.low, cell.high))
    return f"{number(cell.median)} ({low}..{high})"


def middle(cell: Cell) -> float | None:
    """The figure of a cell without its spread."""
    return cell.median if isinstance(cell, Spread) else cell


def heads(sheet: Sheet) -> list[str]:
    """The columns' headings."""
    return [f"{sheet.axis} = {column}" if sheet.axis else column for column in sheet.columns]


def show(record: Record, console: Console) -> None:
    """Print it."""
    for key in ("hardware", "threads", "versions", "commit"):
        console.print(f"{key}: {record[key]}", soft_wrap=True)
    for sheet in sheets_of(record):
        table = Table("", *heads(sheet), title=f"{sheet.title}: {sheet.unit}", title_justify="left")
        for name, row in sheet.rows.items():
            table.add_row(name, *(text(row[column]) if column in row else "" for column in sheet.columns))
        console.print(table)
    for note in record["notes"]:
        console.print(note, soft_wrap=True)
