"""Every benchmark runs, leaves what it promises, and computes from its figures what it says. No timing is asserted."""

import json
import math
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import typer
from PIL import Image
from tasks import tiny
from torch import nn

from cutnmix.benchmarks import __main__ as commands
from cutnmix.benchmarks import loaders, measure, memory, methods, mixes, peers, records, steps, tables
from cutnmix.benchmarks.measure import CPU, Clock, Spread, in_turn, per_second
from cutnmix.benchmarks.records import Sheet, make_record, read_records, sheets_of
from cutnmix.models import NETWORKS
from cutnmix.pipeline import Distort, MixBatch, load_splits
from cutnmix.trainer import cli
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.losses import cross_entropy, mutual_kl
from cutnmix.trainer.methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*fork.*:DeprecationWarning"
    ),  # Python 3.12 and later, of a DataLoader's workers
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # torch, where there is one core
]


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", tiny)


@pytest.fixture
def bench(tmp_path):
    """The command: its record, after a look at what it left."""

    def call(name: str, *options: str) -> dict:
        record = commands.app([name, *options, "--out", str(tmp_path)], standalone_mode=False)
        check_record(record)
        place = tmp_path / record["benchmark"]
        assert json.loads(place.with_suffix(".json").read_text()) == json.loads(json.dumps(record))
        with Image.open(place.with_suffix(".png")) as picture:
            assert picture.size[0] == 1000
            assert len(picture.convert("RGB").getcolors(2**24)) > 5
        return record

    return call


def check_record(record: dict) -> None:
    strings = {"benchmark", "command", "date", "commit", "device", "hardware", "threads", "versions"}
    assert record.keys() == strings | {"settings", "notes", "sheets"}
    assert all(isinstance(record[key], str) and record[key] for key in strings)
    assert f"torch {torch.__version__.partition('+')[0]}" in record["versions"]
    for sheet in sheets_of(record):
        assert sheet.title and sheet.unit and sheet.rows
        for row in sheet.rows.values():
            assert list(row) == sheet.columns
            for cell in row.values():
                if isinstance(cell, Spread):
                    assert 0 < cell.low <= cell.median <= cell.high < math.inf
                    assert cell.n == record["settings"]["rounds"]


def rows_of(record: dict, part: str) -> dict[str, records.Row]:
    """The rows of the one sheet with this in its title."""
    (sheet,) = (sheet for sheet in sheets_of(record) if part in sheet.title)
    return sheet.rows


# Each benchmark, small


def test_loader(bench):
    record = bench("loader", "--views=1,2", "--batch=16", "--batches=8,16", "--rounds=1", "--seconds=0")
    for title, columns in (("batch 16", ["1", "2"]), ("J = 2", ["8", "16"])):
        rows = rows_of(record, title)
        assert rows.keys() == loaders.ARRAYS.keys()
        assert all(list(row) == columns and None not in row.values() for row in rows.values())
    same = ((rows_of(record, "batch 16")[name]["2"], rows_of(record, "J = 2")[name]["16"]) for name in loaders.ARRAYS)
    assert all(one == other for one, other in same)


def test_loader_of_jpegs(bench):
    record = bench("loader", "--jpeg", "--images=20", "--views=1,2", "--batch=4", "--rounds=1", "--seconds=0")
    assert (record["benchmark"], record["command"]) == ("loader-jpeg", "cutnmix bench loader --jpeg")
    assert rows_of(record, "folder/train, batch 4").keys() == loaders.JPEGS.keys()


def test_mix(bench):
    record = bench("mix", "--views=1,2", "--batch=8", "--rounds=1", "--seconds=0")
    floats, from_bytes = (
        rows_of(record, f"{task}, aten")
        for task in ("Float views in, mixed views out", "Bytes in, normalised mixed views out")
    )
    assert set(mixes.PUBLIC) < floats.keys() & from_bytes.keys()
    assert floats["cutnmix CutnMix"]["1"] == floats["cutnmix CutnMix"]["2"]  # one call for all views
    assert from_bytes["cutnmix MixBatch"]["1"] == from_bytes["cutnmix MixBatch"]["2"]
    assert floats["torchvision v2.CutMix"]["2"] > floats["torchvision v2.CutMix"]["1"] > 0


def test_step(bench):
    record = bench("step", "--views=1,2", "--network=tiny", "--batch=8", "--rounds=2", "--seconds=0")
    ms, rate = rows_of(record, "A training step"), rows_of(record, "Images a second")
    assert list(ms) == list(rate) == [
        steps.REPLAYED, *steps.TOTALS, steps.LINEAGE, steps.OURS, steps.OURS_FP32
    ]  # fmt: skip
    for name, row in ms.items():  # images/s = 1000 * batch / ms, the slowest being the lowest
        for count, cell in row.items():
            other = rate[name][count]
            assert cell.low * other.high == pytest.approx(8000, rel=1e-4) == cell.high * other.low


def test_peers(bench):
    record = bench("peers", "--views=1,2", "--network=tiny", "--batch=8", "--rounds=2", "--seconds=0")
    assert list(rows_of(record, "A training step of J peers")["cutnmix"]) == ["1", "2"]


@pytest.mark.slow
def test_memory(bench):
    """At this size a peer's feature maps outweigh, tens of times, what an allocator's mood adds or spares."""
    record = bench("memory", "--views=1,3", "--network=resnet20", "--batch=64")
    peak = rows_of(record, "Peak memory")["cutnmix"]
    assert 0 < 1.5 * peak["1"] < peak["3"]


def test_methods(bench):
    record = bench("methods", "--network=tiny", "--batch=8", "--rounds=1", "--seconds=0")
    for sheet in sheets_of(record):
        assert [name.partition(",")[0] for name in sheet.rows] == list(METHODS)


def test_all_leaves_every_record(monkeypatch, tmp_path):
    cells = Sheet("t", "ms", "J", {"cutnmix": {"1": Spread(1.0, 1.0, 1.0, 1)}})
    for module in (loaders, mixes, steps, peers, methods, memory):
        monkeypatch.setattr(module, "measure", lambda *_, **__: [cells])
    commands.app(["all", "--rounds=1", f"--out={tmp_path}", f"--json={tmp_path / 'list.json'}"], standalone_mode=False)
    found = read_records(tmp_path)
    assert found.keys() == {"loader", "loader-jpeg", "mix", "step", "peers", "methods", "memory"}
    assert {record["benchmark"]: record for record in json.loads((tmp_path / "list.json").read_text())} == found
    assert all((tmp_path / f"{name}.png").exists() for name in found)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(mixes, "measure", None)
    (tmp_path / "file").touch()
    with pytest.raises(typer.BadParameter, match="file/results cannot be written: Not a directory"):
        commands.app(["mix", f"--out={tmp_path}/file/results"], standalone_mode=False)
    with pytest.raises(typer.BadParameter, match="file cannot be written: File exists"):
        commands.app(["mix", f"--out={tmp_path}", f"--json={tmp_path}/file/x.json"], standalone_mode=False)


@pytest.mark.parametrize("option", ["--views=0", "--views=x", "--batches=0", "--device=tpu"])
def test_an_option_that_has_no_meaning_is_named(option, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "measure", None)
    with pytest.raises(typer.BadParameter) as refused:
        commands.app(["loader", option, f"--out={tmp_path}"], standalone_mode=False)
    assert refused.value.param_hint == option.partition("=")[0]


def test_the_records_of_a_checkout_are_not_written_over_unless_one_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands.app(["mix", "--views=1", "--batch=4", "--rounds=1", "--seconds=0"], standalone_mode=False)
    assert sorted(path.name for path in (tmp_path / "runs" / "bench").iterdir()) == ["mix.json", "mix.png"]


def test_the_command_line_passes_on(monkeypatch, tmp_path, capsys):
    options = ["mix", "--views", "1", "--batch=4", "--rounds=1", "--seconds=0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cutnmix", "bench", *options])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert (tmp_path / "mix.json").exists()
    assert "kornia RandomCutMixV2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["mix", "--views=1,a"],
        ["mix", "--device=tpu"],
        ["step", "--rounds=0"],
        ["mix", "--views=0"],
        ["memory", "--views="],
        ["peers", "--views=,"],
        ["all", "--views="],
        ["mix", "--seconds=-1"],
    ],
)
def test_what_makes_no_sense_is_refused(options, tmp_path):
    with pytest.raises(SystemExit) as left:
        commands.app([*options, f"--out={tmp_path}"])
    assert left.value.code == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["loader", "--batch=2000"],
            "a batch of 2000 is too large: it must be less than the 1,442 images of digits/train",
        ),
        (
            ["loader", "--batches=32,2048"],
            "a batch of 2048 is too large: it must be less than the 1,442 images of digits/train",
        ),
        (
            ["loader", "--jpeg", "--images=20"],
            "a batch of 128 is too large: it must be less than the 16 images of folder/train",
        ),
        (["loader", "--batches=33"], "a batch of 33 is odd: timm's Mixup takes even ones only"),
        (["mix", "--batch=3"], "a batch of 3 is odd: timm's Mixup takes even ones only"),
    ],
    ids=str,
)
def test_batches_that_a_contender_cannot_make_are_refused(options, said, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "installed", lambda library: True)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        commands.app([*options, f"--out={tmp_path}"], standalone_mode=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_process_of_its_own_refuses_is_told_without_a_traceback(capfd):
    with pytest.raises(RunError, match="measuring memory ended with code 2; the reason stands above"):
        memory.measure(network="tiny", views=[1], batch=8, device=CPU, compiled=False)
    assert "error: peers.network: no 'tiny'" in capfd.readouterr().err


def test_a_benchmark_of_no_batch_sizes_is_one_of_numbers_of_views_alone(monkeypatch, tmp_path):
    given: dict = {}
    monkeypatch.setattr(loaders, "measure", lambda *_, **keys: given.update(keys) or [Sheet("t", "ms", "J", {})])
    commands.app(["loader", "--batches=", "--views=1", f"--out={tmp_path}"], standalone_mode=False)
    assert (given["views"], given["batches"]) == ([1], [])


# All contenders do the same work


@pytest.mark.parametrize("name", sorted(loaders.ARRAYS.keys() - {"copy limit"}))
def test_array_loaders_hand_over_the_same_kind_of_views(name):
    data = load_splits("digits").train
    with loaders.ARRAYS[name].open(loaders.Case(data, Distort(), 2, 8, CPU, workers=1)) as batches:
        check_views(next(batches), data, (32, 32))


@pytest.mark.parametrize("name", loaders.JPEGS)
def test_jpeg_loaders_hand_over_the_same_kind_of_views(name, tmp_path):
    data = loaders.write_jpegs(tmp_path, 16).train
    assert len(data) == 12 and len(data.classes) == 4
    with loaders.JPEGS[name].open(loaders.Case(data, Distort(image_size=64), 2, 8, CPU, workers=1)) as batches:
        check_views(next(batches), data, (64, 64))


def check_views(out, data, size: tuple[int, int]) -> None:
    """Two views of eight images, each distorted on its own, normalised float32."""
    views = list(out.image_VBCHW) if hasattr(out, "image_VBCHW") else [image_BCHW for image_BCHW, *_ in out]
    assert [tuple(view.shape) for view in views] == [(8, 3, *size)] * 2
    assert all(view.dtype == torch.float32 for view in views)
    assert not torch.equal(*views)
    for c, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        levels = torch.cat([view[:, c].flatten() for view in views]) * std + mean
        assert -0.01 < levels.min() < 0.3 and 0.7 < levels.max() < 1.01


def test_the_plain_ways_loss_is_dml():
    logits = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    label_B = torch.randint(5, (6,))
    theirs = [steps.mutual_loss(logits, j, label_B) for j in range(3)]
    logits_JBK = torch.stack(logits)
    ours = cross_entropy(logits_JBK, torch.eye(5)[label_B][None]) + mutual_kl(logits_JBK, 1.0)
    torch.testing.assert_close(torch.stack(theirs), ours)
    for one, other in zip(
        torch.autograd.grad(sum(theirs), logits), torch.autograd.grad(ours.sum(), logits), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_plain_way_updates_every_net(monkeypatch):
    nets: list[nn.Module] = []
    build = steps.build_peer
    monkeypatch.setattr(steps, "build_peer", lambda *args, **keys: nets.append(build(*args, **keys)) or nets[-1])
    with steps.lineage(load_splits("digits").train, "tiny", 8, 2, CPU, workers=1) as step:
        before = [[weight.clone() for weight in net.parameters()] for net in nets]
        step()
    for net, old in zip(nets, before, strict=True):
        assert not any(torch.equal(one, other) for one, other in zip(net.parameters(), old, strict=True))


@pytest.mark.parametrize("replay", [False, True])
def test_a_replayed_batch_costs_no_loader_and_no_mix(replay, monkeypatch):
    mixed: list[int] = []
    read: list[int] = []
    forward, batches = MixBatch.forward, steps.batches
    monkeypatch.setattr(steps, "batches", lambda parts: (read.append(1) or batch for batch in batches(parts)))
    monkeypatch.setattr(MixBatch, "forward", lambda *args: mixed.append(1) or forward(*args))
    overrides = steps.keys(None, "tiny", 8, 2, CPU, "method=cutnmix", "loader=resident")
    with steps.training(overrides, replay=replay) as step:
        for _ in range(3):
            step()
    assert len(mixed) == len(read) == (1 if replay else 3)


# What is computed from the figures


def test_spread():
    assert Spread.of([3.0, 1.0, 8.0]) == (3.0, 1.0, 8.0, 3)
    assert Spread.of([3.0, 1.0]) == (2.0, 1.0, 3.0, 2)
    assert Spread.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, 1.0, 3.0, 3)  # not 4 / 3 of the medians


def test_contenders_take_turns():
    order: list[str] = []
    figures = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert in_turn(figures, rounds=2) == {"a": [1, 4], "b": [2, 3]}


def test_the_rate_leaves_out_the_warm_up(monkeypatch):
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 100 if len(calls) < 2 else 0.3
        calls.append(now)

    calls: list[float] = []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    assert per_second(call, Clock(), seconds=1.0, warmup=2) == pytest.approx(1 / 0.3)
    assert len(calls) == 2 + 4  # begun at 0, 0.3, 0.6 and 0.9 s
    assert per_second(call, Clock(), seconds=0, warmup=0) == pytest.approx(1 / 0.3)


def test_on_a_gpu_events_count_and_are_waited_for(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            log.append("read")
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    assert per_second(lambda: log.append("call"), Clock(torch.device("cuda")), seconds=0, warmup=1) == 4
    assert log == ["call", "idle", "record", "call", "record", "wait", "read"]


def test_ratios_of_a_step(monkeypatch):
    """The price is time over time, the gain images/s over images/s, round by round."""
    rates = {steps.REPLAYED: 10.0, "cutnmix, resident": 8.0, "cutnmix, dali": 5.0, steps.LINEAGE: 2.0}
    rates |= {steps.OURS: 6.0, steps.OURS_FP32: 3.0}
    order = iter([*rates.values(), *reversed(rates.values())])
    monkeypatch.setattr(steps, "training", lambda *args, **keys: nullcontext(None))
    monkeypatch.setattr(steps, "lineage", lambda *args: nullcontext(None))
    monkeypatch.setattr(steps, "per_second", lambda *args, **keys: next(order))
    data = load_splits("digits").train
    ms, rate, price, gain = (
        sheet.rows
        for sheet in steps.measure(
            root=None, data=data, network="tiny", views=[2], batch=64, rounds=2, seconds=0, device=CPU
        )
    )
    assert {name: row["2"].median for name, row in rate.items()} == {name: 64 * value for name, value in rates.items()}
    assert ms[steps.LINEAGE]["2"].median == 500
    assert {name: row["2"].median for name, row in price.items()} == {"cutnmix, resident": 1.25, "cutnmix, dali": 2}
    assert {name: row["2"].median for name, row in gain.items()} == {steps.OURS: 3, steps.OURS_FP32: 1.5}


def test_ratio_of_peers(monkeypatch):
    """Beside the mean of the plain step before and after, times J."""

    @contextmanager
    def training(overrides):
        yield "plain" if "mix=none" in overrides else "many"

    plain_ms = iter([100.0, 100.0, 300.0, 500.0])  # the first is a warm-up
    monkeypatch.setattr(peers, "training", training)
    monkeypatch.setattr(
        peers, "per_second", lambda step, *_, **__: 1000 / (next(plain_ms) if step == "plain" else 800.0)
    )
    ms, ratio = peers.measure(network="tiny", views=[2, 4], batch=8, rounds=1, seconds=0, device=CPU)
    assert ms.rows["cutnmix"]["4"].median == pytest.approx(800)
    assert ratio.rows["cutnmix"]["2"].median == pytest.approx(800 / (2 * 200))
    assert ratio.rows["cutnmix"]["4"].median == pytest.approx(800 / (4 * 400))


def test_shares_of_memory(monkeypatch):
    def apart(overrides: list[str]) -> dict[str, float]:
        (count,) = (int(key.removeprefix("peers.count=")) for key in overrides if key.startswith("peers.count="))
        compiled = "compile=peers" in overrides
        return {"peak_mib": 50.0 + 50 * count, "first_s": 9.0 + compiled, "later_s": 1.0}

    monkeypatch.setattr(memory, "_apart", apart)
    peak, share, compile_s = memory.measure(network="tiny", views=[1, 4], batch=8, device=CPU, compiled=True)
    assert peak.rows["cutnmix"] == {"1": 100, "4": 250}
    assert share.rows["cutnmix"] == {"1": 1, "4": 250 / 400}
    assert compile_s.rows["cutnmix"] == {"1": 9, "4": 9}


def test_what_a_gpu_holds_for_good_counts_and_what_a_small_run_took_does_not(monkeypatch):
    """Its peak is an absolute figure: less the peak of a small run whose memory is taken again, it would be too low."""
    held, peak, mib = [900 * 2**20], [900 * 2**20], 2**20

    @contextmanager
    def training(overrides):
        def step() -> None:
            held[0] = 1000 * mib  # of which 100 stay: what a library took at first use
            peak[0] = max(peak[0], held[0])

        yield step
        held[0] = 100 * mib

    monkeypatch.setattr(memory, "training", training)
    monkeypatch.setattr(memory, "Clock", lambda device: SimpleNamespace(start=lambda: None, stop=lambda: 1.0))
    for name, call in {
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: held[0],
        "max_memory_allocated": lambda device: peak[0],
        "reset_peak_memory_stats": lambda device: peak.__setitem__(0, held[0]),
    }.items():
        monkeypatch.setattr(torch.cuda, name, call)
    assert memory.probe(["device=cuda"])["peak_mib"] == 900


def test_an_absent_library_is_told(monkeypatch):
    monkeypatch.setattr(loaders, "installed", lambda library: library != "timm")
    monkeypatch.setattr(loaders, "_rate", lambda *_: 2.0)
    (sheet,) = loaders.measure(
        load_splits("digits").train, views=[1, 2], batch=8, batches=[], rounds=1, seconds=0, device=CPU
    )
    assert sheet.rows["tensor crops + timm Mixup"] == {"1": None, "2": None}
    assert all(None not in row.values() for name, row in sheet.rows.items() if "timm" not in name)
    assert "| tensor crops + timm Mixup | not installed | not installed |" in tables.render(
        make_record("x", [sheet], {}), "results"
    )
