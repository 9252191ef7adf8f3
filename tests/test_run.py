"""The loop around the steps: its draws and rates, what it saves and when and refuses to, what it says of a run."""

import itertools
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from rich.console import Console
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.distributed.checkpoint.api import CheckpointException

from cutnmix.models import NETWORKS
from cutnmix.models.peers import Peers
from cutnmix.trainer import checkpoint, device, run
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import Position, RunError, RunFolder, Stopped
from cutnmix.trainer.mesh import Mesh
from cutnmix.trainer.step import Step, Tally

TINY = [
    "peers.network=small",
    "peers.count=1",
    "method=baseline",
    "mix=none",
    "data.images_per_class=10",  # 100 images: five batches
    "batch_size=20",
    "epochs=2",
    "loader=resident",
    "log_every=2",
    "checkpoint.best=false",
    "resume=auto",
    "device=cpu",
]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name in ("small", "dropping"):
        monkeypatch.setitem(NETWORKS, name, getattr(tasks, name))


@pytest.fixture
def train(tmp_path):
    """Trains in tmp_path/run, in this process; returns the result."""

    def train(*keys: str, console: Console | None = None) -> dict:
        config = load_config("quickstart", [*TINY, f"runs={tmp_path}", "name=run", *keys])
        return run.train(config, Display(console or Console(quiet=True)))

    return train


@pytest.fixture
def stop_at(monkeypatch) -> Iterator:
    """SIGTERM within the step of that number, counted over all."""
    real, count = Step.train, 0

    def at(number: int) -> None:
        def step(*args, **kwargs):
            nonlocal count
            real(*args, **kwargs)
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Step, "train", step)

    return at


def test_the_rate_of_each_step_is_the_schedules(train, tmp_path):
    """Milestones count from the run's beginning: the second epoch's first step is the first that is slower."""
    train("log_every=1", "optimizer.lr=0.5", "schedule=step", "schedule.milestones=[1]")
    rates = [record["lr"] for record in RunFolder(tmp_path / "run").records("train")]
    assert rates == pytest.approx([0.5] * 5 + [0.05] * 5)


def test_every_epoch_has_its_own_plan_and_time(train, monkeypatch):
    seen, real = [], Step.train

    def step(self, learner, views, draws, *args, **kwargs):
        seen.append((draws.index_B, draws.epoch.item()))
        real(self, learner, views, draws, *args, **kwargs)

    monkeypatch.setattr(Step, "train", step)
    train()
    first, second = (torch.cat([index_B for index_B, _ in seen[start : start + 5]]).tolist() for start in (0, 5))
    assert first != second and sorted(first) == sorted(second) == [*range(100)]
    assert [epoch for _, epoch in seen] == [e + s / 5 for e in range(2) for s in range(5)]


def test_torch_is_seeded_by_the_run_and_deterministic_where_that_is_asked_for(train, monkeypatch):
    asked, seeds, real = [], [], run.build
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(run, "build", lambda *given: seeds.append(torch.initial_seed()) or real(*given))
    train("seed=7", "epochs=1", "deterministic=true")
    assert (seeds, asked) == ([7], [True])


def saved_at(monkeypatch) -> list[Position]:
    """The positions of last.pt, as they are saved."""
    positions, real = [], checkpoint.save

    def save(path: Path, learner, position: Position, *rest) -> None:
        positions.append(position)
        real(path, learner, position, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    return positions


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        (["checkpoint.every_steps=2"], [2, 4, 5, 7, 9, 10]),
        (["checkpoint.every_steps=3", "optimizer.accumulate=2"], [4, 5, 9, 10]),  # updates after 2, 4 and 5
        (["checkpoint.every_steps=6", "checkpoint.every_epochs=2"], [6, 10]),  # longer than an epoch
    ],
)
def test_it_saves_once_so_many_steps_are_done(keys, steps, train, monkeypatch):
    positions = saved_at(monkeypatch)
    train(*keys)
    assert [5 * epoch + step for epoch, step in positions] == steps


def last_state(folder: Path) -> dict:
    return checkpoint.load(RunFolder(folder).last, torch.device("cpu"))


def test_what_draws_goes_on_with_the_draws_of_an_uninterrupted_run(train, stop_at, tmp_path):
    keys = ("peers.network=dropping", "precision=fp32")
    train(*keys, "name=straight")
    stop_at(7)
    with pytest.raises(Stopped):
        train(*keys)
    torch.rand(5)  # whatever this process draws meanwhile
    train(*keys)
    run, straight = (last_state(tmp_path / name)["learner"]["peers"] for name in ("run", "straight"))
    torch.testing.assert_close(run, straight, rtol=0, atol=0)


def test_losses_that_were_summed_up_before_a_stop_are_in_the_next_record(train, stop_at, tmp_path):
    """Logged after steps 2 and 4 of an epoch, stopped after its third."""
    train("name=straight", "precision=fp32")
    stop_at(8)
    with pytest.raises(Stopped):
        train("precision=fp32")
    train("precision=fp32")
    run, straight = (
        [(record["step"], record["loss"], record["top1"]) for record in RunFolder(tmp_path / name).records("train")]
        for name in ("run", "straight")
    )
    assert run == straight


def score_as(monkeypatch, *top1: float) -> None:
    """One evaluation after the other finds these."""
    left = iter(top1)

    def score(*_, **__) -> dict:
        found = {"top1": next(left), "top5": 99.0, "nll": 1.0, "ece": 1.0}
        return dict.fromkeys(("peer0", "mean", "best_peer", "ensemble"), found)

    monkeypatch.setattr(run, "score", score)


def best_position(folder: Path) -> Position:
    return Position(*checkpoint.load(RunFolder(folder).best, torch.device("cpu"))["position"])


def test_best_pt_is_of_the_best_epoch_not_of_the_last(train, tmp_path, monkeypatch):
    """Of two that are as good, the first."""
    score_as(monkeypatch, 50.0, 70.0, 60.0, 70.0)
    result = train("epochs=4", "checkpoint.best=true")
    assert best_position(tmp_path / "run") == (1, 5)
    assert (result["headline"]["top1"], result["best_epoch_on_test"]["epoch"]) == (70.0, 2)


def test_a_resumed_run_remembers_its_best_epoch(train, stop_at, tmp_path, monkeypatch):
    score_as(monkeypatch, 70.0, 60.0)
    stop_at(7)
    with pytest.raises(Stopped):
        train("checkpoint.best=true")
    train("checkpoint.best=true")
    assert best_position(tmp_path / "run") == (0, 5)


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
    """The losses of the last step are of the weights before it, and finite."""
    train("epochs=2", "eval_every=2")
    folder = RunFolder(tmp_path / "run")
    before = folder.last.read_bytes()
    folder.result.unlink()
    folder.config.write_text(folder.config.read_text().replace("epochs: 2", "epochs: 3", 1))
    real, count = Step.train, 0

    def step(self, learner, *args, **kwargs):
        nonlocal count
        real(self, learner, *args, **kwargs)
        count += 1
        if count == 5:
            with torch.no_grad():
                next(learner.peers.parameters()).fill_(math.inf)

    monkeypatch.setattr(Step, "train", step)
    with pytest.raises(RunError, match=r"step 15: a peer's weights are not finite; start another run \(name=NAME\)"):
        train("epochs=3", "eval_every=2")
    assert folder.last.read_bytes() == before and not folder.result.exists()


def test_a_run_tells_what_each_start_of_it_computed_with(train, stop_at, tmp_path, monkeypatch, capsys):
    """precision=auto may mean another one where the run goes on."""
    stop_at(7)
    monkeypatch.setattr(device, "_fast_dtype", lambda _: torch.bfloat16)
    with pytest.raises(Stopped):
        train()
    monkeypatch.setattr(device, "_fast_dtype", lambda _: torch.float32)
    result = train(console=Console(highlight=False))
    assert "precision: going on in float32, so far bfloat16\n" in capsys.readouterr().out
    assert result["precision"] == "bfloat16, then float32" and result["compile"] == "none"
    folder = RunFolder(tmp_path / "run")
    first, second = folder.records("session")
    assert (first["step"], second["step"], second["epoch"]) == (0, 7, 1.4)
    assert result["hardware"] == first["hardware"] == second["hardware"]
    before = folder.result.read_text()
    monkeypatch.setattr(device, "_fast_dtype", lambda _: torch.bfloat16)
    assert train()["precision"] == "bfloat16, then float32"  # nothing was left to be done
    assert json.loads(before) == json.loads(folder.result.read_text())


def test_the_time_until_a_signal_counts(train, stop_at, tmp_path):
    stop_at(3)
    with pytest.raises(Stopped):
        train("log_every=50", "checkpoint.every_steps=null")
    folder = RunFolder(tmp_path / "run")
    begun, stopped = folder.records()
    assert (begun["kind"], stopped["kind"], stopped["by"], stopped["step"]) == ("session", "stopped", "SIGTERM", 3)
    assert stopped["hours"] > 0
    train("log_every=50")
    assert folder.records("session")[1]["hours"] >= stopped["hours"]


def test_second_views_are_no_images_of_the_rate(train, tmp_path, monkeypatch):
    monkeypatch.setattr(run._Timer, "read", lambda timer: float(timer.images))
    train("method=cs_kd", "epochs=1", "log_every=5")
    (record,) = RunFolder(tmp_path / "run").records("train")
    assert record["images_per_s"] == 100


def test_the_parameters_on_record_are_those_of_all_peers(train):
    one, two = (train(f"peers.count={count}", "epochs=1", f"name=of{count}")["parameters"] for count in (1, 2))
    assert two == 2 * one == 2 * sum(p.numel() for p in tasks.small(10).parameters())


def test_a_run_without_a_scale_goes_on_in_fp16(train, stop_at, monkeypatch):
    """As where the first machine multiplies bf16, and the second does not."""
    stop_at(3)
    with pytest.raises(Stopped):
        train()
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: real("cpu", enabled=True))
    assert train()["steps"] == 10


def test_a_run_that_was_trained_as_a_cuda_graph_is_scored_without(train, tmp_path):
    result = train()
    folder = RunFolder(tmp_path / "run")
    folder.config.write_text(folder.config.read_text().replace("compile: auto", "compile: graph", 1))
    with run.trained(folder.path) as (parts, epochs):
        assert epochs == 2
        assert run.score(parts)["mean"]["top1"] == result["headline"]["top1"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one_and_nothing_else(error, train, tmp_path, monkeypatch):
    """torch has an error of its own where a disk is full in the middle of a tensor."""
    folder = RunFolder(tmp_path / "run")
    real = torch.save

    def full(state, file) -> None:
        if state["position"] != (1, 0):
            raise error
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=f"{folder.last} cannot be written, .* MB are free there"):
        train()
    assert [path.name for path in folder.last.parent.iterdir()] == ["last.pt"]
    assert torch.load(folder.last, weights_only=True)["position"] == (1, 0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        CheckpointException("", {1: (OSError(28, "No space left on device"), None)}),
    ],
)
def test_a_checkpoint_of_several_processes_that_cannot_be_written_is_told_in_a_line(error, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    slots = [tmp_path / f"last.{i}" for i in range(2)]
    for slot in slots:
        slot.mkdir()
    path.symlink_to(slots[0].name)

    def full(*_) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_save_folder", full)
    with pytest.raises(
        RunError, match=rf"^{path} cannot be written, .* there \(\[Errno 28\] No space left on device\)$"
    ):
        checkpoint.save(path, None, Position(0, 1), Tally([]), 0.0, Mesh(2, 1))
    assert slots[0].is_dir() and not slots[1].exists()


def test_a_reader_of_several_processes_checkpoint_stays_with_the_one_that_it_began_with(tmp_path):
    path = tmp_path / "last.pt"
    for i in range(2):
        (tmp_path / f"last.{i}").mkdir()
        (tmp_path / f"last.{i}" / "facts.json").write_text(f'{{"position": [{i}, 0]}}')
    path.symlink_to("last.0")
    state = checkpoint.load(path, torch.device("cpu"))
    path.unlink()
    path.symlink_to("last.1")
    checkpoint._clear(path)
    assert state == {"path": tmp_path / "last.0", "position": [0, 0]}
    with pytest.raises(
        RunError, match=f"{tmp_path / 'last.0'} was replaced by a later one while it was read: try again"
    ):
        checkpoint.load_peers(state, Peers(["small"], num_classes=10, seed=0))


def test_a_checkpoint_may_be_a_link_to_elsewhere(train, tmp_path):
    train()
    last = RunFolder(tmp_path / "run").last
    last.rename(tmp_path / "elsewhere.pt")
    for place in (tmp_path / "elsewhere.pt", "../../elsewhere.pt"):
        last.unlink(missing_ok=True)
        last.symlink_to(place)
        assert checkpoint.load(last, torch.device("cpu"))["position"] == (2, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard", "tensorboard later"])
def test_a_record_that_cannot_be_written_is_told_in_a_line(full, train, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    real, writes = RecordWriter.write, itertools.count()

    def write(*arguments: Any) -> None:
        if full == "tensorboard later" and next(writes) < 4:
            real(*arguments)
        else:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if full == "metrics.jsonl" else (RecordWriter, "write")), write)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        folder.append({}) if full == "metrics.jsonl" else train()


def test_a_finished_run_says_so(train, capsys):
    train()
    train(console=Console(highlight=False, width=200))
    assert "run: is finished" in capsys.readouterr().out


def test_a_run_is_scored_where_its_data_and_its_device_are_others(train, tmp_path, monkeypatch):
    result = train("data.root=there")
    folder, seen = RunFolder(tmp_path / "run"), []
    folder.config.write_text(folder.config.read_text().replace("device: cpu", "device: cuda:7", 1))
    real = run.build
    monkeypatch.setattr(run, "build", lambda config, **more: seen.append(config) or real(config, **more))
    with run.trained(folder.path, root=tmp_path, device="cpu") as (parts, _):
        assert run.score(parts)["mean"]["top1"] == result["headline"]["top1"]
    (config,) = seen
    assert config.data.root == tmp_path and config.data.download is False


class Uneven(Mesh):
    """As if another process had two batches of test images, fewer than this one."""

    def agree(self, signum: int) -> int:
        return max(signum, -2)


def test_all_processes_look_for_signals_after_the_batches_that_all_have():
    config = load_config("quickstart", [*TINY, "eval_batch_size=100"])
    for mesh, expected in ((Mesh(), None), (Uneven(), 2)):
        parts, polls = build(config, mesh), []
        run.score(parts, poll=lambda polls=polls: polls.append(1))
        batches = len(parts.test_plan())
        assert batches > 2 and len(polls) == (expected or batches)
        parts.close()
