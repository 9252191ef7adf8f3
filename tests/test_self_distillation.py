"""What cs_kd, ddgsd, ps_kd, tf_kd and kd compute, and the teachers that the last two read from files."""

import copy
import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import tasks
import torch
from safetensors.torch import save_file
from tasks import EPOCHS, TINY, D, E, K, N, build, make_batch, make_outputs, make_task, save_network
from torch import Tensor, nn
from torch.nn import functional as F

from cutnmix.models import NETWORKS
from cutnmix.models.network import Branch, Network
from cutnmix.models.peers import Outputs, Peers, build_peer
from cutnmix.models.saved import Frozen, load_network
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer import figures, picture, run
from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.methods.tf_kd import virtual_kl, virtual_share

SECOND = {"cs_kd": "class", "ddgsd": "image", "ps_kd": None, "tf_kd": None, "kd": None}
SOFTENED = sorted(SECOND.keys() - {"ps_kd"})
MIXES = ["mixup", "cutmix", "cutnmix"]


def normed(num_classes: int) -> Network:
    """As tasks.tiny, with batch norms."""
    trunk = nn.Sequential(nn.Conv2d(3, E, 1), nn.BatchNorm2d(E), nn.ReLU())
    stage = nn.Sequential(nn.Conv2d(E, D, 1), nn.BatchNorm2d(D), nn.ReLU())
    return Network(trunk, Branch(stage, nn.Linear(D, num_classes), D), E)


@pytest.fixture(autouse=True)
def _networks():
    with patch.dict(NETWORKS, TINY | {"normed": normed}), patch.dict(tasks.TINY, {"normed": normed}):
        yield


@pytest.fixture
def teacher(tmp_path) -> str:
    """A file with a network of batch norms that have seen something."""
    path = save_network(tmp_path / "teacher.safetensors", "normed")
    network = load_network(path).train()
    network(torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 3 + 1)
    save_file(network.state_dict(), path, {"network": "normed", "num_classes": str(K)})
    return str(path)


def peers_of(J: int, network: str = "normed") -> Peers:
    return Peers([network] * J, num_classes=K, seed=0)


def doubled(batch: Batch) -> Batch:
    return Batch(*(x.double() if x is not None and x.is_floating_point() else x for x in batch))


# Against the equations


def divergence(teacher_BK: Tensor, student_BK: Tensor, T: float) -> Tensor:
    """T^2 KL(teacher || student), the teacher held fixed."""
    return T**2 * F.kl_div(
        (student_BK / T).log_softmax(-1), (teacher_BK.detach() / T).softmax(-1), reduction="batchmean"
    )


def cs_kd(net, x, second, y, keys, _) -> dict[str, Tensor]:
    z, _ = net(x)
    other, _ = net(second)
    return {
        "ce": F.cross_entropy(z, y),
        "kl": keys.get("weight", 1) * divergence(other, z, keys.get("temperature", 4)),
    }


def ddgsd(net, x, second, y, keys, _) -> dict[str, Tensor]:
    (z, f), (z_b, f_b) = net(x), net(second)
    apart = sum((f[:, d].mean() - f_b[:, d].mean()) ** 2 for d in range(D))
    T = keys.get("temperature", 3)
    return {
        "ce": F.cross_entropy(z, y) + F.cross_entropy(z_b, y),
        "kl": keys.get("kl_weight", 1) * (divergence(z_b, z, T) + divergence(z, z_b, T)),
        "mmd": keys.get("mmd_weight", 5e-4) * apart,
    }


def kd(net, x, second, y, keys, teacher) -> dict[str, Tensor]:
    alpha, (z, _) = keys.get("alpha", 0.9), net(x)
    kl = divergence(teacher(x)[0], z, keys.get("temperature", 4))
    return {"ce": (1 - alpha) * F.cross_entropy(z, y), "kl": alpha * kl}


def tf_kd(net, x, second, y, keys, teacher) -> dict[str, Tensor]:
    if keys.get("variant") == "self":
        terms = kd(net, x, second, y, {"alpha": 0.95, "temperature": 6, **keys}, teacher)
        return {**terms, "kl": keys.get("multiplier", 1) * terms["kl"]}
    alpha, T, (z, _) = keys.get("alpha", 0.1), keys.get("temperature", 20), net(x)
    paper = keys.get("formula") == "paper"
    virtual = torch.zeros_like(z)
    for c in range(K):  # the labels of a soft target, one by one
        u = torch.full((K,), (1 - 0.99) / (K - 1), dtype=torch.float64)
        u[c] = 0.99
        virtual = virtual + y[:, c, None] * ((u.log() if paper else u) / T).softmax(-1)
    kl = divergence(virtual.log() * T, z, T) if paper else divergence(virtual.log(), z, 1)
    return {"ce": (1 - alpha) * F.cross_entropy(z, y), "kl": alpha * keys.get("multiplier", 1) * kl}


CASES = [
    ("cs_kd", cs_kd, {}),
    ("cs_kd", cs_kd, {"temperature": 2.5, "weight": 3.0}),
    ("ddgsd", ddgsd, {}),
    ("ddgsd", ddgsd, {"temperature": 1.5, "kl_weight": 0.7, "mmd_weight": 0.4}),
    ("kd", kd, {}),
    ("kd", kd, {"temperature": 2.5, "alpha": 0.3}),
    ("tf_kd", tf_kd, {}),
    ("tf_kd", tf_kd, {"temperature": 2.0, "alpha": 0.6, "multiplier": 3.0}),
    ("tf_kd", tf_kd, {"temperature": 2.0, "alpha": 0.6, "formula": "paper"}),
    ("tf_kd", tf_kd, {"variant": "self"}),
    ("tf_kd", tf_kd, {"variant": "self", "temperature": 2.0, "alpha": 0.6, "multiplier": 0.5}),
]


@pytest.mark.parametrize(("J", "V", "L"), [(1, 1, 1), (3, 1, 1), (3, 3, 1), (3, 3, 3)])
@pytest.mark.parametrize(("name", "reference", "keys"), CASES)
def test_terms_gradients_and_batch_norms_are_those_of_the_equations(name, reference, keys, J, V, L, teacher):
    if name == "kd" or keys.get("variant") == "self":
        keys = {**keys, "teacher": teacher}
    peers, batch = peers_of(J).double(), doubled(make_batch(L, V))
    batch = batch._replace(target_LBK=batch.target_LBK / batch.target_LBK.sum(-1, keepdim=True))  # 1 to float64
    nets = [copy.deepcopy(peers.network(j)) for j in range(J)]
    method = build(name, J, peers, **keys).double()
    losses = method(peers(batch.image_VBCHW), batch, peers)
    sum(losses.values()).backward()

    held = load_network(Path(teacher)).double()
    expected = []
    for j, net in enumerate(nets):
        view, target = j if V > 1 else 0, j if L > 1 else 0
        assert batch.second_VBCHW is not None
        terms = reference(net, batch.image_VBCHW[view], batch.second_VBCHW[view], batch.target_LBK[target], keys, held)
        sum(terms.values()).backward()
        expected.append(terms)
    for term in losses.keys() | expected[0].keys():
        torch.testing.assert_close(losses[term], sum(terms[term] for terms in expected), rtol=1e-10, atol=0)
    for j, net in enumerate(nets):
        ours = peers.network(j)
        torch.testing.assert_close(ours.state_dict(), net.state_dict(), rtol=1e-12, atol=1e-12)
        for p, q in zip(ours.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "reached"), [("cs_kd", False), ("ddgsd", True)])
def test_whether_the_second_views_teach_or_only_tell(name, reached):
    """Gradient reaches their pixels or not; both times batch norms take their statistics as in training."""
    peers, batch = peers_of(2), make_batch(V=2)
    second = batch.second_VBCHW.requires_grad_()
    loss = sum(build(name, 2, peers)(peers(batch.image_VBCHW), batch, peers).values())
    loss.backward()
    assert (second.grad is not None and all(grad.any() for grad in second.grad)) == reached
    assert peers.training and peers.get_submodule("nets.1.trunk.1").num_batches_tracked == 2


def test_in_ddgsd_each_view_is_a_target_for_the_other():
    """At equal logits KL has no gradient; the MMD at equal mean features none either."""
    peers, batch = peers_of(1), make_batch()
    batch = batch._replace(second_VBCHW=batch.image_VBCHW)
    losses = build("ddgsd", 1, peers)(peers(batch.image_VBCHW), batch, peers)
    assert losses["kl"].item() == pytest.approx(0, abs=1e-6) and losses["mmd"] == 0
    baseline = build("baseline", 1)(peers(batch.image_VBCHW), batch, peers)
    torch.testing.assert_close(losses["ce"], 2 * baseline["ce"])


# By hand


QUARTER = torch.tensor([[[0.25, 0.75]]]).log()  # what teaches
HALF = torch.zeros(1, 1, 2)  # what learns: KL(quarter || half) = 0.1308, KL(half || quarter) = 0.1438


def hand(logits_JBK: Tensor) -> Outputs:
    return Outputs(logits_JBK, (torch.zeros(1, 1),))


def test_the_direction_of_every_kl_by_hand(teacher):
    batch = make_batch()._replace(target_LBK=torch.tensor([[[1.0, 0.0]]]))
    ways = {"temperature": 1.0}
    modes = []

    def answer(_) -> Outputs:
        modes.append(torch.is_grad_enabled())
        return hand(QUARTER)

    assert build("cs_kd", 1, **ways)(hand(HALF), batch, answer)["kl"].item() == pytest.approx(0.1308, abs=1e-4)
    both = build("ddgsd", 1, **ways)(hand(HALF), batch, answer)["kl"].item()
    assert both == pytest.approx(0.1308 + 0.1438, abs=1e-4)
    assert modes == [False, True]  # cs_kd's second images cost no graph
    for name, keys in (("kd", {}), ("tf_kd", {"variant": "self"})):
        method = build(name, 1, peers_of(1), teacher=teacher, alpha=1.0, **keys, **ways)
        with patch.object(Frozen, "forward", lambda *_: QUARTER):
            assert method(hand(HALF), batch, None)["kl"].item() == pytest.approx(0.1308, abs=1e-4)
    assert virtual_kl(torch.tensor([[[0.0, 1.0]]]), 0.75, HALF, 1.0).item() == pytest.approx(0.1308, abs=1e-4)


def test_the_virtual_teacher_by_hand():
    assert virtual_share(100, 0.99, 20.0, "code") == pytest.approx(0.0105, abs=5e-5)
    assert virtual_share(10, 0.99, 20.0, "code") == pytest.approx(0.1045, abs=5e-5)
    assert virtual_share(100, 0.99, 20.0, "paper") == pytest.approx(1 / (1 + 99 * (0.01 / 99 / 0.99) ** 0.05))
    for K_ in (2, 10):  # at T = 1 the paper's is u itself
        assert virtual_share(K_, 0.9, 1.0, "paper") == pytest.approx(0.9)
        for formula in ("code", "paper"):
            assert virtual_share(K_, 0.9, 1e9, formula) == pytest.approx(1 / K_)


def test_the_authors_mean_over_classes_times_k_is_a_multiplier_of_one():
    outputs, batch = make_outputs(1), doubled(make_batch(soft=False))
    u = torch.full_like(batch.target_LBK[0], 0.01 / (K - 1)).masked_fill(batch.target_LBK[0] > 0, 0.99)
    z = outputs.logits_JBK[0]
    theirs = 0.1 * K * (u / 20).softmax(1).mul((u / 20).softmax(1).log() - z.log_softmax(1)).mean()
    torch.testing.assert_close(build("tf_kd", 1)(outputs, batch, None)["kl"], theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("formula", ["code", "paper"])
def test_a_mixed_target_interpolates_the_virtual_teachers_gradient(formula):
    """As CutMix interpolates its loss: lam of that of one label, the rest of that of another."""
    method, outputs, batch, lam = build("tf_kd", 1, formula=formula), make_outputs(1), doubled(make_batch()), 0.3
    a, b = (torch.eye(K, dtype=torch.float64)[label][None] for label in ([0, 1, 2, 3, 0], [1, 0, 2, 0, 3]))

    def gradient(target_LBK: Tensor) -> Tensor:
        kl = method(outputs, batch._replace(target_LBK=target_LBK), None)["kl"]
        return torch.autograd.grad(kl, outputs.logits_JBK)[0]

    expected = lam * gradient(a) + (1 - lam) * gradient(b)
    torch.testing.assert_close(gradient(lam * a + (1 - lam) * b), expected)


@pytest.mark.parametrize("formula", ["code", "paper"])
def test_a_sharp_virtual_teacher_is_the_label(formula):
    outputs, batch = make_outputs(2), doubled(make_batch(soft=False))
    keys = {"temperature": 1e-3, "alpha": 0.5, "formula": formula}
    losses = build("tf_kd", 2, **keys)(outputs, batch, None)
    scale = 1e-3 if formula == "paper" else 1  # log-softmax(z / T) is of the size of 1 / T, T^2 in front
    z = outputs.logits_JBK
    expected = 0.5 * scale**2 * sum(F.cross_entropy(z_j / scale, batch.target_LBK[0]) for z_j in z)
    torch.testing.assert_close(losses["kl"], expected)


# PS-KD's table


def step(method, indices: list[int], epoch: float, seed: int, J: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss on these images, the reference's inputs: one-hot targets (B, K), probs of each peer."""
    size, outputs = len(indices), make_outputs(J, seed=seed)
    logits_JBK = outputs.logits_JBK[:, :size]
    batch = doubled(make_batch(epoch=epoch, seed=seed, soft=False))
    batch = batch._replace(
        target_LBK=batch.target_LBK[:, :size],
        label_B=batch.label_B[:size],
        index_B=torch.tensor(indices),
        epoch=torch.tensor(epoch, dtype=torch.float64),
    )
    loss = method(outputs._replace(logits_JBK=logits_JBK), batch, None)["ce"]
    return loss, batch.target_LBK[0], list(logits_JBK.detach())


@pytest.mark.parametrize("alpha_T", [0.8, 1.0])
def test_two_epochs_of_ps_kd_by_hand(alpha_T):
    J, method = 2, build("ps_kd", 2, alpha_T=alpha_T).double()
    past: dict[int, list[Tensor]] = {}
    # image 7 is never seen in the first epoch, 0 not in the second; the last steps begin the third, where 0 is old
    calls = [([3, 0, 5], 0.0), ([1, 2], 0.6), ([5, 7, 3], 1.0), ([2, 1], 1.99), ([0, 7, 2, 1], 2.0), ([3], 9.5)]
    for seed, (indices, epoch) in enumerate(calls):
        loss, target_BK, logits = step(method, indices, epoch, seed, J)
        alpha = alpha_T * (math.floor(epoch) + 1) / EPOCHS
        expected = torch.zeros(())
        for j in range(J):
            for b, i in enumerate(indices):
                y = target_BK[b] if i not in past else (1 - alpha) * target_BK[b] + alpha * past[i][j]
                expected = expected - (y * logits[j][b].log_softmax(0)).sum() / len(indices)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        past |= {i: [logits[j][b].softmax(0) for j in range(J)] for b, i in enumerate(indices)}
        table = torch.zeros(J, N, K, dtype=torch.float64)
        for i, rows in past.items():
            table[:, i] = torch.stack(rows)
        torch.testing.assert_close(method.past_JNK, table, rtol=1e-9, atol=0)
    assert past.keys() == {0, 1, 2, 3, 5, 7} and not method.past_JNK[:, [4, 6]].any()


def test_ps_kd_mixes_the_target_as_in_its_docstring():
    outputs = make_outputs(1)
    outputs = outputs._replace(logits_JBK=torch.tensor([[[0.25, 0.75]]]).log())
    batch = make_batch()._replace(
        target_LBK=torch.tensor([[[1.0, 0.0]]]), index_B=torch.tensor([2]), epoch=torch.tensor(0.5)
    )
    method = METHODS["ps_kd"](make_task(1)._replace(K=2))
    first = method(outputs, batch, None)["ce"]
    assert first.item() == pytest.approx(math.log(4))
    second = method(outputs, batch._replace(epoch=torch.tensor(1.5)), None)["ce"]
    assert second.item() == pytest.approx(0.88 * math.log(4) + 0.12 * math.log(4 / 3))


def test_ps_kd_gives_the_gradient_of_a_fixed_target_and_writes_in_training_alone():
    method, batch = build("ps_kd", 2).double(), doubled(make_batch(epoch=4.0))
    method(make_outputs(2, seed=1), batch, None)
    before = method.past_JNK.clone()
    outputs = make_outputs(2)
    method.eval()(outputs, batch, None)
    assert torch.equal(method.past_JNK, before)
    method.train()(outputs, batch, None)["ce"].backward()
    assert not method.past_JNK.requires_grad and not torch.equal(method.past_JNK, before)
    target_JBK = 0.6 * batch.target_LBK + 0.4 * before[:, batch.index_B]
    fixed = (outputs.logits_JBK.softmax(-1) - target_JBK) / tasks.B
    torch.testing.assert_close(outputs.logits_JBK.grad, fixed.detach())


def test_compiled_ps_kd_learns_from_the_past_and_not_from_what_it_writes():
    """The partitioner of torch.compile may move what the backward needs there, behind the write."""
    method = build("ps_kd")
    twin = copy.deepcopy(method)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager_decomp_partition")
    for seed in range(3):
        gradients = []
        for each in (compiled, twin):
            outputs = make_outputs(3, torch.float32, seed)
            each(outputs, make_batch(epoch=float(seed), seed=seed), None)["ce"].backward()
            gradients.append(outputs.logits_JBK.grad)
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(method.past_JNK, twin.past_JNK)


# What reduces to what


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cs_kd", {"weight": 0.0}),
        ("ps_kd", {"alpha_T": 0.0}),
        ("tf_kd", {"alpha": 0.0}),
        ("tf_kd", {"alpha": 0.0, "variant": "self", "teacher": True}),
        ("kd", {"alpha": 0.0, "teacher": True}),
    ],
)
def test_a_weight_of_zero_is_the_baseline_exactly(name, keys, teacher):
    outputs, batch = make_outputs(2, torch.float32), make_batch()
    keys = {key: teacher if key == "teacher" else value for key, value in keys.items()}
    method = build(name, 2, peers_of(2), **keys)
    for _ in range(2):
        assert method(outputs, batch, None) == build("baseline", 2)(outputs, batch, None)
    assert not [p for p in method.parameters() if p.requires_grad]
    assert "teacher" in keys or not list(method.buffers())


@pytest.mark.parametrize(("key", "gone"), [("kl_weight", "kl"), ("mmd_weight", "mmd")])
def test_ddgsd_leaves_out_a_term_of_weight_zero(key, gone):
    peers, batch = peers_of(2), make_batch()
    full, less = (build("ddgsd", 2, peers, **keys)(peers(batch.image_VBCHW), batch, peers) for keys in ({}, {key: 0.0}))
    assert less == {term: loss for term, loss in full.items() if term != gone}


@pytest.mark.parametrize(("name", "keys"), [("kd", {}), ("tf_kd", {"variant": "self"})])
def test_without_a_share_of_its_own_ce_is_left_out(name, keys, teacher):
    peers = peers_of(2)
    method = build(name, 2, peers, alpha=1.0, teacher=teacher, **keys)
    assert method(make_outputs(2), make_batch(), peers).keys() == {"kl"}
    assert build("tf_kd", 2, alpha=1.0)(make_outputs(2), make_batch(), peers).keys() == {"kl"}
    assert build("tf_kd", 2, multiplier=0.0)(make_outputs(2), make_batch(), peers).keys() == {"ce"}


# Teachers


@pytest.mark.parametrize(("name", "keys"), [("kd", {}), ("tf_kd", {"variant": "self"})])
def test_nothing_changes_a_teacher(name, keys, teacher):
    peers, saved = peers_of(2), load_network(Path(teacher)).state_dict()
    method = build(name, 2, peers, teacher=teacher, **keys)
    for mode in (True, False, True):
        method.train(mode)
        assert method.training == mode and not any(m.training for m in method.teacher.modules())
        batch = make_batch(V=2)
        sum(method(peers(batch.image_VBCHW), batch, peers).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.parameters())
    assert all(p.grad is not None for p in peers.parameters())
    assert not method.teacher(make_batch().image_VBCHW.requires_grad_()).requires_grad
    torch.testing.assert_close(method.teacher.network.state_dict(), saved, rtol=0, atol=0)
    own = {key.removeprefix("teacher.network."): value for key, value in method.state_dict().items()}
    torch.testing.assert_close(own, saved, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "keys"), [("kd", {}), ("tf_kd", {"variant": "self"})])
def test_the_teacher_is_scored_on_the_first_view_whatever_its_dtype(name, keys, teacher):
    method, batch = build(name, 2, peers_of(2), teacher=teacher, **keys).eval(), make_batch(V=2)
    expected = load_network(Path(teacher))(batch.image_VBCHW[0])[0]
    torch.testing.assert_close(method.predictions(make_outputs(2), batch), {"teacher": expected.detach()})
    low = method.predictions(make_outputs(2), batch._replace(image_VBCHW=batch.image_VBCHW.bfloat16()))["teacher"]
    torch.testing.assert_close(low, expected.detach(), rtol=0.02, atol=0.02)
    assert build("tf_kd").predictions(make_outputs(3), batch) == {}


def test_the_teacher_is_the_peer_that_is_named(tmp_path):
    files = [save_network(tmp_path / f"peers/peer{j}.safetensors", seed=j) for j in range(3)]
    for j, path in enumerate(files):
        by_run = build("kd", teacher=str(tmp_path), teacher_peer=j).teacher.state_dict()
        by_file = build("kd", teacher=str(path)).teacher.network.state_dict()
        expected = build_peer("tiny", K, seed=j, j=0).state_dict()
        torch.testing.assert_close(by_file, expected, rtol=0, atol=0)
        torch.testing.assert_close([*by_run.values()], [*expected.values()], rtol=0, atol=0)


def test_a_loaded_network_is_the_saved_one_and_draws_nothing(teacher):
    before = torch.get_rng_state()
    network = load_network(Path(teacher))
    assert torch.equal(torch.get_rng_state(), before) and not network.training
    assert network.trunk[1].num_batches_tracked == 1 and isinstance(network, Network)


def test_only_kd_takes_a_teacher_of_another_network(tmp_path):
    wide = str(save_network(tmp_path / "wide.safetensors", "tiny_wide"))
    assert build("kd", 2, peers_of(2), teacher=wide)(make_outputs(2), make_batch(), None)["kl"] > 0
    with pytest.raises(ValueError, match=r"method\.teacher must be the peers' own network .*kd takes any"):
        build("tf_kd", 2, peers_of(2), variant="self", teacher=wide)


@pytest.mark.parametrize("name", ["kd", "tf_kd"])
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda _: "", "method.teacher must be a finished run's folder or a .safetensors file, got ''"),
        (lambda path: path / "x", "x is not there"),
        (lambda path: path, "has no peers/peer0.safetensors: it is no run, or one that has not ended"),
        (lambda path: save_network(path / "export/peer0.safetensors").parents[1], "has no peers/peer0.safetensors"),
        (lambda path: _broken(path), "cannot be read as a .safetensors file"),
        (lambda path: _bare(path), "does not say what it is: its metadata lack network, num_classes"),
        (lambda path: save_network(path / "x", num_classes=7), f"tells 7 classes apart, not {K}"),
        (lambda path: save_network(path / "x", says={"peer": "mean"}), "is the mean of several peers"),
        (lambda path: save_network(path / "x", "tiny_wide", says={"network": "tiny"}), "is no 'tiny' of this"),
        (lambda path: save_network(path / "x", says={"network": "unknown"}), "no 'unknown'"),
        (lambda path: save_network(path / "x", says={"num_classes": "ten"}), f"x tells ten classes apart, not {K}"),
        (lambda _: "~nobody-of-this-name/x", "~nobody-of-this-name/x is not there"),
    ],
)
def test_a_teacher_that_cannot_be_had_is_refused_with_its_key(name, made, said, tmp_path):
    keys = {"variant": "self"} if name == "tf_kd" else {}
    with pytest.raises(ValueError) as refused:
        build(name, teacher=str(made(tmp_path)), **keys)
    assert str(refused.value).startswith("method.teacher") and said in str(refused.value)


@pytest.mark.parametrize(("name", "keys"), [("kd", {}), ("tf_kd", {"variant": "self"})])
@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({}, None),  # as older files
        ({"classes": list("abcd"), "mean": [0.5 + 1e-9], "image_size": [8, 8]}, None),
        ({"classes": list("abdc")}, "classes[2] is 'd', not 'c'"),
        ({"classes": list("abcd"), "std": [0.2]}, "std[0] is 0.2, not 0.25"),
        ({"mean": [0.5, 0.5]}, "mean[1] is 0.5, not None"),
    ],
)
def test_a_teacher_of_other_data_is_refused_where_its_file_says_so(name, keys, said, wrong, tmp_path):
    path = save_network(tmp_path / "x", says={key: json.dumps(value) for key, value in said.items()})
    task = make_task(2)._replace(data={"classes": tuple("abcd"), "mean": (0.5,), "std": (0.25,)})
    if wrong is None:
        METHODS[name](task, teacher=str(path), **keys)
        return
    with pytest.raises(ValueError) as refused:
        METHODS[name](task, teacher=str(path), **keys)
    assert str(refused.value) == f"method.teacher: {path} was trained on other data: its {wrong}"


def test_a_teacher_that_does_not_take_the_views_is_refused_before_it_sees_them(tmp_path):
    path = save_network(tmp_path / "x", "densenet40_12")
    METHODS["kd"](make_task(2)._replace(size=(32, 32)), teacher=str(path))
    with pytest.raises(ValueError) as refused:
        METHODS["kd"](make_task(2)._replace(size=(2, 2)), teacher=str(path))
    assert str(refused.value).startswith("method.teacher: densenet40_12 does not take images of 2 x 2 pixels (")


@pytest.mark.parametrize("said", ["0.5,0.5", "0.5"])
def test_a_teacher_whose_words_are_damaged_is_refused(said, tmp_path):
    path = save_network(tmp_path / "x", says={"mean": said})
    task = make_task(2)._replace(data={"mean": (0.5,)})
    with pytest.raises(ValueError) as refused:
        METHODS["kd"](task, teacher=str(path))
    assert str(refused.value) == f"method.teacher: {path} is damaged: its mean is '{said}', which is no list in JSON"


def _broken(folder: Path) -> Path:
    (folder / "x.safetensors").write_bytes(b"no tensors")
    return folder / "x.safetensors"


def _bare(folder: Path) -> Path:
    save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def test_a_peer_that_the_run_has_not_is_refused(tmp_path):
    for j in range(2):
        save_network(tmp_path / f"peers/peer{j}.safetensors")
    with pytest.raises(ValueError, match=r"no peer 2, only peer0\.safetensors, peer1\.safetensors"):
        build("kd", teacher=str(tmp_path), teacher_peer=2)


def test_a_file_is_one_peer_and_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_network(tmp_path / "x.safetensors")
    build("kd", teacher="~/x.safetensors")
    with pytest.raises(
        ValueError, match=r"method\.teacher_peer must be left out where method\.teacher is a file, got 7"
    ):
        build("kd", teacher="~/x.safetensors", teacher_peer=7)


@pytest.mark.parametrize("name", ["kd", "tf_kd"])
def test_a_teacher_is_found_from_any_working_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [f"method={name}", "mix=none", "method.teacher=runs/one"]
    method = load_config("quickstart", keys + ["method.variant=self"] * (name == "tf_kd")).method
    assert method["teacher"] == str(tmp_path / "runs/one")
    assert load_config("quickstart", ["method=kd", "mix=none"]).method["teacher"] == ""


# What is refused, what is not


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("tf_kd", {"correct": 0.25}, r"correct must be > 1 / K, K = 4, got 0\.25"),
        ("tf_kd", {"alpha": 1.0, "multiplier": 0.0}, r"multiplier must be > 0 under method\.alpha: 1, which leaves no"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_the_others_are_refused_with_their_key(name, keys, message):
    with pytest.raises(ValueError, match=rf"^method\.{message}"):
        build(name, **keys)


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("mix", ["none", "cutout", *MIXES])
def test_mixes_are_refused_where_they_have_no_meaning(name, mix):
    overrides = [f"method={name}", f"mix={mix}"]
    if name in ("cs_kd", "ps_kd") and mix in MIXES:
        reason = {"cs_kd": "has no one class", "ps_kd": "with another partner"}[name]
        with pytest.raises(ConfigError, match=rf"{mix} has no meaning with {name}: .*{reason}"):
            load_config("paper", overrides)
    else:
        assert load_config("paper", overrides).mix.name == mix


@pytest.mark.parametrize("name", SECOND)
def test_what_is_asked_of_loader_and_peers(name):
    assert METHODS[name].needs.second == SECOND[name] and METHODS[name].needs.min_peers == 1


# Through a run


def test_a_run_learns_from_a_finished_one_and_scores_its_teacher(tmp_path, monkeypatch):
    """The teacher scores in the second run exactly what it scored at the end of its own."""
    monkeypatch.setattr(picture, "draw_batch", lambda *_, **__: None)
    monkeypatch.setattr(figures, "draw_curves", lambda *_: None)
    size = ["data.classes=3", "data.images_per_class=7", "batch_size=8", "peers.network=normed", "epochs=1"]
    common = [*size, "precision=fp32", "device=cpu", "loader=resident", f"runs={tmp_path}"]
    run.train(load_config("quickstart", [*common, "method=baseline", "mix=cutmix", "name=teacher", "seed=3"]))
    before = json.loads(RunFolder(tmp_path / "teacher").result.read_text())["last_epoch"]["scores"]

    keys = ["method=kd", f"method.teacher={tmp_path / 'teacher'}", "method.teacher_peer=1", "mix=none", "name=kd"]
    result = run.train(load_config("quickstart", [*common, *keys]))
    assert result["last_epoch"]["scores"]["teacher"] == pytest.approx(before["peer1"])
    keys[0:1] = ["method=tf_kd", "method.variant=self"]
    result = run.train(load_config("quickstart", [*common, *keys, "name=tf_kd"]))
    assert result["last_epoch"]["scores"]["teacher"] == pytest.approx(before["peer1"])

    with pytest.raises(ConfigError, match=r"method\.teacher: .*tells 3 classes apart, not 4"):
        run.train(load_config("quickstart", [*common, *keys, "data.classes=4", "name=other"]))
    with pytest.raises(ConfigError, match=r"method\.teacher: .*other data: its classes\[0\] is '0', not '2'"):
        run.train(load_config("quickstart", [*common, *keys, "data.classes=[2,1,0]", "name=other"]))
