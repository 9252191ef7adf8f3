"""The paper's numbers: configs/paper/*.yaml as typed values, and what follows from them.

The files hold what is printed and nothing else. Gains, and where the paper contradicts itself, are computed here, so
that printed and recomputed figures cannot be mixed up.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from cutnmix import configs
from cutnmix.trainer.keys import ConfigError

OURS, BASELINE = "cutnmix", "baseline"  # the gains that the paper prints are of the one over the other
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


class Value(NamedTuple):
    """Top-1 percent over n runs: the mean, and the sample standard deviation, None for one run."""

    mean: float
    spread: float | None
    n: int


Numbers = Callable[[str, str, str], Value | None]  # (data, network, method) -> what is known of that cell


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Note(_Part):
    """A remark, and the data sets, networks and methods that it is about; no list: about all of them."""

    text: str
    data: list[str] = []
    networks: list[str] = []
    methods: list[str] = []


class GainRange(_Part):
    """The gains of one method over another lie between two figures."""

    data: str
    method: str
    over: str
    low: float
    high: float


class GainsMost(_Part):
    """A method gains most over another on one network."""

    network: str
    method: str
    over: str


class Claim(_Part):
    """A sentence of the paper, and what numbers would have to show for it: one of the three."""

    quote: str
    above: list[tuple[str, str]] = []  # the first of each pair has more
    gain_range: GainRange | None = None
    gains_most: GainsMost | None = None

    def pairs(self, methods: list[str]) -> list[tuple[str, str]]:
        """The pairs of those methods of which the first has to be above the second."""
        return [(one, other) for one, other in self.above if one in methods and other in methods]


class Borrowed(_Part):
    """Rows of another table, to read a table beside."""

    table: str
    methods: list[str]


class Table(_Part):
    """What the paper prints of one experiment, and says of it."""

    title: str
    source: str
    what: str
    n: int  # runs a cell
    seeds: str
    epochs: int
    methods: dict[str, str]  # name -> as the paper calls it
    networks: dict[str, str]
    cells: dict[str, dict[str, dict[str, tuple[float, float]]]]  # data, method, network
    printed_gains: dict[str, dict[str, float]] = {}  # data, network
    borrowed: Borrowed | None = None
    claims: list[Claim] = []
    notes: list[Note] = []

    def value(self, data: str, network: str, method: str) -> Value | None:
        """The cell as printed; None where there is none."""
        if self.borrowed and method in self.borrowed.methods:
            return load_table(self.borrowed.table).value(data, network, method)
        printed = self.cells.get(data, {}).get(method, {}).get(network)
        return Value(*printed, self.n) if printed else None

    def gain(self, data: str, network: str, method: str = OURS, over: str = BASELINE) -> float | None:
        """The difference of two printed cells, to the two digits that they have."""
        return gain(self.value, data, network, method, over)

    def places(self) -> list[tuple[str, str]]:
        """(data, network) of every cell, in the paper's order."""
        return [(data, network) for data in self.cells for network in self.networks]

    def label(self, method: str) -> str:
        """The paper's name for a row."""
        borrowed = load_table(self.borrowed.table).methods if self.borrowed else {}
        return (borrowed | self.methods).get(method, method)

    def origin(self, method: str) -> str:
        """The table that a row is printed in."""
        borrowed = self.borrowed is not None and method in self.borrowed.methods
        return load_table(self.borrowed.table).title if self.borrowed and borrowed else self.title

    def rows(self) -> list[str]:
        """All methods that there are printed values of, borrowed ones first."""
        return [*(self.borrowed.methods if self.borrowed else []), *self.methods]


def signed(number: float) -> str:
    """Two digits with their sign, a true minus; zero has none."""
    text = f"{number:+.2f}".replace("-", "\u2212")
    return "0.00" if text[1:] == "0.00" else text


def gain(numbers: Numbers, data: str, network: str, method: str, over: str) -> float | None:
    """mean(method) - mean(over), None where either is not known."""
    one, other = numbers(data, network, method), numbers(data, network, over)
    return round(one.mean - other.mean, 2) if one and other else None


@cache
def load_table(name: str) -> Table:
    """The table of configs/paper/NAME.yaml.

    Raises:
        ConfigError: there is none, naming those that there are.
    """
    folder = Path(configs.__file__).parent / "paper"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"paper: no numbers of {name!r}; there are {there}")
    return Table.model_validate(yaml.safe_load(path.read_text()))


def contradictions(table: Table) -> list[Note]:
    """Where the paper's numbers disagree with each other, or with its text; computed."""
    notes = []
    for data, gains in table.printed_gains.items():
        for network, printed in gains.items():
            if (real := table.gain(data, network)) != printed:
                text = f"A gain of {printed:.2f} is printed; the values that it stands below differ by {real:.2f}."
                notes.append(Note(text=text, data=[data], networks=[network], methods=[OURS]))
    for claim in table.claims:
        notes += _against(table, claim)
    for data in table.cells:
        low = [
            (network, method, difference)
            for network in table.networks
            for method in table.methods
            if method != BASELINE and (difference := table.gain(data, network, method)) is not None and difference <= 0
        ]
        if low:
            cells = ", ".join(f"{table.methods[m]} on {table.networks[n]} ({signed(d)})" for n, m, d in low)
            text = f"{DATA[data]}: {len(low)} of the paper's own cells are not above its baseline: {cells}."
            notes.append(Note(text=text, data=[data]))
    return notes


def _against(table: Table, claim: Claim) -> list[Note]:
    """What of the paper's own numbers stands against a sentence of its text."""
    quote = f'The text says: "{claim.quote}".'
    if claim.gain_range:
        said = claim.gain_range
        gains = [table.gain(said.data, network, said.method, said.over) for network in table.networks]
        known = [difference for difference in gains if difference is not None]
        if (min(known), max(known)) == (said.low, said.high):
            return []
        text = f"{quote} The differences of its table are {min(known):.2f} to {max(known):.2f}."
        return [Note(text=text, data=[said.data], methods=[said.method])]
    notes = []
    if claim.gains_most:
        said = claim.gains_most
        for data in table.cells:
            gains = {n: table.gain(data, n, said.method, said.over) or 0.0 for n in table.networks}
            more = {n: value for n, value in gains.items() if value > gains[said.network]}
            if more:
                listed = ", ".join(f"{table.networks[n]} {signed(value)}" for n, value in more.items())
                own = f"{table.networks[said.network]} {signed(gains[said.network])}"
                text = f"{quote} On {DATA[data]}, {own} is below {listed}."
                notes.append(Note(text=text, data=[data], networks=[said.network], methods=[said.method]))
    for data, network in table.places():
        for one, other in claim.pairs(table.rows()):
            difference = table.gain(data, network, one, other)
            if difference is not None and difference <= 0:
                a, b = table.value(data, network, one), table.value(data, network, other)
                assert a and b
                where = f"{DATA[data]}, {table.networks[network]}"
                text = f"{quote} On {where}, {table.label(one)} ({a.mean:.2f}) is not above {table.label(other)}"
                text += f" of {table.origin(other)} ({b.mean:.2f})."
                notes.append(Note(text=text, data=[data], networks=[network], methods=[one]))
    return notes
