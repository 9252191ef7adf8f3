"""Plain sentences from the numbers: what agrees with the paper and what does not, never stronger than n allows.

Signs and orders are compared at any scale, values only at the paper's own. With one run a cell nothing is said about
chance, with two neither; from three on by a paired t test over seeds, not corrected for the number of tests, which is
given.
"""

from typing import NamedTuple

from cutnmix.benchmarks.reproduce.paper import DATA, Claim, signed
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
    """A sentence, one of the six words above, and the quote of the paper that it answers; "" for none of either."""

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
    text = f"Above in {len(above)} of {_count(len(known), 'comparison')}"
    if len(known) < len(compared):
        text += f" ({len(compared) - len(known)} more are not run yet)"
    side, name = (above, "Above") if len(above) < len(below) else (below, "Not above")
    if len(known) <= 3:
        text += ". " + "; ".join(f"{where}: {_told(d)}" for where, d in known)
    elif side:
        text += f". {name}: " + "; ".join(f"{where}: {_told(d)}" for where, d in side)
    else:
        text += f", by {signed(min(d.mean for _, d in known))} to {signed(max(d.mean for _, d in known))}"
    text += ". " + chance([d for _, d in known])
    if above and below:
        return Finding(MIXED, text, quote)
    all_sure = len(sure) == len(compared)
    if above:
        return Finding(AGREES if all_sure else LEANS, text, quote)
    return Finding(DISAGREES if all_sure else AGAINST, text, quote)


def _told(difference: Difference) -> str:
    """The difference with its p where n allows one."""
    test = "" if difference.p is None else f"{p_text(difference.p)}, "
    return f"{signed(difference.mean)} ({test}n\u00a0=\u00a0{difference.n})"


def p_text(p: float) -> str:
    """A p value to three digits."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"


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
    few = sum(d.n < 3 for d in differences)
    alike = len(differences) - len(tested) - few
    untested = f"; {_count(few, 'comparison')} with fewer than three pairs" if few else ""
    untested += f"; {_count(alike, 'comparison')} whose pairs all differ by the same" if alike else ""
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
    inside = sum(said.low <= round(gain, 2) <= said.high for gain in gains)
    text = (
        f"Here {signed(min(gains))} to {signed(max(gains))} over {_count(len(gains), 'network')}, {inside} inside that "
        f"range; the paper's own table gives {signed(min(printed))} to {signed(max(printed))}."
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
        text = f"{DATA.get(data, data)}: {results.network(said.network)} gains {signed(gains[said.network])}, "
        others = [f"{results.network(n)} {signed(gains[n])}" for n in gains if n != said.network]
        text += f"the others {', '.join(others)}. Gains are compared by their means alone, without a test."
        verdict = AGAINST if len(more) == len(gains) - 1 else MIXED if more else LEANS
        found.append(Finding(verdict, text, claim.quote))
    return found


def _signs(results: Results) -> list[Finding]:
    """Which methods gain over the reference here and in the paper, where its gain is not 0.00, which has no sign."""
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
            if not theirs:
                continue
            differences.append(difference)
            text = f"{cell.row.label} {signed(difference.mean)} (paper {signed(theirs)})"
            (same if difference.mean * theirs > 0 else other).append(text)
        if differences:
            reference = results.label(results.reference)
            text = f"{results.place(data, network)}: over {reference}, "
            text += f"{len(same)} of {len(differences)} gains have the paper's sign"
            text += f": {', '.join(same)}" if same and len(differences) <= 3 else ""
            text += f". Not so {', '.join(other)}" if other else ""
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
        verdict = "" if not total else LEANS if same == total else MIXED if same else AGAINST
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
        where = f"{cell.row.label}, {results.place(data, network)}: {signed(difference)}"
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
