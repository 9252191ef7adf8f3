"""`cutnmix methods` and the benchmark of methods: what they say of a method is what it is. No timing is asserted."""

import io
import json
import sys
from contextlib import contextmanager
from itertools import count as count_up

import pytest
import torch
from rich.console import Console
from tasks import TINY, tiny
from torch import nn

from cutnmix.benchmarks import __main__ as commands
from cutnmix.benchmarks import methods
from cutnmix.benchmarks.measure import CPU
from cutnmix.benchmarks.records import sheets_of
from cutnmix.models import NETWORKS
from cutnmix.models.peers import Peers
from cutnmix.pipeline import load_splits
from cutnmix.trainer import cli
from cutnmix.trainer import overview as module
from cutnmix.trainer.config import load_config
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.overview import cost_of, overrides, overview, state_bytes, stepping
from cutnmix.trainer.step import Step


class Whole(nn.Module):
    """A network without trunk and branch."""

    feature_dim = 4

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 5, stride=4), nn.Linear(4, num_classes)

    def forward(self, image_BCHW):
        feature_BD = self.conv(image_BCHW).relu().mean((2, 3))
        return self.head(feature_BD), feature_BD


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in {**TINY, "whole": Whole}.items():
        monkeypatch.setitem(NETWORKS, name, network)


@pytest.fixture
def command(monkeypatch, capsys):
    """cutnmix ARGUMENTS: (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cutnmix", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, *capsys.readouterr()

    return call


def cells(printed: str) -> dict[str, list[str]]:
    """The lines of both tables' bodies by their first cell, those of a method in one."""
    found = {}
    for line in printed.splitlines():
        if "│" in line:
            name, *values = (cell.strip() for cell in line.strip("│").split("│"))
            found.setdefault(name, []).extend(values)
    return found


def numel(*modules: nn.Module) -> int:
    return sum(x.numel() for module in modules for x in (*module.parameters(), *module.buffers()))


def test_the_table_says_what_each_method_declares(command):
    code, printed, _ = command("methods", "--network", "tiny", "--no-cost")
    assert code == 0
    rows = cells(printed)
    assert rows.keys() == METHODS.keys()
    for name, (paper, peers, form, second, refuses, _, cost, keys) in rows.items():
        needs = METHODS[name].needs
        assert (paper, form, second) == (needs.paper or "-", needs.form or "any", needs.second or "-")
        assert peers == f">= {needs.min_peers}" and cost == "-"
        assert refuses == (", ".join(needs.refuses) or "-")
        assert [key.partition(":")[0] for key in keys.split(", ")] == (list(module.defaults(name)) or ["-"])
    assert rows["ps_kd"][5] == "40.00" and rows["dml"][5] == "0.00"  # 2 x 50,000 x 100 float32, in MB
    assert rows["dml"][7] == "temperature: 1.0, alpha: 1.0"
    assert rows["kdcl"][7] == "variant: minlogit, temperature: null, weight: null, holdout: 0.02"
    assert "tau2: true" in rows["cutnmix"][7] and 'teacher: ""' in rows["kd"][7]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_word_of_the_tables_is_cut_off_on_a_terminal(width, monkeypatch):
    monkeypatch.setattr(module, "cost_of", lambda *_: 1.25)
    screen = io.StringIO()
    console = Console(file=screen, width=width)
    for table in module.make_tables(overview("tiny", 2, 1)):
        console.print(table)
    assert "\u2026" not in screen.getvalue()
    assert all(line.rstrip().endswith("│") for line in screen.getvalue().splitlines() if line[0] == "│")
    words = screen.getvalue().replace("\n", " ").split()
    assert all(f"{key}:" in words for name in METHODS for key in module.defaults(name))


def test_state_is_what_a_method_remembers_beside_the_peers():
    size = {"num_images": 50_000, "num_classes": 100}
    assert state_bytes("baseline", "tiny", 2, **size) == state_bytes("kdcl", "tiny", 2, **size) == 0
    assert state_bytes("ps_kd", "tiny", 2, **size) == pytest.approx(2 * 50_000 * 100 * 4, rel=1e-3)
    assert state_bytes("kd", "tiny", 2, **size) == 4 * numel(tiny(100))
    assert state_bytes("cutnmix", "tiny", 3, **size) == 4 * numel(nn.Linear(3 * 6, 100))
    assert state_bytes("pcl", "tiny", 3, **size) > 4 * numel(Peers(["tiny"] * 3, num_classes=100, seed=0))


def test_every_method_is_measured_with_as_many_peers_as_it_needs(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "cost_of", lambda *arguments: asked.append(arguments) or 1.5)
    rows = overview("tiny", 1, 4)
    assert asked == [(name, "tiny", METHODS[name].needs.min_peers, 4) for name in METHODS]
    assert all(row.cost == 1.5 and row.peers == METHODS[row.name].needs.min_peers for row in rows)
    assert [row.peers for row in overview("tiny", 3, 4)] == [3] * len(METHODS)
    assert [row.cost for row in overview("tiny", 3, 0)] == [None] * len(METHODS)


def test_a_network_that_cannot_be_cut_leaves_out_the_branches_alone(monkeypatch):
    monkeypatch.setattr(module, "cost_of", lambda *_: 1.0)
    for row in overview("whole", 2, 1):
        assert (row.cost is None) == (row.state_mb is None) == (row.needs.form == "branches")


@pytest.mark.parametrize("name", METHODS)
def test_cost_is_a_ratio_of_steps_that_train(name):
    assert 0 < cost_of(name, "tiny", 2, steps=1) < float("inf")


def test_cost_is_the_median_ratio_to_the_baseline_before_and_after(monkeypatch):
    """Clock times made up: the baseline takes 1, 2, 3 ... in the order of the calls, the method 10 times that."""
    calls = count_up(1)

    @contextmanager
    def stepping_by_hand(config):
        yield lambda: (10 if config.method["name"] == "dml" else 1) * next(calls)

    monkeypatch.setattr(module, "stepping", stepping_by_hand)
    # After 4 steps of warm-up: baseline 5, method 60, baseline 7, method 80, baseline 9, ...
    assert cost_of("dml", "tiny", 2, steps=3) == pytest.approx(10)


def test_a_step_trains_on_the_same_batch_again(monkeypatch, tmp_path):
    seen = []
    train = Step.train

    def spy(self, learner, views, draws, tally, **rest):
        seen.append((views, rest))
        return train(self, learner, views, draws, tally, **rest)

    monkeypatch.setattr(Step, "train", spy)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.append("update"))
    keys = overrides("dml", "tiny", 2, 10, tmp_path)
    with stepping(load_config("quickstart", [*keys, "loader=resident"])) as step:
        assert step() > 0 and step() > 0
    (first, rest), one, (second, _), two = seen
    assert first is second and one == two == "update" and rest["update"] is True


def test_configurations_differ_from_one_another_by_the_method_alone(tmp_path):
    trees = {name: load_config("quickstart", overrides(name, "tiny", 3, 10, tmp_path)).model_dump() for name in METHODS}
    for name, tree in trees.items():
        assert tree.pop("method")["name"] == name
        assert tree["peers"].pop("form") == (METHODS[name].needs.form or "nets")
    assert all(tree == trees["baseline"] for tree in trees.values())
    assert trees["dml"]["peers"] == {"network": "tiny", "count": 3} and trees["dml"]["mix"]["name"] == "none"


def test_an_unknown_network_is_one_line(command):
    code, printed, error = command("methods", "--network", "tinny")
    assert (code, printed) == (2, "")
    assert error.startswith("error: --network: no 'tinny'") and error.count("\n") == 1
    with pytest.raises(ConfigError):
        overview("tinny", 2, 0)


# benchmarks/methods.py


def test_the_benchmark_leaves_a_record_of_every_method(tmp_path):
    options = ["--network", "tiny", "--batch", "8", "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path)]
    record = commands.app(["methods", *options], standalone_mode=False)
    assert json.loads((tmp_path / "methods.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / "methods.png").stat().st_size > 0
    ms, ratio = sheets_of(record)
    assert list(ms.rows) == list(ratio.rows)
    assert [row.partition(",")[0] for row in ms.rows] == list(METHODS)
    for sheet in (ms, ratio):
        for row in sheet.rows.values():
            assert row["step"].n == 2 and 0 < row["step"].low <= row["step"].median <= row["step"].high


@pytest.mark.parametrize(("count", "expected"), [(1, {"dml": 2, "baseline": 1}), (2, {"dml": 2}), (4, {"dml": 4})])
def test_peers_are_those_asked_for_or_those_of_the_paper(count, expected):
    for name in ("one", "okddip", "pcl"):
        assert methods.peers_of(name, count) == max(3, count)
    for name, peers in expected.items():
        assert methods.peers_of(name, count) == peers


def test_the_ratio_is_to_j_steps_of_one_plain_network(monkeypatch):
    """Rates made up: a step of J peers takes J^2 seconds, and one on a plain network 1; so the ratio is J."""

    @contextmanager
    def training(keys):
        (count,) = (int(key.removeprefix("peers.count=")) for key in keys[-4:] if key.startswith("peers.count="))
        yield lambda: count**2

    monkeypatch.setattr(methods, "training", training)
    monkeypatch.setattr(methods, "per_second", lambda step, *_, **__: 1 / step())
    data = load_splits("digits").train
    ms, ratio = methods.measure(
        root=None, data=data, network="tiny", count=2, batch=8, rounds=3, seconds=0.0, device=CPU
    )
    for row in ms.rows:
        count = int(row[-1])
        assert ms.rows[row]["step"].median == pytest.approx(1000 * count**2)
        assert ratio.rows[row]["step"].median == pytest.approx(count)
