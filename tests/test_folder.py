"""A run folder belongs to one run and one process, and holds nothing that its checkpoint has not seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import (
    Position,
    RunError,
    RunFolder,
    Taken,
    expect_writable,
    same_but_seed,
    write_atomically,
)
from cutnmix.trainer.keys import Config, ConfigError

HOLD = """
import sys, time
from pathlib import Path
from cutnmix.trainer.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "mine")


def config(*overrides: str) -> Config:
    return load_config("quickstart", overrides)


# One process


def test_the_lock_refuses_a_second_process_and_dies_with_the_first(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"{folder.path} is in use by another process"), folder.locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder.locked():
        pass


def test_the_lock_is_given_back_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), folder.locked():
        raise ZeroDivisionError
    with folder.locked():
        pass


def test_a_lock_that_cannot_be_made_is_told_in_one_line(folder, monkeypatch):
    def refuse(self, timeout: float) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(RunError, match=f"{folder.path} cannot be written: Permission denied"), folder.locked():
        pass


def test_a_configuration_that_is_no_text_is_named(folder):
    folder.begin(config())
    folder.config.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match=f"{folder.config}: 'utf-8' codec can't decode"):
        folder.read_config()


def test_a_folder_that_cannot_be_made_is_named(folder):
    folder.path.parent.mkdir()
    folder.path.write_text("a file")
    with pytest.raises(RunError, match=f"^runs, name: {folder.path} cannot be made: File exists"), folder.locked():
        pass


def test_what_would_be_refused_later_is_refused_at_once_and_leaves_nothing(folder, monkeypatch):
    folder.expect_free()
    assert not folder.path.exists()
    with folder.locked(), pytest.raises(Taken, match="in use by another process"):
        RunFolder(folder.path).expect_free()
    folder.expect_free()
    folder.begin(config())
    kept = {path.name for path in folder.path.iterdir()}
    folder.expect_free()
    assert {path.name for path in folder.path.iterdir()} == kept
    with pytest.raises(RunError, match=r"^runs, name: /proc/none/mine cannot be made: No such file or directory$"):
        RunFolder(Path("/proc/none/mine")).expect_free()


def test_a_folder_is_written_to_before_what_takes_long(tmp_path):
    expect_writable(tmp_path / "new" / "one")
    assert [*(tmp_path / "new" / "one").iterdir()] == []
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"{tmp_path / 'file'} cannot be written: File exists"):
        expect_writable(tmp_path / "file")
    with pytest.raises(RunError, match="/proc/none cannot be written: No such file or directory"):
        expect_writable(Path("/proc/none"))


# One run


def test_a_new_folder_takes_any_run(folder):
    folder.check(config())
    folder.check(config("resume=auto"))


def test_a_second_run_is_refused_unless_it_resumes(folder):
    folder.begin(config())
    with pytest.raises(RunError, match="holds a run already: resume=auto goes on with it, name=NAME starts another"):
        folder.check(config())
    folder.check(config("resume=auto"))


def test_a_run_with_other_keys_is_refused_with_each_of_them(folder):
    folder.begin(config())
    with pytest.raises(RunError, match="was started with other keys") as refused:
        folder.check(config("resume=auto", "optimizer.lr=1.5", "method=dml", "distort.colour.hue=3", "epochs=13"))
    message = str(refused.value)
    for change in (
        "optimizer.lr (was 0.05, now 1.5)",
        "distort.colour.hue (was 0.0, now 3.0)",
        "epochs (was 9, now 13)",
    ):
        assert change in message
    assert "method.name (was 'cutnmix', now 'dml')" in message and "method.beta (was 0.3, now None)" in message
    assert "resume" not in message.partition("other keys")[2].partition("; name=NAME")[0]


@pytest.mark.parametrize(
    "free",
    [
        "runs=there",
        "name=other",
        "data.root=there",  # of a data set with a name
        "loader=resident",
        "loader.threads=3",
        "loader.prefetch=5",
        "checkpoint.every_steps=3",
        "checkpoint.best=false",
        "log_every=7",
    ],
)
def test_keys_that_change_no_number_are_free(free, folder):
    folder.begin(config())
    folder.check(config("resume=auto", free))


HELD = [
    "seed=1", "epochs=13", "batch_size=16", "eval_batch_size=100", "views=shared", "mix.alpha=0.5", "method.alpha=0.5",
    "data.classes=4", "data.images_per_class=20", "distort.pad=1", "peers.network=resnet32", "peers.count=3",
    "optimizer.weight_decay=0.1", "optimizer.accumulate=2", "schedule.warmup_epochs=2", "precision=fp32",
    "channels_last=false", "deterministic=true", "eval_every=2", "imports=[json]",
]  # fmt: skip


@pytest.mark.parametrize("held", HELD)
def test_every_other_key_is_held(held, folder):
    folder.begin(config())
    with pytest.raises(RunError, match=f"was started with other keys: {held.partition('=')[0]}"):
        folder.check(config("resume=auto", held))


def test_a_tilde_in_the_place_of_runs_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert config("runs=~/runs", "name=run").folder == Path("/home/ann/runs/run")


def test_a_name_that_no_folder_can_have_is_refused_in_one_line(folder):
    with pytest.raises(RunError, match="File name too long"), RunFolder(folder.path / ("x" * 300)).locked():
        pass
    for refused in (lambda run: run.check(config()), RunFolder.expect, RunFolder.read_config):
        with pytest.raises(RunError, match="File name too long"):
            refused(RunFolder(folder.path / ("x" * 300)))


def test_the_place_of_ones_own_images_says_which_they_are(folder):
    birds, cars = (("data=folder", f"data.root={root}", "distort.image_size=32") for root in ("birds", "cars"))
    folder.begin(config(*birds))
    folder.check(config(*birds, "resume=auto"))
    folder.check(config(*birds, f"data.root={Path('birds').absolute()}", "resume=auto"))  # as Ray's workers write it
    with pytest.raises(RunError, match=r"data.root \(was 'birds', now 'cars'\)"):
        folder.check(config(*cars, "resume=auto"))


def test_runs_are_the_same_but_for_the_seed_where_no_other_number_changes():
    one = config("data.root=here", "name=one")
    assert same_but_seed(one, one) and same_but_seed(
        one, config("seed=7", "name=two", "loader=resident", "log_every=3")
    )
    assert not same_but_seed(one, config("seed=7", "epochs=3"))
    assert not same_but_seed(one, config("method=dml"))


def test_dropping_the_last_batch_is_not_free(folder):
    folder.begin(config())
    with pytest.raises(RunError, match=r"drop_last \(was False, now True\)"):
        folder.check(config("resume=auto", "drop_last=true"))


def test_the_configuration_is_read_back_as_it_was(folder):
    folder.begin(config("method=dml", "data.classes=[3, 5]", "runs=there"))
    assert folder.read_config() == config("method=dml", "data.classes=[3, 5]", "runs=there")


@pytest.mark.parametrize("is_file", [False, True])
def test_what_is_no_run_is_named(is_file, folder):
    folder.path.parent.mkdir()
    folder.path.write_text("a file") if is_file else folder.path.mkdir()
    with pytest.raises(RunError, match=f"{folder.path} is not a run: it has no config.yaml"):
        folder.read_config()


@pytest.mark.parametrize("text", ["", "epochs: [", "epoch: 3", "- 3"])
def test_a_damaged_configuration_is_named(text, folder):
    folder.begin(config())
    folder.config.write_text(text)
    with pytest.raises(ConfigError, match=str(folder.config)):
        folder.read_config()


# Records


def train_record(step: int) -> dict:
    return {"kind": "train", "epoch": step / 10, "step": step}


def test_record(epoch: int) -> dict:
    return {"kind": "test", "epoch": epoch, "step": 10 * epoch}


test_record.__test__ = False  # a record of a test, no test
RECORDS = [  # of two epochs and a half of ten steps, logged every fifth, evaluated after each epoch
    train_record(5), train_record(10), test_record(1),
    train_record(15), train_record(20), test_record(2),
    train_record(25),
]  # fmt: skip


def kept(folder: RunFolder, epoch: int, step: int) -> list[dict]:
    """What is left of RECORDS when the checkpoint stands there."""
    folder.begin(config())
    for record in RECORDS:
        folder.append(record)
    folder.rewind(Position(epoch, step), 10 * epoch + step)
    return folder.records()


@pytest.mark.parametrize(
    ("epoch", "step", "count"),
    [
        (0, 0, 0),  # killed before the first checkpoint
        (0, 5, 1),
        (0, 9, 1),
        (0, 10, 2),  # stopped during the first evaluation: it will be done again
        (1, 0, 3),  # saved after it
        (1, 5, 4),
        (1, 7, 4),
        (1, 10, 5),
        (2, 0, 6),
        (2, 4, 6),
        (2, 5, 7),
        (3, 0, 7),
    ],
)
def test_rewinding_drops_what_the_checkpoint_has_not_seen(epoch, step, count, folder):
    assert kept(folder, epoch, step) == RECORDS[:count]


def test_rewinding_twice_is_rewinding_once(folder):
    once = kept(folder, 1, 7)
    folder.rewind(Position(1, 7), 17)
    assert folder.records() == once


def test_a_session_of_which_no_step_is_left_is_dropped(folder):
    folder.begin(config())
    sessions = [{"kind": "session", "epoch": step / 10, "step": step} for step in (0, 5, 7)]
    stopped = {"kind": "stopped", "epoch": 0.7, "step": 7}
    for record in (sessions[0], train_record(5), sessions[1], stopped, sessions[2]):
        folder.append(record)
    folder.rewind(Position(0, 7), 7)
    assert folder.records() == [sessions[0], train_record(5), sessions[1], stopped]
    folder.rewind(Position(0, 0), 0)
    assert folder.records() == []


def test_a_line_cut_short_by_a_kill_is_no_record(folder):
    folder.begin(config())
    folder.append(train_record(5))
    with folder.metrics.open("a") as file:
        file.write(json.dumps(train_record(10))[:-3])
    assert folder.records() == [train_record(5)]
    folder.rewind(Position(1, 0), 10)
    folder.append(train_record(10))
    assert folder.records() == [train_record(5), train_record(10)]


def test_records_of_one_kind(folder):
    kept(folder, 3, 0)
    assert folder.records("test") == [record for record in RECORDS if record["kind"] == "test"] != []


def test_a_folder_without_records_has_none(folder):
    assert folder.records() == []


# Files


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        os.ftruncate(descriptor, 7)
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(RunError, match=f"{path} cannot be written: disk full"):
        patch.setattr(os, "fsync", full)
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_beginning_again_changes_only_the_configuration(folder):
    folder.begin(config())
    folder.append(train_record(5))
    folder.begin(config("log_every=3"))
    assert folder.records() == [train_record(5)]
    assert yaml.safe_load(folder.config.read_text())["log_every"] == 3
