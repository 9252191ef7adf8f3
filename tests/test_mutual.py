"""What baseline, dml and cutnmix compute: each peer's own objective, term by term."""

from typing import NamedTuple

import pytest
import torch
from tasks import B, D, K, build, make_batch, make_outputs, make_peers, make_task
from torch import Tensor, nn
from torch.nn import functional as F

from cutnmix.models.peers import Outputs
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.methods.baseline import Baseline
from cutnmix.trainer.methods.cutnmix import CutnMixDistillation
from cutnmix.trainer.methods.dml import DML

TERMS = {
    "baseline": {"ce"},
    "dml": {"ce", "dml"},
    "cutnmix": {"ce", "dml", "mmd", "pt", "pt_ce"},
}
EACH = pytest.mark.parametrize("name", TERMS)
PEERS = make_peers(1)  # these methods never look at them


class Made(NamedTuple):
    """Outputs as two leaves."""

    logits: Tensor
    feature: Tensor

    def outputs(self) -> Outputs:
        return Outputs(self.logits, self.feature.unbind())


def outputs(J: int = 3, dtype: torch.dtype = torch.float64) -> Made:
    made = make_outputs(J, dtype)
    return Made(made.logits_JBK, torch.stack(made.features).detach().requires_grad_())


def batch(L: int = 1) -> Batch:
    return make_batch(L)


def terms(method, made: Made, data: Batch) -> dict[str, Tensor]:
    return method(made.outputs(), data, PEERS)


@EACH
def test_losses_are_those_of_float32_inside_autocast(name):
    made, method = outputs(dtype=torch.float32), build(name)
    expected = terms(method, made, batch())
    with torch.autocast("cpu", torch.bfloat16):
        actual = terms(method, made, batch())
    for term in expected:
        linear = 0.02 if term.startswith("pt") else 0  # the teacher's Linear alone may run in bfloat16
        torch.testing.assert_close(actual[term], expected[term], rtol=linear, atol=linear)


def gradients(loss: Tensor, made: Made, method: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [*made, *method.parameters()], allow_unused=True, retain_graph=True))


# term: does its gradient reach (the peers' logits, the peers' features, the method's own parameters)?
ROUTES = {
    "ce": (True, False, False),
    "dml": (True, False, False),
    "mmd": (False, True, False),
    "pt": (True, False, False),
    "pt_ce": (False, False, True),
}


@pytest.mark.parametrize(
    ("name", "keys", "term", "route"),
    [
        *((name, {}, term, ROUTES[term]) for name in TERMS for term in sorted(TERMS[name])),
        *(("cutnmix", {"mmd_detach": False}, term, route) for term, route in ROUTES.items()),
        *(("cutnmix", {"pt_grad_to_peers": True}, term, ROUTES[term]) for term in ("ce", "dml", "mmd", "pt")),
        ("cutnmix", {"pt_grad_to_peers": True}, "pt_ce", (False, True, True)),
    ],
)
def test_what_gets_gradient_from_which_term(name, keys, term, route):
    made, method = outputs(), build(name, **keys).double()
    logits, feature, *own = gradients(terms(method, made, batch())[term], made, method)
    for grad, reached in zip((logits, feature), route, strict=False):
        assert (grad is not None) == reached
        if grad is not None:
            assert grad.flatten(1).any(-1).all()  # every peer
    assert all((grad is not None) == route[2] for grad in own)


def objective(j: int, made: Made, target_BK: Tensor, teacher_BK: Tensor, weights: dict[str, float], T: float):
    """L^j, Eq. 8, pair by pair, with everything that belongs to another detached."""
    z, f = made
    p = [(z_k / T).softmax(-1) for z_k in z]
    others = [k for k in range(len(z)) if k != j]

    def divergence(target: Tensor, q: Tensor) -> Tensor:
        return T**2 * (target.detach() * (target.detach() / q).log()).sum() / B

    return (
        F.cross_entropy(z[j], target_BK)
        + weights["dml"] * sum(divergence(p[k], p[j]) for k in others) / len(others)
        + weights["mmd"] * sum((f[j].mean(0) - f[k].detach().mean(0)).square().sum() for k in others) / len(others)
        + weights["pt"] * divergence((teacher_BK / T).softmax(-1), p[j])
    )


@pytest.mark.parametrize("J", [2, 3, 4])
@pytest.mark.parametrize("own_targets", [False, True])
@pytest.mark.parametrize(
    ("name", "weights", "temperature"),
    [
        ("baseline", {"dml": 0.0, "mmd": 0.0, "pt": 0.0}, 1.0),
        ("dml", {"dml": 1.0, "mmd": 0.0, "pt": 0.0}, 1.0),
        ("cutnmix", {"dml": 0.6, "mmd": 0.3, "pt": 0.1}, 3.0),
    ],
)
def test_defaults_give_each_peer_the_gradient_of_its_own_objective(name, weights, temperature, J, own_targets):
    made, data, method = outputs(J), batch(J if own_targets else 1), build(name, J).double()
    losses = terms(method, made, data)
    total = sum(losses[term] for term in losses if term != "pt_ce")
    teacher = method.teacher(made.outputs()) if name == "cutnmix" else torch.zeros(B, K)
    target_JBK = data.target_LBK.double().expand(J, B, K)
    per_peer = [objective(j, made, target_JBK[j], teacher, weights, temperature) for j in range(J)]
    torch.testing.assert_close(total, sum(per_peer), rtol=1e-11, atol=0)
    actual = torch.autograd.grad(total, made, allow_unused=True)
    for j, objective_j in enumerate(per_peer):
        expected = torch.autograd.grad(objective_j, made, retain_graph=True, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None or not e.any())
            if a is not None and e is not None:
                torch.testing.assert_close(a[j], e[j], rtol=1e-11, atol=1e-12)
                assert not e[torch.arange(J) != j].any()


@pytest.mark.parametrize("own_targets", [False, True])
def test_teacher_learns_the_mean_target_from_features_in_peer_order(own_targets):
    made, data, method = outputs(), batch(3 if own_targets else 1), build("cutnmix").double()
    linear = method.peer_teacher
    by_hand = linear.bias + sum(f @ w.T for f, w in zip(made.feature, linear.weight.split(D, 1), strict=True))
    torch.testing.assert_close(method.teacher(made.outputs()), by_hand)
    expected = F.cross_entropy(by_hand, data.target_LBK.double().mean(0))
    torch.testing.assert_close(terms(method, made, data)["pt_ce"], expected)


@EACH
def test_order_of_peers_does_not_matter(name):
    perm = [2, 0, 1]
    made, data, method = outputs(), batch(3), build(name).double()
    expected = terms(method, made, data)
    if name == "cutnmix":
        weight = method.peer_teacher.weight
        weight.data = weight.data.view(K, 3, D)[:, perm].flatten(1)
    actual = terms(method, Made(*(x[perm] for x in made)), data._replace(target_LBK=data.target_LBK[perm]))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("name", "zero"), [("dml", ["alpha"]), ("cutnmix", ["alpha", "beta", "gamma"])])
def test_weights_of_zero_are_the_baseline_exactly(name, zero):
    made, method = outputs(dtype=torch.float32), build(name, **dict.fromkeys(zero, 0.0))
    actual, expected = terms(method, made, batch()), terms(build("baseline"), made, batch())
    assert actual == expected
    assert not list(method.parameters()) and method.predictions(made.outputs(), batch()) == {}


@pytest.mark.parametrize(("key", "gone"), [("alpha", {"dml"}), ("beta", {"mmd"}), ("gamma", {"pt", "pt_ce"})])
def test_weight_zero_leaves_out_its_term_and_no_other(key, gone):
    made = outputs(dtype=torch.float32)
    full, less = (terms(build("cutnmix", **keys), made, batch()) for keys in ({}, {key: 0.0}))
    assert less == {term: loss for term, loss in full.items() if term not in gone}


def test_identical_peers_have_nothing_to_tell_one_another():
    made = Made(*(x[:1].repeat(2, 1, 1) for x in outputs()))
    losses = terms(build("cutnmix", J=2).double(), made, batch())
    assert losses["dml"] == 0 and losses["mmd"] == 0


def test_dml_by_hand():
    logits = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    data = batch()._replace(target_LBK=torch.tensor([[[1.0, 0.0]]]))
    losses = terms(DML(make_task(2)), Made(logits, torch.zeros(2, 1, D)), data)
    assert losses["dml"].item() == pytest.approx(0.1308 + 0.1438, abs=1e-4)
    assert losses["ce"].item() == pytest.approx(0.6931 + 1.3863, abs=1e-4)


def test_tau2_is_a_factor_of_dml_alone():
    made = outputs(dtype=torch.float32)
    on, off = (terms(build("cutnmix", tau2=tau2), made, batch()) for tau2 in (True, False))
    torch.testing.assert_close(on.pop("dml"), 9 * off.pop("dml"))
    assert on == off


def test_maps_to_one_feature_size_keep_distances_and_are_not_trained():
    """The MMD is their only loss: trained, they would bring it to 0 in place of the peers, or diverge."""
    task = make_task(2)._replace(feature_dims=(D, 2 * D))
    method = CutnMixDistillation(task, feature_dim=D)
    assert method.projection is not None
    assert not any(p.requires_grad for p in method.projection.parameters())
    torch.manual_seed(0)
    narrow, wide = torch.randn(B, D), torch.randn(B, 2 * D)
    with torch.autocast("cpu", torch.bfloat16):
        mapped_JBD = method.projection((narrow, wide))
    assert mapped_JBD.dtype == torch.float32
    torch.testing.assert_close(torch.cdist(mapped_JBD[0], mapped_JBD[0]), torch.cdist(narrow, narrow))
    made = Outputs(outputs(2, torch.float32).logits, (narrow, wide.requires_grad_()))
    method(made, batch(), PEERS)["mmd"].backward()
    assert wide.grad is not None and wide.grad.any()


def test_baseline_trains_any_number_of_peers():
    for J in (1, 4):
        made, data = outputs(J), batch()
        alone = [F.cross_entropy(logits, data.target_LBK[0].double()) for logits in made.logits]
        torch.testing.assert_close(terms(Baseline(make_task(J)), made, data), {"ce": sum(alone)})
