"""report.html: one file that holds its styles, its script and its figures, and asks the network for nothing.

Every text goes through `escape`. The page reads without its script, which only sorts tables.
"""

from collections import Counter
from html import escape
from pathlib import Path

from cutnmix.benchmarks.reproduce import curves, sheets
from cutnmix.benchmarks.reproduce.findings import AGAINST, AGREES, DISAGREES, LEANS, MIXED, OPEN, Finding
from cutnmix.benchmarks.reproduce.paper import Note
from cutnmix.benchmarks.reproduce.results import Outcome, Results
from cutnmix.benchmarks.reproduce.sheets import Entry, Sheet

CHIPS = {AGREES: "yes sure", LEANS: "yes", MIXED: "mixed", AGAINST: "no", DISAGREES: "no sure", OPEN: "open"}
GROUPS = {
    "claims": "What the paper says",
    "gains": "Gains over the reference",
    "order": "Order of the methods",
    "values": "Values",
}


def render(results: Results, found: list[Finding], facts: list[tuple[str, str]]) -> str:
    """The page; facts are (name, text) pairs that say where the figures are from."""
    grid, stamp = results.grid, escape(results.stamp.text)
    notes = sheets.notes_of(results)
    parts = [
        ("words", "In words", _words(found, results)),
        ("curves", "Accuracy over the epochs", _figures(results)),
        ("tables", "Tables", _tables(results, notes)),
        ("ranking", "Ranking", _table(sheets.ranking(results, notes), stamp)),
        ("cost", "Cost", _table(sheets.costs(results), stamp)),
        ("runs", "Every run", _cells(results, stamp)),
        ("notes", "Notes on the paper's figures", _notes(results, notes)),
        ("source", "Where this is from", _facts(facts)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in parts)
    sections = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>' for key, title, body in parts)
    kind = "paper" if results.stamp.comparable else "short"
    note = f'<p class="lede">{escape(grid.note)}</p>' if grid.note else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(grid.title)} | {stamp}</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}
@page {{ @top-center {{ content: "{_css(results.stamp.text)}" }} }}
</style>
</head>
<body>
<div class="stamp {kind}" role="note">{stamp}</div>
<header>
<p class="eyebrow">cutnmix reproduce {escape(grid.name)}</p>
<h1>{escape(grid.title)}</h1>
{note}
{_progress(results)}
<nav aria-label="Sections"><ol>{links}</ol></nav>
</header>
<main>
{sections}
</main>
<footer>{stamp}</footer>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _css(text: str) -> str:
    """The text inside a string of CSS: whatever might end it or the style is written by its code."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\{ord(c):x} " for c in text)


def _progress(results: Results) -> str:
    runs = results.runs
    done, begun = sum(run.done for run in runs), sum(run.state == "begun" for run in runs)
    other = [run for run in runs if not run.known]
    text = f"{done} of {len(runs)} runs done" + (f", {begun} begun" if begun else "")
    text += f", {len(other)} in a folder of another run" if other else ""
    bar = f'<progress max="{len(runs)}" value="{done}" aria-label="{text}"></progress>'
    return f'<p class="progress">{bar}<span>{text}</span></p>'


def _words(found: list[Finding], results: Results) -> str:
    text = f"<p>{escape(compared(results))}</p>"
    for about, title in GROUPS.items():
        items = [finding for finding in found if finding.about == about]
        if items:
            listed = f'<ul class="findings">{"".join(map(_finding, items))}</ul>'
            if about != "claims" and len(items) > 3:
                counts = Counter(item.verdict or "no figures of the paper" for item in items)
                most = ", ".join(f"{verdict}: {n}" for verdict, n in counts.most_common())
                listed = f"<details><summary>Of {len(items)} networks {most}</summary>{listed}</details>"
            text += f"<h3>{title}</h3>{listed}"
    return text


def compared(results: Results) -> str:
    """What of the paper these runs can be held against, one paragraph."""
    what = "Signs, orders and values" if results.stamp.comparable else "Signs and orders, not values,"
    return f"{results.stamp.text}. {what} are compared, by the last epoch's mean over peers."


def _finding(finding: Finding) -> str:
    quote = f"<q>{escape(finding.quote)}</q>" if finding.quote else ""
    kind, verdict = CHIPS.get(finding.verdict, ""), finding.verdict
    chip = f'<span class="chip {kind}">{verdict}</span>' if verdict else "<span></span>"
    return f"<li>{chip}<div>{quote}<p>{escape(finding.text)}</p></div></li>"


def _figures(results: Results) -> str:
    figures = []
    for data, network in results.places:
        if lines := curves.mean_lines(results.at(data, network)):
            title = results.place(data, network)
            ns = sorted({len(cell.done) for cell in results.at(data, network) if cell.done})
            seeds = f"n = {' to '.join(map(str, sorted({ns[0], ns[-1]})))}" if ns else "no run is finished"
            figures.append(
                f"<figure><figcaption><b>{escape(title)}</b> {seeds}</figcaption>"
                f'<div class="wide">{curves.svg(lines, 7.4, 3.9, title)}</div>'
                f'<div class="narrow">{curves.svg(lines, 4.1, 3.7, title)}</div></figure>'
            )
    if not figures:
        return ""
    caption = (
        "Mean over seeds of the peers' mean test accuracy; the shade is one sample standard deviation. "
        "The frame is made for the last three quarters of the epochs. "
    )
    return f'<p>{caption}{escape(results.stamp.text)}.</p><div class="figures">{"".join(figures)}</div>'


def _tables(results: Results, notes: list[Note]) -> str:
    stamp = escape(results.stamp.text)
    text = (
        "<p>Top-1 test accuracy in percent. Ours is the last epoch's mean over peers, then over seeds; \u00b1 is the "
        "sample standard deviation over seeds; a gain is paired by seed, with its 95 % interval where three seeds "
        "allow one. "
        "The highest of each network is bold. Click a heading to sort.</p>"
    )
    for sheet, detail in sheets.accuracies(results, notes):
        table = _table(sheet, stamp)
        text += f"<details><summary>All readings</summary>{table}</details>" if detail else table
    return text


def _cells(results: Results, stamp: str) -> str:
    return "".join(_cell(results, cell, stamp) for cell in results.cells.values())


def _cell(results: Results, cell: Outcome, stamp: str) -> str:
    place = results.place(cell.data, cell.network)
    state = sheets.value_text(cell.value) if cell.value else f"{len(cell.done)} of {len(cell.runs)} runs"
    lines = curves.seed_lines(cell)
    figure = f"<figure>{curves.svg(lines, 4.2, 2.9, f'{place}, {cell.row.label}')}</figure>" if lines else ""
    head = f'<b>{escape(cell.row.label)}</b> <span>{escape(place)}</span> <span class="figure">{escape(state)}</span>'
    note = f"<p>{escape(cell.row.note)}</p>" if cell.row.note else ""
    note += "".join(f"<p>Seed {run.seed}: {escape(run.state)}</p>" for run in cell.runs if not run.known)
    return f"<details><summary>{head}</summary>{note}{figure}{_table(sheets.seeds(cell), stamp)}</details>"


def _notes(results: Results, notes: list[Note]) -> str:
    if not results.paper:
        return ""
    items = "".join(f'<li id="note-{n}">{escape(note.text)}</li>' for n, note in enumerate(notes, 1))
    runs = f", n = {results.paper.n}" if results.paper.cells else ""
    source = f"<p>{escape(results.paper.source)}: {escape(results.paper.what)}{runs}. "
    return f'{source}{escape(results.paper.seeds)}</p><ol class="notes">{items}</ol>'


def _facts(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f"<dl>{rows}</dl>"


def _table(sheet: Sheet, stamp: str) -> str:
    title = escape(sheet.title)
    heads = "".join(
        f'<th scope="col" class="{"number" if column.number else "text"}" aria-sort="none">'
        f'<button type="button"{_title(column.hint)}>{escape(column.title)}</button>{_marks(column.marks)}</th>'
        for column in sheet.columns
    )
    rows = "".join(
        "<tr>"
        + "".join(_entry(entry, column.number, first=i == 0) for i, (entry, column) in enumerate(cells))
        + "</tr>"
        for cells in (list(zip(row, sheet.columns, strict=True)) for row in sheet.rows)
    )
    return (
        f'<p class="caption"><b>{title}</b>{_marks(sheet.marks)} <small>{stamp}</small></p>'
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table aria-label="{title}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _title(hint: str) -> str:
    return f' title="{escape(hint)}"' if hint else ""


def _entry(entry: Entry, number: bool, first: bool) -> str:
    kinds = " ".join(kind for kind, on in (("number", number), ("faint", entry.faint)) if on)
    known = entry.sort is not None
    sort = f' data-sort="{escape(str(entry.sort))}"' if known else ""
    text = f"<b>{escape(entry.text)}</b>" if entry.strong else escape(entry.text)
    under = "".join(f"<small>{escape(line)}</small>" for line in entry.under.splitlines())
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    return f'<{tag}{scope} class="{kinds}"{sort}>{text}{_marks(entry.marks)}{under}</{tag}>'


def _marks(numbers: tuple[int, ...]) -> str:
    links = " ".join(f'<a href="#note-{n}" aria-label="note {n}">{n}</a>' for n in numbers)
    return f"<sup>{links}</sup>" if links else ""
