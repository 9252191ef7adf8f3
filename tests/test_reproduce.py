"""cutnmix reproduce: the laws of grids and scales, and real grids that are killed, fail, go on and end alike."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Started, wait_until
from rich.console import Console
from safetensors.torch import save_file
from test_resume import assert_same, comparable_records, final_state, steps_on_record
from torch.utils.flop_counter import FlopCounterMode

from cutnmix.benchmarks.reproduce import estimate, workers
from cutnmix.benchmarks.reproduce.__main__ import _sort
from cutnmix.benchmarks.reproduce.drive import LEDGER, Halted, page_folder, reproduce, state
from cutnmix.benchmarks.reproduce.grid import IMAGES_PER_CLASS, Scale, grids, load_grid, plan_grid
from cutnmix.benchmarks.reproduce.ledger import Ledger
from cutnmix.configs import shipped
from cutnmix.models.cost import cost
from cutnmix.models.peers import build_peer
from cutnmix.pipeline.dataset import DataError
from cutnmix.pipeline.datasets import load_splits
from cutnmix.trainer import cli, overview
from cutnmix.trainer import run as training
from cutnmix.trainer.config import dump_config, load_config
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import RunError, RunFolder
from cutnmix.trainer.keys import ConfigError

TINY = """
title: A tiny grid
seeds: [95]
data: [digits]
networks: [resnet20]
overrides: [epochs=2, batch_size=24, data.images_per_class=12, log_every=1, checkpoint.every_steps=1,
            "schedule.milestones=[1]", distort.flip=0, precision=fp32]
rows:
"""
BASELINE = "  - {name: baseline, label: Baseline, recipe: table1/baseline}\n"
CUTNMIX = "  - {name: cutnmix, label: Ours, recipe: paper}\n"
DIVERGES = "  - {name: diverges, label: Diverges, recipe: table1/baseline, overrides: [optimizer.lr=1e30]}\n"


def write_grid(folder: Path, *rows: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY + "".join(rows))
    return path


def quiet() -> Display:
    return Display(Console(file=io.StringIO()))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are started here: sums must be taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_grid(path: Path, out: Path, **keys):
    grid = load_grid(str(path))
    return reproduce(grid, plan_grid(grid, out=out), 1.0, out, partial(workers.here, display=quiet()), quiet(), **keys)


def events(out: Path, run: str) -> list[str]:
    return [record["event"] for record in Ledger(out / LEDGER, "", 1).records() if record["run"] == run]


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cutnmix", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return call


# Grids


def test_table_1_is_every_method_with_every_network_on_both_data_sets():
    grid = load_grid("table1")
    plan = plan_grid(grid)
    assert len(plan) == 2 * 6 * 9 * 3
    assert len({run.config.folder for run in plan}) == len(plan)
    assert {run.config.seed for run in plan} == {95, 96, 97}
    for run in plan:  # each is the recipe of its row, but for its cell
        row = load_config(run.cell.row.recipe)
        assert (run.config.data.name, run.config.peers.networks[0]) == (run.cell.data, run.cell.network)
        for key in ("method", "mix", "views", "epochs", "schedule", "optimizer", "distort", "batch_size"):
            assert getattr(run.config, key) == getattr(row, key)


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_all_grids_are_valid_and_share_a_folder_only_where_they_share_the_run(scale):
    assert not any(name.startswith(("grids", "paper/")) for name in shipped())
    seen: dict[Path, dict] = {}
    for name in grids():
        grid = load_grid(name)
        plan = plan_grid(grid, seeds=[95], scale=scale)
        assert len(plan) == len(grid.data) * len(grid.networks) * len(grid.rows)
        for run in plan:
            tree = dump_config(run.config)
            assert seen.setdefault(run.config.folder, tree) == tree, f"{name}: {run.config.folder}"
            assert run.config.folder.name.endswith("seed95" if scale == 1 else "seed95-scale0.02")
            assert run.config.resume == "auto"
    assert page_folder(load_grid("table1"), 0.02, Path("o")) == Path("o/table1-scale0.02")


def test_table_2_leaves_a_term_out_where_the_paper_has_no_tick():
    terms = {
        r.cell.row.name: (r.config.method["beta"], r.config.method["gamma"]) for r in plan_grid(load_grid("table2"))
    }
    assert terms == {
        "cutnmix_dml": (0, 0),
        "cutnmix_mmd": (0.3, 0),
        "cutnmix_pt": (0, 0.1),
        "cutnmix": (0.3, 0.1),
    }


@pytest.mark.parametrize("row", ["dml_cutmix"])
def test_dml_with_cutmix_shows_all_peers_the_same_batch(row):
    (run,) = plan_grid(load_grid("figure1"), only={"method": [row], "network": ["resnet32"]}, seeds=[95])
    config = run.config
    assert (config.views, config.mix.name, config.method["name"], config.peers.count) == ("shared", "cutmix", "dml", 2)


# What is selected


@pytest.mark.parametrize(
    ("row", "override", "said"),
    [
        (
            "{recipe: quickstart, overrides: [method.temprature=2]}",
            "",
            "mine, row a: method.temprature (its overrides): unk",
        ),
        ("{recipe: quickstrt}", "", "mine, row a: quickstrt: neither a YAML file nor a shipped recipe"),
        ("{recipe: quickstart}", "epohcs=2", "epohcs (command line): unknown key"),
    ],
)
def test_a_mistake_in_a_grid_of_ones_own_is_laid_to_its_row(row, override, said, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"title: t\nseeds: [1]\ndata: [digits]\nnetworks: [resnet20]\nrows: [{{name: a, label: A, {row[1:]}]\n"
    )
    with pytest.raises(ConfigError) as error:
        plan_grid(load_grid(str(path)), overrides=[override] if override else [])
    assert said in str(error.value)
    path.write_text("")
    with pytest.raises(ConfigError, match=f"{path}: must be a mapping of the keys name, title, seeds"):
        load_grid(str(path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds: [95]", "seeds: [95, 96, 95]", "seeds: Value error, 95 given twice"),
        ("data: [digits]", "data: [digits, digits]", "data: Value error, digits given twice"),
        ("networks: [resnet20]", "networks: [resnet20, resnet20]", "networks: Value error, resnet20 given twice"),
    ],
)
def test_what_stands_twice_in_a_grid_is_refused(old, new, said, tmp_path):
    path = write_grid(tmp_path, BASELINE)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"{path}: {said}"):
        load_grid(str(path))


def test_a_plan_asks_for_no_data_of_what_is_left_out_or_done(tmp_path, command):
    path, out = write_grid(tmp_path, BASELINE), tmp_path / "out"
    path.write_text(path.read_text().replace("[digits]", "[digits, folder]").replace(", distort.flip=0", ""))
    arguments = (path, "--out", out, "--root", tmp_path / "gone", "--no-measure")
    code, said, error = command(*arguments, "--dry-run")
    assert (code, error) == (0, "") and "2 epochs of 120 images, 2 epochs" in said
    assert (
        f"folder is not there, would be downloaded, or its runs left out: data.root: there is no folder {tmp_path}"
        in said
    )
    (run,) = plan_grid(
        load_grid(str(path)), only={"data": ["folder"]}, out=out, overrides=[f'data.root="{tmp_path}/gone"']
    )
    RunFolder(run.config.folder).begin(run.config)
    RunFolder(run.config.folder).result.write_text("{}")
    code, said, error = command(*arguments, "data=folder", "--dry-run")
    assert (code, error) == (0, "") and "done     folder-resnet20-baseline-seed95" in said


def test_a_key_that_does_not_fit_the_data_is_not_taken_for_data_that_are_not_there(tmp_path):
    path = write_grid(tmp_path, BASELINE, CUTNMIX.replace("paper}", "paper, overrides: [data.images_per_class=5000]}"))
    for rows in (["baseline", "cutnmix"], ["cutnmix"]):
        plan = plan_grid(load_grid(str(path)), only={"method": rows})
        with pytest.raises(DataError, match=r"^row cutnmix: data\.images_per_class: 5000"):
            estimate.absent_data(plan, download=False)
    (run, *_) = plan_grid(load_grid("s1"), overrides=[f"data.root={tmp_path}"])  # a part of what is not there
    assert estimate.absent_data([run], download=False).keys() == {"cifar100"}


def test_a_place_for_runs_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(RunError, match=f"--out: {tmp_path}/out cannot be made: File exists"):
        Ledger(tmp_path / "out" / LEDGER, "mine", 1).append("begun", "run")


def test_only_selects_in_the_order_of_the_grid():
    grid = load_grid("table1")
    only = {"network": ["resnet32"], "method": ["cutnmix", "baseline"], "data": ["cifar100"]}
    plan = plan_grid(grid, only=only, seeds=[96, 95])
    names = [(run.seed, run.cell.row.name) for run in plan]
    assert names == [(96, "baseline"), (96, "cutnmix"), (95, "baseline"), (95, "cutnmix")]


def test_after_only_a_shell_passes_several_keys():
    rest = ["box_rule", "method=baseline,dml", "precision=fp32", "network=vgg16"]
    assert _sort(rest, ["network=resnet32"]) == (
        "box_rule",
        {"network": ["resnet32", "vgg16"], "method": ["baseline", "dml"]},
        ["precision=fp32"],
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel1"], ["tabel1", "did you mean table1?"]),
        (["ablation"], ["box_rule", "peers"]),
        (["table1", "box_rule"], ["box_rule", "KEY=VALUE"]),
        (["table1", "--only", "network=resnet33"], ["network=resnet33", "vgg16", "did you mean resnet32?"]),
        (["table1", "method=dlm"], ["method=dlm", "baseline, dml", "did you mean"]),
        (["table1", "--only", "epochs=3"], ["--only epochs=3", "data=, network=, method="]),
        (["table1", "epohcs=3"], ["epohcs", "did you mean epochs?"]),
        (["table1", "seed=3"], ["seed=3", "--seeds"]),
        (["table1", "--seeds", "95,x"], ["--seeds", "95,x"]),
        (["table1", "--seeds", "95,95"], ["--seeds", "95", "twice"]),
        (["table1", "--scale", "0"], ["--scale", "at most 1"]),
        (["table1", "--scale", "1.5"], ["--scale", "at most 1"]),
        (["table1", "--scale", "0.001", "data=cifar100"], ["--scale", "cifar100", "500", "above 0.001"]),
        (["table1", "--workers", "2", "--ray", "10.0.0.1:6379"], ["--workers"]),
        (["table1", "data=cifar10", "data.download=false", "--root", "nowhere"], ["nowhere", "cifar-10"]),
        (["table1", "data=cifar100", "peers.network=resnet33"], ["peers.network", "network=NAME"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_that_names_it(arguments, words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = command(*arguments)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    assert not any(tmp_path.iterdir())


def test_the_line_of_the_readme_plans_six_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "table1 --scale 0.02 --only network=resnet32 method=baseline,dml,cutnmix --seeds 95 --dry-run --no-measure"
    code, out, _ = command(*line.split())
    assert code == 0
    assert sum(text.startswith("missing  cifar") and "seed95-scale0.02" in text for text in out.splitlines()) == 6
    assert "SCALE 0.02" in out and "5 epochs of 1,000 images" in out
    assert not any(tmp_path.iterdir())


def test_list_names_every_grid(command):
    code, out, _ = command("--list")
    assert code == 0
    for name in grids():
        assert name.replace("/", " ") in out


# Scale


@pytest.mark.parametrize("value", [0.005, 0.02, 0.1, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("recipe", ["paper", "table1/one", "quickstart"])
def test_a_scaled_run_has_the_same_shape(recipe, value):
    full = load_config(recipe, ["schedule.warmup_epochs=2"])
    short = Scale(value).apply(full)
    labels = load_splits("digits16").train.labels
    images = {"cifar100": 500, "digits16": int(min(Counter(labels.tolist()).values()))}[full.data.name]
    assert short.epochs == max(1, round(value * full.epochs))
    assert short.data.images_per_class == round(value * images)
    assert -(-short.epochs // short.eval_every) <= 10
    for scaled, of in zip(times(short), times(full), strict=True):  # the same shares of the run
        assert scaled / short.epochs == pytest.approx(of / full.epochs, abs=1e-5)
    same = set(dump_config(full)) - {"epochs", "eval_every", "data", "schedule", "method"}
    assert all(getattr(short, key) == getattr(full, key) for key in same)
    assert short.method | {"ramp_epochs": 0} == full.method | {"ramp_epochs": 0}


def times(config) -> list[float]:
    """All keys that are in epochs."""
    schedule = config.schedule
    milestones = schedule.milestones if schedule.name == "step" else []
    return [*milestones, schedule.warmup_epochs, config.method.get("ramp_epochs", 0)]


@pytest.mark.parametrize(
    ("keys", "value", "every"), [([], 0.02, 1), ([], 0.1, 3), (["eval_every=40"], 0.1, 4), ([], 0.5, 12)]
)
def test_a_scaled_run_is_evaluated_as_often_as_before_but_at_most_ten_times(keys, value, every):
    assert Scale(value).apply(load_config("paper", keys)).eval_every == every


def test_cost_falls_with_the_square_of_the_scale():
    full = load_config("paper")
    for value in (0.1, 0.25, 0.5):
        ratio = estimate.work(Scale(value).apply(full)).train_flops / estimate.work(full).train_flops
        assert ratio == pytest.approx(value**2)
    assert Scale(1).apply(full) is full


# Cost


def test_pflop_of_the_papers_runs_are_those_of_the_survey():
    survey = {"vgg16": 45, "vgg19": 57, "resnet32": 10, "resnet110": 24, "wrn20_8": 147, "densenet40_12": 10}
    for network, pflop in survey.items():
        config = load_config("paper", [f"peers.network={network}"])
        assert estimate.work(config).train_flops / 1e15 == pytest.approx(pflop, rel=0.05)


def test_flops_are_those_of_a_real_forward_and_backward():
    config = load_config("quickstart", ["epochs=3", "eval_every=2", "data.images_per_class=10"])
    net, image = build_peer("resnet20", 10, seed=0, j=0), torch.randn(4, 3, 16, 16)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(image)
    with FlopCounterMode(display=False) as both:
        net(image)[0].sum().backward()
    cost, tests = estimate.work(config), len(load_splits("digits16").test)
    images = 2 * 3 * 100  # peers, epochs, images
    assert cost.train_flops == 3 * images * forward.get_total_flops() // 4
    assert cost.train_flops == pytest.approx(images * both.get_total_flops() / 4, rel=0.01)  # no gradient to the image
    assert cost.test_flops == 2 * 2 * tests * forward.get_total_flops() // 4  # after epochs 2 and 3
    assert cost.images == 300


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [("baseline", 3), ("cutmix", 3), ("dml", 6), ("kdcl", 6), ("cs_kd", 4), ("ddgsd", 6)],
)
def test_passes_of_a_method_over_a_network(recipe, passes):
    one_pass = estimate.work(load_config("table1/baseline")).train_flops / 3
    assert estimate.work(load_config(f"table1/{recipe}")).train_flops == pytest.approx(passes * one_pass)


@pytest.mark.parametrize(("views", "answers"), [("shared", 1), ("per_peer", 3)])
def test_a_teacher_costs_what_its_own_network_does_a_view(views, answers, tmp_path):
    """Not what its students cost, nor once for each of those that share a view."""
    file = tmp_path / "teacher.safetensors"
    weights = build_peer("resnet110", 100, seed=0, j=0).state_dict()
    save_file(weights, file, {"network": "resnet110", "num_classes": "100", "peer": "0"})
    keys = ["peers.network=resnet32", "peers.count=3", f"views={views}", f"method.teacher={file}"]
    config = load_config("table1/baseline", ["method=kd", *keys])
    student, teacher = (cost(name, 100, (32, 32)).macs for name in ("resnet32", "resnet110"))
    work = estimate.work(config)
    assert work.train_flops == 2 * 50_000 * 240 * (3 * 3 * student + answers * teacher)
    assert work.test_flops == 2 * 10_000 * 240 * (3 * student + teacher)
    file.unlink()  # of a run that is still to come: taken for a student
    assert estimate.work(config).train_flops == 2 * 50_000 * 240 * (3 * 3 + answers) * student


MEASURED = [
    "method=baseline", "peers.count=1", "mix=none", "peers.network=resnet20", "data.images_per_class=4", "batch_size=8",
    "loader=resident", "epochs=1",
]  # fmt: skip


def test_a_measured_step_has_its_data_in_it(monkeypatch):
    read: list[int] = []
    batches = overview.batches
    monkeypatch.setattr(overview, "batches", lambda parts: (read.append(1) or batch for batch in batches(parts)))
    measured = estimate.measure(load_config("quickstart", MEASURED))
    assert len(read) == 3 + estimate.STEPS  # prefetch + 1, not counted
    assert measured.seconds > 0


def test_a_measured_rate_is_a_steps_flops_over_its_median_seconds(monkeypatch):
    monkeypatch.setattr(estimate, "_timed", lambda step, most: [9.0, 2.0, 4.0][:most])
    config = load_config("quickstart", MEASURED)
    step_flops = estimate.work(config).train_flops / 40 * 8  # of 40 images
    assert estimate.measure(config) == (4.0, pytest.approx(step_flops / 4.0))


def test_branches_cost_less_than_networks():
    one, dml = (estimate.work(load_config(f"table1/{name}")) for name in ("one", "dml"))
    assert dml.train_flops / 2 < one.train_flops < dml.train_flops
    assert dml.disk_bytes / 2 < one.disk_bytes < dml.disk_bytes


def test_sizes_are_those_of_the_data_set():
    keys = ["data.classes=4", "data.images_per_class=9"]
    train, test = load_splits("digits16", classes=4, images_per_class=9)
    assert estimate.sizes(load_config("quickstart", keys)) == (len(train), len(test), 4, (16, 16))


@pytest.mark.cifar
def test_sizes_of_cifar_are_those_of_the_files(cifar_root):
    train, test = load_splits("cifar100", cifar_root, classes=20, images_per_class=250)
    config = load_config("paper", ["data.classes=20", "data.images_per_class=250"])
    assert estimate.sizes(config) == (len(train), len(test), 20, (32, 32))
    assert len(load_splits("cifar100", cifar_root).train) == 100 * IMAGES_PER_CLASS["cifar100"]


def test_what_is_left_of_a_run_is_what_its_last_record_has_not_reached(tmp_path):
    config = load_config("quickstart", ["epochs=4", f"runs={tmp_path}", "name=run"])
    folder = RunFolder(config.folder)
    assert estimate.left(config) == 1
    folder.begin(config)
    folder.append({"kind": "train", "epoch": 0.5, "step": 5})
    assert estimate.left(config) == 1  # without a checkpoint it begins anew
    folder.last.touch()
    folder.append({"kind": "train", "epoch": 1.0, "step": 10})
    assert estimate.left(config) == 0.75
    folder.result.touch()
    assert estimate.left(config) == 0


# The ledger


def test_the_ledger_survives_a_line_cut_short(tmp_path):
    ledger = Ledger(tmp_path / "deep" / LEDGER, "tiny", 0.5)
    ledger.append("started", "a", pid=7)
    ledger.append("failed", "a", reason='of "quotes"\nand lines')
    whole = ledger.path.read_bytes()
    for cut in range(1, len(whole) - len(whole.splitlines()[0])):
        ledger.path.write_bytes(whole[:-cut])
        ledger.append("retried", "a")
        kept = ledger.records()
        assert (kept[0]["event"], kept[-1]["event"]) == ("started", "retried")
    assert (kept[0]["grid"], kept[0]["scale"], kept[0]["pid"]) == ("tiny", 0.5, 7)


# Real grids


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, one_thread) -> Path:
    """The folder of a grid of two runs that nobody disturbed, one by one in this process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    summary = run_grid(write_grid(folder, BASELINE, CUTNMIX), folder / "out")
    assert (len(summary.finished), summary.failed, summary.taken) == (2, {}, [])
    assert summary.page.is_file() and summary.page.parent == folder / "out" / "tiny"
    return folder / "out"


RUNS = ["digits-resnet20-baseline-seed95", "digits-resnet20-cutnmix-seed95"]


def assert_same_runs(out: Path, reference: Path) -> None:
    for run in RUNS:
        assert_same(final_state(out / run)["learner"], final_state(reference / run)["learner"])
        assert comparable_records(out / run) == comparable_records(reference / run)
        results = [json.loads(RunFolder(o / run).result.read_text()) for o in (out, reference)]
        assert results[0]["last_epoch"] == results[1]["last_epoch"]


def test_what_is_done_is_skipped_and_what_is_new_is_run(uninterrupted):
    before = {run: (uninterrupted / run / "result.json").stat().st_mtime_ns for run in RUNS}
    summary = run_grid(uninterrupted.parent / "tiny.yaml", uninterrupted)
    assert summary.finished == []
    assert before == {run: (uninterrupted / run / "result.json").stat().st_mtime_ns for run in RUNS}
    for run in RUNS:
        assert events(uninterrupted, run) == ["started", "finished"]
        assert estimate.left(RunFolder(uninterrupted / run).read_config()) == 0


def test_a_folder_with_other_keys_is_refused_before_any_work(uninterrupted):
    grid = load_grid(str(uninterrupted.parent / "tiny.yaml"))
    plan = plan_grid(grid, seeds=[94, 95], out=uninterrupted, overrides=["optimizer.lr=0.01"])
    with pytest.raises(RunError, match=r"optimizer\.lr \(was 0\.05, now 0\.01\); another --out"):
        reproduce(grid, plan, 1.0, uninterrupted, partial(workers.here, display=quiet()), quiet())
    assert state(plan[0]) == "missing"


def test_a_run_that_fails_is_tried_twice_and_the_others_go_on(tmp_path, uninterrupted):
    out = tmp_path / "out"
    path = write_grid(tmp_path, DIVERGES, BASELINE)
    summary = run_grid(path, out)
    bad = "digits-resnet20-diverges-seed95"
    assert summary.finished == [RUNS[0]]
    assert list(summary.failed) == [bad] and "not finite" in summary.failed[bad]
    assert events(out, bad) == ["started", "failed", "retried", "started", "failed"]
    order = [r["run"] for r in Ledger(out / LEDGER, "", 1).records() if r["event"] == "started"]
    assert order == [bad, RUNS[0], bad]
    assert_same(final_state(out / RUNS[0])["learner"], final_state(uninterrupted / RUNS[0])["learner"])


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path):
    path, out = write_grid(tmp_path, BASELINE, CUTNMIX), tmp_path / "out"
    with RunFolder(out / RUNS[1]).locked():
        plan = plan_grid(load_grid(str(path)), out=out, only={"method": ["cutnmix"]})
        for place in (workers.here, partial(workers.processes, count=1, threads=1)):
            summary = reproduce(load_grid(str(path)), plan, 1.0, out, place, quiet())
            assert (summary.finished, summary.failed, summary.taken) == ([], {}, [RUNS[1]])
    assert events(out, RUNS[1])[-1] == "taken"


def test_a_run_that_another_command_finished_with_other_keys_is_not_taken_for_done(tmp_path):
    path, out = write_grid(tmp_path, BASELINE), tmp_path / "out"
    theirs, mine = (
        plan_grid(load_grid(str(path)), out=out, overrides=[f"optimizer.lr={lr}"])[0].config for lr in (0.01, 0.02)
    )
    RunFolder(theirs.folder).begin(theirs)
    RunFolder(theirs.folder).result.write_text("{}")
    assert workers._claim(theirs) == workers.attempt(theirs) == workers.Ending("done")
    for ending in (workers._claim(mine), workers.attempt(mine)):
        assert ending and ending.what == "failed"
        assert "optimizer.lr (was 0.01, now 0.02); another --out" in ending.reason


@pytest.mark.parametrize(
    ("code", "what"), [(0, "finished"), (75, "stopped"), (-15, "stopped"), (-9, "failed"), (2, "failed"), (1, "failed")]
)
def test_a_process_has_stopped_only_if_it_says_so(code, what, tmp_path):
    (config,) = (run.config for run in plan_grid(load_grid(str(write_grid(tmp_path, BASELINE))), out=tmp_path))
    config.folder.mkdir()
    (config.folder / workers.LOG).write_text("error: the last line\n")
    assert workers._ended(code, config).what == what


@pytest.mark.parametrize("stops", [1, workers.RESCHEDULES, workers.RESCHEDULES + 1])
def test_a_run_that_somebody_else_stopped_goes_on(stops, tmp_path):
    """As often as Ray reschedules one; a run that never finishes is not left without a word."""
    grid, out = load_grid(str(write_grid(tmp_path, BASELINE))), tmp_path / "out"

    def place(todo, stop):
        stopped = 0
        while todo:
            run = todo.popleft()
            yield workers.Event(run, "started")
            yield workers.Event(run, "stopped" if stopped < stops else "finished")
            stopped += 1

    summary = reproduce(grid, plan_grid(grid, out=out), 1.0, out, place, quiet())
    if stops > workers.RESCHEDULES:
        assert summary.failed == {RUNS[0]: f"stopped {stops} times, and not by this command; it is saved"}
    else:
        assert (summary.finished, summary.failed) == ([RUNS[0]], {})
        assert events(out, RUNS[0]) == ["started", "stopped"] * stops + ["started", "finished"]


def test_runs_are_numbered_as_they_begin(tmp_path):
    grid, out = load_grid(str(write_grid(tmp_path, BASELINE, CUTNMIX, DIVERGES))), tmp_path / "out"

    def place(todo, stop):
        begun = [todo.popleft() for _ in range(3)]
        for run in begun:
            yield workers.Event(run, "started")
        yield workers.Event(begun[1], "failed")
        yield workers.Event(todo.popleft(), "started")

    told = io.StringIO()
    display = Display(Console(file=told, width=200))
    reproduce(grid, plan_grid(grid, out=out), 1.0, out, place, display)
    numbers = [line.split()[0] for line in told.getvalue().splitlines() if line.startswith("[")]
    assert numbers == ["[1/3]", "[2/3]", "[3/3]", "[2/3]"]


def test_a_report_that_cannot_be_written_hides_no_ending(tmp_path, command, monkeypatch):
    """The exit status is 1 where all runs ended well, and 75 after SIGTERM."""
    path, out = write_grid(tmp_path, BASELINE), tmp_path / "out"
    out.mkdir()
    (out / "tiny").touch()  # where its folder would be

    def place(todo, stop, display):
        yield workers.Event(todo.popleft(), "finished")

    monkeypatch.setattr(workers, "here", place)
    code, told, _ = command(path, "--out", out, "--no-measure")
    assert code == 1
    assert "the report could not be written: FileExistsError" in told and "tiny: 1 finished, 0 failed" in told

    def stopped(todo, stop, display):
        stop.append(signal.SIGTERM)
        yield workers.Event(todo.popleft(), "stopped")

    monkeypatch.setattr(workers, "here", stopped)
    assert command(path, "--out", out, "--no-measure")[0] == 75


def test_a_signal_that_comes_while_a_run_is_made_stops_the_grid(tmp_path, monkeypatch):
    path, out, real = write_grid(tmp_path, BASELINE, CUTNMIX), tmp_path / "out", training.build

    def build(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(training, "build", build)
    with pytest.raises(Halted, match="stopped by SIGTERM"):
        run_grid(path, out)
    assert events(out, RUNS[0]) == ["started", "stopped"] and steps_on_record(out / RUNS[0]) == 1
    assert not (out / RUNS[1]).exists()


def test_runs_of_a_data_set_that_is_not_there_are_left_out(tmp_path):
    path, out = write_grid(tmp_path, BASELINE), tmp_path / "out"
    summary = run_grid(path, out, leave_out={"digits"})
    assert (summary.finished, summary.failed, summary.taken) == ([], {}, [])
    assert summary.page.is_file()


def grid_command(path: Path, out: Path, *arguments: str) -> list[str]:
    return ["reproduce", str(path), "--out", str(out), "--no-measure", "--threads", "1", *arguments]


def start_grid(path: Path, out: Path, *arguments: str) -> Started:
    return Started(grid_command(path, out, *arguments), path.parent / "log")


def start_grid_on_ray(path: Path, out: Path) -> subprocess.Popen:
    """As a user does: what Ray makes of its environment and of the process is its own affair."""
    command = [sys.executable, "-m", "cutnmix.trainer", *grid_command(path, out, "--ray", "local", "--workers", "1")]
    # Ray lowers the priority of its workers, which the other tests then keep from working at all.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    with (path.parent / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def is_free(folder: Path) -> bool:
    try:
        with RunFolder(folder).locked():
            return True
    except RunError:
        return False


@pytest.mark.slow
def test_a_grid_that_is_stopped_and_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, uninterrupted):
    path, out = write_grid(tmp_path, BASELINE, CUTNMIX), tmp_path / "out"
    process = start_grid(path, out)
    wait_until(lambda: 2 <= steps_on_record(out / RUNS[0]), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert "the same command goes on" in (tmp_path / "log").read_text()
    (baseline, _) = plan_grid(load_grid(str(path)), out=out)
    (stopped,) = RunFolder(out / RUNS[0]).records("stopped")
    assert state(baseline) == "cut off" and estimate.left(baseline.config) == 1 - stopped["step"] / 10
    process = start_grid(path, out)
    wait_until(lambda: 3 <= steps_on_record(out / RUNS[1]), process)
    process.kill()
    process.wait()
    assert not (out / RUNS[1] / "result.json").exists()
    assert len(run_grid(path, out).finished) == 1
    assert_same_runs(out, uninterrupted)
    assert events(out, RUNS[0]) == ["started", "stopped", "started", "finished"]
    assert events(out, RUNS[1]) == ["started", "started", "finished"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again_and_sigterm_stops_all(tmp_path, uninterrupted):
    path, out = write_grid(tmp_path, BASELINE, CUTNMIX), tmp_path / "out"
    process = start_grid(path, out, "--workers", "2")
    wait_until(lambda: 2 <= steps_on_record(out / RUNS[0]), process)
    pids = {r["run"]: r["pid"] for r in Ledger(out / LEDGER, "", 1).records() if r["event"] == "started"}
    os.kill(pids[RUNS[0]], signal.SIGKILL)
    wait_until(lambda: events(out, RUNS[0])[-2:] == ["retried", "started"], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    (failure,) = [r for r in Ledger(out / LEDGER, "", 1).records() if r["event"] == "failed"]
    assert (failure["run"], failure["reason"]) == (RUNS[0], "killed by SIGKILL")
    assert events(out, RUNS[0])[-1] == "stopped"
    run_grid(path, out)  # in another place than where they began
    assert_same_runs(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_processes_save_and_end_with_the_command_however_that_ended(tmp_path):
    path, out = write_grid(tmp_path, BASELINE), tmp_path / "out"
    process = start_grid(path, out, "--workers", "1")
    wait_until(lambda: 2 <= steps_on_record(out / RUNS[0]), process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600
    while not is_free(out / RUNS[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_free(out / RUNS[0])
    assert "stopped by SIGTERM" in (out / RUNS[0] / workers.LOG).read_text()


@pytest.mark.slow
def test_ray_reschedules_a_run_whose_worker_was_killed(tmp_path, uninterrupted):
    pytest.importorskip("ray")
    path, out = write_grid(tmp_path, BASELINE, CUTNMIX), tmp_path / "out"
    process = start_grid_on_ray(path, out)
    try:
        wait_until(lambda: any(2 <= steps_on_record(out / run) < 8 for run in RUNS), process)
        (begun,) = [r for r in Ledger(out / LEDGER, "", 1).records() if r["event"] == "started"]
        os.kill(begun["pid"], signal.SIGKILL)
        assert process.wait() == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert events(out, begun["run"]) == ["started", "started", "finished"]  # of its own, not as a failure
    assert_same_runs(out, uninterrupted)


def test_without_ray_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ledger = Ledger(tmp_path / LEDGER, "tiny", 1.0)
    place = workers.on_ray(deque(), [], ledger=ledger, address="local", count=1, threads=1, gpus=1.0)
    with pytest.raises(ConfigError, match=r'pip install "cutnmix\[ray\]"'):
        next(place)
