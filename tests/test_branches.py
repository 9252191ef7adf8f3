"""What ONE, OKDDip and PCL compute, against slow references in float64 written from the papers' equations."""

import copy
import math

import pytest
import torch
from tasks import B, D, K, build, leaves, make_batch, make_outputs, make_peers, make_task
from torch import Tensor, nn
from torch.nn import functional as F

from cutnmix.models.peers import Outputs
from cutnmix.trainer.losses import ramp_up
from cutnmix.trainer.methods.okddip import OKDDip
from cutnmix.trainer.methods.one import ONE
from cutnmix.trainer.methods.pcl import PCL, others_kl

PEERS = pytest.mark.parametrize("J", [2, 3, 4])
RAMP = math.exp(-5 * (1 - 3 / 80) ** 2)  # of epoch 3.25, which is in its fourth epoch


def kl(teacher_BK: Tensor, student_BK: Tensor, T: float = 3.0, hold: bool = True) -> Tensor:
    p_BK = ((teacher_BK.detach() if hold else teacher_BK) / T).softmax(-1)
    return T**2 * sum(p * (p.log() - q) for p, q in zip(p_BK, (student_BK / T).log_softmax(-1), strict=True)).sum() / B


def ce(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    return F.cross_entropy(logits_BK, target_BK)


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    a, e = (torch.autograd.grad(x, inputs, retain_graph=True, materialize_grads=True) for x in (actual, expected))
    torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9)


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
@pytest.mark.parametrize("own_targets", [False, True])
def test_one(J, own_targets):
    outputs, batch, method = make_outputs(J), make_batch(J if own_targets else 1), build("one", J).double()
    losses = method(outputs, batch, None)
    target_JBK = batch.target_LBK.double().expand(J, B, K)
    teacher = one_teacher(method, outputs)
    inputs = [*leaves(outputs), *method.parameters()]
    z = outputs.logits_JBK
    assert_same_gradients(losses["ce"], sum(ce(z[j], target_JBK[j]) for j in range(J)), inputs)
    assert_same_gradients(losses["teacher_ce"], ce(teacher, target_JBK.mean(0)), inputs)
    assert_same_gradients(losses["kl"], RAMP * sum(kl(teacher, z[j]) for j in range(J)), inputs)


def test_one_routes():
    outputs, method = make_outputs(), build("one").double()
    losses = method(outputs, make_batch(), None)
    assert reached(losses["ce"], outputs, method) == (True, False, False, False)
    assert reached(losses["teacher_ce"], outputs, method) == (True, False, True, True)
    assert reached(losses["kl"], outputs, method) == (True, False, False, False)
    assert method.predictions(outputs, make_batch()).keys() == {"teacher"}


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
def test_okddip(J):
    outputs, batch, method = make_outputs(J), make_batch(), build("okddip", J).double()
    losses, z = method(outputs, batch, None), outputs.logits_JBK
    inputs = [*leaves(outputs), *method.parameters()]
    targets = okddip_targets(method, outputs)
    peer = RAMP * sum(kl(targets[a], z[a], hold=False) for a in range(J - 1))
    leader = RAMP * kl(sum(z[:-1]) / (J - 1), z[-1], hold=False)
    target_BK = batch.target_LBK[0].double()
    assert_same_gradients(losses["ce"], sum(ce(z[j], target_BK) for j in range(J)), inputs)
    assert_same_gradients(losses["peer_kl"], peer, inputs)
    assert_same_gradients(losses["leader_kl"], leader, inputs)


def test_okddips_lone_peer_has_nothing_to_learn():
    outputs, method = make_outputs(2), build("okddip", 2).double()
    loss = method(outputs, make_batch(), None)["peer_kl"]
    assert loss.abs() < 1e-15
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
    assert method(mixed, make_batch(), make_peers(1))["peer_kl"].isfinite()


# PCL


def pcl(J: int, form: str, **keys) -> tuple[PCL, nn.Module]:
    peers = make_peers(J, form).double()
    torch.manual_seed(0)
    return PCL(make_task(J, peers), **keys).double(), peers


@PEERS
@pytest.mark.parametrize("form", ["nets", "branches"])
@pytest.mark.parametrize("V", [1, "J"])
def test_pcl(J, form, V):
    method, peers = pcl(J, form)
    outputs, batch = make_outputs(J), make_batch(V=J if V == "J" else 1)
    batch = batch._replace(image_VBCHW=batch.image_VBCHW.double())
    losses, z = method(outputs, batch, peers), outputs.logits_JBK
    own = [method.ensemble.weight, method.ensemble.bias]
    inputs, target_BK = [*leaves(outputs), *own], batch.target_LBK[0].double()
    teacher = torch.cat(outputs.features, -1) @ own[0].T + own[1]
    views = batch.image_VBCHW.expand(J, *batch.image_VBCHW.shape[1:])
    with torch.no_grad():
        mean = [peers.network(k)(views[k])[0] for k in range(J)]  # after the first step they are the peers themselves
    pairs = sum(kl(mean[k], z[j]) for j in range(J) for k in range(J) if k != j) / (J - 1)
    assert_same_gradients(losses["ce"], sum(ce(z[j], target_BK) for j in range(J)), inputs)
    assert_same_gradients(losses["en_ce"], ce(teacher, target_BK), inputs)
    assert_same_gradients(losses["en_kl"], RAMP * sum(kl(teacher, z[j]) for j in range(J)), inputs)
    assert_same_gradients(losses["mean_kl"], RAMP * pairs, inputs)


def test_pcl_routes():
    method, peers = pcl(3, "nets")
    batch = make_batch()
    outputs, batch = make_outputs(), batch._replace(image_VBCHW=batch.image_VBCHW.double())
    losses = method(outputs, batch, peers)
    assert reached(losses["en_ce"], outputs, method) == (False, True, False, True)
    assert reached(losses["en_kl"], outputs, method) == (True, False, False, False)
    assert reached(losses["mean_kl"], outputs, method) == (True, False, False, False)
    assert all(p.grad is None for p in peers.parameters())


@pytest.mark.parametrize("form", ["nets", "branches"])
def test_pcls_mean_teachers_are_the_moving_average_of_the_peers(form):
    method, peers = pcl(2, form, decay=0.7)
    batch = make_batch()
    batch = batch._replace(image_VBCHW=batch.image_VBCHW.double())
    expected = [torch.zeros_like(p) for p in peers.parameters()]
    for step in range(6):
        with torch.no_grad():
            for p in peers.parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        a = min(1 - 1 / (step + 1), 0.7)
        expected = [a * e + (1 - a) * p.detach() for e, p in zip(expected, peers.parameters(), strict=True)]
        method(make_outputs(2), batch, peers)
        torch.testing.assert_close([*method.mean_teachers.parameters()], expected, rtol=1e-6, atol=1e-6)
    before = copy.deepcopy(method.state_dict())
    method.eval()(make_outputs(2), batch, peers)  # an evaluation moves nothing
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_pcl_predicts_by_its_ensemble_and_its_mean_teachers():
    method, _ = pcl(2, "nets")
    batch = make_batch()
    batch = batch._replace(image_VBCHW=batch.image_VBCHW.double())
    made = method.eval().predictions(make_outputs(2), batch)
    assert made.keys() == {"teacher", "mean_teacher0", "mean_teacher1"}
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
    ("method", "keys", "message"),
    [
        (ONE, {"temperature": 0.0}, r"method\.temperature must be > 0 .*got 0\.0"),
        (ONE, {"ramp_epochs": -1.0}, r"method\.ramp_epochs must be >= 0 .*got -1\.0"),
        (OKDDip, {"weight": -1.0}, r"method\.weight must be >= 0 .*got -1\.0"),
        (OKDDip, {"temperature": math.inf}, r"method\.temperature must be > 0 and finite"),
        (PCL, {"decay": 1.0}, r"method\.decay must be >= 0 and < 1, got 1\.0"),
        (PCL, {"mean_weight": math.nan}, r"method\.mean_weight must be >= 0"),
    ],
)
def test_values_without_meaning_are_refused_with_their_key(method, keys, message):
    with pytest.raises(ValueError, match=message):
        method(make_task(3), **keys)
