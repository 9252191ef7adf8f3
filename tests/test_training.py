"""Every method, through the command line: it trains, its loss falls, and killed it goes on to the very same end."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import tasks
from test_resume import assert_same, comparable_records, final_state, log_path, start, steps_on_record, wait_for_step

from cutnmix.models import NETWORKS
from cutnmix.trainer.cli import main
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.methods import METHODS

KEYS = {  # with alpha as published, a teacher that knows little after one epoch is nearly all that is learned
    "kd": ["method.teacher={teacher}", "method.alpha=0.5"],
    "tf_kd": ["method.variant=self", "method.teacher={teacher}", "method.alpha=0.5"],
    "ps_kd": ["method.alpha_T=0.2"],  # of two epochs: with 0.8 most of the second's targets are its own predictions
}
STATEFUL = [("ps_kd", []), ("one", []), ("okddip", []), ("pcl", []), ("kdcl", ["method.variant=general"])]


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """For the trainings in this process; those in their own import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "small", tasks.small)
        yield


def train(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cutnmix", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def keys(name: str, teacher: Path | None = None) -> list[str]:
    needs = METHODS[name].needs
    mix = "none" if "cutnmix" in needs.refuses else "cutnmix"
    form = needs.form or "nets"
    own = [key.format(teacher=teacher) for key in KEYS.get(name, [])]
    return [f"method={name}", *own, f"mix={mix}", f"peers.count={max(2, needs.min_peers)}", f"peers.form={form}"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, small_network) -> Path:
    """A finished run of one network."""
    runs = tmp_path_factory.mktemp("teacher")
    small = ["peers.network=small", "mix=none", "peers.count=1", "epochs=1", "data.images_per_class=60"]
    with pytest.MonkeyPatch.context() as patch:
        train(patch, "quickstart", "method=baseline", *small, f"runs={runs}", "name=t")
    return runs / "t"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_on_digits_lower_the_loss(name, teacher, tmp_path, monkeypatch):
    size = [
        "peers.network=small",
        "epochs=2",
        "data.images_per_class=50",
        "batch_size=20",
        "optimizer.lr=0.1",
        "schedule=constant",
        "loader=resident",
    ]
    train(monkeypatch, "quickstart", *keys(name, teacher), *size, f"runs={tmp_path}", "name=run")
    folder = RunFolder(tmp_path / "run")
    first, last = [record for record in folder.records() if record["kind"] == "train"]
    assert last["loss"]["ce"] < first["loss"]["ce"]
    result = json.loads(folder.result.read_text())
    assert 0 < result["headline"]["top1"] <= 100


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Runs of the methods with memory that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    for name, more in STATEFUL:
        run = folder / name
        assert start(run, *keys(name), *more, "loader=resident").wait() == 0, log_path(run).read_text()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), STATEFUL, ids=[name for name, _ in STATEFUL])
def test_a_method_with_memory_killed_at_a_random_moment_ends_the_same(name, more, straight, tmp_path):
    straight, broken = straight / name, tmp_path / "broken"
    overrides = [*keys(name), *more, "loader=resident"]
    rng = random.Random(name)
    process = start(broken, *overrides)
    wait_for_step(process, broken, rng.randrange(1, steps_on_record(straight) // 2))
    time.sleep(rng.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(broken, *overrides).wait() == 0, log_path(broken).read_text()
    assert_same(final_state(broken), final_state(straight))
    assert comparable_records(broken) == comparable_records(straight)
