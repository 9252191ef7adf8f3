"""What ONE, OKDDip and PCL compute, against slow references in float64 written from the papers' equations."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from tasks import B, D, E, K, build, leaves, make_batch, make_outputs, make_peers, make_task
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from cutnmix.models import NETWORKS
from cutnmix.models.network import Branch, Network
from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import others_kl, ramp_up
from cutnmix.trainer.methods.okddip import OKDDip
from cutnmix.trainer.methods.one import ONE
from cutnmix.trainer.methods.pcl import PCL

PEERS = pytest.mark.parametrize("J", [2, 3, 4])
RAMP = math.exp(-5 * (1 - 3 / 80) ** 2)  # of epoch 3.25, which is in its fourth epoch


def kl(teacher_BK: Tensor, student_BK: Tensor, T: float = 3.0, hold: bool = True) -> Tensor:
    p_BK = ((teacher_BK.detach() if hold else teacher_BK) / T).softmax(-1)
    return T**2 * sum(p * (p.log() - q) for p, q in zip(p_BK, (student_BK / T).log_softmax(-1), strict=True)).sum() / B


def ce(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    return F.cross_entropy(logits_BK, target_BK)


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    a, e = (torch.autograd.grad(x, inputs, retain_graph=True, materialize_grads=True) for x in (actual, expected))
    torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8)


def reached(loss: Tensor, outputs: Outputs, method: nn.Module) -> tuple[bool, bool, bool, bool]:
    """Whether logits, features, the trunk's map and the method's own parameters get a gradient."""
    own = [p for p in method.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [*leaves(outputs), *own], allow_unused=True, retain_graph=True)
    got = [grad is not None and bool(grad.any()) for grad in grads]
    J = len(outputs.features)
    return got[0], any(got[1 : J + 1]), got[J + 1], any(got[J + 2 :])


def test_the_ramp_is_laine_and_ailas_in_whole_epochs():
    for epoch, expected in (
        (0.0, math.exp(-5)),
        (0.99, math.exp(-5)),
        (40.5, math.exp(-1.25)),
        (80.0, 1.0),
        (200.0, 1.0),
    ):
        w = ramp_up(torch.tensor(epoch, dtype=torch.float64), 80.0)
        assert w.shape == () and w.dtype == torch.float32
        assert w.item() == pytest.approx(expected, rel=1e-6)
    assert ramp_up(torch.tensor(0.0), 0.0) == 1


# ONE


def one_teacher(method: ONE, outputs: Outputs) -> Tensor:
    """z^e, image by image, the gate's batch norm by hand."""
    linear, norm, _ = method.gate
    score = outputs.shared_VBE.mean(0) @ linear.weight.T + linear.bias
    score = (score - score.mean(0)) / (score.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    gate = score.relu().softmax(-1)
    return torch.stack([sum(gate[b, j] * outputs.logits_JBK[j, b] for j in range(len(gate[b]))) for b in range(B)])


@PEERS
@pytest.mark.parametrize(("own_targets", "T"), [(False, 3.0), (True, 1.5)])
def test_one(J, own_targets, T):
    outputs, batch = make_outputs(J), make_batch(J if own_targets else 1)
    method = build("one", J, temperature=T).double()
    losses = method(outputs, batch, None)
    target_JBK = batch.target_LBK.double().expand(J, B, K)
    teacher = one_teacher(method, outputs)
    inputs = [*leaves(outputs), *method.parameters()]
    z = outputs.logits_JBK
    assert_same_gradients(losses["ce"], sum(ce(z[j], target_JBK[j]) for j in range(J)), inputs)
    assert_same_gradients(losses["teacher_ce"], ce(teacher, target_JBK.mean(0)), inputs)
    assert_same_gradients(losses["kl"], RAMP * sum(kl(teacher, z[j], T) for j in range(J)), inputs)


def test_one_routes():
    outputs, method = make_outputs(), build("one").double()
    losses = method(outputs, make_batch(), None)
    assert reached(losses["ce"], outputs, method) == (True, False, False, False)
    assert reached(losses["teacher_ce"], outputs, method) == (True, False, True, True)
    assert reached(losses["kl"], outputs, method) == (True, False, False, False)
    predictions = method.predictions(outputs, make_batch())
    torch.testing.assert_close(predictions, {"teacher": one_teacher(method, outputs)})


def test_a_gate_that_sees_several_views_reads_their_mean():
    outputs, method = make_outputs(), build("one").double().eval()
    both = outputs._replace(shared_VBE=torch.cat([outputs.shared_VBE + 1, outputs.shared_VBE - 1]))
    torch.testing.assert_close(method.teacher(both), method.teacher(outputs))


# OKDDip


def okddip_targets(method: OKDDip, outputs: Outputs) -> list[Tensor]:
    q, k = ([f @ w.weight.T for f in outputs.features[:-1]] for w in (method.query, method.key))
    targets = []
    for a in range(len(q)):
        weights = torch.stack([(q[a] * k[b]).sum(-1) for b in range(len(q))]).softmax(0)
        targets.append(sum(weights[b][:, None] * outputs.logits_JBK[b] for b in range(len(q))))
    return targets


@PEERS
@pytest.mark.parametrize(("own_targets", "T"), [(False, 3.0), (True, 1.5)])
def test_okddip(J, own_targets, T):
    outputs, batch = make_outputs(J), make_batch(J if own_targets else 1)
    method = build("okddip", J, temperature=T).double()
    losses, z = method(outputs, batch, None), outputs.logits_JBK
    inputs = [*leaves(outputs), *method.parameters()]
    targets = okddip_targets(method, outputs)
    peer = RAMP * sum(kl(targets[a], z[a], T, hold=False) for a in range(J - 1))
    leader = RAMP * kl(sum(z[:-1]) / (J - 1), z[-1], T, hold=False)
    target_JBK = batch.target_LBK.double().expand(J, B, K)
    assert_same_gradients(losses["ce"], sum(ce(z[j], target_JBK[j]) for j in range(J)), inputs)
    assert_same_gradients(losses["peer_kl"], peer, inputs)
    assert_same_gradients(losses["leader_kl"], leader, inputs)


def test_okddips_lone_peer_has_nothing_to_learn():
    outputs, method = make_outputs(2), build("okddip", 2).double()
    loss = method(outputs, make_batch(), None)["peer_kl"]
    assert loss == 0
    assert all(
        grad is None or grad.abs().max() < 1e-12
        for grad in torch.autograd.grad(loss, leaves(outputs), allow_unused=True)
    )


@pytest.mark.parametrize("detach", [False, True])
def test_okddip_routes(detach):
    outputs, method = make_outputs(), build("okddip", detach_logits=detach).double()
    losses = method(outputs, make_batch(), None)
    assert reached(losses["peer_kl"], outputs, method) == (True, True, False, True)
    assert reached(losses["leader_kl"], outputs, method) == (True, False, False, False)
    (to_logits,) = torch.autograd.grad(losses["leader_kl"], outputs.logits_JBK)
    assert to_logits[-1].any() and bool(to_logits[:-1].any()) is not detach
    torch.testing.assert_close(method.predictions(outputs, make_batch())["leader"], outputs.logits_JBK[-1])


def test_okddip_holds_the_logits_in_both_targets_where_it_is_told_to():
    outputs, method = make_outputs(4), build("okddip", 4, detach_logits=True).double()
    losses, z = method(outputs, make_batch(), None), outputs.logits_JBK
    held = [target.detach() for target in okddip_targets(method, outputs)]
    peer = RAMP * sum(kl(held[a], z[a]) for a in range(3))
    assert_same_gradients(losses["peer_kl"], peer, [z])
    assert_same_gradients(losses["leader_kl"], RAMP * kl(z[:-1].mean(0), z[-1]), [z])
    own = [*outputs.features, *method.parameters()]
    free = build("okddip", 4).double()(outputs, make_batch(), None)["peer_kl"]
    for a, e in zip(  # the attention learns as it does without
        torch.autograd.grad(losses["peer_kl"], own[:3]), torch.autograd.grad(free, own[:3]), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("width", "expected"), [(6, 1), (17, 2), (64, 8)])
def test_okddips_attention_has_an_eighth_of_the_features(width, expected):
    method = OKDDip(make_task(3)._replace(feature_dims=(width, width, 1)))
    assert method.query.weight.shape == method.key.weight.shape == (expected, width)
    assert method.query.bias is None and method.key.bias is None


def test_okddip_mixes_logits_in_float32_inside_autocast():
    outputs, method = make_outputs(4, torch.float32), build("okddip", 4)
    nn.init.zeros_(method.query.weight)  # so that A = 1 / 3 whatever the type
    expected = method(outputs, make_batch(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert method(outputs, make_batch(), None) == expected


def test_okddips_auxiliary_peers_may_change_places():
    perm = [1, 2, 0, 3]
    outputs, method = make_outputs(4), build("okddip", 4).double()
    moved = Outputs(outputs.logits_JBK[perm], tuple(outputs.features[j] for j in perm), outputs.shared_VBE)
    torch.testing.assert_close(method(moved, make_batch(), None), method(outputs, make_batch(), None))


def test_okddips_leader_may_be_of_another_size_but_auxiliary_peers_need_a_projection():
    task = make_task(3)._replace(feature_dims=(D, D, 2 * D))
    OKDDip(task)
    with pytest.raises(ValueError, match=r"method\.feature_dim: the attention of okddip.*6, 12"):
        OKDDip(task._replace(feature_dims=(D, 2 * D, D)))
    outputs = make_outputs(3, torch.float32)
    mixed = outputs._replace(features=(outputs.features[0], outputs.features[1].repeat(1, 2), outputs.features[2]))
    method = OKDDip(task._replace(feature_dims=(D, 2 * D, D)), feature_dim=5)
    loss = method(mixed, make_batch(), make_peers(1))["peer_kl"]
    assert loss.isfinite()
    loss.backward()
    assert len(method.projection.maps) == 2
    assert all(p.grad is not None and p.grad.any() for p in method.projection.parameters())


# PCL


def normed(num_classes: int) -> Network:
    """As tasks.tiny, with batch norms."""
    trunk, stage = (
        nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, E), (E, D))
    )
    return Network(trunk, Branch(stage, nn.Linear(D, num_classes), D), E)


def pcl(J: int, form: str, **keys) -> tuple[PCL, Peers]:
    """In float64, with peers that have batch norms."""
    with patch.dict(NETWORKS, normed=normed):
        peers = Peers(["normed"] * J, num_classes=K, seed=0, form=form).double()
    torch.manual_seed(0)
    return PCL(make_task(J, peers), **keys).double(), peers


def batch64(V: int = 1, L: int = 1, seed: int = 0) -> Batch:
    batch = make_batch(L, V, seed=seed)
    return batch._replace(image_VBCHW=batch.image_VBCHW.double())


@PEERS
@pytest.mark.parametrize(("own_targets", "T"), [(False, 3.0), (True, 1.5)])
@pytest.mark.parametrize("form", ["nets", "branches"])
@pytest.mark.parametrize("views", ["shared", "per_peer"])
def test_pcl(J, form, views, own_targets, T):
    """Five steps of SGD beside mean teachers that are averaged and run by hand."""
    method, peers = pcl(J, form, decay=0.7, temperature=T)
    mean_teachers = copy.deepcopy(peers)
    optimizer = torch.optim.SGD([*peers.parameters(), method.ensemble.weight, method.ensemble.bias], lr=0.3)
    for step in range(5):
        batch = batch64(J if views == "per_peer" else 1, J if own_targets else 1, seed=step)
        a = (0, 1 / 2, 2 / 3, 0.7, 0.7)[step]
        for mean, own in zip(mean_teachers.parameters(), peers.parameters(), strict=True):
            mean.data = a * mean.data + (1 - a) * own.data
        teacher_JBK = mean_teachers(batch.image_VBCHW).logits_JBK.detach()
        outputs = peers(batch.image_VBCHW)
        losses, z, target_JBK = method(outputs, batch, peers), outputs.logits_JBK, batch.target_LBK.double()
        en = torch.cat(outputs.features, -1) @ method.ensemble.weight.T + method.ensemble.bias
        pairs = sum(kl(teacher_JBK[k], z[j], T) for j in range(J) for k in range(J) if k != j) / (J - 1)
        inputs = [z, *outputs.features, *method.ensemble.parameters()]
        assert losses.keys() == {"ce", "en_ce", "en_kl", "mean_kl"}
        assert_same_gradients(losses["ce"], sum(ce(z[j], target_JBK.expand(J, B, K)[j]) for j in range(J)), inputs)
        assert_same_gradients(losses["en_ce"], ce(en, target_JBK.mean(0)), inputs)
        assert_same_gradients(losses["en_kl"], RAMP * sum(kl(en, z[j], T) for j in range(J)), inputs)
        assert_same_gradients(losses["mean_kl"], RAMP * pairs, inputs)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Their batch norms have the running statistics of their own forwards.
    torch.testing.assert_close(method.mean_teachers.state_dict(), mean_teachers.state_dict(), rtol=1e-6, atol=1e-8)
    assert not any(p.requires_grad for p in method.mean_teachers.parameters())
    before = copy.deepcopy(method.state_dict())
    method.eval()(make_outputs(J), batch64(), peers)  # an evaluation moves nothing
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_pcls_mean_teacher_sees_the_view_of_its_own_peer():
    method, peers = pcl(3, "nets")
    outputs, batch = make_outputs(), batch64(V=3)
    loss = method(outputs, batch, peers)["mean_kl"]
    # At the first step mean teachers are their peers.
    mean = [peers.network(k)(batch.image_VBCHW[k])[0] for k in range(3)]
    pairs = sum(kl(mean[k], outputs.logits_JBK[j]) for j in range(3) for k in range(3) if k != j) / 2
    torch.testing.assert_close(loss, RAMP * pairs, rtol=1e-6, atol=0)


def test_pcl_routes():
    method, peers = pcl(3, "nets")
    outputs = make_outputs()
    losses = method(outputs, batch64(), peers)
    assert reached(losses["en_ce"], outputs, method) == (False, True, False, True)
    assert reached(losses["en_kl"], outputs, method) == (True, False, False, False)
    assert reached(losses["mean_kl"], outputs, method) == (True, False, False, False)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in (*peers.parameters(), *method.mean_teachers.parameters()))


@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_pcls_first_average_is_the_peers_and_the_last_moves_by_1_minus_decay(decay):
    method, peers = pcl(2, "nets", decay=decay)
    weights = nn.utils.parameters_to_vector
    with torch.no_grad():
        for p in peers.parameters():
            p += 1
    method(make_outputs(2), batch64(), peers)
    old = weights(method.mean_teachers.parameters())
    torch.testing.assert_close(old, weights(peers.parameters()))
    method.step.fill_(1e6)
    with torch.no_grad():
        for p in peers.parameters():
            p += 1
    method(make_outputs(2), batch64(), peers)
    torch.testing.assert_close(weights(method.mean_teachers.parameters()) - old, torch.full_like(old, 1 - decay))
    assert method.step == 1e6 + 1


@pytest.mark.parametrize("form", ["nets", "branches"])
def test_pcl_compiles_to_one_graph_while_peers_and_mean_teachers_move(form):
    method, peers = pcl(2, form, decay=0.7)
    twin = copy.deepcopy(method)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(method, fullgraph=True, backend=counter)
    graphs = []
    for step in range(3):
        with torch.no_grad():
            for p in peers.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        actual, expected = (run(make_outputs(2), batch64(2, seed=step), peers) for run in (compiled, twin))
        torch.testing.assert_close(actual, expected)
        sum(actual.values()).backward()
        graphs.append(counter.frame_count)
    torch.testing.assert_close(method.state_dict(), twin.state_dict())
    assert len(set(graphs)) == 1  # none after the first step
    assert all(p.grad is None for p in peers.parameters())


def test_the_layout_of_the_peers_does_not_matter_to_pcl():
    made = []
    for channels_last in ((False, False), (True, False), (True, True)):  # peers, mean teachers
        method, peers = pcl(2, "nets")
        for module, last in zip((peers, method), channels_last, strict=True):
            module.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        for step in range(3):
            losses = method(make_outputs(2), batch64(seed=step), peers)
            with torch.no_grad():
                for p in peers.parameters():
                    p *= 0.9
        made.append((losses, method.state_dict()))
    for other in made[1:]:
        torch.testing.assert_close(other, made[0])


def test_pcl_predicts_by_its_ensemble_and_its_mean_teachers():
    method, _ = pcl(2, "nets")
    outputs, batch = make_outputs(2), batch64()
    made = method.eval().predictions(outputs, batch)
    assert made.keys() == {"teacher", "mean_teacher0", "mean_teacher1"}
    torch.testing.assert_close(made["teacher"], method.ensemble(torch.cat(outputs.features, -1)))
    for j in range(2):
        torch.testing.assert_close(made[f"mean_teacher{j}"], method.mean_teachers.network(j)(batch.image_VBCHW[0])[0])


def test_the_kl_to_the_others_is_that_of_all_pairs():
    g = torch.Generator().manual_seed(0)
    t, s = torch.randn(2, 4, B, K, generator=g, dtype=torch.float64)
    pairs = [sum(kl(t[k], s[j]) for k in range(4) if k != j) / 3 for j in range(4)]
    torch.testing.assert_close(others_kl(t, s, 3.0), torch.stack(pairs))


# All three


@pytest.mark.parametrize(
    ("name", "zero", "left"),
    [("one", {"weight": 0.0}, {"ce", "teacher_ce"}), ("okddip", {"weight": 0.0}, {"ce"}),
     ("pcl", {"en_weight": 0.0, "mean_weight": 0.0}, {"ce", "en_ce"})],
)  # fmt: skip
def test_weight_zero_leaves_the_terms_out(name, zero, left):
    outputs, batch = make_outputs(dtype=torch.float32), make_batch()
    losses = build(name, **zero)(outputs, batch, make_peers(3))
    assert losses.keys() == left
    assert losses["ce"] == build("baseline")(outputs, batch, make_peers(3))["ce"]


@pytest.mark.parametrize(
    ("name", "key", "scaled"),
    [
        ("one", "weight", {"kl"}),
        ("okddip", "weight", {"peer_kl", "leader_kl"}),
        ("pcl", "en_weight", {"en_kl"}),
        ("pcl", "mean_weight", {"mean_kl"}),
    ],
)
def test_weights_scale_their_terms_and_the_ramp_all_distillation(name, key, scaled):
    outputs, batch, peers = make_outputs(dtype=torch.float32), make_batch(), make_peers(3)
    full, less, flat = (
        build(name, 3, peers, **keys)(outputs, batch, peers) for keys in ({}, {key: 0.25}, {"ramp_epochs": 0.0})
    )
    for term, loss in full.items():
        torch.testing.assert_close(less[term], loss * (0.25 if term in scaled else 1))
        torch.testing.assert_close(flat[term] * (RAMP if term.endswith("kl") else 1), loss)


@pytest.mark.parametrize("name", ["one", "okddip", "pcl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_evaluation_needs_no_autocast_around_what_autocast_made(name, dtype):
    outputs, batch = make_outputs(dtype=dtype), make_batch()
    batch = batch._replace(image_VBCHW=batch.image_VBCHW.to(dtype))
    method = build(name).eval()
    for what, logits_BK in method.predictions(outputs, batch).items():
        assert logits_BK.isfinite().all() and (what == "leader" or logits_BK.dtype == torch.float32)


@pytest.mark.parametrize("name", ["one", "pcl"])
def test_the_order_of_peers_does_not_matter(name):
    perm = [2, 0, 1]
    peers, outputs, batch = make_peers(3), make_outputs(), make_batch(3)
    moved = Outputs(outputs.logits_JBK[perm], tuple(outputs.features[j] for j in perm), outputs.shared_VBE)
    method, other = build(name, 3, peers).double(), build(name, 3, peers).double()
    batch = batch._replace(image_VBCHW=batch.image_VBCHW.double())
    other.load_state_dict(method.state_dict())
    peers = peers.double()
    moved_peers = copy.deepcopy(peers)
    moved_peers.nets = nn.ModuleList(moved_peers.nets[j] for j in perm)  # the first step copies them
    if name == "one":
        for p in other.gate.parameters():
            p.data = p.data[perm]
    else:
        other.ensemble.weight.data = method.ensemble.weight.data.view(K, 3, D)[:, perm].flatten(1)
    actual = other(moved, batch._replace(target_LBK=batch.target_LBK[perm]), moved_peers)
    torch.testing.assert_close(actual, method(outputs, batch, peers))
