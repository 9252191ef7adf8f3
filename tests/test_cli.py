"""The command line from recipe to result, and what it says to a mistake."""

import io
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tasks
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from cutnmix.models import NETWORKS, build_network
from cutnmix.models.peers import Peers
from cutnmix.pipeline.dataset import Splits
from cutnmix.pipeline.datasets import DATASETS, digits
from cutnmix.trainer import checkpoint, cli, figures, picture, run
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import RunError, RunFolder
from cutnmix.trainer.keys import Config, ConfigError
from cutnmix.trainer.methods import METHODS

SMALL = ["data.images_per_class=8", "epochs=2", "log_every=1"]


def cutnmix(*arguments: str | Path, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without a terminal."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "cutnmix.trainer", *arguments], capture_output=True, text=True, env=env, cwd=folder
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[RunFolder, str]:
    """A run of two epochs, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    done = cutnmix("train", "quickstart", *SMALL, f"runs={runs}", "name=run")
    assert (done.returncode, done.stderr) == (0, "")
    return RunFolder(runs / "run"), done.stdout


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cutnmix", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return call


# A run


def test_a_run_leaves_what_it_promises(trained):
    folder, _ = trained
    files = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    events = {name for name in files if re.fullmatch(r"tensorboard/events\.out\.tfevents\..+", name)}
    assert len(events) == 1
    assert files - events == {
        ".lock", "config.yaml", "metrics.jsonl", "batch.png", "curves.png", "result.json",
        "checkpoints/last.pt", "checkpoints/best.pt", "peers/peer0.safetensors", "peers/peer1.safetensors",
    }  # fmt: skip
    assert all((folder.path / name).stat().st_size > 0 for name in files - {".lock"})


def test_records_tell_of_every_step_and_epoch(trained):
    folder, _ = trained
    train, test = ([r for r in folder.records() if r["kind"] == kind] for kind in ("train", "test"))
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]  # 80 images in batches of 32
    assert [record["epoch"] for record in train] == [0.333333, 0.666667, 1, 1.333333, 1.666667, 2]
    assert all(record["loss"].keys() == {"ce", "dml", "mmd", "pt", "pt_ce", "total"} for record in train)
    for record in train:
        total = record["loss"].pop("total")
        assert total == pytest.approx(sum(record["loss"].values()))
    assert [(record["epoch"], record["step"]) for record in test] == [(1, 3), (2, 6)]
    assert test[0]["scores"].keys() == {"peer0", "peer1", "mean", "best_peer", "ensemble", "teacher"}


def test_the_headline_is_the_last_epochs_mean_over_peers(trained):
    folder, _ = trained
    result, last = json.loads(folder.result.read_text()), folder.records()[-1]
    assert last["kind"] == "test" and last["epoch"] == 2
    assert result["headline"]["top1"] == last["scores"]["mean"]["top1"]
    assert "last epoch" in result["headline"]["what"] and "mean over peers" in result["headline"]["what"]
    assert result["last_epoch"] == {"epoch": 2, "scores": last["scores"]}
    best = max((r for r in folder.records() if r["kind"] == "test"), key=lambda r: r["scores"]["mean"]["top1"])
    assert result["best_epoch_on_test"] == {"epoch": best["epoch"], "scores": best["scores"]}
    assert {"hardware", "versions", "precision", "images_per_s"} <= result.keys()


def test_tensorboard_shows_the_records(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    test = [record for record in folder.records() if record["kind"] == "test"]
    shown = [(event.step, event.value) for event in events.Scalars("test/top1/mean")]
    assert shown == [(r["step"], pytest.approx(r["scores"]["mean"]["top1"])) for r in test]
    assert len(events.Scalars("loss/dml")) == 6


def test_without_a_terminal_there_is_no_bar_and_no_escape(trained):
    _, printed = trained
    assert "\x1b" not in printed and "\r" not in printed and "images/s" not in printed
    assert printed.count("top-1 %: mean") == 2


def test_on_a_terminal_there_is_a_live_bar(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200, _environ={"TERM": "xterm"})
    keys = ["peers.network=tiny", "data.classes=2", f"runs={tmp_path}"]
    run.train(load_config("quickstart", [*SMALL, *keys]), Display(console))
    assert all(part in screen.getvalue() for part in ("epoch 2/2", "step 1/1", "images/s", "left", "dml", "total"))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_where_the_bar_has_no_room_the_losses_are_cut_and_nothing_else(width):
    screen = io.StringIO()
    shown = Display(Console(file=screen, force_terminal=True, width=width, color_system=None))
    shown.start(Path("runs/x"), 240, 79, 300)
    for _ in range(2):  # the time that is left is known from the second step on
        shown.advance()
    losses = {"ce": 4.58, "dml": 0.0596, "mmd": 0.000312, "pt": 0.0122, "pt_ce": 2.1, "total": 6.75}
    shown.losses(losses, 12071.0)
    shown.stop()
    line = screen.getvalue().rsplit("epoch ", 1)[1]
    assert re.match(r"4/240 step 65/79 .* 12,071 images/s 0:00:0\d left [\d:-]+ total 6.7", line), line


def test_exported_peers_are_the_checkpoints_in_plain_torch(trained):
    folder, _ = trained
    peers = Peers(["resnet20"] * 2, num_classes=10, seed=1)
    peers.load_state_dict(torch.load(folder.last, weights_only=True)["learner"]["peers"])
    image_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for j, net in enumerate(peers.eval().nets):
        with safe_open(folder.peers / f"peer{j}.safetensors", "pt") as file:
            meta = file.metadata()
            plain = build_network(meta["network"], int(meta["num_classes"])).eval()
            plain.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        with torch.no_grad():
            assert torch.equal(plain(image_BCHW)[0], net(image_BCHW)[0])


# evaluate and report


def rows(printed: str) -> dict[str, list[str]]:
    """A table's rows by their name."""
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line)
    return {name: values for name, *values in cells}


def test_evaluate_gives_the_score_on_record(trained, command):
    folder, printed = trained
    code, shown, error = command("evaluate", folder.path)
    assert (code, error) == (0, "")
    assert f"{folder.path}, last.pt: 2 epochs" in shown
    assert rows(shown) == rows(printed)
    mean = folder.records()[-1]["scores"]["mean"]
    assert rows(shown)["mean"][0] == f"{mean['top1']:.2f}"


def test_evaluate_best_gives_the_score_of_the_best_epoch(trained, command):
    folder, _ = trained
    best = json.loads(folder.result.read_text())["best_epoch_on_test"]
    code, printed, _ = command("evaluate", folder.path, "--best")
    assert code == 0
    assert f"best.pt: {best['epoch']} epochs" in printed
    assert rows(printed)["mean"][2] == f"{best['scores']['mean']['nll']:.3f}"


def test_compare_puts_runs_beside_the_first(trained, command, tmp_path):
    folder, _ = trained
    code, printed, _ = command("compare", folder.path, folder.path, "--on", "unused", "--csv", tmp_path / "rows.csv")
    assert code == 0
    assert printed.startswith("1,362 training images that no run has used")
    assert len(re.findall(r"│ run +│ (?:mean|ensemble|teacher) +│ +\d+\.\d\d ± \d\.\d\d │", printed)) == 3
    assert (tmp_path / "rows.csv").read_text().count("\n") == 4


def test_compare_over_seeds_from_a_kept_file(trained, command, tmp_path):
    folder, _ = trained
    assert command("compare", folder.path, "--keep", tmp_path)[0] == 0
    code, printed, _ = command("compare", tmp_path / "run.safetensors", "--over-seeds")
    assert code == 0
    assert "over images, then over seeds; p of a paired t test over seeds" in printed and "seeds: run 95\n" in printed
    assert len(re.findall(r"│ run +│ (?:mean|ensemble|teacher) +│ +\d+\.\d\d ± \d\.\d\d │ +│ +│ +1 │", printed)) == 3


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_images_that_are_not_there_are_refused(verb, trained, command, tmp_path):
    folder, _ = trained
    code, _, error = command(verb, folder.path, "--on", "train")
    assert (code, error) == (2, "error: --on: 'train' is none of test, unused\n")
    whole = RunFolder(tmp_path / "whole")
    whole.begin(load_config("quickstart"))
    whole.last.write_bytes(folder.last.read_bytes())
    code, _, error = command(verb, whole.path, "--on", "unused")
    assert (code, error) == (2, "error: data.images_per_class: None leaves no training image of digits16 unused\n")


def test_a_checkpoint_of_other_networks_is_one_line(trained, command, tmp_path):
    folder, _ = trained
    other = RunFolder(tmp_path / "other")
    other.begin(load_config("quickstart", ["peers.network=resnet32"]))
    other.last.write_bytes(folder.last.read_bytes())
    code, _, error = command("evaluate", other.path)
    assert code == 2 and error.count("\n") == 1 and len(error) < 500 + len(str(other.last))
    assert error.startswith(f"error: {other.last} does not fit what this version of cutnmix makes of the run's keys: ")


def test_report_shows_the_last_evaluation_and_draws_the_curves(trained, command):
    folder, printed = trained
    folder.curves.unlink()
    code, shown, _ = command("report", folder.path)
    assert code == 0
    assert rows(shown) == rows(printed) and folder.curves.stat().st_size > 0


def test_report_works_before_the_first_evaluation(tmp_path, command):
    folder = RunFolder(tmp_path / "[run]")  # brackets are no markup
    folder.begin(load_config("quickstart"))
    code, shown, _ = command("report", folder.path)
    assert code == 0
    assert f"{folder.path}: no evaluation yet, 0 training records" in shown and folder.curves.exists()


def test_report_needs_no_module_of_the_run(tmp_path, command):
    folder = RunFolder(tmp_path / "run")
    folder.begin(load_config("quickstart").model_copy(update={"imports": ["a_module_that_is_not_here"]}))
    code, shown, error = command("report", folder.path)
    assert (code, error) == (0, "") and "no evaluation yet" in shown


# Mistakes: exit code 2, one line, no traceback, nothing left behind


@pytest.mark.parametrize(
    ("name", "content", "verb", "said"),
    [
        ("last", b"half a checkpoint", "evaluate", "is damaged, or no checkpoint ("),
        ("last", b"", "evaluate", "is damaged, or no checkpoint ("),
        ("metrics", b'{"kind": "test"\n', "report", ": line 1 is damaged ("),
        ("metrics", b'{"kind": "test"}\n', "report", ": line 1 is damaged ("),
        ("metrics", b'{"kind": "test", "epoch": "\xff\xfe\n', "report", ": line 1 is damaged ("),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, content, verb, said, tmp_path, command):
    folder = RunFolder(tmp_path / "run")
    folder.begin(load_config("quickstart"))
    path = getattr(folder, name)
    path.write_bytes(content)
    code, _, error = command(verb, folder.path)
    assert code == 2 and error.startswith(f"error: {path}{said if said[0] == ':' else ' ' + said}")
    assert error.count("\n") == 1


def test_a_table_that_cannot_be_written_is_named(trained, command, tmp_path):
    folder, _ = trained
    code, _, error = command("compare", folder.path, "--csv", tmp_path)
    assert (code, error) == (2, f"error: {tmp_path} cannot be written: Is a directory\n")
    code, out, error = command("compare", folder.path, "--csv", "/proc/none/x.csv")
    assert (code, out, error) == (2, "", "error: /proc/none cannot be written: No such file or directory\n")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("output", ["a closed pipe", "a full disk"])
def test_a_run_goes_on_where_nobody_reads_what_it_says(output):
    """All of it is in the run's folder."""
    code = "from cutnmix.trainer.display import Display; d = Display(); [d.note('x' * 9999) for _ in range(3)]"
    if output == "a full disk":
        with open("/dev/full", "wb") as file:
            done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
    told = "nothing more can be shown here: No space left on device\n" if output == "a full disk" else ""
    assert (done.returncode, done.stderr) == (0, told)


def test_what_a_module_of_ones_own_adds_is_there_for_every_command(tmp_path, command, monkeypatch):
    module = """
        from cutnmix.models import NETWORKS
        from cutnmix.pipeline.datasets import DATASETS, digits
        from cutnmix.trainer.methods import METHODS
        from cutnmix.trainer.methods.dml import DML

        METHODS["mine"], DATASETS["ours"], NETWORKS["theirs"] = DML, digits, NETWORKS["resnet20"]
    """
    (tmp_path / "my_parts.py").write_text(textwrap.dedent(module))
    names = ["method=mine", "data=ours", "peers.network=theirs", "loader=resident", "mix=none"]
    run_keys = [*SMALL, "epochs=1", *names, "runs=runs", "name=own"]
    for words in (["train", "quickstart", *run_keys, "imports=[my_parts]"], ["evaluate", "runs/own"]):
        done = cutnmix(*words, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert "mean" in done.stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the command adds the folder
    code, _, error = command("train", "quickstart", *run_keys, "name=other", "imports=[my_part]")
    assert code == 2 and error.count("\n") == 1
    assert error.startswith("error: imports (command line): 'my_part' cannot be imported (ModuleNotFoundError: ")
    assert f"modules are looked for in {tmp_path} and" in error


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    done = cutnmix("train", "quickstart", "epohcs=1", f"runs={tmp_path / 'runs'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: epohcs (command line): unknown key; did you mean epochs?")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_modules_say_a_mistake_as_the_command_does():
    for module, *words in (("benchmarks", "step", "--network", "resnt20"), ("benchmarks.reproduce", "tabel1")):
        line = [sys.executable, "-m", f"cutnmix.{module}", *words]
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.temprature=2", "method.temprature (command line): unknown key; did you mean method.temperature?"),
        (
            "method.temperature=-2",
            "method.temperature (command line): Input should be greater than or equal to 0.001, got -2",
        ),
        ("method.name=[dml]", "method.name (command line): ['dml'] is not a method"),
        ("imports=my_methods", "imports (command line): Input should be a valid list"),
        ("peers.count=1", "peers.count (command line): cutnmix needs at least 2 peers, got 1"),
        ("peers.network=resnt20", "peers.network: no 'resnt20', did you mean 'resnet20'?"),
        ("data=digit", f"data.name: 'digit' is none of {', '.join(DATASETS)}; the nearest is 'digits'"),
        ("data=folder", "distort.pad"),
        ("distort.cutout=17", "distort.cutout: 17 pixels are too many for views of 16 x 16; at most 16"),
        ("mix={name: cutout, length: 17}", "mix.length: 17 pixels are too many for views of 16 x 16; at most 16"),
        ("distort.pad=16", "distort.pad: 16 pixels are too many for views of 16 x 16; at most 15"),
        ("data.classes=11", "data.classes: 11 is not within 2..10"),
        ("data.images_per_class=1000", "data.images_per_class: 1000 asked"),
        ("device=cuda:99", "device: cuda:99 is not here"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_written(override, said, tmp_path, command):
    runs = tmp_path / "runs"
    pad = ["distort.pad=2"] if override == "data=folder" else []
    code, printed, error = command("train", "quickstart", override, *pad, f"runs={runs}")
    assert (code, printed) == (2, "")
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert not runs.exists()


def test_the_largest_holes_and_padding_are_taken():
    """Every view still shows a pixel of its image."""
    parts = build(load_config("quickstart", [SMALL[0], "distort.cutout=16", "distort.pad=15"]))
    plan = parts.plan(0)
    parts.close()
    assert plan.hole_VN4 is not None
    assert set((plan.crop_VN2 - 15).abs().unique().tolist()) == {*range(16)}


def test_drop_last_without_a_full_batch_is_refused(tmp_path, command):
    code, _, error = command("train", "quickstart", *SMALL, "drop_last=true", "batch_size=81", f"runs={tmp_path}")
    assert code == 2
    assert error.startswith("error: batch_size: 81 is more than the 80 training images")


def test_missing_data_is_named(tmp_path, command):
    keys = ["data=cifar100", f"data.root={tmp_path}", "data.download=false", f"runs={tmp_path / 'runs'}"]
    code, _, error = command("train", "paper", *keys)
    assert code == 2
    assert error.startswith(f"error: data.root: {tmp_path / 'cifar-100-python'} lacks train, test, meta")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_a_run_is_refused(trained, command):
    folder, _ = trained
    code, _, error = command("train", "quickstart", *SMALL, f"runs={folder.path.parent}", f"name={folder.path.name}")
    assert code == 2
    assert error == f"error: {folder.path} holds a run already: resume=auto goes on with it, name=NAME starts another\n"


def test_a_misspelt_network_is_met_before_data_is_fetched(command, tmp_path):
    keys = ["peers.network=resnet33", f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}"]
    code, _, error = command("train", "paper", *keys)
    assert code == 2 and error.startswith("error: peers.network: no 'resnet33', did you mean 'resnet32'?")
    assert not any(tmp_path.iterdir())


def test_a_recipe_is_printed_with_all_its_keys_and_nothing_is_made(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, error = command("config", "paper", "method=dml", "mix=none", "data.root=not/there")
    assert (code, error) == (0, "") and not any(tmp_path.iterdir())
    (tmp_path / "mine.yaml").write_text(printed)
    assert load_config("mine.yaml") == load_config("paper", ["method=dml", "mix=none", "data.root=not/there"])
    assert yaml.safe_load(printed).keys() == Config.model_fields.keys()
    code, printed, error = command("config", "paper", "epoch=3")
    assert (code, printed) == (2, "") and error.startswith("error: epoch (command line): unknown key; did you mean")


def test_a_misspelt_network_is_named_as_it_was_given(command):
    assert command("models", "resnet33")[2].startswith("error: no 'resnet33', did you mean 'resnet32'?")
    for verb in ("methods", "plan-scale"):
        assert command(verb, "--network", "resnet33")[2].startswith("error: --network: no 'resnet33', did you mean")


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_what_is_no_run_is_refused(verb, tmp_path, command):
    code, _, error = command(verb, tmp_path / "none")
    assert code == 2
    assert error == f"error: {tmp_path / 'none'} is not a run: it has no config.yaml\n"


def test_a_run_without_a_checkpoint_cannot_be_evaluated(tmp_path, command):
    folder = RunFolder(tmp_path / "run")
    folder.begin(load_config("quickstart"))
    code, _, error = command("evaluate", folder.path)
    assert code == 2
    assert error == f"error: {folder.last} is not there: the run has not saved a checkpoint yet\n"


# Every combination


class Tiny(nn.Module):
    feature_dim = 4

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 5, stride=4), nn.Linear(4, num_classes)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        feature_BD = self.conv(image_BCHW).relu().mean((2, 3))
        return self.head(feature_BD), feature_BD


MIXES = ["none", "cutmix", "cutnmix", "mixup", "cutout"]
# Every method with every mix that it takes; views and loaders in turn.
COMBINATIONS = [
    (["shared", "per_peer"][i % 2], mix, method, ["dali", "resident"][i // 2 % 2])
    for i, (mix, method) in enumerate(product(MIXES, METHODS))
    if mix not in METHODS[method].needs.refuses
]
OWN_SCORES = {"kd": {"teacher"}, "one": {"teacher"}, "okddip": {"leader"}, "cutnmix": {"teacher"}}
OWN_SCORES["pcl"] = {"teacher", "mean_teacher0", "mean_teacher1"}


@pytest.fixture
def quick(monkeypatch):
    """A tiny network and no pictures."""
    monkeypatch.setitem(NETWORKS, "tiny", tasks.tiny)
    monkeypatch.setattr(picture, "draw_batch", lambda *_, **__: None)
    monkeypatch.setattr(figures, "draw_curves", lambda *_: None)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["method=one", "peers.form=branches", "views=shared"],
            "the last batch of an epoch has 1 image, .* one to train on; drop",
        ),
        (
            ["method=dml", "peers.network=torchvision.resnet18"],
            "the last .* torchvision.resnet18 to train on; drop_last=true",
        ),
        (["method=dml", "peers.network=torchvision.resnet18", "batch_size=1"], "a batch has 1 image, .*; 2 or more"),
    ],
)
def test_a_batch_too_small_for_its_norms_is_refused(keys, said, tmp_path):
    small = ["data.images_per_class=1", "batch_size=3", "epochs=1", "mix=none", f"runs={tmp_path / 'runs'}"]
    with pytest.raises(ConfigError, match=rf"^batch_size: {said}"):
        run.train(load_config("quickstart", [*small, *keys]))
    assert not (tmp_path / "runs").exists()


def test_a_size_that_a_network_does_not_take_is_told_before_that_of_a_batch(tmp_path):
    small = ["data.images_per_class=1", "batch_size=3", "method=dml", "mix=none", f"runs={tmp_path / 'runs'}"]
    with pytest.raises(ConfigError, match=r"^peers\.network: torchvision\.vit_b_16 does not take images of 16 x 16"):
        run.train(load_config("quickstart", [*small, "peers.network=torchvision.vit_b_16"]))


def test_images_that_are_not_rgb_are_refused_before_anything_is_written(monkeypatch, tmp_path):
    grey = Splits(*(replace(d, images=d.array[..., :1], mean=d.mean[:1], std=d.std[:1]) for d in digits()))
    monkeypatch.setitem(DATASETS, "grey", lambda root, download: grey)
    with pytest.raises(ConfigError, match=r"^data\.name: digits/train has 1 channel\(s\), and networks take 3"):
        run.train(load_config("quickstart", ["data.name=grey", f"runs={tmp_path / 'runs'}"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["dml", "cutnmix"])
def test_one_image_is_a_batch_where_all_norms_can_learn_of_it(method, quick, tmp_path):
    small = ["data.images_per_class=1", "batch_size=3", "epochs=1", "mix=none", "peers.network=resnet20"]
    config = load_config("quickstart", [*small, f"method={method}", f"runs={tmp_path}"])
    assert run.train(config)["steps"] == 4  # of 10 images


@pytest.mark.parametrize(("views", "mix", "method", "loader"), COMBINATIONS)
def test_every_combination_of_views_mix_and_method_trains(views, mix, method, loader, quick, tmp_path):
    keys = [f"views={views}", f"mix={mix}", f"method={method}", f"loader={loader}", f"runs={tmp_path}"]
    size = ["data.classes=3", "data.images_per_class=7", "batch_size=8", "peers.network=tiny", "epochs=1"]
    if METHODS[method].needs.form:
        keys.append(f"peers.form={METHODS[method].needs.form}")
    if method == "kd":
        keys.append(f"method.teacher={tasks.save_network(tmp_path / 'teacher.safetensors', num_classes=3)}")
    config = load_config("quickstart", [*size, *keys])
    result = run.train(config)
    assert result["steps"] == 3
    records = RunFolder(config.folder).records("train")
    losses = records[0]["loss"]
    assert losses.pop("total") == pytest.approx(sum(losses.values())) and sum(losses.values()) > 0
    every = {"peer0", "peer1", "mean", "best_peer", "ensemble"}
    assert result["last_epoch"]["scores"].keys() == every | OWN_SCORES.get(method, set())


def test_a_loss_that_is_not_finite_ends_the_run_with_its_name(quick, tmp_path):
    keys = ["peers.network=tiny", "data.classes=3", "precision=fp32", "optimizer.lr=1e30", "schedule=constant"]
    with pytest.raises(RunError, match=r"step \d: ce, .*total is not finite; start .* a lower optimizer\.lr"):
        run.train(load_config("quickstart", [*SMALL, *keys, f"runs={tmp_path}"]))


def test_a_loss_that_is_not_finite_is_in_no_checkpoint(quick, tmp_path):
    keys = ["peers.network=tiny", "data.classes=3", "precision=fp32", "optimizer.lr=1e30", "schedule=constant"]
    often = ["log_every=50", "checkpoint.every_steps=1", "batch_size=4", "name=run", f"runs={tmp_path}"]
    with pytest.raises(RunError, match=r"step [23]: ce, .*total is not finite"):  # of 6
        run.train(load_config("quickstart", [*SMALL, *keys, *often]))
    kept = checkpoint.load(RunFolder(tmp_path / "run").last, torch.device("cpu"))
    assert kept["tally"]["sums"].isfinite().all() and 0 < kept["tally"]["steps"] == kept["position"][1]
