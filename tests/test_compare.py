"""Runs beside each other: the differences are those of the same images, and so are their standard errors."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from scipy.stats import binom, ttest_rel

from cutnmix.pipeline.datasets import load_splits
from cutnmix.trainer import compare as comparison
from cutnmix.trainer import predicted
from cutnmix.trainer.compare import compare
from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import RunError, RunFolder
from cutnmix.trainer.keys import ConfigError
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
    assert compared.images == len(load_splits("digits16").test)
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
    assert (alone["mean"].less, together["teacher"].less, together["mean"].less) == (None, None, "alone")
    assert compared.seeds == [("alone", [3]), ("peers", [95])]


def test_standard_errors_and_p_are_of_the_paired_differences():
    rng = np.random.default_rng(0)
    first_N, hit_N = rng.integers(0, 2, 500).astype(float), rng.integers(0, 3, 500) / 2  # one network; two peers
    row = comparison._compared("run", "mean", {0: hit_N}, "first", {0: first_N})
    d_N = hit_N - first_N
    variance = sum((d - sum(d_N) / 500) ** 2 for d in d_N) / 499
    assert row.difference == pytest.approx(100 * (hit_N.mean() - first_N.mean()))
    assert row.difference_error == pytest.approx(100 * (variance / 500) ** 0.5)
    assert row.p == pytest.approx(ttest_rel(hit_N, first_N).pvalue)


def test_p_is_near_mcnemars_exact_one_where_both_predict_once():
    first_N, hit_N = np.zeros(2000), np.zeros(2000)
    first_N[:90] = hit_N[90:210] = 1  # 90 images that only the first has right, 120 that only the second has
    row = comparison._compared("run", "ensemble", {0: hit_N}, "first", {0: first_N})
    assert row.p == pytest.approx(2 * binom.cdf(90, 210, 0.5), rel=0.2)
    assert row.difference == pytest.approx(1.5)


def test_a_run_and_its_copy_do_not_differ(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs["peers"], copy)
    rows = [row for row in compare([runs["peers"], copy]).rows if row.run == "copy"]
    assert [(row.difference, row.difference_error, row.p) for row in rows] == [(0, 0, None)] * 3


def test_unused_images_are_those_of_training_that_no_run_saw(runs, tmp_path):
    whole, splits = load_splits("digits16"), load_splits("digits16", images_per_class=8, test="unused")
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
    assert lines[0]["p"] == lines[0]["less"] == lines[0]["seed_error"] == "" and lines[0]["seeds"] == "1"
    heads = "on images run prediction top1 error less difference difference_error p seeds seed_error"
    assert [*lines[0]] == heads.split()


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


def test_a_file_that_is_not_there_is_said_to_be_absent(runs, tmp_path):
    with pytest.raises(RunError, match=f"^{tmp_path / 'x.safetensors'} is not there$"):
        compare([runs["peers"], tmp_path / "x.safetensors"])


def test_what_cannot_be_kept_is_told_before_anything_is_scored(runs, monkeypatch):
    monkeypatch.setattr(comparison, "_predicted", lambda *_: pytest.fail("scored"))
    with pytest.raises(RunError, match=r"^/proc/none cannot be written: No such file or directory$"):
        compare([runs["alone"], runs["peers"]], keep=Path("/proc/none"))


# Files of predictions


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory) -> tuple[Path, comparison.Comparison]:
    """The folder of the predictions of the last checkpoints on the test images, and how the runs compare."""
    folder = tmp_path_factory.mktemp("kept") / "new"
    return folder, compare([runs["alone"], runs["peers"]], keep=folder)


@pytest.fixture
def kept(scored) -> Path:
    return scored[0]


def test_a_kept_file_stands_for_its_run_without_checkpoint_and_data(runs, scored, monkeypatch):
    kept, whole = scored
    assert sorted(path.name for path in kept.iterdir()) == ["alone.safetensors", "peers.safetensors"]
    alone, peers = (kept / f"{name}.safetensors" for name in ("alone", "peers"))
    assert compare([alone, runs["peers"]]) == whole
    assert compare([runs["alone"], peers]) == whole
    monkeypatch.setattr(comparison, "predict_run", None)
    monkeypatch.setattr(comparison, "saved", None)
    assert compare([alone, peers]) == whole


def test_a_kept_file_needs_neither_the_modules_nor_the_method_of_its_run(kept, tmp_path):
    made, mine = predicted.read(kept / "alone.safetensors"), tmp_path / "mine.safetensors"
    keys = {"imports": ["a_module_that_is_not_here"], "method": {"name": "nobodys", "weight": 0.5}}
    predicted.write(mine, made._replace(config=made.config.model_copy(update=keys)))
    again = predicted.read(mine).config
    assert (again.imports, again.method) == (keys["imports"], keys["method"])
    assert again.model_copy(update={key: getattr(made.config, key) for key in keys}) == made.config
    assert compare([kept / "alone.safetensors", mine]).rows[0].top1 == compare([mine]).rows[0].top1
    predicted.write(mine, made._replace(config=made.config.model_copy(update={"batch_size": 0})))
    with pytest.raises(ConfigError, match=r"^batch_size \(.*mine.safetensors\): "):
        predicted.read(mine)


def test_a_kept_file_says_what_it_is_of(runs, kept):
    found, wanted = predicted.read(kept / "peers.safetensors"), load_splits("digits16")
    assert found[:1] + found[2:5] == ("peers", "last", 1.0, "test")
    assert found.config == RunFolder(runs["peers"]).read_config().model_copy(update={"runs": Path("runs")})
    assert found.digest == wanted.test.digest()
    np.testing.assert_array_equal(found.label_N, wanted.test.labels)
    assert [*sorted(found.class_N)] == ["ensemble", "peer0", "peer1", "teacher"]
    assert str(runs["peers"].parent).encode() not in (kept / "peers.safetensors").read_bytes()
    with safe_open(kept / "peers.safetensors", "np") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"uint8"}


def test_predictions_survive_their_file_whatever_the_number_of_classes(kept, tmp_path):
    made = predicted.read(kept / "alone.safetensors")
    many = made._replace(
        class_N=made.class_N | {"peer0": made.class_N["peer0"] + 70_000}, checkpoint="best", epochs=1 / 3
    )
    predicted.write(tmp_path / "many.safetensors", many)
    again = predicted.read(tmp_path / "many.safetensors")
    assert again[:6] == many[:6]
    assert all(np.array_equal(again.class_N[name], many.class_N[name]) for name in many.class_N)
    assert [path.name for path in tmp_path.iterdir()] == ["many.safetensors"]


def test_a_file_of_other_predictions_is_refused(runs, kept, tmp_path):
    file, run = kept / "alone.safetensors", runs["peers"]
    with pytest.raises(RunError, match=r"alone.safetensors holds predictions of test images: it goes with --on test"):
        compare([run, file], test="unused")
    with pytest.raises(RunError, match=r"alone.safetensors holds predictions of last.pt: .* without --best"):
        compare([run, file], best=True)
    made, other = predicted.read(file), tmp_path / "other.safetensors"
    predicted.write(other, made._replace(checkpoint="best"))
    with pytest.raises(RunError, match=r"other.safetensors holds predictions of best.pt: .* with --best"):
        compare([run, other])
    predicted.write(other, made._replace(digest="0" * 32))
    for pair in ([file, other], [other, file], [run, other]):
        with pytest.raises(RunError, match="its 355 test images or their labels are others than the 355 of"):
            compare(pair)
    narrow = made.config.model_copy(update={"data": made.config.data.model_copy(update={"classes": 5})})
    predicted.write(other, made._replace(config=narrow))
    with pytest.raises(RunError, match=r"other.safetensors: its data.classes is 5, of .*peers it is None"):
        compare([run, other])


def test_a_file_without_predictions_is_refused(runs, kept, tmp_path):
    whole, broken = (kept / "alone.safetensors").read_bytes(), tmp_path / "broken.safetensors"
    weights = (runs["alone"] / "peers" / "peer0.safetensors").read_bytes()
    for content in (b"", b"a,b\n1,2\n", whole[:-1], whole[:100], weights, whole.replace(b"of.peer0", b"of.peerX")):
        broken.write_bytes(content)
        with pytest.raises(
            RunError, match=r"broken.safetensors is damaged, or no file of cutnmix compare --keep \(.+\)"
        ):
            compare([broken])
    with pytest.raises(RunError, match="nothing is not a run"):
        compare([tmp_path / "nothing"])


def test_two_runs_of_one_name_are_not_kept_in_one_folder(runs, tmp_path):
    twin = tmp_path / "twin" / "alone"
    shutil.copytree(runs["alone"], twin)
    with pytest.raises(RunError, match=rf"--keep: {runs['alone']} and {twin} would both be .*alone.safetensors"):
        compare([runs["alone"], twin], keep=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_kept_file_of_other_images_is_not_written_over(runs, kept, tmp_path):
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    before = (folder / "alone.safetensors").read_bytes()
    for keys, wanted in (({"test": "unused"}, "test images by last.pt"), ({"best": True}, "test images by last.pt")):
        with pytest.raises(RunError, match=rf"--keep: {folder / 'alone.safetensors'} holds predictions of {wanted}; "):
            compare([runs["alone"], runs["peers"]], keep=folder, **keys)
    assert (folder / "alone.safetensors").read_bytes() == before
    compare([runs["alone"], runs["peers"]], keep=folder)  # of the same
    others = predicted.read(folder / "alone.safetensors")._replace(digest="of others")
    predicted.write(folder / "alone.safetensors", others)
    with pytest.raises(RunError, match="holds predictions of other images; keep these in another folder"):
        compare([runs["alone"], runs["peers"]], keep=folder)
    assert predicted.read(folder / "alone.safetensors").digest == "of others"


def test_a_kept_file_of_another_run_is_not_written_over(runs, kept, tmp_path):
    """It may be the only one that there is."""
    folder = tmp_path / "kept"
    folder.mkdir()
    taken = folder / "alone.safetensors"
    shutil.copy(kept / "peers.safetensors", taken)
    before = taken.read_bytes()
    with pytest.raises(RunError, match=rf"--keep: {taken} is of a run with other keys than {runs['alone']}; keep"):
        compare([taken, runs["alone"]], keep=folder)
    assert taken.read_bytes() == before


# Over seeds


@pytest.fixture
def put(tmp_path, kept):
    """Leave a file of a run of this method and seed that is right about these images of 6."""
    alone = predicted.read(kept / "alone.safetensors")

    def _put(method: str, seed: int, right: str, name: str = "", folder: str = "", **keys) -> Path:
        lr = 0.1 if method == "dml" else 0.2
        optimizer = alone.config.optimizer.model_copy(update={"lr": lr})
        config = alone.config.model_copy(update={"seed": seed, "optimizer": optimizer, **keys})
        label_N, class_N = np.zeros(6, np.int64), np.array([0 if is_right == "1" else 1 for is_right in right])
        path = tmp_path / folder / f"{name or f'{method}-seed{seed}'}.safetensors"
        facts = {"run": path.stem, "config": config, "label_N": label_N, "digest": "d" * 32}
        predicted.write(path, alone._replace(**facts, class_N={"peer0": class_N, "ensemble": 1 - class_N}))
        return path

    return _put


def test_errors_over_images_and_over_seeds_by_hand(put):
    paths = [
        *(put("dml", seed, right) for seed, right in {1: "110000", 2: "111000", 9: "111111"}.items()),
        *(put("ours", seed, right) for seed, right in {2: "111110", 1: "100110", 4: "000000"}.items()),
    ]
    compared = compare(paths, over_seeds=True)
    assert compared.seeds == [("dml", [1, 2, 9]), ("ours", [2, 1, 4])]
    dml, ours = (row for row in compared.rows if row.prediction == "mean")
    assert dml.top1 == pytest.approx(100 * 11 / 18) and ours.top1 == pytest.approx(100 * 8 / 18)
    assert (dml.run, dml.less, dml.difference, dml.seeds, dml.seed_error) == ("dml", None, None, 3, None)
    # Seed 1: 0 -1 0 1 1 0, seed 2: 0 0 0 1 1 0. Means of the seeds 1/6 and 2/6, of the images 0 -1/2 0 1 1 0.
    assert (ours.run, ours.less, ours.seeds) == ("ours", "dml", 2)
    assert ours.difference == pytest.approx(25)
    assert ours.seed_error == pytest.approx(100 / 12)  # the half difference of two, as sd / sqrt(2) is
    square = 3 * 0.25**2 + 0.75**2 + 2 * 0.75**2
    assert ours.difference_error == pytest.approx(100 * (square / 5 / 6) ** 0.5)
    assert ours.p == pytest.approx(1 - 2 / np.pi * np.arctan(3))  # t = 3 of one degree of freedom, a Cauchy
    assert ours.p == pytest.approx(ttest_rel([5 / 6, 3 / 6], [3 / 6, 2 / 6]).pvalue)
    assert [row.difference for row in compared.rows if row.prediction == "ensemble"] == [None, pytest.approx(-25)]


def test_over_one_seed_is_the_comparison_of_the_runs(put):
    pair = [put("dml", 3, "110100", name="one"), put("ours", 3, "011111", name="two")]
    assert compare(pair, over_seeds=True) == compare(pair)
    assert [row.difference for row in compare(pair).rows if row.less] == [
        pytest.approx(100 / 3),
        pytest.approx(-100 / 3),
    ]


def test_runs_without_a_seed_in_common_have_no_difference(put):
    compared = compare([put("dml", 1, "110000"), put("ours", 2, "111000")], over_seeds=True)
    assert [(row.top1, row.less, row.p, row.seeds) for row in compared.rows[2:]] == [(50, None, None, 1)] * 2


def test_seeds_that_all_say_the_same_have_no_p(put):
    paths = [put(name, seed, right) for name, right in (("dml", "100000"), ("ours", "110000")) for seed in (1, 2)]
    row = compare(paths, over_seeds=True).rows[2]
    assert (row.difference, row.seed_error, row.p) == (pytest.approx(100 / 6), pytest.approx(0), None)


def test_groups_are_named_by_what_their_runs_have_in_common(put):
    paths = [put("dml", 1, "110000"), put("dml", 2, "110000", name="again"), put("ours", 5, "110000", log_every=9)]
    paths += [put("ours", 6, "110000", folder="elsewhere", runs=Path("elsewhere"))]
    assert compare(paths, over_seeds=True).seeds == [("dml-seed1", [1, 2]), ("ours", [5, 6])]
    assert [name for name, _ in compare(paths).seeds] == ["dml-seed1", "again", "ours-seed5", "ours-seed6"]


def test_two_runs_of_one_seed_are_refused(put):
    one, other = put("dml", 1, "110000"), put("dml", 1, "111000", folder="other")
    with pytest.raises(RunError, match=f"--over-seeds: {one} and {other} are both of seed 1 and of one configuration"):
        compare([one, other], over_seeds=True)
    assert len(compare([one, other]).rows) == 4 and len(compare([one, one], over_seeds=True).rows) == 2
