"""A run that was killed, stopped or restarted ends with the very weights of the one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cutnmix.trainer.folder import RunFolder

TINY = [
    "data.images_per_class=16",
    "epochs=4",
    "batch_size=24",
    "distort.cutout=6",
    "log_every=2",
    "checkpoint.every_steps=2",
    "resume=auto",
]


def command(folder: Path, *overrides: str) -> list[str]:
    place = [f"runs={folder.parent}", f"name={folder.name}"]
    return [sys.executable, "-m", "cutnmix.trainer", "train", "quickstart", *TINY, *place, *overrides]


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(command(folder, *overrides), stdout=log, stderr=subprocess.STDOUT, env=env)


def steps_on_record(folder: Path) -> int:
    records = RunFolder(folder).records()
    return records[-1]["step"] if records else 0


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and steps_on_record(folder) < step and time.monotonic() < deadline:
        time.sleep(0.01)


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
    """Records without what is a timing."""
    timings = {"images_per_s", "hours"}
    return [{k: v for k, v in record.items() if k not in timings} for record in RunFolder(folder).records()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert start(folder).wait() == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_killed_at_random_moments_ends_with_the_same_weights_and_records(loader, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    rng = random.Random(loader)
    total = steps_on_record(uninterrupted)
    for kill_after in sorted(rng.sample(range(1, total), 3)):
        process = start(folder, f"loader={loader}")
        wait_for_step(process, folder, kill_after)
        time.sleep(rng.random() * 0.2)  # anywhere within a step, an evaluation or a save
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folder, f"loader={loader}").wait() == 0
    assert_same(final_state(folder), final_state(uninterrupted))
    assert comparable_records(folder) == comparable_records(uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_the_next_start_goes_on(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "checkpoint.every_steps=null", "checkpoint.every_epochs=4")  # nothing but the signal saves
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert RunFolder(folder).last.exists()
    assert start(folder).wait() == 0
    assert_same(final_state(folder)["learner"], final_state(uninterrupted)["learner"])
    assert comparable_records(folder) == comparable_records(uninterrupted)
    hours = [record["hours"] for record in RunFolder(folder).records()]
    assert 0 < hours[0] and hours == sorted(hours)  # the second session counts on from the first
    assert json.loads(RunFolder(folder).result.read_text())["hours"] == hours[-1]


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    first = start(folder, "epochs=100")
    wait_for_step(first, folder, 1)
    second = subprocess.run(command(folder, "epochs=100"), capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.strip() == f"error: {folder} is in use by another process"
    assert first.poll() is None
    first.kill()
    first.wait()


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    before = final_state(uninterrupted)
    assert start(uninterrupted).wait() == 0
    assert_same(final_state(uninterrupted), before)


def test_other_keys_are_refused_and_named(uninterrupted):
    done = subprocess.run(command(uninterrupted, "optimizer.lr=0.1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "optimizer.lr (was 0.05, now 0.1)" in done.stderr


def test_the_resolved_configuration_is_on_record(uninterrupted):
    tree = yaml.safe_load(RunFolder(uninterrupted).config.read_text())
    assert tree["optimizer"] == {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "accumulate": 1}
    assert tree["method"]["pt_grad_to_peers"] is False
