"""Several processes train what one would: the same draws, losses, weights and scores, and the same run after a loss."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mesh_worker
import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mesh_worker import MODES, SAVED, STEPS, Normed, config_of, restored
from processes import SMALL_NETWORK, Started, fork, wait_until
from safetensors.torch import load_file
from tasks import make_task
from test_resume import assert_same, comparable_records, log_path, steps_on_record
from torch import Tensor

from cutnmix.models import NETWORKS
from cutnmix.pipeline import Distort, Mix, MixBatch, ResidentLoader, load_splits
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.plan import Plan, part_of
from cutnmix.trainer import checkpoint, exchange
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.exchange import ALONE, Exchange
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.losses import cross_entropy, mmd, mutual_kl
from cutnmix.trainer.mesh import Mesh
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.metrics import is_peer

# On a free port, whatever else runs here, and whether the machine's own name resolves or not.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
MESHES = [(1, 2), (2, 1), (2, 2)]
ROOT = Path(__file__).resolve().parent.parent
SECOND = pytest.mark.parametrize("second", [None, "image"])
N, B, J, K, D = 47, 12, 4, 5, 3  # three full batches, and one of 11 images


def plan(groups: int | None = 6, mix: str = "cutnmix", **changes) -> Plan:
    return make_plan(
        **dict(
            seed=3, epoch=1, num_images=N, size=(32, 32), batch_size=B, distort=Distort(cutout=4, rotation=5.0),
            mix=Mix(name=mix, groups=groups), num_views=J, num_peers=J,
        ) | changes
    )  # fmt: skip


# Plans


@SECOND
@pytest.mark.parametrize("mix", ["none", "cutmix", "cutnmix", "mixup"])
@pytest.mark.parametrize(("data", "peer"), [(1, 4), (2, 2), (3, 1)])
def test_batches_of_all_shards_are_the_batches_of_one(mix, second, data, peer):
    """Pixels and targets, image by image and view by view."""
    train, _ = load_splits("digits", images_per_class=5)
    whole = plan(mix=mix, second=second)
    shards = [[whole.shard(d, data, part_of(J, p, peer)) for p in range(peer)] for d in range(data)]
    loader = ResidentLoader(train, Distort(cutout=4, rotation=5.0))
    mixer = MixBatch(mean=train.mean, std=train.std, size=(32, 32), num_classes=10)

    def batches(plan: Plan) -> list:
        return [mixer(views, plan.step(s)) for s, views in enumerate(loader.epoch(plan))]

    made = [[batches(shard) for shard in row] for row in shards]
    for s, batch in enumerate(batches(whole)):
        parts = [[made[d][p][s] for p in range(peer)] for d in range(data)]
        for field in ("image_VBCHW", "second_VBCHW"):
            if getattr(batch, field) is not None:
                rows = [torch.cat([getattr(part, field) for part in row]) for row in parts]
                assert torch.equal(torch.cat(rows, 1), getattr(batch, field))
        assert all(
            torch.equal(torch.cat([row[p].target_LBK for row in parts], 1), batch.target_LBK) for p in range(peer)
        )
        assert torch.equal(torch.cat([row[0].index_B for row in parts]), batch.index_B)
        assert sum(shards[d][0].weight(s) for d in range(data)) == pytest.approx(data)
        assert all(
            shards[d][p].weight(s) == data * len(parts[d][p].index_B) / len(batch.index_B)
            for d in range(data) for p in range(peer)
        )  # fmt: skip


def test_every_image_is_seen_once_by_each_peer():
    for p in range(2):
        shards = [plan().shard(d, 3, part_of(J, p, 2)) for d in range(3)]
        assert sorted(torch.cat([shard.index_N for shard in shards]).tolist()) == list(range(N))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("size", [12, 13, 47])
def test_parts_are_contiguous_whole_and_of_like_size(size, count):
    parts = [part_of(size, i, count) for i in range(count)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_partners_are_a_permutation_of_each_group(groups):
    made = plan(groups)
    for s in range(len(made)):
        partner_B = made.step(s).partner_B.tolist()
        for group in (part_of(len(partner_B), g, groups) for g in range(groups)):
            assert sorted(partner_B[i] for i in group) == list(group)


def test_one_group_is_none_and_groups_change_partners_alone():
    one, none, two = (vars(plan(groups)) for groups in (1, None, 2))
    for name in one:
        if isinstance(one[name], Tensor):
            assert torch.equal(one[name], none[name])
            assert torch.equal(one[name], two[name]) == (name != "partner_N")


def test_partners_in_a_group_are_uniform():
    """Of 2000 draws: each of the three images of a group gets each of the three as often."""
    made = plan(4, num_images=B * 2000, num_views=1, distort=Distort())
    first = made.partner_N.view(-1, B)[:, 0]
    assert np.abs(torch.bincount(first).numpy() / 2000 - 1 / 3).max() < 0.05


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="groups must be a multiple of 2"):
        plan(groups=1).shard(0, 2)
    with pytest.raises(ValueError, match="a batch of 2 images cannot be cut into 3 parts"):
        plan(num_images=B + 2, groups=3).shard(0, 3)


# Exchange, without processes


class Together:
    """Runs a function for each process in turn, time after time: the sums are of what was added the last time.

    After three times they are right: no sum depends on a sum of sums of others.
    """

    def __init__(self, monkeypatch, data: int, peer: int):
        self.places = [
            Exchange("peer" if peer > 1 else None, p, peer, "data" if data > 1 else None, data)
            for _ in range(data) for p in range(peer)
        ]  # fmt: skip
        self.peer, self.patch = peer, monkeypatch

    def run(self, function: Callable[[int, int, Exchange], Tensor]) -> list[Tensor]:
        made, before = [], []
        for _ in range(3):
            made, heard = [], [[] for _ in self.places]
            for rank, over in enumerate(self.places):
                self.patch.setattr(exchange, "_sum", self.summed(rank, before, heard[rank]))
                made.append(function(*divmod(rank, self.peer), over))
            before = heard
        return made

    def summed(self, rank: int, before: list[list[Tensor]], heard: list[Tensor]) -> Callable[[Tensor, str], Tensor]:
        d, p = divmod(rank, self.peer)
        ranks = {"peer": range(d * self.peer, (d + 1) * self.peer), "data": range(p, len(self.places), self.peer)}

        def sum_of(flat: Tensor, axis: str) -> Tensor:
            heard.append(flat)
            return sum(before[r][len(heard) - 1] for r in ranks[axis]) if before else torch.ones_like(flat)

        return sum_of


def objective(logits_JBK: Tensor, feature_JBD: Tensor, weight_KF: Tensor, over: Exchange, detach: bool) -> Tensor:
    """Each kind of term: of a peer alone, against sums over peers, of means over the batch, of a common teacher."""
    teacher_BK = over.joined(torch.cat([*feature_JBD], -1) @ weight_KF.T)
    target_BK = torch.eye(K, dtype=torch.float64)[torch.zeros(logits_JBK.shape[1], dtype=torch.long)]
    return (
        cross_entropy(logits_JBK, target_BK[None]).sum()
        + mutual_kl(logits_JBK, 2.0, over).sum()
        + mmd(feature_JBD, detach, over).sum()
        + over.once(cross_entropy(teacher_BK[None], target_BK[None]).sum())
    )


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("data", "peer"), [(1, 2), (1, 4), (2, 1), (3, 1), (2, 2), (3, 4)])
def test_losses_and_gradients_over_processes_are_those_of_one(data, peer, detach, monkeypatch):
    g = torch.Generator().manual_seed(0)
    size = 11  # which neither 2 nor 3 divides
    leaves = [
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((J, size, K), (J, size, D), (K, J * D))
    ]
    whole = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = objective(*whole, ALONE, detach)
    expected.backward()

    losses, gradients = [], []

    def one(d: int, p: int, over: Exchange) -> Tensor:
        images, peers = part_of(size, d, data), part_of(J, p, peer)
        at = slice(images.start, images.stop), slice(peers.start, peers.stop)
        columns = slice(peers.start * D, peers.stop * D)
        own = [leaves[0][at[1], at[0]], leaves[1][at[1], at[0]], leaves[2][:, columns]]
        own = [leaf.clone().requires_grad_() for leaf in own]
        loss = objective(*own, over, detach) * (data * len(images) / size)
        loss.backward()
        losses.append(loss.detach())
        gradients.append((at, columns, [leaf.grad / data for leaf in own]))
        return loss

    Together(monkeypatch, data, peer).run(one)
    count = data * peer
    torch.testing.assert_close(sum(losses[-count:]) / data, expected.detach(), rtol=1e-12, atol=0)
    summed = [torch.zeros_like(leaf) for leaf in leaves]
    for at, columns, (logits, feature, weight) in gradients[-count:]:
        summed[0][at[1], at[0]] += logits
        summed[1][at[1], at[0]] += feature
        summed[2][:, columns] += weight
    for ours, leaf in zip(summed, whole, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-10, atol=1e-12)


def test_the_spread_of_large_and_close_means_does_not_cancel(monkeypatch):
    feature_JBD = 1000 + torch.randn(J, 8, D, generator=torch.Generator().manual_seed(1)) / 100
    expected = mmd(feature_JBD)
    made = Together(monkeypatch, 1, 2).run(lambda d, p, over: mmd(feature_JBD[2 * p : 2 * p + 2], True, over))
    torch.testing.assert_close(torch.cat(made), expected, rtol=0.05, atol=0)  # means of 1e-2 apart in steps of 6e-5


def test_gradients_are_averaged_in_one_sum(monkeypatch):
    gradients = [torch.full((2, 3), 1.0), torch.full((4,), 10.0)]
    sums = []
    monkeypatch.setattr(exchange, "_sum", lambda flat, group: sums.append((group, len(flat))) or flat + 2.0)
    Exchange(data="data", data_count=2).average_(gradients)
    assert sums == [("data", 10)]
    torch.testing.assert_close(gradients, [torch.full((2, 3), 1.5), torch.full((4,), 6.0)])


def test_gradients_are_averaged_as_they_lie_in_memory(monkeypatch):
    """Else a channels_last one is copied, and _foreach_copy_ is one kernel only where the strides are alike."""
    kept = torch.randn(2, 3, 4, 5), torch.randn(6, 3, 3, 3).to(memory_format=torch.channels_last), torch.tensor(2.0)
    gradients, copied = [each.clone() for each in kept], []
    monkeypatch.setattr(exchange, "_sum", lambda flat, group: 6 * flat)
    with monkeypatch.context() as patch, oracle.Dispatches() as watched:
        real = torch._foreach_copy_
        patch.setattr(torch, "_foreach_copy_", lambda to, means: copied.append((to, means)) or real(to, means))
        Exchange(data="data", data_count=2).average_(gradients)
    torch.testing.assert_close(gradients, [3 * each for each in kept])
    ((to, means),) = copied
    assert [each.stride() for each in to] == [each.stride() for each in means] == [(1,)] * 3
    assert [each.data_ptr() for each in to] == [each.data_ptr() for each in gradients]
    assert not {"clone", "copy_", "_reshape_copy"} & set(watched.calls)


def test_a_gradient_with_gaps_is_refused_before_a_copy_of_it_is_averaged():
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        Exchange(data="data", data_count=2).average_([torch.randn(4, 4)[:, :2]])


def test_a_sum_is_asked_for_once_all_are_known_to_be_there(monkeypatch):
    """Gloo raises where one is missing; for NCCL the host waits until its watchdog ends the process."""
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *op: asked.append((tensor.device.type, tensor.dtype)))
    devices: Any = object()
    Mesh(2, 1, 0, devices).sum(torch.zeros(3, device="meta"))
    assert asked == [("cpu", torch.int64), ("meta", torch.float32)]


def test_alone_nothing_is_computed():
    x = torch.randn(3)
    with oracle.Dispatches() as watched:
        assert ALONE.total(x) == (x,) and ALONE.joined(x) is x and ALONE.once(x) is x and ALONE.batch_mean(x, 3) is x
        ALONE.average_([x])
    assert watched.calls == []
    assert ALONE.own(5) == range(5) and ALONE.peers(5) == 5


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["mesh.peer=3", "peers.count=4"], "mesh.peer (command line): 4 peers cannot be cut into 3 parts"),
        (["mesh.data=3"], "mesh.data (command line): batch_size 32 is no multiple of 3"),
        (["mesh.data=2", "mix.groups=1"], "mix.groups (command line): 1 is no multiple of mesh.data, 2"),
        (["mix.groups=32"], "mix.groups (command line): a batch of 32 in 32 part(s)"),
        (
            ["mesh.data=32"],
            "mesh.data (command line): a batch of 32 in 32 part(s), mix.groups, leaves every",
        ),
        (["batch_size=1"], "batch_size (command line): a batch of 1 in 1 part(s)"),
        (["mix.groups=3"], "mix.groups (command line): batch_size 32 is no multiple of 3"),
        (["mesh.peer=2", "peers.form=branches"], "branches share one trunk"),
        (["mesh.peer=2", "method=pcl"], "pcl cannot be split along it: its ensemble"),
        (["mesh.peer=2", "method=okddip", "peers.count=4"], "okddip cannot be split along it"),
        (["mesh.data=2", "method=ps_kd", "mix=none"], "mesh.data (command line): ps_kd cannot be split along it"),
        (["mesh.peer=2", "mix.box_rule=clip_corrected"], "mix.box_rule (command line): clip_corrected"),
        (["mix=cutout", "mix.groups=2"], "mix.groups (command line): would do nothing"),
        (["mesh.data=0"], "mesh.data (command line)"),
    ],
)
def test_keys_that_do_not_go_together(keys, message):
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", keys)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_groups_follow_the_data_axis():
    assert load_config("quickstart", ["mesh.data=4"]).mix.groups == 4
    assert load_config("quickstart", ["mesh.data=4", "mix=none"]).mix.groups is None
    assert load_config("quickstart", []).mix.groups is None


@pytest.mark.parametrize("variant", ["minlogit", "naive", "linear", "general"])
def test_variants_of_kdcl_that_need_every_peer(variant):
    with pytest.raises(ValueError, match=f"mesh.peer must be 1 under method.variant: {variant}"):
        METHODS["kdcl"](make_task(4)._replace(over=Exchange("peer", 0, 2)), variant=variant)
    METHODS["kdcl"](make_task(4)._replace(over=Exchange("peer", 0, 2)), variant="mean")


def run_command(*keys: str, processes: int = 1) -> list[str]:
    launch = [*TORCHRUN, f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "cutnmix.trainer", "train", "quickstart", *keys]


def test_a_mesh_without_torchrun_is_refused_in_one_line(tmp_path):
    done = subprocess.run(run_command("mesh.data=2", f"runs={tmp_path}"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        "error: mesh: data=2 x peer=1 needs 2 processes, not 1: "
        "torchrun --nproc-per-node 2 -m cutnmix.trainer train ...\n"
    )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("keys", "mesh", "message"),
    [
        (
            ["batch_size=28"],
            (4, 1),
            "mesh.data: the last batch of an epoch has 2 images, too few for 4 processes; drop",
        ),
        (["precision=fp16", "peers.count=4"], (1, 4), "precision: fp16 skips a step where a gradient overflows"),
    ],
)
def test_what_only_the_data_and_the_device_tell_is_refused_when_the_run_is_built(keys, mesh, message):
    axes = [f"mesh.data={mesh[0]}", f"mesh.peer={mesh[1]}"]
    config = load_config("quickstart", ["data.images_per_class=3", "loader=resident", *axes, *keys])
    with pytest.raises(ConfigError) as refused:
        build(config, Mesh(*mesh))
    assert message in str(refused.value)


# Four meshes


@pytest.fixture(scope="module")
def worked_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("worked")


@pytest.fixture(scope="module")
def worked(worked_folder) -> dict[tuple[int, int], list[dict]]:
    """What mesh_worker.py left, by mesh and rank. The later meshes also read the checkpoints of the former ones."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "normed", Normed)
        mesh_worker.main(worked_folder, 1, 1)
    for meshes in ([(2, 2)], [(1, 2), (2, 1)]):
        log = worked_folder / "log"
        agent = fork(log, mesh_worker.launch, worked_folder, meshes, daemon=False)
        agent.join()
        assert agent.exitcode == 0, log.read_text()[-3000:]
    for data, peer in [(1, 1), *MESHES]:
        files = [worked_folder / f"{data}x{peer}-rank{r}.pt" for r in range(data * peer)]
        made[data, peer] = [torch.load(file, weights_only=False) for file in files]
    return made


slow_meshes = [pytest.mark.slow, pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")]


def on_meshes(test):
    for mark in slow_meshes:
        test = mark(test)
    return test


@on_meshes
@pytest.mark.parametrize("mode", MODES)
def test_losses_weights_and_scores_are_those_of_one_process(mode, mesh, worked):
    (alone,), ranks = worked[1, 1], worked[mesh]
    for rank in ranks:
        steps = zip(rank[mode]["losses"], alone[mode]["losses"], alone[mode]["seen"], strict=True)
        for ours, theirs, (_, index_B) in steps:
            assert ours.keys() == theirs.keys()
            for name, loss in theirs.items():  # one guess may differ, where rounding decides between two classes
                near = {"abs": 101 / (4 * len(index_B))} if name == "top1" else {"rel": 1e-4, "abs": 1e-5}
                assert ours[name] == pytest.approx(loss, **near), name
        scores, expected = rank[mode]["scores"], alone[mode]["scores"]
        assert scores.keys() == expected.keys()
        assert scores["best_peer"] in [score for name, score in scores.items() if is_peer(name)]
        for name in scores.keys() - {"best_peer"}:
            assert scores[name]["nll"] == pytest.approx(expected[name]["nll"], rel=1e-5, abs=1e-4)
            assert scores[name] == pytest.approx(expected[name], abs=101 / 319)  # in percent: one of the test images
    assert len(alone[mode]["losses"]) == STEPS
    names = set()
    for rank in ranks:
        for name, tensor in rank[mode]["state"].items():
            expected = alone[mode]["state"][name].double()  # in the norm: single numbers of a momentum are near 0
            assert (tensor - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name
            names.add(name)
    assert names == alone[mode]["state"].keys()


@on_meshes
def test_what_processes_hold_in_common_stays_the_same_to_the_last_bit(mesh, worked):
    for mode in MODES:
        first: dict[str, Tensor] = {}
        for rank in worked[mesh]:
            for name, tensor in rank[mode]["state"].items():
                assert torch.equal(first.setdefault(name, tensor), tensor), (mode, name)


@on_meshes
def test_every_image_is_trained_on_once_an_epoch(mesh, worked):
    data, peer = mesh
    for p in range(peer):
        ranks = [worked[mesh][d * peer + p]["cutnmix"]["seen"] for d in range(data)]
        for epoch in range(2):
            seen = torch.cat([index_B for rank in ranks for at, index_B in rank if at == epoch])
            assert sorted(seen.tolist()) == list(range(99))


@pytest.mark.slow
def test_what_peers_exchange_does_not_depend_on_their_number(worked):
    """Number and bytes of the all-reduces over the peer axis, of a step with B = 16, K = 9, D = 8 in float32."""
    exchanged = worked[1, 2][0]["exchanged"]
    probs, teacher, mean = 4 * 16 * (9 + 1), 4 * 16 * 9, 8 * (8 + 1)  # the means in float64
    volumes = {
        "baseline": (0, 0),
        "dml": (1, probs),
        "cutnmix": (3, probs + mean + teacher),
        "kdcl mean": (1, teacher),
    }
    expected = {mode: {"count": count, "bytes": size} for mode, (count, size) in volumes.items()}
    assert exchanged == {(mode, J): expected[mode] for mode in volumes for J in (2, 4, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("reader", [(1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("writer", [(1, 1), (2, 2)], ids=str)
def test_a_checkpoint_of_one_mesh_is_read_by_another(writer, reader, worked):
    """Every weight, buffer and momentum, to the last bit; and the running losses."""
    check_restored([rank["restored"]["{}x{}".format(*writer)] for rank in worked[reader]], worked[writer])


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_read_by_one(worked, worked_folder, monkeypatch):
    monkeypatch.setitem(NETWORKS, "normed", Normed)
    check_restored([restored(build(config_of(SAVED, 1, 1)), worked_folder / "2x2" / "last.pt")], worked[2, 2])


def check_restored(ranks: list[tuple], writers: list[dict]) -> None:
    written: dict[str, Tensor] = {}
    for writer in reversed(writers):  # the first's last: of what several hold apart, its values are kept
        written |= writer["saved"]
    names = set()
    for state, position, best, tally in ranks:
        assert position == (1, 3) and best == 12.5
        assert tally == pytest.approx(writers[0]["tally"], rel=1e-6)
        for name, tensor in state.items():
            assert torch.equal(tensor, written[name]), name
            names.add(name)
    assert names == written.keys()


# Runs


TINY = [
    *SMALL_NETWORK,
    "data.classes=4",
    "data.images_per_class=40",  # ten batches of 16
    "loader=resident",
    "epochs=2",
    "batch_size=16",
    "log_every=1",
    "eval_every=2",
    "checkpoint.every_steps=2",
    "resume=auto",
    "mesh.timeout_s=60",
]


def start(folder: Path, data: int, peer: int, *keys: str, restarts: int = 0) -> Started | subprocess.Popen:
    mesh = [f"mesh.data={data}", f"mesh.peer={peer}", f"runs={folder.parent}", f"name={folder.name}"]
    if data * peer == 1:
        return Started(["train", "quickstart", *TINY, *mesh, *keys], log_path(folder))
    command = run_command(*TINY, *mesh, *keys, processes=data * peer)
    command[4:4] = [f"--max-restarts={restarts}"]
    with log_path(folder).open("a") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env)


def log_of(folder: Path) -> str:
    return log_path(folder).read_text()


def wait_for(done: Callable[[], object], process: Started | subprocess.Popen) -> None:
    wait_until(done, process)
    assert done()


def workers(process: Started | subprocess.Popen) -> dict[int, int]:
    """Process ids by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        if rank := re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes()):
            found[int(rank[1])] = int(child)
    return found


def final_tensors(folder: Path) -> dict[str, Tensor]:
    """All of the last checkpoint of several processes."""
    reader = dcp.FileSystemReader(RunFolder(folder).last)
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    checkpoint._read(RunFolder(folder).last, tensors)
    return tensors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert start(folder, 2, 1).wait() == 0, log_of(folder)
    return folder


@pytest.mark.slow
def test_a_killed_process_ends_with_the_weights_of_an_uninterrupted_run(uninterrupted, tmp_path):
    """torchrun starts all anew, and they go on by themselves."""
    folder = tmp_path / "run"
    process = start(folder, 2, 1, restarts=1)
    wait_for(lambda: steps_on_record(folder) >= 3, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait() == 0, log_of(folder)
    assert "going on at epoch" in log_of(folder)
    assert_same(final_tensors(folder), final_tensors(uninterrupted))
    assert comparable_records(folder) == comparable_records(uninterrupted)


@pytest.mark.slow
def test_a_finished_run_of_several_processes_is_evaluated_and_exported_by_one(uninterrupted):
    def command(*words: str) -> str:
        log = uninterrupted.with_name(f"{words[0]}.log")
        assert Started(words, log).wait() == 0, log.read_text()
        return log.read_text()

    (test,) = [record["scores"] for record in RunFolder(uninterrupted).records() if record["kind"] == "test"]
    shown = command("evaluate", str(uninterrupted))
    assert f"{test['ensemble']['nll']:.3f}" in shown and f"{test['peer1']['top1']:.2f}" in shown
    command("export", str(uninterrupted), "--format", "safetensors", "--peer", "1")
    own, exported = (uninterrupted / place / "peer1.safetensors" for place in ("peers", "export"))
    assert_same(load_file(own), load_file(exported))
    checkpoints = {path.name for path in (uninterrupted / "checkpoints").iterdir()}
    assert {"last.pt", "best.pt"} < checkpoints and len(checkpoints) == 4  # two links, and what they point to


@pytest.mark.slow
def test_processes_with_other_peers_leave_a_file_of_each(tmp_path):
    folder = tmp_path / "run"
    assert start(folder, 1, 2, "epochs=1").wait() == 0, log_of(folder)
    left = {path.name: load_file(path) for path in RunFolder(folder).peers.iterdir()}
    assert left.keys() == {"peer0.safetensors", "peer1.safetensors"}
    assert [record["epoch"] for record in RunFolder(folder).records() if record["kind"] == "test"] == [1]
    saved = final_tensors(folder)
    for j in range(2):
        own = f"peers.nets.{j}."
        expected = {name.removeprefix(own): tensor for name, tensor in saved.items() if name.startswith(own)}
        assert_same(left[f"peer{j}.safetensors"], expected)


@pytest.mark.slow
def test_stopped_on_one_mesh_goes_on_on_another(tmp_path):
    """SIGTERM to one process stops all after the same step; one process goes on from there."""
    folder, keys = tmp_path / "run", ("mesh.sync_batch_norm=true", "checkpoint.every_steps=null", "mix.groups=2")
    process = start(folder, 2, 1, *keys)
    wait_for(lambda: steps_on_record(folder) >= 2, process)
    os.kill(workers(process)[1], signal.SIGTERM)
    assert process.wait() == 1  # torchrun's own
    assert re.search(r"exitcode +: 75", log_of(folder)) and "stopped by SIGTERM" in log_of(folder), log_of(folder)
    assert start(folder, 1, 1, *keys).wait() == 0, log_of(folder)
    steps = [record["step"] for record in RunFolder(folder).records() if record["kind"] == "train"]
    assert steps == list(range(1, 21))
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["best.pt", "last.pt"]


LEAVING = """
import sys
from pathlib import Path
import torch.distributed as dist
from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import Stopped
from cutnmix.trainer.mesh import joined

leave = {"stopped": Stopped(15, Path("run")), "refused": SystemExit(2)}[sys.argv[1]]
try:
    with joined(load_config("quickstart", ["mesh.peer=2", "mesh.timeout_s=600"])) as mesh:
        mesh.wait()
        raise leave
except (Stopped, SystemExit) as left:
    assert left is leave and not dist.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["stopped", "refused"])
def test_processes_that_leave_together_end_their_threads_first(tmp_path, leave):
    """One that still held a tensor when Python ends would abort it: exit code -6, not the run's own."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    command = [sys.executable, *TORCHRUN, "--nproc-per-node=2", str(tmp_path / "leaving.py"), leave]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_hung_process_ends_the_run_with_a_clear_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    RunFolder(folder).batch.touch()  # or the first process would draw it, for longer than the others wait
    process = start(folder, 1, 2, "epochs=1000", "mesh.timeout_s=8")
    wait_for(lambda: steps_on_record(folder) >= 2, process)
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_for(lambda: "error: mesh: " in log_of(folder), process)
    assert time.monotonic() - stopped < 8 + 5 + 60  # the timeout, the roll call, and what the machine takes
    os.kill(hung, signal.SIGKILL)  # or torchrun does, after 30 s
    assert process.wait() == 1
    line = next(line for line in log_of(folder).splitlines() if "error: mesh: " in line)
    assert "did not answer for 8 s (mesh.timeout_s); no sign of life from rank: 1 (" in line
