"""A run that was killed, stopped or restarted ends with the very weights of the one that was not."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import Started, wait_until

from cutnmix.trainer.folder import RunFolder

TINY = [
    "imports=[small_network]",
    "peers.network=dropping",  # so that it draws
    "data.images_per_class=16",
    "epochs=10",  # of 7 steps: enough for a signal to come before the end, however fast they are
    "batch_size=24",
    "distort.cutout=6",
    "log_every=3",  # so that sums lie in a checkpoint
    "checkpoint.every_steps=2",
    "resume=auto",
]
RESNET20 = ["peers.network=resnet20", "epochs=4"]  # its steps are longer


def start(folder: Path, *overrides: str, log: str = "log") -> Started:
    """A training in `folder`, of a network that draws where no override names another; it prints to FOLDER.log."""
    place = [f"runs={folder.parent}", f"name={folder.name}"]
    return Started(["train", "quickstart", *TINY, *place, *overrides], log_path(folder, log))


def log_path(folder: Path, log: str = "log") -> Path:
    return folder.with_name(f"{folder.name}.{log}")


def steps_on_record(folder: Path) -> int:
    records = RunFolder(folder).records()
    return records[-1]["step"] if records else 0


def wait_for_step(process: Started, folder: Path, step: int) -> None:
    wait_until(lambda: steps_on_record(folder) >= step, process)


def final_state(folder: Path) -> dict:
    return torch.load(RunFolder(folder).last, weights_only=True)


def assert_same(one, other) -> None:
    """Equal to the last bit, through nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def comparable_records(folder: Path) -> list[dict]:
    """Records of training and evaluation without what is a timing."""
    timings = {"images_per_s", "hours"}
    records = [record for record in RunFolder(folder).records() if record["kind"] in ("train", "test")]
    return [{k: v for k, v in record.items() if k not in timings} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert start(folder).wait() == 0, log_path(folder).read_text()
    return folder


@pytest.fixture(scope="module")
def uninterrupted_resnet20(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert start(folder, *RESNET20).wait() == 0, log_path(folder).read_text()
    return folder


def check_killed_at_random_moments(folder: Path, straight: Path, seed: str, *overrides: str) -> None:
    rng = random.Random(seed)
    total = steps_on_record(straight)
    for kill_after in sorted(rng.sample(range(1, total), 3)):
        process = start(folder, *overrides)
        wait_for_step(process, folder, kill_after)
        time.sleep(rng.random() * 0.1)  # anywhere within a step, an evaluation or a save
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folder, *overrides).wait() == 0, log_path(folder).read_text()
    assert_same(final_state(folder), final_state(straight))
    assert comparable_records(folder) == comparable_records(straight)


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_weights_and_records(uninterrupted, tmp_path):
    check_killed_at_random_moments(tmp_path / "run", uninterrupted, "resident", "loader=resident")


@pytest.mark.slow
def test_the_quickstart_itself_killed_at_random_moments_ends_the_same(uninterrupted_resnet20, tmp_path):
    check_killed_at_random_moments(tmp_path / "run", uninterrupted_resnet20, "dali", *RESNET20, "loader=dali")


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_the_next_start_goes_on(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "checkpoint.every_steps=null", "checkpoint.every_epochs=10")  # nothing but the signal saves
    wait_for_step(process, folder, 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert RunFolder(folder).last.exists()
    assert start(folder).wait() == 0
    assert_same(final_state(folder)["learner"], final_state(uninterrupted)["learner"])
    assert comparable_records(folder) == comparable_records(uninterrupted)
    records = RunFolder(folder).records()
    hours = [record["hours"] for record in records]
    assert hours == sorted(hours)  # the second session counts on from the first
    (stopped,) = [record for record in records if record["kind"] == "stopped"]
    begun = [record for record in records if record["kind"] == "session"]
    assert stopped["by"] == "SIGTERM" and [record["step"] for record in begun] == [0, stopped["step"]]
    assert begun[1]["hours"] >= stopped["hours"] > 0
    assert json.loads(RunFolder(folder).result.read_text())["hours"] == hours[-1]


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    first = start(folder, "epochs=1000")
    wait_for_step(first, folder, 1)
    second = start(folder, "epochs=1000", log="second.log")
    assert second.wait() == 2
    assert log_path(folder, "second.log").read_text() == f"error: {folder} is in use by another process\n"
    assert first.poll() is None
    first.kill()
    assert first.wait() == -signal.SIGKILL


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    before = final_state(uninterrupted)
    assert start(uninterrupted).wait() == 0
    assert_same(final_state(uninterrupted), before)


def test_other_keys_are_refused_and_named(uninterrupted):
    assert start(uninterrupted, "optimizer.lr=0.1", log="other.log").wait() == 2
    assert "optimizer.lr (was 0.05, now 0.1)" in log_path(uninterrupted, "other.log").read_text()


def test_the_resolved_configuration_is_on_record(uninterrupted):
    tree = yaml.safe_load(RunFolder(uninterrupted).config.read_text())
    assert tree["optimizer"] == {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "accumulate": 1}
    assert tree["method"]["pt_grad_to_peers"] is False
