"""The report of a grid, written from its run folders, whatever of them is done.

report.html      the page
report.md        the same tables and sentences as Markdown, with curves-*.png
report.csv       a row a run
report-cells.csv a row a cell

Each carries the scale, the page on every table and the CSV in every row, so that no short run is taken for a full one.
"""

import re
import shlex
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cutnmix.benchmarks.measure import commit
from cutnmix.benchmarks.reproduce import curves, page, sheets
from cutnmix.benchmarks.reproduce.findings import Finding, findings
from cutnmix.benchmarks.reproduce.grid import Grid, Planned
from cutnmix.benchmarks.reproduce.results import READINGS, Results, collect
from cutnmix.benchmarks.reproduce.sheets import Entry, Sheet
from cutnmix.trainer.folder import csv_text, write_atomically


def write(grid: Grid, plan: list[Planned], scale: float, out: Path) -> Path:
    """Write all files of the report into `out` and return the page's path.

    Figures are kept from call to call, so that only those of runs that went on are drawn anew.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = collect(grid, plan, scale)
    found, facts = findings(results), provenance(results)
    write_atomically(out / "report.csv", csv_text(_run_rows(results)))
    write_atomically(out / "report-cells.csv", csv_text(_cell_rows(results)))
    write_atomically(out / "report.md", _markdown(results, found, facts, _pictures(results, out)))
    write_atomically(out / "report.html", page.render(results, found, facts))
    return out / "report.html"


def provenance(results: Results) -> list[tuple[str, str]]:
    """(name, text) of what the figures are worth nothing without."""
    done = [run.result for run in results.runs if run.done]

    def seen(texts: list[str]) -> str:
        counts = Counter(texts)
        return (
            "; ".join(f"{text} ({n} runs)" if len(counts) > 1 else text for text, n in counts.most_common()) or "none"
        )

    seeds = list(dict.fromkeys(run.seed for run in results.runs))
    return [
        ("Scale", results.stamp.text),
        ("Command", _command()),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Hardware", seen([result["hardware"] for result in done])),
        ("Precision", seen([f"{result['precision']}, compile {result['compile']}" for result in done])),
        ("Versions", seen([", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in done])),
        ("Written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, at commit {commit()}"),
    ]


def _command() -> str:
    """The command line that this process is."""
    program = Path(sys.argv[0])
    if program.stem in ("cutnmix", "__main__"):
        return shlex.join(["cutnmix", *sys.argv[1:]])
    return "called from Python"


def _run_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for cell in results.cells.values():
        for run in cell.runs:
            best, result = run.best_epoch, run.result
            rows.append(
                {
                    "grid": results.grid.name,
                    "stamp": results.stamp.text,
                    "scale": results.scale,
                    "data": cell.data,
                    "network": cell.network,
                    "method": cell.row.name,
                    "seed": run.seed,
                    "state": run.state,
                    "epochs": run.epochs,
                    "last_epoch_on_record": run.curve[-1][0] if run.curve else 0,
                    **{f"last_epoch_{name}_top1": run.reading(name) for name in READINGS},
                    "best_epoch_chosen_on_test": best[0] if best else None,
                    "best_epoch_chosen_on_test_mean_top1": best[1] if best else None,
                    **{key: result.get(key) for key in ("images_per_s", "hours", "peak_memory_bytes", "parameters")},
                    **{key: result.get(key) for key in ("hardware", "precision", "compile")},
                    "versions": " ".join(f"{k}={v}" for k, v in result.get("versions", {}).items()),
                }
            )
    return rows


def _cell_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for (data, network, name), cell in results.cells.items():
        value, theirs = cell.value, results.theirs(data, network, name)
        over = results.difference(data, network, name, results.reference) if name != results.reference else None
        rows.append(
            {
                "grid": results.grid.name,
                "stamp": results.stamp.text,
                "scale": results.scale,
                "data": data,
                "network": network,
                "method": name,
                "runs_planned": len(cell.runs),
                "n": value.n if value else 0,
                "mean_top1": value.mean if value else None,
                "spread": value.spread if value else None,
                "paper_top1": theirs.mean if theirs else None,
                "paper_spread": theirs.spread if theirs else None,
                "comparable": results.stamp.comparable,
                "difference": value.mean - theirs.mean if value and theirs else None,
                "reference": results.reference,
                "gain": over.mean if over else None,
                "gain_pairs": over.n if over else 0,
                "gain_p_paired_t": over.p if over else None,
                "paper_gain": results.paper.gain(data, network, name, results.reference) if results.paper else None,
                **{key: cell.cost(key) for key in ("images_per_s", "hours", "peak_memory_bytes")},
            }
        )
    return rows


def _pictures(results: Results, out: Path) -> dict[str, str]:
    """Title -> file name of the figure of each place that has one."""
    pictures = {}
    for data, network in results.places:
        if lines := curves.mean_lines(results.at(data, network)):
            title = results.place(data, network)
            name = f"curves-{data}-{re.sub('[^A-Za-z0-9_.]', '_', network)}.png"
            write_atomically(out / name, curves.png(lines, f"{title}\n{results.stamp.text}"))
            pictures[title] = name
    return pictures


def _markdown(results: Results, found: list[Finding], facts: list[tuple[str, str]], pictures: dict[str, str]) -> str:
    notes = sheets.notes_of(results)
    stamp = f"**{results.stamp.text}**"
    done = sum(run.done for run in results.runs)
    parts = [f"# {results.grid.title}", stamp, results.grid.note, f"{done} of {len(results.runs)} runs done."]
    parts.append(page.compared(results))
    for about, title in page.GROUPS.items():
        lines = [_sentence(finding) for finding in found if finding.about == about]
        parts += [f"## {title}", "\n".join(lines)] if lines else []
    parts += [f"![{title}]({name})" for title, name in pictures.items()]
    for sheet, _ in sheets.accuracies(results, notes):
        parts += _sheet(sheet, stamp)
    parts += _sheet(sheets.ranking(results, notes), stamp) + _sheet(sheets.costs(results), stamp)
    if results.paper:
        parts += ["## Notes on the paper's figures", f"{results.paper.source}. {results.paper.seeds}"]
        parts.append("\n".join(f"{n}. {note.text}" for n, note in enumerate(notes, 1)))
    parts += ["## Where this is from", "\n".join(f"- {name}: {text}" for name, text in facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sentence(finding: Finding) -> str:
    quote = f'"{finding.quote}": ' if finding.quote else ""
    verdict = f"**{finding.verdict}**. " if finding.verdict else ""  # without figures of the paper there is none
    return f"- {quote}{verdict}{finding.text}"


def _sheet(sheet: Sheet, stamp: str) -> list[str]:
    heads = [column.title + _marks(column.marks) for column in sheet.columns]
    rule = ["---:" if column.number else "---" for column in sheet.columns]
    lines = [heads, rule, *([_text(entry) for entry in row] for row in sheet.rows)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return [f"### {sheet.title}{_marks(sheet.marks)}", stamp, table]


def _text(entry: Entry) -> str:
    text = f"**{entry.text}**" if entry.strong else entry.text
    return text + _marks(entry.marks) + "".join(f"; {line}" for line in entry.under.splitlines())


def _marks(numbers: tuple[int, ...]) -> str:
    return f" [{', '.join(map(str, numbers))}]" if numbers else ""
