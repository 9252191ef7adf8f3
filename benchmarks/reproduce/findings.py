"""Plain sentences from the numbers: what agrees with the paper and what does not, never stronger than n allows.

Signs and orders are compared at any scale, values only at the paper's own. With one run a cell nothing is said about
chance, with two neither; from three on by a paired t test over seeds, not corrected for the number of tests, which is
given.
"""

from typing import NamedTuple

from cutnmix.benchmarks.reproduce.paper import DATA, Claim
from cutnmix.benchmarks.reproduce.results import Difference, Results, pairs_in_order, ranks

LEVEL = 0.05
AGREES, LEANS, MIXED, AGAINST, DISAGREES, OPEN = (
    "agrees",
    "points the same way",
    "mixed",
    "points the other way",
    "disagrees",
    "open",
)


class Finding(NamedTuple):
    """A sentence, the quote of the paper that it answers ("" for none), and one of the six words above."""

    verdict: str
    text: str
    quote: str = ""
    about: str = "claims"  # of the paper, "gains", "order" or "values"


class _Compared(NamedTuple):
    """One method over another at one place; a difference of None is not known yet."""

    text: str
    difference: Difference | None


def findings(results: Results) -> list[Finding]:
    """All that can be said: the paper's claims first, then signs, orders and values."""
    found = [finding for claim in (results.paper.claims if results.paper else []) for finding in _claim(results, claim)]
    return found + _signs(results) + _order(results) + _values(results)


def _claim(results: Results, claim: Claim) -> list[Finding]:
    names = list(dict.fromkeys(name for _, _, name in results.cells))
    if claim.gain_range:
        return _gain_range(results, claim)
    if claim.gains_most:
        return _gains_most(results, claim)
    compared = [
        _Compared(
            f"{results.label(one)} over {results.label(other)}, {results.place(data, network)}",
            results.difference(data, network, one, other),
        )
        for data, network in results.places
        for one, other in claim.pairs(names)
        if {(data, network, one), (data, network, other)} <= results.cells.keys()
    ]
    return [_verdict(compared, claim.quote)] if compared else []


def _verdict(compared: list[_Compared], quote: str) -> Finding:
    """Whether differences are above zero, how many, and how surely."""
    known = [(text, difference) for text, difference in compared if difference]
    if not known:
        return Finding(OPEN, f"No pair of runs is done yet; {_count(len(compared), 'comparison')} to make.", quote)
    above = [(text, d) for text, d in known if d.mean > 0]
    below = [(text, d) for text, d in known if d.mean <= 0]
    sure = [d for _, d in known if d.p is not None and d.p < LEVEL]
    parts = [f"Above in {len(above)} of {_count(len(known), 'comparison')}"]
    if len(known) < len(compared):
        parts[0] += f" ({len(compared) - len(known)} more are not run yet)"
    side = above if len(above) < len(below) else below
    if len(known) <= 3:
        parts.append("; ".join(f"{text}: {signed(d)}" for text, d in known))
    elif side:
        parts.append(f"{'above' if side is above else 'not above'}: " + "; ".join(f"{t}: {signed(d)}" for t, d in side))
    else:
        low, high = min(d.mean for _, d in known), max(d.mean for _, d in known)
        parts.append(f"by {low:+.2f} to {high:+.2f}")
    text = ". ".join(parts) + ". " + chance([d for _, d in known])
    if above and below:
        return Finding(MIXED, text, quote)
    all_sure = len(sure) == len(compared)
    if above:
        return Finding(AGREES if all_sure else LEANS, text, quote)
    return Finding(DISAGREES if all_sure else AGAINST, text, quote)


def signed(difference: Difference) -> str:
    """The difference with its p, or with what n allows instead."""
    if difference.p is None:
        return f"{difference.mean:+.2f} (n = {difference.n})"
    return f"{difference.mean:+.2f} ({p_text(difference.p)}, n = {difference.n})"


def p_text(p: float) -> str:
    """A p value with two significant digits."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def chance(differences: list[Difference]) -> str:
    """What so many seeds allow to say about chance, one sentence."""
    tested = [d for d in differences if d.p is not None]
    if not tested:
        most = max(d.n for d in differences)
        if most < 3:
            return f"With {_count(most, 'run')} a cell that may be chance: no test is possible."
        return "All seeds differ by the same: no test is possible."
    sure = sum(d.p < LEVEL for d in tested if d.p is not None)
    tests = "the one test" if len(tested) == 1 else f"{len(tested)} tests, not corrected for their number"
    untested = f"; {_count(len(differences) - len(tested), 'comparison')} with fewer than three pairs" * (
        len(tested) < len(differences)
    )
    if len(tested) == 1:
        told = "The seeds tell it from chance" if sure else "The seeds do not tell it from chance"
    else:
        told = f"The seeds tell {sure} of {len(tested)} from chance"
    return f"{told} (paired t, p < {LEVEL}; {tests}{untested})."


def _gain_range(results: Results, claim: Claim) -> list[Finding]:
    said = claim.gain_range
    assert said and results.paper
    networks = [n for data, n in results.places if data == said.data and n in results.paper.networks]
    differences = [results.difference(said.data, network, said.method, said.over) for network in networks]
    gains = [difference.mean for difference in differences if difference]
    if not networks:
        return []
    if not results.stamp.comparable:
        return [Finding(OPEN, "Not compared: these runs have not the paper's schedule and data.", claim.quote)]
    if not gains:
        return [Finding(OPEN, "No pair of runs is done yet.", claim.quote)]
    printed = [gain for n in results.paper.networks if (gain := results.paper.gain(said.data, n)) is not None]
    inside = sum(said.low <= gain <= said.high for gain in gains)
    text = (
        f"Here {min(gains):+.2f} to {max(gains):+.2f} over {_count(len(gains), 'network')}, {inside} of them inside "
        f"that range; the paper's own table gives {min(printed):+.2f} to {max(printed):+.2f}."
    )
    return [Finding(LEANS if inside == len(gains) else MIXED if inside else AGAINST, text, claim.quote)]


def _gains_most(results: Results, claim: Claim) -> list[Finding]:
    said = claim.gains_most
    assert said
    found = []
    for data in dict.fromkeys(data for data, _ in results.places):
        networks = [network for place, network in results.places if place == data]
        if said.network not in networks or len(networks) < 2:
            continue
        differences = {n: results.difference(data, n, said.method, said.over) for n in networks}
        gains = {n: d.mean for n, d in differences.items() if d}
        if said.network not in gains or len(gains) < 2:
            found.append(Finding(OPEN, f"{DATA.get(data, data)}: the runs are not done yet.", claim.quote))
            continue
        more = [n for n in gains if gains[n] > gains[said.network]]
        text = f"{DATA.get(data, data)}: {results.network(said.network)} gains {gains[said.network]:+.2f}, "
        others = [f"{results.network(n)} {gains[n]:+.2f}" for n in gains if n != said.network]
        text += f"the others {', '.join(others)}. Gains are compared by their means alone, without a test."
        verdict = AGAINST if len(more) == len(gains) - 1 else MIXED if more else LEANS
        found.append(Finding(verdict, text, claim.quote))
    return found


def _signs(results: Results) -> list[Finding]:
    """Which methods gain over the reference here and in the paper."""
    found = []
    for data, network in results.places:
        same, other, differences = [], [], []
        base = results.theirs(data, network, results.reference)
        for cell in results.at(data, network):
            printed = results.theirs(data, network, cell.row.name)
            difference = results.difference(data, network, cell.row.name, results.reference)
            if cell.row.name == results.reference or not (base and printed and difference):
                continue
            theirs = round(printed.mean - base.mean, 2)
            differences.append(difference)
            text = f"{cell.row.label} {difference.mean:+.2f} (paper {theirs:+.2f})"
            (same if difference.mean * theirs > 0 else other).append(text)
        if differences:
            reference = results.label(results.reference)
            text = f"{results.place(data, network)}: against {reference}, "
            text += f"{len(same)} of {_count(len(differences), 'method')} have the paper's sign"
            text += f": {', '.join(same)}" if same else ""
            text += f"; not so {', '.join(other)}" if other else ""
            found.append(
                Finding(
                    LEANS if not other else MIXED if same else AGAINST, f"{text}. {chance(differences)}", about="gains"
                )
            )
    return found


def _order(results: Results) -> list[Finding]:
    """The methods of each network by their means, and how much of the paper's order that is."""
    found = []
    for data, network in results.places:
        cells = results.at(data, network)
        ours = {cell.row.name: cell.value for cell in cells}
        order = sorted(ranks(ours).items(), key=lambda item: item[1])
        if len(order) < 2:
            continue
        listed = ", ".join(f"{results.label(name)} {value.mean:.2f}" for name, _ in order if (value := ours[name]))
        text = f"{results.place(data, network)}, by means: {listed}."
        theirs = {cell.row.name: results.theirs(data, network, cell.row.name) for cell in cells}
        same, total = pairs_in_order(ours, theirs)
        if total:
            text += f" {same} of {_count(total, 'pair')} of methods stand in the paper's order."
        missing = len(cells) - len(order)
        text += f" {_count(missing, 'method')} without a finished run." if missing else ""
        least = min(value.n for value in ours.values() if value)
        text += " Some of these are one run: the order may be chance." if least == 1 else ""
        verdict = OPEN if not total else LEANS if same == total else MIXED if same else AGAINST
        found.append(Finding(verdict, text, about="order"))
    return found


def _values(results: Results) -> list[Finding]:
    """How far the cells are from the paper's; only where runs are like the paper's."""
    if not results.stamp.comparable:
        return []
    near = total = 0
    furthest = (0.0, "")
    for (data, network, name), cell in results.cells.items():
        printed = results.theirs(data, network, name)
        if not (cell.value and printed):
            continue
        difference = cell.value.mean - printed.mean
        total += 1
        near += abs(difference) <= (cell.value.spread or 0) + (printed.spread or 0)
        where = f"{cell.row.label}, {results.place(data, network)}: {difference:+.2f}"
        furthest = max(furthest, (abs(difference), where))
    if not total:
        return []
    text = (
        f"{near} of {_count(total, 'cell')} differ from the paper's by no more than both standard deviations together"
    )
    verdict = LEANS if near == total else MIXED if near else AGAINST
    return [Finding(verdict, f"{text}; furthest is {furthest[1]}.", about="values")]


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + "s" * (n != 1)
