"""Runs beside each other: the differences are those of the same images, and so are their standard errors."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, ttest_rel

from cutnmix.pipeline.datasets import load_splits
from cutnmix.trainer import compare as comparison
from cutnmix.trainer.compare import compare
from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import RunError, RunFolder
from cutnmix.trainer.run import train

SMALL = ["data.images_per_class=8", "epochs=1", "log_every=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run with a peer teacher and one of a single network, each of one epoch on 80 digits."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"peers": [], "alone": ["method=baseline", "peers.count=1", "mix=none", "seed=3"]}
    for name, own in keys.items():
        train(load_config("quickstart", [*SMALL, *own, f"runs={folder}", f"name={name}"]))
    return {name: folder / name for name in keys}


def test_scores_are_those_on_record(runs):
    compared = compare([runs["alone"], runs["peers"]])
    assert compared.images == len(load_splits("digits").test)
    assert [(row.run, row.prediction) for row in compared.rows] == [
        *(("alone", name) for name in ("mean", "ensemble")),
        *(("peers", name) for name in ("mean", "ensemble", "teacher")),
    ]
    for row in compared.rows:
        scores = RunFolder(runs[row.run]).records("test")[-1]["scores"]
        assert row.top1 == pytest.approx(scores[row.prediction]["top1"], abs=1e-4)
    alone, together = ({row.prediction: row for row in compared.rows if row.run == run} for run in ("alone", "peers"))
    assert together["mean"].difference == pytest.approx(together["mean"].top1 - alone["mean"].top1, abs=1e-9)
    assert alone["mean"].difference is together["teacher"].difference is None  # the first has no teacher


def test_standard_errors_and_p_are_of_the_paired_differences():
    rng = np.random.default_rng(0)
    first_N, hit_N = rng.integers(0, 2, 500).astype(float), rng.integers(0, 3, 500) / 2  # one network; two peers
    row = comparison._compared("run", "mean", hit_N, first_N)
    d_N = hit_N - first_N
    variance = sum((d - sum(d_N) / 500) ** 2 for d in d_N) / 499
    assert row.difference == pytest.approx(100 * (hit_N.mean() - first_N.mean()))
    assert row.difference_error == pytest.approx(100 * (variance / 500) ** 0.5)
    assert row.p == pytest.approx(ttest_rel(hit_N, first_N).pvalue)


def test_p_is_near_mcnemars_exact_one_where_both_predict_once():
    first_N, hit_N = np.zeros(2000), np.zeros(2000)
    first_N[:90] = hit_N[90:210] = 1  # 90 images that only the first has right, 120 that only the second has
    row = comparison._compared("run", "ensemble", hit_N, first_N)
    assert row.p == pytest.approx(2 * binom.cdf(90, 210, 0.5), rel=0.2)
    assert row.difference == pytest.approx(1.5)


def test_a_run_and_its_copy_do_not_differ(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs["peers"], copy)
    rows = [row for row in compare([runs["peers"], copy]).rows if row.run == "copy"]
    assert [(row.difference, row.difference_error, row.p) for row in rows] == [(0, 0, None)] * 3


def test_unused_images_are_those_of_training_that_no_run_saw(runs, tmp_path):
    whole, splits = load_splits("digits"), load_splits("digits", images_per_class=8, test="unused")
    compared = compare([*runs.values()], test="unused")
    assert compared.images == len(whole.train) - 80 == len(splits.test)
    seen = {image.tobytes() for image in splits.train.array}
    rest = [image.tobytes() for image in splits.test.array]
    assert sorted([*rest, *(image.tobytes() for image in splits.train.array)]) == sorted(
        image.tobytes() for image in whole.train.array
    )
    assert not seen & set(rest)
    comparison.write_csv(tmp_path / "made" / "compared.csv", compared, "unused")
    with (tmp_path / "made" / "compared.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["prediction"], float(line["top1"])) for line in lines] == [
        (row.run, row.prediction, row.top1) for row in compared.rows
    ]
    assert {line["on"] for line in lines} == {"unused"} and {line["images"] for line in lines} == {str(len(rest))}
    assert lines[0]["p"] == ""


def test_runs_on_other_images_are_refused(runs, tmp_path):
    other = RunFolder(tmp_path / "other")
    other.begin(load_config("quickstart", ["data.images_per_class=9"]))
    with pytest.raises(RunError, match=r"other: its data.images_per_class is 9, of .*peers it is 8"):
        compare([runs["peers"], other.path], test="unused")
    with pytest.raises(RunError, match="has not saved a checkpoint yet"):  # on the test images they can be compared
        compare([runs["peers"], other.path])
    other.config.unlink()
    other.begin(load_config("quickstart", ["data.classes=5"]))
    with pytest.raises(RunError, match=r"its data.classes is 5, of .*peers it is None"):
        compare([runs["peers"], other.path])
