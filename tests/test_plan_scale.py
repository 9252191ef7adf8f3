"""What is predicted of J peers on N devices is what the formulae, the tensors and a ring of messages say."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tasks
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutnmix.benchmarks import one_peer, plan_scale, scale
from cutnmix.benchmarks.steps import keys
from cutnmix.models import NETWORKS
from cutnmix.models.peers import Peers
from cutnmix.trainer import cli
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.device import choose
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.method import Task
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.step import Tally

CPU = torch.device("cpu")
JOB = scale.Job("cutnmix", J=4, B=8, K=10, D_f=6, parameters=1000, dataset_bytes=7)
SINGLE = scale.Single(scale.Line(0.5, 0.25), scale.Line(0.0, 100.0), 5000.0)
LINKS = {"peer": scale.Link(1000.0, 0.5), "data": scale.Link(100.0, 0.25)}
MESHES = [scale.Mesh(1, 1), scale.Mesh(1, 2), scale.Mesh(2, 1), scale.Mesh(2, 2), scale.Mesh(4, 2)]
FOUR, _ = scale.meshes(4, JOB.J, JOB.B)
METHOD = pytest.mark.parametrize("method", scale.METHODS)
POSITIVE = st.floats(1e-6, 1e6)
LINK = st.builds(scale.Link, POSITIVE, st.floats(0, 10))


def volume(job: scale.Job, mesh: scale.Mesh, axis: str) -> int:
    return sum(each.bytes for each in scale.exchanges(job, mesh) if each.axis == axis)


# Formulae


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_a_ring_of_messages_takes_what_the_formula_says(n):
    """Each device sends a part to the next, n - 1 times to be added and n - 1 times to be kept; all send at once."""
    link, size = scale.Link(1000.0, 0.25), 8 * 5 * n
    parts = torch.randn(n, n, 5, dtype=torch.float64)  # of device i, its part p
    want, seconds = parts.sum(0), 0.0
    for turn in range(2 * (n - 1)):
        sent = [(i, (i - turn) % n) for i in range(n)]
        messages = [parts[i, p].clone() for i, p in sent]
        for (i, p), message in zip(sent, messages, strict=True):
            to = (i + 1) % n
            parts[to, p] = parts[to, p] + message if turn < n - 1 else message
        seconds += link.latency_s + messages[0].nbytes / link.bytes_per_s
    torch.testing.assert_close(parts, want.expand(n, -1, -1))
    assert scale.all_reduce_s(size, n, link) == pytest.approx(seconds)
    bus_bandwidth = (
        2 * (n - 1) / n * size / scale.all_reduce_s(size, n, scale.Link(1000.0, 0.0))
    )  # as nccl-tests has it
    assert bus_bandwidth == pytest.approx(1000)


def test_one_mesh_by_hand():
    """4 peers on 2 x 2: 2 peers and 4 images a device."""
    sizes = [(each.axis, each.bytes) for each in scale.exchanges(JOB, scale.Mesh(2, 2))]
    trained = 2 * 1000 + (2 * 6 * 10 + 10)
    assert sizes == [
        ("peer", 4 * 4 * 11), ("peer", 8 * 7), ("peer", 4 * 4 * 10), ("data", 4 * 13), ("data", 4 * trained), ("all", 8)
    ]  # fmt: skip
    peer_s = 3 * 2 * 0.5 + (176 + 56 + 160) / 1000
    data_s = 2 * 2 * 0.25 + (52 + 4 * trained) / 100
    all_s = 6 * 0.5 + 6 / 4 * 8 / 1000  # the link of the peer axis is the slower one for so few bytes
    found = scale.predict(JOB, scale.Mesh(2, 2), SINGLE, LINKS)
    assert found.exchange_s == pytest.approx(peer_s + data_s + all_s)
    assert found.compute_s == 2 * (0.5 + 4 * 0.25)
    assert found.step_s == found.compute_s + found.exchange_s
    assert found.least_s == found.exchange_s > found.compute_s
    assert found.memory_bytes == 5000 + 12 * trained + 8 * trained + 7  # 2 * 400 bytes of activations are fewer
    assert (found.peers, found.images, found.peer_bytes, found.data_bytes) == (2, 4, 392, 52 + 4 * trained)
    half = scale.predict(JOB, scale.Mesh(1, 4), SINGLE._replace(autocast=True), LINKS)
    assert half.memory_bytes == 5000 + 14 * (1000 + 60 + 10) + 800 + 7  # gradients stay here; activations of 8 images


def test_one_device_exchanges_nothing():
    found = scale.predict(JOB, scale.Mesh(1, 1), SINGLE, {})
    assert (found.exchange_s, found.peer_bytes, found.data_bytes) == (0, 0, 0)
    assert found.step_s == found.least_s == 4 * (0.5 + 8 * 0.25)


@pytest.mark.parametrize(("axis", "mesh"), [("data", scale.Mesh(2, 1)), ("peer", scale.Mesh(1, 2))])
def test_on_one_axis_all_meet_over_its_own_link(axis, mesh):
    alone = scale.predict(JOB, mesh, SINGLE, {axis: LINKS[axis]})
    assert alone == scale.predict(JOB, mesh, SINGLE, LINKS)


@METHOD
def test_what_the_peer_axis_exchanges_does_not_depend_on_J(method):
    for mesh in MESHES:
        seen = {volume(JOB._replace(method=method, J=J), mesh, "peer") for J in (2, 4, 8, 64)}
        assert len(seen) == 1
        assert (seen == {0}) == (mesh.peer == 1 or method == "baseline")


@given(LINK, LINK, st.sampled_from(MESHES), st.floats(1, 100), st.sampled_from(scale.METHODS))
def test_a_better_link_is_never_slower(peer, data, mesh, factor, method):
    job, links = JOB._replace(method=method), {"peer": peer, "data": data}
    slow = scale.predict(job, mesh, SINGLE, links)
    for axis in links:
        for better in (
            links[axis]._replace(bytes_per_s=links[axis].bytes_per_s * factor),
            links[axis]._replace(latency_s=links[axis].latency_s / factor),
        ):
            fast = scale.predict(job, mesh, SINGLE, links | {axis: better})
            assert fast.exchange_s <= slow.exchange_s
            assert fast.compute_s == slow.compute_s
    assert slow.least_s <= slow.step_s <= 2 * slow.least_s * (1 + 1e-12)


@METHOD
def test_more_to_train_never_costs_less(method):
    job = JOB._replace(method=method)
    for mesh in MESHES:
        less = scale.predict(job, mesh, SINGLE, LINKS)
        for more in (job._replace(J=8), job._replace(B=16), job._replace(K=20), job._replace(parameters=2000)):
            found = scale.predict(more, mesh, SINGLE, LINKS)
            assert found.memory_bytes >= less.memory_bytes and found.step_s >= less.step_s


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 12])
@pytest.mark.parametrize("J", [1, 4, 6])
def test_the_meshes_are_all_that_can_be_cut(devices, J):
    good, refused = scale.meshes(devices, J, 24)
    pairs = [(d, p) for d in range(1, devices + 1) for p in range(1, devices + 1) if d * p == devices]
    assert good == [(d, p) for d, p in pairs if J % p == 0 and 24 % d == 0]
    assert sorted(refused) == [pair for pair in pairs if pair not in good]


def test_the_best_mesh_is_the_fastest_that_fits():
    predictions = scale.plan(JOB, FOUR, SINGLE, LINKS)
    assert {each.mesh for each in predictions} == {(1, 4), (2, 2), (4, 1)}
    assert [each.step_s for each in predictions] == sorted(each.step_s for each in predictions)
    most = max(each.memory_bytes for each in predictions)
    exactly = scale.plan(JOB, FOUR, SINGLE, LINKS, memory_limit=most)
    assert all(each.fits for each in exactly)


def test_what_does_not_fit_comes_last_however_fast():
    links = {"peer": scale.Link(1.0, 1.0), "data": scale.Link(1e9, 0.0)}  # so the data axis is fast, and takes memory
    free = scale.plan(JOB, FOUR, SINGLE, links)
    assert free[0].memory_bytes == max(each.memory_bytes for each in free)
    limited = scale.plan(JOB, FOUR, SINGLE, links, memory_limit=free[0].memory_bytes - 1)
    assert [each.mesh for each in limited] == [each.mesh for each in (*free[1:], free[0])]
    assert [each.fits for each in limited] == [True, True, False]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 100), st.floats(1, 100))
def test_a_line_meets_its_points_or_stays_above_zero(y_1, y_2, x, more):
    line = scale.Line.through((x, y_1), (x + more, y_2))
    assert line.fixed >= 0 and line.slope >= 0
    assert line.at(x + more) == pytest.approx(y_2, abs=1e-6)
    if y_1 <= y_2 and y_2 * x <= y_1 * (x + more) * (1 - 1e-9):
        assert line.at(x) == pytest.approx(y_1, abs=1e-6)


# Against what is really there


@pytest.mark.parametrize("J", [2, 4])
def test_bytes_of_gradients_are_those_of_the_modules(J):
    peers = Peers(["resnet20"] * J, num_classes=10, seed=0)
    task = Task(J, 10, peers.feature_dims, peers.trunk_dim, num_images=8, epochs=1, peers=peers)
    method = METHODS["cutnmix"](task)
    (D_f,) = set(peers.feature_dims)
    single = sum(p.numel() for p in peers.nets[0].parameters())
    job = scale.Job("cutnmix", J, 8, 10, D_f, single)
    (gradients,) = (each for each in scale.exchanges(job, scale.Mesh(2, 1)) if each.what == "gradients")
    assert gradients.bytes == sum(p.nbytes for module in (peers, method) for p in module.parameters())


def test_bytes_of_memory_are_those_of_the_optimizer():
    parts = build(load_config("quickstart", keys(None, "resnet20", 8, 2, CPU, "loader=resident", "precision=fp32")))
    plan, optimizer = parts.plan(0), parts.learner.optimizer
    views = next(iter(parts.loader.epoch(plan)))
    parts.step.train(parts.learner, views, plan.step(0), Tally([]), lr=0.1, share=1.0, update=False)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = sum(p.grad.nbytes for p in weights)
    parts.step.train(parts.learner, views, plan.step(0), Tally([]), lr=0.1, share=1.0, update=True)
    momentum = sum(optimizer.state[p]["momentum_buffer"].nbytes for p in weights)
    parts.close()
    trained = sum(p.numel() for p in weights)
    assert sum(p.nbytes for p in weights) + gradients + momentum == scale.kept_bytes(False) * trained
    (D_f,) = set(parts.learner.peers.feature_dims)
    own = sum(p.numel() for p in parts.learner.peers.nets[0].parameters())
    job = scale.Job("cutnmix", 2, 8, 10, D_f, own)
    assert 2 * own + scale.method_parameters(job, scale.Mesh(1, 1)) == trained


@METHOD
@pytest.mark.parametrize(("data", "peer"), [(1, 2), (2, 1), (2, 2)])
def test_the_sums_of_a_step_are_those_that_are_counted(method, data, peer, monkeypatch):
    """Every all-reduce that losses, method and gradients ask for, by its axis and size, in a process of the mesh."""
    exchange = pytest.importorskip("cutnmix.trainer.exchange")
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(exchange, "_sum", lambda flat, group: seen.append((group, flat.nbytes)) or flat.clone())
    axes = {"peer": "peer" if peer > 1 else None, "data": "data" if data > 1 else None}
    over = exchange.Exchange(**axes, peer_index=0, peer_count=peer, data_count=data)
    J, B = 4, tasks.B
    name, _, variant = method.partition("-")
    task = Task(J, tasks.K, (tasks.D,) * J, tasks.E, num_images=8, epochs=1, peers=None, over=over)
    module = METHODS[name](task, **({"variant": variant} if variant else {}))
    outputs = tasks.make_outputs(J // peer, torch.float32)
    losses = module(outputs, tasks.make_batch(), None)
    sum(losses.values()).backward()
    own = tasks.make_peers(J // peer)
    over.average_([torch.zeros_like(p) for m in (own, module) for p in m.parameters()])
    W = sum(p.numel() for p in own.nets[0].parameters())
    job = scale.Job(method, J, B * data, tasks.K, tasks.D, W)
    counted = [(each.axis, each.bytes) for each in scale.exchanges(job, scale.Mesh(data, peer)) if each.axis != "all"]
    assert sorted(seen) == sorted(counted)


# What was measured


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", tasks.tiny)


def measured(network: str = "tiny", **changes) -> one_peer.Measured:
    points = (
        {"images": 2, "step_ms": (20.0, 19.0, 21.0, 3), "peak_mib": 300.0},
        {"images": 10, "step_ms": (60.0, 59.0, 61.0, 3), "peak_mib": 380.0},
    )
    words = dict.fromkeys(("date", "commit", "device", "hardware", "threads", "versions"), "here")
    here = {"classes": 4, "image_size": (32, 32), "parameters": 2**20, "precision": "float32", "compile": "none"}
    return one_peer.Measured.model_validate({"network": network, **here, "points": points, **words, **changes})


def test_the_lines_go_through_what_was_measured():
    single = measured().single()
    assert single.step_s.at(2) == pytest.approx(0.02) and single.step_s.at(10) == pytest.approx(0.06)
    for images, mib in ((2, 300), (10, 380)):
        job = scale.Job("baseline", 1, images, 4, 6, 2**20)
        assert scale.memory_bytes(job, scale.Mesh(1, 1), single) == pytest.approx(mib * 2**20)


def test_the_peak_of_a_half_precision_peer_holds_its_copy():
    full, half = (measured(precision=name).single() for name in ("float32", "bfloat16"))
    assert full.fixed_bytes - half.fixed_bytes == 2 * 2**20 and half.autocast and not full.autocast


def test_a_peer_is_measured_at_both_sizes(tiny):
    threads = torch.get_num_threads()
    seen = one_peer.probe(
        network="tiny", classes=4, size=(8, 8), batches=(6, 3), device="cpu", threads=threads, rounds=2, seconds=0.0
    )
    assert [point.images for point in seen.points] == [3, 6]
    assert all(0 < low <= median <= high and n == 2 for median, low, high, n in (p.step_ms for p in seen.points))
    assert all(point.peak_mib > 0 for point in seen.points)
    assert seen.parameters == sum(p.numel() for p in tasks.tiny(4).parameters())
    assert one_peer.Measured.model_validate_json(seen.model_dump_json()) == seen


def test_time_and_memory_go_to_their_batch_size(tiny, monkeypatch):
    """A peak never falls, so the smaller batch must come first, and the first step is not the whole of it."""
    log: list[int] = []
    steps = {images: lambda images=images: log.append(images) for images in (3, 6)}
    monkeypatch.setattr(one_peer, "make_steps", lambda *_: (steps, tasks.tiny(4)))
    monkeypatch.setattr(one_peer, "peak_mib", lambda device: 100.0 + sum(log))
    monkeypatch.setattr(one_peer, "per_second", lambda step, *_, **__: step() or 10.0 * log[-1])
    threads = torch.get_num_threads()
    seen = one_peer.probe(
        network="tiny", classes=4, size=(8, 8), batches=(6, 3), device="cpu", threads=threads, rounds=2, seconds=0.0
    )
    assert [point.peak_mib for point in seen.points] == [100 + 3 + 3, 100 + 3 + 3 + 6 + 6]
    assert [point.step_ms for point in seen.points] == [(100 / 3, 100 / 3, 100 / 3, 2), (100 / 6, 100 / 6, 100 / 6, 2)]


def test_a_measured_step_trains_on_its_whole_batch(tiny, monkeypatch):
    setting = choose(load_config("quickstart", ["device=cpu", "precision=fp32"]))
    steps, peers = one_peer.make_steps("tiny", 4, (8, 8), (6, 3), setting)
    shapes = []
    peers.nets[0].register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    for images in (3, 6):
        before = [p.detach().clone() for p in peers.parameters()]
        steps[images]()
        assert not any(torch.equal(one, other) for one, other in zip(before, peers.parameters(), strict=True))
    assert shapes == [(3, 3, 8, 8), (6, 3, 8, 8)]


@pytest.mark.slow
def test_measured_here_in_a_process_of_its_own(tmp_path, capsys):
    options = ["--network=resnet20", "--batch=8", "--peers=2", "--link-gbps=10", "--latency-us=5", "--device=cpu"]
    quick = ["--rounds=1", "--seconds=0", "--threads=1", f"--save={tmp_path / 'one.json'}"]
    plan_scale.app([*options, *quick], standalone_mode=False)
    first = capsys.readouterr().out
    seen = one_peer.Measured.model_validate_json((tmp_path / "one.json").read_bytes())
    assert (seen.network, seen.device, [point.images for point in seen.points]) == ("resnet20", "cpu", [4, 8])
    plan_scale.app([*options, f"--measured={tmp_path / 'one.json'}"], standalone_mode=False)
    assert capsys.readouterr().out in first  # the same plan, without the line that tells of measuring


# The command


@pytest.fixture
def saved(tiny, tmp_path) -> Path:
    path = tmp_path / "measured.json"
    path.write_text(measured().model_dump_json())
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cutnmix", "plan-scale", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return call


ASKED = ("--network=tiny", "--classes=4", "--batch=8", "--devices=4", "--peers=4")
SPEEDS = ("--link-gbps=8,0.8", "--latency-us=5")


def test_the_plan_is_that_of_the_formulae(command, saved, tmp_path):
    code, out, err = command(*ASKED, *SPEEDS, f"--measured={saved}", f"--json={tmp_path / 'plan.json'}")
    assert (code, err) == (0, "")
    left = json.loads((tmp_path / "plan.json").read_text())
    want = predicted(J=4)
    assert left["job"]["J"] == 4 and [scale.Mesh(**row["mesh"]) for row in left["meshes"]] == [e.mesh for e in want]
    assert {axis: scale.Link(**link) for axis, link in left["links"].items()} == {
        "peer": scale.Link(1e9, 5e-6), "data": scale.Link(1e8, 5e-6)
    }  # fmt: skip
    assert one_peer.Measured.model_validate(left["measured"]) == measured()
    same = ("step_s", "least_s", "memory_bytes", "peer_bytes", "data_bytes", "fits")
    for row, each in zip(left["meshes"], want, strict=True):
        assert [row[key] for key in same] == [getattr(each, key) for key in same]
        assert sum(found["bytes"] for found in row["all_reduces"]) == each.peer_bytes + each.data_bytes + 8
    rows = rows_of(out)
    assert list(rows) == [f"{each.mesh.data} x {each.mesh.peer}" for each in want]
    assert ["best" in row for row in rows.values()] == [True, False, False]


def test_what_does_not_fit_or_cannot_be_cut_is_told(command, saved):
    predictions = predicted(J=2)
    low, high = sorted(each.memory_bytes for each in predictions)
    options = (*ASKED[:-1], "--peers=2", *SPEEDS, f"--measured={saved}")
    code, out, _ = command(*options, f"--memory-gb={(low + high) / 2e9:.12f}")
    rows, fits = (
        rows_of(out),
        {f"{each.mesh.data} x {each.mesh.peer}": each.memory_bytes == low for each in predictions},
    )
    assert code == 0 and list(rows) == [*sorted(fits, key=lambda mesh: not fits[mesh]), "1 x 4"]
    assert "2 peers cannot be cut into 4 parts" in rows["1 x 4"]
    for mesh, fit in fits.items():
        assert ("best" in rows[mesh], "more than" in rows[mesh]) == (fit, not fit)
    code, out, err = command(*options, "--memory-gb=0.001")
    assert code == 2 and "best" not in out and "--memory-gb: no mesh fits" in err


def predicted(J: int) -> list[scale.Prediction]:
    """By the formulae, what the command of ASKED and SPEEDS plans for J peers."""
    links = {"peer": scale.Link(1e9, 5e-6), "data": scale.Link(1e8, 5e-6)}
    W = sum(p.numel() for p in tasks.tiny(4).parameters())
    good, _ = scale.meshes(4, J, 8)
    return scale.plan(scale.Job("cutnmix", J, 8, 4, tasks.D, W), good, measured().single(), links)


def rows_of(out: str) -> dict[str, str]:
    """Mesh -> its line of the table."""
    lines = (line.split("\u2502") for line in out.splitlines() if " x " in line)
    return {cells[1].strip(): " ".join(cells) for cells in lines if len(cells) > 2}


def test_half_precision_is_not_split_over_peers(command, saved):
    """As the trainer refuses it."""
    saved.write_text(measured(precision="float16").model_dump_json())
    code, out, _ = command(*ASKED, *SPEEDS, f"--measured={saved}")
    rows = rows_of(out)
    assert code == 0 and list(rows) == ["4 x 1", "1 x 4", "2 x 2"]
    assert ["fp16 skips" in row for row in rows.values()] == [False, True, True]
    code, _, err = command(*ASKED, "--batch=6", *SPEEDS, f"--measured={saved}")
    assert code == 2 and "no mesh of 4" in err and "a batch of 6" in err


def test_a_batch_size_that_was_not_measured_is_told(command, saved):
    for batch, said in (("8", False), ("40", True)):
        _, out, _ = command(*ASKED, f"--batch={batch}", *SPEEDS, f"--measured={saved}")
        assert ("on the line through what was: 20, 40 images" in out) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method=pcl"], "--method: 'pcl' is not planned for; choose one of baseline, dml"),
        (["--peers=1"], "--peers: cutnmix needs at least 2, got 1"),
        (["--devices=3"], "--devices: no mesh of 3: 1 x 3: 4 peers cannot be cut into 3 parts; 3 x 1: a batch of 8"),
        (["--link-gbps="], "--link-gbps: needed for more devices than one (--devices 4)"),
        (["--link-gbps=", "--latency-us="], "--link-gbps and --latency-us: needed for more devices"),
        (["--link-gbps=0"], "--link-gbps: must be a number > 0, or two of them"),
        (["--link-gbps=1,2,3"], "got '1,2,3'"),
        (["--latency-us=-1"], "--latency-us: must be a number >= 0"),
        (["--network=resnet33"], "resnet33"),
        (["--check"], "--check: leave out --classes, --link-gbps, --latency-us, --measured: it measures here"),
        (["--save=new.json"], "--save: nothing is measured"),
        (["--classes=5"], "classes 4, not 5: give --classes"),
        (["--image-size=16"], "image_size (32, 32), not (16, 16): give --image-size"),
        (["--measured=absent.json"], "--measured: absent.json cannot be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line(command, saved, options, said):
    code, out, err = command(*ASKED, *SPEEDS, f"--measured={saved}", *options)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("option", ["--save", "--json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(option, command, monkeypatch):
    monkeypatch.setattr(one_peer, "measure", lambda **_: pytest.fail("measured"))
    code, _, err = command("--devices=1", f"{option}=/proc/none/x.json")
    assert (code, err) == (2, "error: /proc/none cannot be written: No such file or directory\n")


def test_a_check_on_more_images_than_there_are_is_refused(command):
    code, _, err = command("--check", "--network=resnet20", "--peers=2", "--devices=2", "--batch=2000")
    assert (code, err) == (2, "error: --batch: 2000 is more than the 1,442 handwritten digits that it trains on\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree | {"speed": 3}, "speed: Extra inputs"),
        (lambda tree: {key: value for key, value in tree.items() if key != "points"}, "points: Field required"),
        (lambda tree: tree | {"points": tree["points"][::-1]}, "points: the smaller batch comes first"),
        (lambda tree: [], "object"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(change, said, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(change(measured().model_dump(mode="json"))))
    with pytest.raises(ConfigError, match="no measurement") as refused:
        one_peer.read(path)
    assert said in str(refused.value)


# The check against real processes


@pytest.mark.parametrize("n", [2, 4])
def test_the_link_is_found_from_two_sums(n):
    check, link = scale_check(), scale.Link(3e8, 2e-4)
    basis = {f"sum {size}": scale.all_reduce_s(4 * size, n, link) for size in (check.SMALL, check.LARGE)}
    assert check.link_of(basis, n) == pytest.approx(link)
    assert check.link_of({f"sum {check.SMALL}": 2.0, f"sum {check.LARGE}": 1.0}, n).bytes_per_s == math.inf


def test_every_mesh_is_checked():
    found = scale_check().cases(2, 8, 32)
    assert [(*case.mesh, case.J) for case in found] == [
        (1, 1, 1), (2, 1, 1), *((*mesh, J) for J in (2, 4, 8) for mesh in ((1, 1), (1, 2), (2, 1)))
    ]  # fmt: skip


def test_a_prediction_starts_from_the_figures_around_it():
    """The basis takes twice as long from turn to turn, a step does not; so a case's basis is 1.5 of the one before."""
    check, link = scale_check(), scale.Link(1e6, 0.1)
    figures = {"one 8": 2.0, "all 4": 3.0, "all 8": 4.0}
    figures |= {f"sum {size}": scale.all_reduce_s(4 * size, 2, link) for size in (check.SMALL, check.LARGE)}
    calls = dict.fromkeys(figures, -1)

    def figure(key: str) -> float:
        calls[key] += 1
        return figures[key] * 2 ** calls[key]

    cases = [check.Case(scale.Mesh(1, 1), 2), check.Case(scale.Mesh(1, 2), 2), check.Case(scale.Mesh(2, 1), 1)]
    seen = check._turns(
        {case: lambda: 10.0 for case in cases}, {key: lambda key=key: figure(key) for key in figures}, 2
    )
    record = check._record(
        {"network": "resnet20", "batch": 8, "method": "cutnmix", "devices": 2},
        seen,
        {case: check.Sent() for case in cases},
    )
    ratio = record["sheets"][2]["rows"]
    alone, parts = 2 * 2.0, 4.0 + 4 * 0.2 + (4 * 8 * 11 + 8 * 65 + 4 * 8 * 10 + 8) / 1e6
    images = 3.0 + 2 * 0.2 + (4 * scale_parameters("resnet20") + 8) / 1e6
    for row, J, want, (first, second) in (("1 x 1", "2", alone, (1, 32)), ("1 x 2", "2", parts, (2, 16)),
                                          ("2 x 1", "1", images, (4, 8))):  # fmt: skip
        assert ratio[row][J][1:3] == [pytest.approx(1.5 * turn * want / 10, rel=1e-4) for turn in (first, second)]


def scale_parameters(network: str) -> int:
    return sum(p.numel() for p in Peers([network], num_classes=10, seed=0).parameters())


@pytest.mark.slow
def test_the_check_trains_on_real_processes(tmp_path, capsys):
    scale_check()
    options = ["--check", "--peers=2", "--network=resnet20", "--batch=4", "--rounds=1", "--threads=1"]
    plan_scale.app([*options, f"--json={tmp_path / 'check.json'}"], standalone_mode=False)
    record = json.loads((tmp_path / "check.json").read_text())
    rows = record["sheets"][2]["rows"]
    assert {row: list(cells) for row, cells in rows.items()} == {
        "1 x 1": ["1", "2"], "2 x 1": ["1", "2"], "1 x 2": ["2"]
    }  # fmt: skip
    assert all(0 < cell[0] < math.inf for cells in rows.values() for cell in cells.values())
    count, taken = (sheet["rows"] for sheet in record["sheets"][3:5])
    for row, J in (("2 x 1", 1), ("2 x 1", 2), ("1 x 2", 2)):
        job = scale.Job("cutnmix" if J > 1 else "baseline", J, 4, 10, 64, scale_parameters("resnet20"))
        sizes = [
            each.bytes for each in scale.exchanges(job, scale.Mesh(int(row[0]), int(row[-1]))) if each.axis != "all"
        ]
        assert (count[row][str(J)], taken[row][str(J)]) == (len(sizes), sum(sizes))
    assert "Predicted / measured" in capsys.readouterr().out


def scale_check() -> SimpleNamespace:
    """The module, where the trainer has a mesh."""
    pytest.importorskip("cutnmix.trainer.mesh")
    from cutnmix.benchmarks import scale_check

    return scale_check
