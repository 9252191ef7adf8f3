"""The tables of a report, as text with what to sort by; page.py and report.py give them their form."""

from collections.abc import Iterator
from typing import NamedTuple

from cutnmix.benchmarks.reproduce.paper import DATA, Note, Value, contradictions, signed
from cutnmix.benchmarks.reproduce.results import READINGS, Difference, Outcome, Results, ranks
from cutnmix.trainer.compare import p_digits

NOTHING = "\u2013"  # an en dash, for what is not known


class Entry(NamedTuple):
    """A cell of a table."""

    text: str
    sort: float | str | None = None  # None: nothing known, which stands last in either direction
    under: str = ""  # smaller lines below it
    marks: tuple[int, ...] = ()  # numbers of notes
    strong: bool = False
    faint: bool = False


class Column(NamedTuple):
    """The head of a column."""

    title: str
    number: bool = True
    hint: str = ""
    marks: tuple[int, ...] = ()


class Sheet(NamedTuple):
    """A table; the first column names its rows."""

    title: str
    columns: list[Column]
    rows: list[list[Entry]]
    marks: tuple[int, ...] = ()


def notes_of(results: Results) -> list[Note]:
    """The remarks on the paper's numbers that are about what is planned here; their numbers count from 1."""
    if not results.paper:
        return []
    data, networks, methods = (set(axis) for axis in zip(*results.cells, strict=True))

    def here(note: Note) -> bool:
        named = ((note.data, data), (note.networks, networks), (note.methods, methods))
        return all(not some or planned & set(some) for some, planned in named)

    return [note for note in (*contradictions(results.paper), *results.paper.notes) if here(note)]


def marks(notes: list[Note], *, data: str = "", network: str = "", method: str = "") -> tuple[int, ...]:
    """The numbers of the notes that are about exactly this: "" stands for all, as no list does in a note."""

    def about(named: list[str], here: str) -> bool:
        return here in named if here else not named

    return tuple(
        number
        for number, note in enumerate(notes, 1)
        if about(note.networks, network)
        and about(note.methods, method)
        and (about(note.data, data) or (network and not note.data))
    )


def value_text(value: Value | None) -> str:
    """Mean +- deviation, to two digits."""
    if value is None:
        return NOTHING
    return f"{value.mean:.2f}" + ("" if value.spread is None else f" \u00b1 {value.spread:.2f}")


def _number(number: float | None, form: str = "{:.2f}") -> Entry:
    return Entry(NOTHING if number is None else form.format(number), number)


def _signed(number: float | None) -> Entry:
    return Entry(NOTHING if number is None else signed(number), number)


def _value(value: Value | None) -> Entry:
    return Entry(value_text(value), value.mean if value else None)


def progress(cell: Outcome) -> str:
    """How many of the cell's runs are done, if not all are."""
    done, begun = len(cell.done), [run for run in cell.runs if run.state == "begun" and run.curve]
    if done == len(cell.runs):
        return ""
    text = f"{done} of {len(cell.runs)} runs"
    if begun:
        text += f", {len(begun)} at epoch " + ", ".join(f"{run.curve[-1][0]:g}" for run in begun)
    return text


def accuracies(results: Results, notes: list[Note]) -> Iterator[tuple[Sheet, bool]]:
    """The tables of accuracies, a data set after the other, and whether each is but a detail of the one before."""
    for data in dict.fromkeys(data for data, _ in results.places):
        networks = [network for place, network in results.places if place == data]
        if len(networks) > 1:
            yield overview(results, data, notes), False
        for network in networks:
            yield comparison(results, data, network, notes), False
            yield readings(results, data, network), True


def overview(results: Results, data: str, notes: list[Note]) -> Sheet:
    """As the paper prints its Table 1: a row a method, a column a network, the paper's value below ours."""
    networks = [network for place, network in results.places if place == data]
    names = list(dict.fromkeys(name for place, _, name in results.cells if place == data))
    best = {n: ranks({m: results.ours(data, n, m) for m in names}) for n in networks}
    rows = []
    for name in names:
        own = marks(notes, method=name) + marks(notes, data=data, method=name)
        row = [Entry(results.label(name), results.label(name), marks=own)]
        for network in networks:
            cell = results.cells.get((data, network, name))
            if cell is None:
                row.append(Entry(""))
                continue
            printed = results.theirs(data, network, name)
            under = [progress(cell)] if progress(cell) else []
            under += [f"paper {value_text(printed)}"] if printed else []
            own = marks(notes, data=data, network=network, method=name) if printed else ()
            value = cell.value
            strong = best[network].get(name) == 1
            row.append(Entry(value_text(value), value.mean if value else None, "\n".join(under), own, strong))
        rows.append(row)
    heads = [Column(results.network(n), hint=n, marks=marks(notes, network=n)) for n in networks]
    return Sheet(
        f"{DATA.get(data, data)}, all networks", [Column("Method", False), *heads], rows, marks(notes, data=data)
    )


def comparison(results: Results, data: str, network: str, notes: list[Note]) -> Sheet:
    """A row a method: ours, the paper's, differences, n, spread, epochs, the paired test."""
    cells, reference = results.at(data, network), results.reference
    printed = {cell.row.name: results.theirs(data, network, cell.row.name) for cell in cells}
    ours = {cell.row.name: cell.value for cell in cells}
    rank = ranks(ours)
    beside = any(printed.values())
    rows = []
    for cell in cells:
        name, value, theirs = cell.row.name, cell.value, printed[cell.row.name]
        label = Entry(cell.row.label, cell.row.label, progress(cell), marks(notes, method=name), rank.get(name) == 1)
        row = [
            label,
            _number(rank.get(name), "{:.0f}"),
            _value(value)._replace(strong=rank.get(name) == 1),
            Entry(str(len(cell.done)), len(cell.done)),
            _epochs(cell),
        ]
        if beside:
            own = marks(notes, data=data, network=network, method=name) if theirs else ()
            difference = value.mean - theirs.mean if value and theirs else None
            row += [
                _value(theirs)._replace(marks=own),
                _signed(difference)._replace(faint=not results.stamp.comparable),
            ]
        over = results.difference(data, network, name, reference) if name != reference else None
        row.append(_difference(over) if name != reference else Entry("reference", None, faint=True))
        if beside:
            base = printed.get(reference)
            gain = round(theirs.mean - base.mean, 2) if theirs and base and name != reference else None
            row.append(_signed(gain))
        row.append(_test(over))
        rows.append(row)
    columns = [
        Column("Method", False),
        Column("Rank", hint="By the mean, 1 is the highest"),
        Column("Ours", hint="Top-1 %: the last epoch's mean over peers; mean and sample standard deviation over seeds"),
        Column("n", hint="Finished runs"),
        Column("Epochs"),
    ]
    if beside:
        columns += [
            Column("Paper", hint="As printed, n = 3"),
            Column(
                "Ours \u2212 paper", hint="" if results.stamp.comparable else "These runs are not the paper's setting"
            ),
        ]
    columns.append(Column("Gain", hint=f"Over {results.label(reference)}, paired by seed"))
    columns += [Column("Paper's gain", hint="Recomputed from its cells")] if beside else []
    columns.append(
        Column("p", hint="Two-sided paired t test over seeds, which needs three; not corrected for the number of tests")
    )
    return Sheet(results.place(data, network), columns, rows, marks(notes, network=network))


def _epochs(cell: Outcome) -> Entry:
    epochs = sorted({run.epochs for run in cell.runs})
    return Entry(" to ".join(map(str, epochs)), epochs[-1])


def _difference(difference: Difference | None) -> Entry:
    if difference is None:
        return Entry(NOTHING)
    inside = (
        ""
        if difference.low is None or difference.high is None
        else f"{signed(difference.low)} to {signed(difference.high)}"
    )
    return Entry(signed(difference.mean), difference.mean, inside)


def _test(difference: Difference | None) -> Entry:
    if difference is None:
        return Entry(NOTHING)
    if difference.p is None:
        return Entry(f"none: n = {difference.n}", None, faint=True)
    return Entry(p_digits(difference.p), difference.p)


def readings(results: Results, data: str, network: str) -> Sheet:
    """The other accuracies of the same runs, which are no headline."""
    rows = []
    for cell in results.at(data, network):
        others = [_value(cell.reading(name)) for name in READINGS]
        rows.append([Entry(cell.row.label, cell.row.label), *others, _value(cell.best_epoch)])
    heads = [Column(name, hint="The headline" if name == READINGS["mean"] else "") for name in READINGS.values()]
    chosen = Column("Best epoch, chosen on test", hint="Mean of the peers; the test images chose the epoch")
    title = f"{results.place(data, network)}: readings of the last epoch, and the best epoch"
    return Sheet(title, [Column("Method", False), *heads, chosen], rows)


def ranking(results: Results, notes: list[Note]) -> Sheet:
    """A row a method, a column a network: the rank here, and the paper's rank among the same methods."""
    names = list(dict.fromkeys(name for _, _, name in results.cells))
    rows = [[Entry(results.label(name), results.label(name), marks=marks(notes, method=name))] for name in names]
    for data, network in results.places:
        ours = ranks({name: results.ours(data, network, name) for name in names})
        theirs = ranks({n: results.theirs(data, network, n) for n in names if (data, network, n) in results.cells})
        for row, name in zip(rows, names, strict=True):
            here = ours.get(name)
            under = f"paper {theirs[name]}" if name in theirs else ""
            row.append(Entry(NOTHING if here is None else str(here), here, under, strong=here == 1))
    heads = [Column(results.place(data, network)) for data, network in results.places]
    return Sheet("Rank of each method, by the mean", [Column("Method", False), *heads], rows)


def costs(results: Results) -> Sheet:
    """What the runs took."""
    rows = []
    for cell in results.cells.values():
        hours, peak = cell.cost("hours"), cell.cost("peak_memory_bytes")
        rows.append(
            [
                Entry(cell.row.label, cell.row.label),
                Entry(results.place(cell.data, cell.network), results.place(cell.data, cell.network)),
                Entry(str(len(cell.done)), len(cell.done)),
                _number(cell.cost("images_per_s"), "{:,.0f}"),
                _number(hours, "{:.4f}" if hours and hours < 0.1 else "{:.2f}"),
                _number(peak / 2**30 if peak else None),
                _number(cell.cost("parameters"), "{:,.0f}"),
            ]
        )
    columns = [
        Column("Method", False),
        Column("Data, network", False),
        Column("n", hint="Finished runs; figures are their medians"),
        Column("Images/s", hint="Of training, evaluation left out"),
        Column("Hours a run", hint="Training and evaluation, all sessions of a run together"),
        Column("Peak GiB", hint="GPU memory that PyTorch allocated; not recorded on a CPU"),
        Column("Parameters", hint="Of all peers together"),
    ]
    return Sheet("Cost of a run", columns, rows)


def seeds(cell: Outcome) -> Sheet:
    """A row a run of one cell."""
    rows = []
    for run in cell.runs:
        best = run.best_epoch
        state = run.state if run.known else "another run's folder"
        if run.state == "begun" and run.curve:
            state = f"epoch {run.curve[-1][0]:g} of {run.epochs}"
        rows.append(
            [
                Entry(str(run.seed), run.seed),
                Entry(state, state),
                *(_number(run.reading(name)) for name in READINGS),
                Entry(f"{best[1]:.2f}", best[1], f"epoch {best[0]:g}") if best else Entry(NOTHING),
                _number(run.result.get("images_per_s"), "{:,.0f}"),
                _number(run.result.get("hours"), "{:.3f}"),
            ]
        )
    heads = [Column(text) for text in READINGS.values()]
    first, after = [Column("Seed"), Column("State", False)], [Column("Best epoch, chosen on test")]
    return Sheet("Runs", [*first, *heads, *after, Column("Images/s"), Column("Hours")], rows)
