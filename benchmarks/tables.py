"""The README's tables, made from the records: text between <!-- bench:NAME --> and <!-- /bench --> is theirs.

Nobody types a figure, so none can differ from what was measured; a test checks that none does.
"""

import re

from cutnmix.benchmarks.records import Record, heads, sheets_of, text

MARKED = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


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


def fill(readme: str, records: dict[str, Record]) -> str:
    """The README with what stands between each pair of markers made anew.

    Raises:
        ValueError: for markers of a benchmark that has no record.
    """
    if missing := [name for _, name, _ in MARKED.findall(readme) if name not in records]:
        raise ValueError(f"no record of {', '.join(missing)}: run its benchmark first")
    return MARKED.sub(lambda found: f"{found[1]}{render(records[found[2]])}{found[3]}", readme)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
