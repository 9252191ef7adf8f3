import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutnmix.models.peers import Outputs, Sizes
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.methods.baseline import Baseline
from cutnmix.trainer.methods.cutnmix import CutnMixDistillation
from cutnmix.trainer.methods.dml import DML

B, K, D = 5, 4, 6
TERMS = {
    "baseline": {"ce"},
    "dml": {"ce", "dml"},
    "cutnmix": {"ce", "dml", "mmd", "pt", "pt_ce"},
}
EACH = pytest.mark.parametrize("name", METHODS)


def build(name: str, J: int = 3, **keys) -> nn.Module:
    torch.manual_seed(0)  # the caller seeds a method's own parameters
    return METHODS[name](Sizes(J, K, D), **keys)


def outputs(J: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(J, B, K, generator=g, dtype=torch.float64)
    feature = torch.randn(J, B, D, generator=g, dtype=torch.float64).relu()
    return Outputs(logits.to(dtype).requires_grad_(), feature.to(dtype).requires_grad_())


def batch(L: int = 1) -> Batch:
    target_LBK = torch.randn(L, B, K, generator=torch.Generator().manual_seed(9)).softmax(-1)
    none_B = torch.zeros(B, dtype=torch.int64)
    return Batch(torch.zeros(1, B, 3, 2, 2), target_LBK, none_B, none_B)


def test_every_method_is_in_the_table_of_terms():
    assert METHODS.keys() == TERMS.keys()


@EACH
def test_keys_are_keyword_only_typed_and_have_defaults(name):
    sizes, *keys = inspect.signature(METHODS[name]).parameters.values()
    assert sizes.name == "sizes"
    for key in keys:
        assert key.kind is key.KEYWORD_ONLY and key.annotation in (float, bool) and type(key.default) is key.annotation
    with pytest.raises(TypeError, match="temprature"):
        build(name, temprature=2.0)


@EACH
@pytest.mark.parametrize("autocast", [False, True])
def test_terms_are_float32_scalars_that_reach_every_parameter(name, autocast):
    method = build(name)
    made = outputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = method(made, batch())
    assert losses.keys() == TERMS[name]
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


@EACH
def test_losses_are_those_of_float32_inside_autocast(name):
    made, method = outputs(dtype=torch.float32), build(name)
    expected = method(made, batch())
    with torch.autocast("cpu", torch.bfloat16):
        actual = method(made, batch())
    for term in expected:
        linear = 0.02 if term.startswith("pt") else 0  # the teacher's Linear alone may run in bfloat16
        torch.testing.assert_close(actual[term], expected[term], rtol=linear, atol=linear)


@EACH
def test_teacher_is_logits_or_none(name):
    teacher = build(name).double().teacher(outputs())
    assert teacher is None if name != "cutnmix" else teacher.shape == (B, K)


def gradients(loss: Tensor, made: Outputs, method: nn.Module) -> list[Tensor | None]:
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
        *((name, {}, term, ROUTES[term]) for name in METHODS for term in sorted(TERMS[name])),
        *(("cutnmix", {"mmd_detach": False}, term, route) for term, route in ROUTES.items()),
        *(("cutnmix", {"pt_grad_to_peers": True}, term, ROUTES[term]) for term in ("ce", "dml", "mmd", "pt")),
        ("cutnmix", {"pt_grad_to_peers": True}, "pt_ce", (False, True, True)),
    ],
)
def test_what_gets_gradient_from_which_term(name, keys, term, route):
    made, method = outputs(), build(name, **keys).double()
    logits, feature, *own = gradients(method(made, batch())[term], made, method)
    for grad, reached in zip((logits, feature), route, strict=False):
        assert (grad is not None) == reached
        if grad is not None:
            assert grad.flatten(1).any(-1).all()  # every peer
    assert all((grad is not None) == route[2] for grad in own)


def objective(j: int, made: Outputs, target_BK: Tensor, teacher_BK: Tensor, weights: dict[str, float], T: float):
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
    losses = method(made, data)
    total = sum(losses[term] for term in losses if term != "pt_ce")
    teacher = method.teacher(made) if name == "cutnmix" else torch.zeros(B, K)
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
    by_hand = linear.bias + sum(f @ w.T for f, w in zip(made.feature_JBD, linear.weight.split(D, 1), strict=True))
    torch.testing.assert_close(method.teacher(made), by_hand)
    expected = F.cross_entropy(by_hand, data.target_LBK.double().mean(0))
    torch.testing.assert_close(method(made, data)["pt_ce"], expected)


@EACH
def test_order_of_peers_does_not_matter(name):
    perm = [2, 0, 1]
    made, data, method = outputs(), batch(3), build(name).double()
    expected = method(made, data)
    if name == "cutnmix":
        weight = method.peer_teacher.weight
        weight.data = weight.data.view(K, 3, D)[:, perm].flatten(1)
    actual = method(Outputs(*(x[perm] for x in made)), data._replace(target_LBK=data.target_LBK[perm]))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("name", "zero"), [("dml", ["alpha"]), ("cutnmix", ["alpha", "beta", "gamma"])])
def test_weights_of_zero_are_the_baseline_exactly(name, zero):
    made, method = outputs(dtype=torch.float32), build(name, **dict.fromkeys(zero, 0.0))
    actual, expected = method(made, batch()), build("baseline")(made, batch())
    assert actual == expected
    assert not list(method.parameters()) and method.teacher(made) is None


@pytest.mark.parametrize(("key", "gone"), [("alpha", {"dml"}), ("beta", {"mmd"}), ("gamma", {"pt", "pt_ce"})])
def test_weight_zero_leaves_out_its_term_and_no_other(key, gone):
    made = outputs(dtype=torch.float32)
    full, less = (build("cutnmix", **keys)(made, batch()) for keys in ({}, {key: 0.0}))
    assert less == {term: loss for term, loss in full.items() if term not in gone}


def test_identical_peers_have_nothing_to_tell_one_another():
    made = Outputs(*(x[:1].repeat(2, 1, 1) for x in outputs()))
    losses = build("cutnmix", J=2).double()(made, batch())
    assert losses["dml"] == 0 and losses["mmd"] == 0


def test_dml_by_hand():
    logits = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    data = batch()._replace(target_LBK=torch.tensor([[[1.0, 0.0]]]))
    losses = DML(Sizes(2, 2, D))(Outputs(logits, torch.zeros(2, 1, D)), data)
    assert losses["dml"].item() == pytest.approx(0.1308 + 0.1438, abs=1e-4)
    assert losses["ce"].item() == pytest.approx(0.6931 + 1.3863, abs=1e-4)


def test_tau2_is_a_factor_of_dml_alone():
    made = outputs(dtype=torch.float32)
    on, off = (build("cutnmix", tau2=tau2)(made, batch()) for tau2 in (True, False))
    torch.testing.assert_close(on.pop("dml"), 9 * off.pop("dml"))
    assert on == off


@EACH
def test_compiles_to_one_graph(name):
    graphs, method = [], build(name)

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend=count)
    for seed in range(3):
        made = outputs(dtype=torch.bfloat16, seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(made, batch()), method(made, batch()))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("method", "J", "keys", "message"),
    [
        (DML, 1, {}, r"peers\.count must be at least 2 .*got 1"),
        (DML, 2, {"temperature": 0.0}, r"method\.temperature must be > 0 .*got 0\.0"),
        (DML, 2, {"alpha": -1.0}, r"method\.alpha must be >= 0 .*got -1\.0"),
        (CutnMixDistillation, 1, {}, r"peers\.count must be at least 2 .*got 1"),
        (CutnMixDistillation, 2, {"temperature": -3.0}, r"method\.temperature must be > 0 .*got -3\.0"),
        (CutnMixDistillation, 2, {"temperature": float("inf")}, r"method\.temperature .*got inf"),
        (CutnMixDistillation, 2, {"alpha": float("nan")}, r"method\.alpha .*got nan"),
        (CutnMixDistillation, 2, {"beta": -0.1}, r"method\.beta must be >= 0 .*got -0\.1"),
        (CutnMixDistillation, 2, {"gamma": -0.1}, r"method\.gamma must be >= 0 .*got -0\.1"),
    ],
)
def test_values_without_meaning_are_refused_with_their_key(method, J, keys, message):
    with pytest.raises(ValueError, match=message):
        method(Sizes(J, K, D), **keys)


def test_baseline_trains_any_number_of_peers():
    for J in (1, 4):
        assert Baseline(Sizes(J, K, D))(outputs(J), batch())["ce"] > 0
