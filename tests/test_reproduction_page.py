"""The paper's numbers, results from run folders, and the page: in Python, and in a real browser where there is one."""

import copy
import csv
import json
import math
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cutnmix.benchmarks.reproduce import curves, sheets
from cutnmix.benchmarks.reproduce.drive import reproduce
from cutnmix.benchmarks.reproduce.findings import AGAINST, AGREES, LEANS, MIXED, OPEN, chance, findings
from cutnmix.benchmarks.reproduce.grid import Grid, Planned, Row, load_grid, plan_grid, with_what_lies_there
from cutnmix.benchmarks.reproduce.paper import Value, contradictions, load_table
from cutnmix.benchmarks.reproduce.report import write
from cutnmix.benchmarks.reproduce.results import (
    READINGS,
    Difference,
    Outcome,
    Results,
    Run,
    collect,
    paired,
    pairs_in_order,
    ranks,
    value_of,
)
from cutnmix.trainer.config import load_config
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.run import train

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> RunFolder:
    """A real run of a second, whose files the others are derived from."""
    runs = tmp_path_factory.mktemp("real")
    keys = ["data.images_per_class=2", "epochs=2", "batch_size=10", "peers.network=resnet20"]
    train(load_config("quickstart", [*keys, f"runs={runs}", "name=run"]))
    return RunFolder(runs / "run")


class Maker:
    """Writes run folders as trainer/run.py does, with accuracies of our choice."""

    def __init__(self, real: RunFolder, out: Path):
        self.result = json.loads(real.result.read_text())
        self.record = real.records("test")[-1]
        self.out = out

    def plan(self, name: str, **keys) -> tuple[Grid, list[Planned]]:
        grid = load_grid(name)
        return grid, plan_grid(grid, out=self.out / "runs", **keys)

    def scores(self, top1: float) -> dict:
        """Those of the real run, shifted so that the mean over peers is as given."""
        scores = copy.deepcopy(self.record["scores"])
        shift = top1 - scores["mean"]["top1"]
        for score in scores.values():
            score["top1"] += shift
        return scores

    def run(self, planned: Planned, top1: float, epochs: int | None = None, **result) -> None:
        """A run that rises to `top1`; one that was cut off after `epochs`, if that is given."""
        folder, last = RunFolder(planned.config.folder), planned.config.epochs
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.begin(planned.config)
        lines = []
        for epoch in range(1, (epochs or last) + 1):
            accuracy = top1 * (1 - 0.8 * math.exp(-5 * epoch / last)) / (1 - 0.8 * math.exp(-5))
            lines.append(self.record | {"epoch": epoch, "step": 10 * epoch, "scores": self.scores(accuracy)})
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if epochs is None:
            end = {"epoch": last, "scores": self.scores(top1)}
            best = {"epoch": last, "scores": self.scores(top1 + 0.25)}
            whole = self.result | {"last_epoch": end, "best_epoch_on_test": best} | result
            whole["headline"] = self.result["headline"] | {"top1": top1}
            folder.result.write_text(json.dumps(whole))


@pytest.fixture
def maker(real, tmp_path) -> Maker:
    return Maker(real, tmp_path)


# The paper


def test_table_1_is_whole():
    table = load_table("table1")
    values = [table.value(data, network, method) for data, network in table.places() for method in table.methods]
    assert len(values) == 2 * 6 * 9 and None not in values
    assert all(value and 70 < value.mean < 97 and 0 < value.spread < 1 and value.n == 3 for value in values)
    # One from each row, read off the paper apart from the file.
    assert table.value("cifar10", "wrn20_8", "cutnmix") == (95.90, 0.01, 3)
    assert table.value("cifar100", "resnet32", "one") == (73.71, 0.93, 3)
    assert table.value("cifar100", "densenet40_12", "kdcl") == (72.16, 0.71, 3)
    assert table.value("cifar10", "vgg16", "baseline") == (93.89, 0.06, 3)
    assert table.value("cifar100", "resnet110", "dml") == (77.90, 0.01, 3)
    assert table.value("cifar10", "resnet110", "okddip") == (95.21, 0.25, 3)
    assert table.value("cifar100", "vgg19", "ddgsd") == (75.32, 0.01, 3)
    assert table.value("cifar10", "vgg19", "cs_kd") == (93.54, 0.04, 3)
    assert table.value("cifar100", "densenet40_12", "cutmix") == (71.74, 0.30, 3)
    assert table.value("cifar100", "resnet20", "cutmix") is None


def test_printed_and_recomputed_gains_are_kept_apart():
    table = load_table("table1")
    real = {data: [table.gain(data, network) for network in table.networks] for data in table.cells}
    assert real == {"cifar10": [0.95, 0.88, 0.73, 0.93, 1.43, 0.75], "cifar100": [2.84, 2.85, 2.13, 3.04, 2.38, 1.02]}
    wrong = {
        (data, network): (printed, table.gain(data, network))
        for data, gains in table.printed_gains.items()
        for network, printed in gains.items()
        if printed != table.gain(data, network)
    }
    assert wrong == {("cifar10", "wrn20_8"): (1.48, 1.43), ("cifar100", "vgg19"): (2.75, 2.85)}


def test_where_the_paper_contradicts_itself():
    texts = [note.text for note in contradictions(load_table("table1"))]
    assert len(texts) == 6
    assert "1.48 is printed" in texts[0] and "1.43" in texts[0]
    assert "2.75 is printed" in texts[1] and "2.85" in texts[1]
    assert "1.55-3.29%" in texts[2] and "1.02 to 3.04" in texts[2]  # and CIFAR-10's range is right
    assert "WideResNet +2.38 is below Vgg-16 +2.84, Vgg-19 +2.85, ResNet-110 +3.04" in texts[3]
    assert "DML on Vgg-19 (0.00)" in texts[4] and "DML on ResNet-110 (\u22120.37)" in texts[4]
    (alone,) = contradictions(load_table("table2"))
    assert "CutnMix (78.38) is not above CutMix of Table 1 (78.58)" in alone.text
    assert contradictions(load_table("figure1")) == contradictions(load_table("order")) == []


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no numbers of 'table3'; there are figure1, order, table1, table2"):
        load_table("table3")


@pytest.mark.parametrize("name", ["figure1", "table1", "table2"])
def test_a_grid_and_its_paper_speak_of_the_same(name):
    grid = load_grid(name)
    paper = load_table(grid.paper)
    assert set(paper.methods) <= {row.name for row in grid.rows}
    assert set(paper.networks) <= set(grid.networks)


def test_a_page_has_the_notes_about_what_it_shows(maker):
    def numbers(**only) -> int:
        grid, plan = maker.plan("table1", only=only, seeds=[95])
        return len(sheets.notes_of(collect(grid, plan, 1.0)))

    every = len(contradictions(load_table("table1"))) + len(load_table("table1").notes)
    assert numbers() == every
    assert numbers(data=["cifar10"]) == every - 4  # a printed gain, two sentences and the cells below the baseline
    assert numbers(network=["vgg16", "resnet32"], method=["baseline", "cutnmix"]) == every - 7


# Results


def results_of(maker: Maker, top1: dict[str, list[float]], scale: float = 1.0, grid: str = "table2") -> Results:
    """Rows of the grid's first network, a finished run for each accuracy."""
    return results_by_network(maker, {load_grid(grid).networks[0]: top1}, scale, grid)


def results_by_network(
    maker: Maker, top1: dict[str, dict[str, list[float]]], scale: float = 1.0, grid: str = "table1"
) -> Results:
    """The same of several networks, which have the same rows."""
    only = {"data": load_grid(grid).data[:1], "network": list(top1), "method": list(next(iter(top1.values())))}
    which, plan = maker.plan(grid, only=only, scale=scale)
    for planned in plan:
        accuracies = top1[planned.cell.network][planned.cell.row.name]
        if planned.seed - 95 < len(accuracies):
            maker.run(planned, accuracies[planned.seed - 95])
    return collect(which, plan, scale)


def test_the_real_run_is_read(real):
    config = real.read_config()
    grid = Grid(name="g", title="G", seeds=[95], data=["digits"], networks=["resnet20"], rows=[
        Row(name="cutnmix", label="Ours", recipe="quickstart")])  # fmt: skip
    planned = Planned(("digits", "resnet20", grid.rows[0]), config.seed, config)
    (cell,) = collect(grid, [planned], 1.0).cells.values()
    (run,), result = cell.runs, json.loads(real.result.read_text())
    tests = real.records("test")
    assert run.curve == [(record["epoch"], record["scores"]["mean"]["top1"]) for record in tests]
    assert run.top1 == result["headline"]["top1"] == tests[-1]["scores"]["mean"]["top1"]
    assert run.best_epoch[1] == max(record["scores"]["mean"]["top1"] for record in tests)
    assert run.reading("teacher") == tests[-1]["scores"]["teacher"]["top1"]
    assert cell.cost("hours") == tests[-1]["hours"] > 0
    assert cell.value == (run.top1, None, 1)


def test_cells_are_means_and_sample_deviations(maker):
    results = results_of(maker, {"cutnmix": [79.0, 79.5, 80.6]})
    value = results.ours("cifar100", "resnet110", "cutnmix")
    assert value == pytest.approx((np.mean([79.0, 79.5, 80.6]), np.std([79.0, 79.5, 80.6], ddof=1), 3))
    (cell,) = results.cells.values()
    assert cell.best_epoch.mean == pytest.approx(value.mean + 0.25)  # beside the headline, not it
    assert value_of([]) is value_of([None]) is None


def test_a_cost_is_the_median_of_its_runs(maker):
    grid, plan = maker.plan("table2", only={"method": ["cutnmix"]}, scale=0.02)
    for planned, hours in zip(plan, (1.0, 9.0, 2.0), strict=True):
        maker.run(planned, 70.0, hours=hours)
    (cell,) = collect(grid, plan, 0.02).cells.values()
    assert cell.cost("hours") == 2.0


def test_runs_that_are_not_done_do_not_count(maker):
    grid, plan = maker.plan("table2", only={"method": ["cutnmix"]})
    maker.run(plan[0], 79.0)
    maker.run(plan[1], 90.0, epochs=37)
    (cell,) = collect(grid, plan, 1.0).cells.values()
    assert [run.state for run in cell.runs] == ["done", "begun", "to do"]
    assert cell.value == (pytest.approx(79.0), None, 1)
    assert len(cell.runs[1].curve) == 37
    assert sheets.progress(cell) == "1 of 3 runs, 1 at epoch 37"


def test_a_folder_with_other_keys_is_not_taken_for_the_run(maker):
    grid, plan = maker.plan("table2", only={"method": ["cutnmix"]}, seeds=[95])
    other = plan[0]._replace(config=plan[0].config.model_copy(update={"epochs": 5}))
    maker.run(other, 79.0)
    (cell,) = collect(grid, plan, 1.0).cells.values()
    assert cell.value is None and "epochs (was 5, now 240)" in cell.runs[0].state


def test_the_paired_test_is_that_of_scipy_and_needs_three_pairs(maker):
    from scipy.stats import ttest_rel

    one, other = [79.0, 79.5, 80.6], [78.0, 79.1, 79.2]
    results = results_of(maker, {"cutnmix_dml": other, "cutnmix": one})
    difference = results.difference("cifar100", "resnet110", "cutnmix", "cutnmix_dml")
    expected = ttest_rel(one, other)
    low, high = expected.confidence_interval(0.95)
    assert difference == pytest.approx((np.mean(one) - np.mean(other), 3, expected.pvalue, low, high))


def test_pairs_are_of_one_seed_wherever_it_stands():
    def outcome(top1: dict[int, float]) -> Outcome:
        ends = {seed: {"last_epoch": {"scores": {"mean": {"top1": value}}}} for seed, value in top1.items()}
        runs = [Run(seed, 1, "done", [], end) for seed, end in ends.items()]
        return Outcome("cifar100", "resnet20", Row(name="m", label="M", recipe="paper"), runs)

    one, other = outcome({7: 50.0, 95: 70.0, 96: 75.0}), outcome({96: 73.0, 95: 71.0})
    assert paired(one, other) == (pytest.approx((70 - 71 + 75 - 73) / 2), 2, None, None, None)
    assert paired(outcome({7: 50.0}), other) is None


def test_an_interval_is_told_from_low_to_high():
    entry = sheets._difference(Difference(1.0, 3, 0.01, 0.5, 1.5))
    assert (entry.text, entry.under) == ("+1.00", "+0.50 to +1.50")


@pytest.mark.parametrize(
    ("one", "other", "n"),
    [([79.0], [78.0], 1), ([79.0, 80.0], [78.0, 78.5, 79.0], 2), ([79.0, 80.0, 81.0], [78.0, 79.0, 80.0], 3)],
    ids=["one seed", "two in common", "all differ by the same"],
)
def test_no_test_where_n_allows_none(one, other, n, maker):
    results = results_of(maker, {"cutnmix_dml": other, "cutnmix": one})
    difference = results.difference("cifar100", "resnet110", "cutnmix", "cutnmix_dml")
    assert difference == (pytest.approx(np.mean(one) - np.mean(other[: len(one)])), n, None, None, None)
    assert "no test is possible" in findings(results)[0].text


def test_ranks_and_pairs_in_order():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    ours, theirs = rng.permutation(9), rng.permutation(9)
    same, total = pairs_in_order(*({str(i): Value(float(x), None, 1) for i, x in enumerate(v)} for v in (ours, theirs)))
    assert (2 * same - total) / total == pytest.approx(kendalltau(ours, theirs).statistic)
    values = {"a": Value(2.0, None, 1), "b": Value(3.0, None, 1), "c": Value(1.999, None, 1), "d": None}
    assert ranks(values) == {"a": 2, "b": 1, "c": 2}
    assert pairs_in_order(values, values) == (2, 2)  # a and c are equal


@pytest.mark.parametrize(
    ("grid", "scale", "keys", "text", "comparable"),
    [
        ("table1", 1.0, [], "SCALE 1: 240 epochs, all images; the paper's schedule and data", True),
        ("table1", 0.02, [], "SCALE 0.02: 5 epochs, 10 images a class; not comparable to the paper", False),
        ("table1", 1.0, ["epochs=2"], "SCALE 1: 2 epochs, all images; not comparable to the paper", False),
        ("s1", 1.0, [], "SCALE 1: 240 epochs, 250 images a class, 20 classes; not comparable to the paper", False),
    ],
)
def test_the_stamp_says_what_the_runs_are(grid, scale, keys, text, comparable, maker):
    network = load_grid(grid).networks[0]
    only = {"data": ["cifar100"], "network": [network], "method": ["baseline"]}
    which, plan = maker.plan(grid, only=only, scale=scale, overrides=keys)
    assert collect(which, plan, scale).stamp == (text, comparable)


@pytest.mark.parametrize(
    ("keys", "said", "comparable"),
    [
        (["schedule=cosine"], ", schedule=cosine", False),
        (["schedule.milestones=[10, 20]"], ", schedule.milestones=[10, 20]", False),
        (["batch_size=512", "optimizer.lr=0.4"], ", batch_size=512, optimizer.lr=0.4", False),
        (["distort.flip=0"], ", distort.flip=0", False),
        (["distort.cutout=16"], ", distort.cutout=16", False),
        (["batch_size=64"], ", batch_size=64", True),  # as the recipe has it
        (["precision=fp32", "data.root=elsewhere", "eval_every=10"], "", True),
    ],
    ids=str,
)
def test_runs_with_other_keys_than_the_papers_are_not_stamped_as_its(keys, said, comparable, maker):
    only = {"data": ["cifar100"], "network": ["resnet32"], "method": ["baseline", "cutnmix"]}
    grid, plan = maker.plan("table1", only=only, seeds=[95], overrides=keys)
    verdict = "the paper's schedule and data" if comparable else "not comparable to the paper"
    assert collect(grid, plan, 1.0).stamp == (f"SCALE 1: 240 epochs, all images{said}; {verdict}", comparable)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"overrides": ["schedule=cosine"]}, ", schedule=cosine"), ({"data": ["digits"]}, "")],
    ids=str,
)
def test_a_grid_of_ones_own_is_not_stamped_as_the_papers(changes, said, maker):
    grid = load_grid("table1").model_copy(update={"data": ["cifar100"], "networks": ["resnet32"]} | changes)
    plan = plan_grid(grid, only={"method": ["baseline"]}, seeds=[95], out=maker.out)
    stamp = collect(grid, plan, 1.0).stamp
    assert stamp == (f"SCALE 1: 240 epochs, all images{said}; not comparable to the paper", False)


def test_the_stamp_of_rows_with_fewer_images_and_rows_with_all(maker):
    fewer = Row(
        name="b", label="B", recipe="table1/baseline", overrides=["data.images_per_class=50", "data.classes=20"]
    )
    rows = [Row(name="a", label="A", recipe="table1/baseline"), fewer]
    grid = Grid(name="g", title="G", seeds=[95], data=["cifar100"], networks=["resnet20"], rows=rows)
    text = collect(grid, plan_grid(grid, out=maker.out), 1.0).stamp.text
    assert text == "SCALE 1: 240 epochs, 50 to all images a class, 20, all classes; not comparable to the paper"


# Sentences


def claim(results: Results, quote: str):
    (found,) = [finding for finding in findings(results) if quote in finding.quote]
    return found


BASE = [72.0, 72.4, 72.1]


@pytest.mark.parametrize(
    ("ours", "verdict", "says"),
    [
        ([], OPEN, "No pair of runs is done yet"),
        ([74.0], LEANS, "With 1 run a cell that may be chance: no test is possible."),
        ([74.0, 74.5], LEANS, "With 2 runs a cell that may be chance: no test is possible."),
        ([74.0, 74.6, 74.2], AGREES, "The seeds tell it from chance (paired t, p < 0.05; the one test)."),
        ([72.1, 76.0, 72.2], LEANS, "The seeds do not tell it from chance"),
        ([71.9], AGAINST, "Above in 0 of 1 comparison."),
    ],
    ids=["none", "one", "two", "clear", "noise", "below"],
)
def test_sentences_are_no_stronger_than_n_allows(ours, verdict, says, maker):
    results = results_of(maker, {"baseline": BASE, "cutnmix": ours}, grid="table1")
    found = claim(results, "consistently improves")
    assert found.verdict == verdict and says in found.text
    assert ("p\u00a0" in found.text) == (len(ours) > 2)


def test_a_claim_is_not_settled_before_all_its_comparisons_are(maker):
    """One network that is sure says nothing of the other."""
    rows = {"vgg16": {"baseline": BASE, "cutnmix": [74.0, 74.6, 74.2]}, "vgg19": {"baseline": [], "cutnmix": []}}
    found = claim(results_by_network(maker, rows, scale=0.02), "consistently improves")
    assert found.verdict == LEANS and "Above in 1 of 1 comparison (1 more are not run yet)" in found.text


def test_a_claim_that_holds_in_places_is_mixed_and_the_others_are_named(maker):
    top1 = {"baseline": [76.0], "dml": [75.0], "cutmix": [76.0], "ddgsd": [70.0], "kdcl": [72.0], "one": [73.0]}
    top1["cutnmix"] = [74.0]  # below two rows that are no distillation
    found = claim(results_of(maker, top1, grid="table1"), "outperform")
    assert found.verdict == MIXED
    assert found.text.startswith("Above in 3 of 4 comparisons. Not above: Ours over DML, CIFAR-10, Vgg-16: \u22121.00")


def test_what_distils_is_all_that_the_method_is_held_against_in_s1(maker):
    names = [row.name for row in load_grid("s1").rows]
    found = claim(results_of(maker, {name: [77.0 + i / 10] for i, name in enumerate(names)}, grid="s1"), "outperform")
    assert (found.verdict, found.text.partition(" (")[0]) == (
        LEANS,
        "Above in 1 of 1 comparison. CutnMix + MMD + PT over DML, CIFAR-100, resnet20: +0.60",
    )


def about(results: Results, what: str):
    (found,) = [finding for finding in findings(results) if finding.about == what]
    return found


@pytest.mark.parametrize(
    ("ours", "verdict", "told"),
    [
        ((92.0, 93.0, 94.0), LEANS, "3 of 3"),
        ((93.0, 92.0, 94.0), MIXED, "2 of 3"),
        ((94.0, 93.0, 92.0), AGAINST, "0 of 3"),
    ],
)
def test_orders_agree_mix_or_contradict(ours, verdict, told, maker):
    """The paper's own order is baseline, DML, Ours."""
    top1 = {name: [accuracy] for name, accuracy in zip(("baseline", "dml", "cutnmix"), ours, strict=True)}
    found = about(results_of(maker, top1, 0.02, "table1"), "order")
    assert found.verdict == verdict and f"{told} pairs of methods stand in the paper's order." in found.text


@pytest.mark.parametrize(("n", "said"), [(1, True), (2, False)])
def test_only_an_order_of_single_runs_may_be_chance(n, said, maker):
    found = about(results_of(maker, {"baseline": BASE[:n], "cutnmix": BASE[:n]}, 0.02, "table1"), "order")
    assert ("Some of these are one run" in found.text) == said


@pytest.mark.parametrize(
    ("dml", "ours", "verdict", "told"),
    [(94.0, 94.5, LEANS, "2 of 2"), (93.0, 94.5, MIXED, "1 of 2"), (93.0, 93.2, AGAINST, "0 of 2")],
)
def test_gains_of_the_other_sign_are_named(dml, ours, verdict, told, maker):
    found = about(results_of(maker, {"baseline": [93.5], "dml": [dml], "cutnmix": [ours]}, 0.02, "table1"), "gains")
    assert found.verdict == verdict and f"{told} gains have the paper's sign" in found.text
    assert ("Not so DML \u22120.50 (paper +0.24)" in found.text) == (dml < 93.5)


def gaining(maker: Maker, gains: dict[str, float], base: float, scale: float) -> Results:
    top1 = {network: {"baseline": [base], "cutnmix": [base + gain]} for network, gain in gains.items()}
    return results_by_network(maker, top1, scale)


@pytest.mark.parametrize(("gain", "verdict"), [(2.0, LEANS), (0.9, MIXED), (0.4, AGAINST)])
def test_who_gains_most(gain, verdict, maker):
    results = gaining(maker, {"wrn20_8": gain, "vgg16": 1.0, "resnet32": 0.5}, base=70.0, scale=0.02)
    found = claim(results, "higher performance boost")
    assert found.verdict == verdict
    assert f"WideResNet gains +{gain:.2f}, the others Vgg-16 +1.00, ResNet-32 +0.50." in found.text


@pytest.mark.parametrize(
    ("gains", "verdict", "told"), [((0.9, 1.5), MIXED, "1 inside"), ((0.5, 1.6), AGAINST, "0 inside")]
)
def test_gains_beyond_either_end_lie_outside_the_range(gains, verdict, told, maker):
    results = gaining(maker, dict(zip(("vgg16", "vgg19"), gains, strict=True)), base=93.0, scale=1.0)
    found = claim(results, "0.73-1.43%")
    assert found.verdict == verdict and f"over 2 networks, {told} that range" in found.text


def test_the_papers_own_numbers_have_its_signs_and_lie_in_its_range(maker):
    paper = load_table("table1")
    only = {"data": ["cifar10"], "method": ["baseline", "dml", "cutmix", "cutnmix"]}
    grid, plan = maker.plan("table1", only=only)
    for planned in plan:
        value = paper.value(planned.cell.data, planned.cell.network, planned.cell.row.name)
        maker.run(planned, value.mean + (planned.seed - 96) * value.spread)
    results = collect(grid, plan, 1.0)
    assert "+0.73 to +1.43 over 6 networks, 6 inside that range" in claim(results, "0.73-1.43%").text
    signs = [finding for finding in findings(results) if finding.about == "gains"]
    assert {finding.verdict for finding in signs} == {LEANS}
    assert "2 of 2 gains have the paper's sign" in signs[1].text  # DML on Vgg-19 gains 0.00


def test_why_there_is_no_test_is_said_of_each_comparison():
    differences = [Difference(1.0, 3, 0.01, 0.5, 1.5), Difference(1.0, 3, None, None, None)]
    assert chance(differences).endswith(
        "(paired t, p < 0.05; the one test; 1 comparison whose pairs all differ by the same)."
    )
    differences += [Difference(1.0, 2, None, None, None)] * 2
    assert "; 2 comparisons with fewer than three pairs; 1 comparison whose pairs all" in chance(differences)


def test_values_are_compared_only_at_the_papers_scale(maker):
    top1 = {"baseline": [93.9], "cutnmix": [94.8]}
    full = results_of(maker, top1, grid="table1")
    assert "+0.90 to +0.90 over 1 network, 1 inside" in claim(full, "0.73-1.43%").text
    assert [f.text for f in findings(full) if f.about == "values"] == [
        "2 of 2 cells differ from the paper's by no more than both standard deviations together; "
        "furthest is Ours, CIFAR-10, Vgg-16: \u22120.04."
    ]
    short = results_of(maker, top1, grid="table1", scale=0.02)
    assert claim(short, "0.73-1.43%").verdict == OPEN
    assert not [finding for finding in findings(short) if finding.about == "values"]
    (signs,) = [finding for finding in findings(short) if finding.about == "gains"]
    assert "over Baseline, 1 of 1 gains have the paper's sign: Ours +0.90 (paper +0.95)" in signs.text


def test_a_cell_is_near_the_papers_by_both_deviations_together(maker):
    """93.89 +- 0.06 is printed: 94.09 +- 0.30 is near, 94.09 of one run is not."""
    for top1, told in (([94.09], "0 of 1"), ([93.79, 94.09, 94.39], "1 of 1")):
        text = about(results_of(maker, {"baseline": top1}, grid="table1"), "values").text
        assert text.startswith(f"{told} cell")


# The files


SHORT = {
    "scale": 0.02,
    "only": {"data": ["cifar100"], "network": ["resnet32"], "method": ["baseline", "dml", "cutnmix"]},
}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def short_report(maker: Maker, done: int) -> tuple[Path, list[Planned]]:
    grid, plan = maker.plan("table1", **SHORT)
    for i, planned in enumerate(plan[: done + 1]):
        maker.run(planned, 30 + i, epochs=None if i < done else 2)
    return write(grid, plan, 0.02, maker.out), plan


@pytest.mark.parametrize("done", [0, 4, 9], ids=["none", "some", "all"])
def test_the_report_works_with_any_part_of_the_runs(done, maker):
    html, _ = short_report(maker, done)
    stamp = "SCALE 0.02: 5 epochs, 10 images a class; not comparable to the paper"
    text, md = html.read_text(), (maker.out / "report.md").read_text()
    assert html == maker.out / "report.html" and f"{done} of 9 runs done" in text and f"{done} of 9 runs done" in md
    assert f"| {stamp}</title>" in text
    assert text.count(f"<small>{stamp}</small>") == text.count("<table")
    assert md.count(f"**{stamp}**\n\n|") == md.count("\n| ---")
    runs, cells = rows(maker.out / "report.csv"), rows(maker.out / "report-cells.csv")
    assert {row["stamp"] for row in runs + cells} == {stamp}
    assert len(runs) == 9 and [row["state"] for row in runs].count("done") == done
    assert [(row["method"], int(row["n"])) for row in cells] == [
        (name, math.ceil((done - i) / 3)) for i, name in enumerate(["baseline", "dml", "cutnmix"])
    ]
    assert sorted(path.name for path in maker.out.iterdir() if path.is_file()) == [
        "curves-cifar100-resnet32.png", "report-cells.csv", "report.csv", "report.html", "report.md",
    ]  # fmt: skip


def test_a_selection_leaves_what_was_done_before_on_the_page(maker):
    def reported(done: list[Planned], **keys) -> list[tuple[str, str, str]]:
        grid, plan = maker.plan("s1", **keys)
        for planned in done:
            maker.run(planned, 70.0)
        page = reproduce(
            grid, plan, 1.0, maker.out / "runs", lambda todo, stop: (event for event in ()), Display()
        ).page
        assert page and f"{len(done)} of {len(done)} runs done" in page.read_text()
        lines = rows(page.with_name("report.csv"))
        return [(line["method"], line["seed"], line["state"]) for line in lines]

    names = [row.name for row in load_grid("s1").rows]
    every = maker.plan("s1")[1] + maker.plan("s1", seeds=[7], only={"method": ["dml"]})[1]
    expected = [(name, seed, "done") for name in names for seed in ["7"] * (name == "dml") + ["95", "96", "97"]]
    assert reported(every, seeds=[97], only={"method": ["dml", "cutnmix"]}) == expected


def test_what_the_overrides_make_no_run_of_is_not_on_the_page(maker):
    grid, plan = maker.plan("s1", seeds=[95], only={"method": ["baseline", "dml"]})
    for planned in plan:
        maker.run(planned, 70.0)
    of_one = {"seeds": [96], "only": {"method": ["cutnmix"]}, "overrides": ["method.beta=0.5"]}  # a key of its alone
    _, plan = maker.plan("s1", **of_one)
    assert with_what_lies_there(grid, plan, 1.0, maker.out / "runs") == plan


def test_before_any_run_there_is_a_page(maker):
    grid, plan = maker.plan("table1", **SHORT)
    text = write(grid, plan, 0.02, maker.out).read_text()
    assert "0 of 9 runs done" in text and "<svg" not in text and text.count("0 of 3 runs") == 6


def test_the_tables_hold_ours_beside_the_papers(maker):
    short_report(maker, 9)
    ours = rows(maker.out / "report-cells.csv")[-1]
    assert float(ours["mean_top1"]) == pytest.approx(statistics.mean([32, 35, 38]))
    assert float(ours["spread"]) == pytest.approx(statistics.stdev([32, 35, 38]))
    assert (float(ours["paper_top1"]), float(ours["paper_spread"]), float(ours["paper_gain"])) == (73.84, 0.25, 2.13)
    assert float(ours["difference"]) == pytest.approx(35 - 73.84)
    assert (float(ours["gain"]), ours["comparable"]) == (pytest.approx(2), "False")
    line = "| **Ours** | 1 | **35.00 \u00b1 3.00** | 3 | 5 | 73.84 \u00b1 0.25 | \u221238.84 | +2.00 | +2.13 |"
    assert line in (maker.out / "report.md").read_text()


def test_other_readings_stand_under_their_own_names(maker):
    only = {"data": ["cifar100"], "network": ["resnet110"], "method": ["cutnmix"]}
    grid, plan = maker.plan("table2", only=only, seeds=[95], scale=0.02)
    for i, score in enumerate(maker.record["scores"].values()):
        score["top1"] = float(i)  # all apart
    maker.run(plan[0], 79.0)
    results = collect(grid, plan, 0.02)
    (cell,) = results.cells.values()
    (run,) = cell.runs
    expected = {name: run.reading(name) for name in READINGS if name != "leader"}
    assert expected["mean"] == 79.0 and len(set(expected.values()) - {None}) == 4
    sheet = sheets.readings(results, cell.data, cell.network)
    titles = [column.title for column in sheet.columns]
    shown = dict(zip(titles, [entry.sort for entry in sheet.rows[0]], strict=True))
    assert {name: shown[READINGS[name]] for name in expected} == expected
    assert shown["Best epoch, chosen on test"] == pytest.approx(79.25)
    write(grid, plan, 0.02, maker.out)
    (line,) = rows(maker.out / "report.csv")
    assert {name: float(line[f"last_epoch_{name}_top1"]) for name in expected} == pytest.approx(expected)
    assert float(line["best_epoch_chosen_on_test_mean_top1"]) == pytest.approx(79.25)


def test_every_text_is_escaped(maker):
    grid, plan = maker.plan("table1", **SHORT, seeds=[95])
    evil = "<script>alert('x')</script>\"&"
    row = plan[0].cell.row.model_copy(update={"label": evil, "note": evil})
    grid = grid.model_copy(update={"title": evil, "note": evil, "rows": [row, *grid.rows[1:]]})
    maker.run(plan[0], 30.0, hardware=evil)
    plan[0] = plan[0]._replace(cell=plan[0].cell._replace(row=row))
    text = write(grid, plan, 0.02, maker.out).read_text()
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;") > 8


def test_the_page_asks_the_network_for_nothing(maker):
    text = short_report(maker, 9)[0].read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)|@import|https?://", text)


def test_an_id_stands_once_and_every_link_within_the_page_has_its_end(maker):
    text = short_report(maker, 9)[0].read_text()
    ids = re.findall(r'\bid="([^"]*)"', text)
    body = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)  # two figures of one shape may share its clip
    own = re.findall(r'\bid="([^"]*)"', body)
    assert len(own) == len(set(own))
    assert set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_figures_are_drawn_anew_only_where_a_run_went_on(maker):
    _, plan = short_report(maker, 4)
    before = curves.svg.cache_info().misses
    write(load_grid("table1"), plan, 0.02, maker.out)
    assert curves.svg.cache_info().misses == before
    maker.run(plan[4], 44.0)
    write(load_grid("table1"), plan, 0.02, maker.out)
    assert curves.svg.cache_info().misses == before + 3  # the methods' figure in both sizes, and the cell's


def test_the_shade_is_the_sample_deviation(maker):
    results = results_of(maker, {"cutnmix": [79.0, 79.5, 80.6]})
    (line,) = curves.mean_lines(list(results.cells.values()))
    epoch, mean, spread = line.points[-1]
    assert (epoch, mean, spread) == pytest.approx((240, 79.7, statistics.stdev([79.0, 79.5, 80.6])))


# In a browser

PROBE = """
<script>
window.addEventListener("load", () => {
  const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].firstChild.textContent.trim());
  const table = [...document.querySelectorAll("table")].find((t) => t.getAttribute("aria-label") === "TABLE");
  const heads = [...table.tHead.rows[0].cells];
  const at = heads.findIndex((head) => head.textContent === "HEAD");
  const orders = [column(table, at)], states = [heads[at].getAttribute("aria-sort")];
  for (let click = 0; click < 2; click++) {
    heads[at].querySelector("button").click();
    orders.push(column(table, at));
    states.push(heads[at].getAttribute("aria-sort"));
  }
  heads[0].querySelector("button").click();
  orders.push(column(table, 0));
  const seen = [...document.querySelectorAll(".figures svg")].map((svg) => svg.getBoundingClientRect());
  parent.postMessage(JSON.stringify({
    orders, states, last: heads[at].getAttribute("aria-sort"), inner: innerWidth,
    body: document.documentElement.scrollWidth,
    figures: seen.filter((box) => box.width > 200 && box.height > 150 && box.right <= innerWidth).length,
    hidden: seen.filter((box) => box.width === 0).length,
    loaded: performance.getEntriesByType("resource").length,
  }), "*");
});
</script>
"""
FRAME = """<!DOCTYPE html><body><script>
addEventListener("message", (event) => {
  document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: event.data}));
});
</script><iframe src="probe.html" width="WIDTH" height="900" style="border: 0"></iframe>"""


def in_chromium(page_path: Path, width: int, table: str, head: str) -> tuple[dict, list[str]]:
    """What the probe saw in a frame of that width (a window has a least width), and all lines of the console."""
    probe = page_path.with_name("probe.html")
    script = PROBE.replace("TABLE", table).replace("HEAD", head)
    probe.write_text(page_path.read_text().replace("</body>", f"{script}</body>"))
    frame = page_path.with_name("frame.html")
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000"]
    place = f"--user-data-dir={page_path.parent / f'chromium{width}'}"
    command = [CHROMIUM, *flags, place, "--virtual-time-budget=2000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser_it_opens_sorts_and_fits(width, maker):
    grid, plan = maker.plan(
        "table1", scale=0.02, only={"data": ["cifar100"], "network": ["vgg16", "resnet32"]}, seeds=[95]
    )
    for planned, top1 in zip(plan, [31, 9.5, 100, 30, 22, 28, 27], strict=False):  # Vgg-16's last two are missing
        maker.run(planned, top1)
    for planned in plan[9:]:
        maker.run(planned, 25.0)
    html = write(grid, plan, 0.02, maker.out)
    seen, console = in_chromium(html, width, "CIFAR-100, Vgg-16", "Ours")
    assert console == []
    falling = ["100.00", "31.00", "30.00", "28.00", "27.00", "22.00", "9.50"]
    assert seen["orders"][0] == ["31.00", "9.50", "100.00", "30.00", "22.00", "28.00", "27.00", "\u2013", "\u2013"]
    assert seen["orders"][1] == [*falling, "\u2013", "\u2013"]
    assert seen["orders"][2] == [*falling[::-1], "\u2013", "\u2013"]  # what is not known stays last
    assert seen["states"] == ["none", "descending", "ascending"] and seen["last"] == "none"
    names = seen["orders"][3]
    assert names == sorted(names, key=str.lower)
    assert seen["inner"] == width and seen["body"] <= width
    assert (seen["figures"], seen["hidden"]) == (2, 2)  # one size of each of the two
    assert seen["loaded"] == 0


def test_a_figure_has_the_labels_as_they_are():
    points = tuple((float(epoch), 50.0 + epoch / 3, None) for epoch in range(1, 9))
    labels = ["beta = 0.03", "beta = 0.003 and more", 'T = 1.25 "warm"']
    drawn = curves.svg(tuple(curves.Line(label, points, "#000000", "-") for label in labels), 7.4, 3.7)
    texts = re.findall(r">([^<]*)</text>", drawn)
    assert [text for text in texts if text.endswith("  52.7")] == [f"{label}  52.7" for label in labels]
    assert not re.search(r"<path [^>]*\d\.\d\d", drawn)  # all else is shortened


def test_long_labels_and_shorter_schedules_leave_room_for_the_curves():
    points = tuple((float(epoch), 50.0 + epoch, None) for epoch in range(1, 9))
    long = curves.Line("A method of a very long name " * 4, points, "#000000", "-")
    short = curves.Line("Short", points[:3], "#000000", "--")
    begun = curves.Line("Begun", points[:5], "#000000", ":", so_far=True)
    for lines in ((long, short), (long, short, begun)):
        for width in (4.1, 7.4):
            drawn = curves.svg(lines, width, 3.7)
            assert "\u2026" in drawn and drawn.count("so far") == len(lines) - 2
