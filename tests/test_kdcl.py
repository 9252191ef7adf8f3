"""What KDCL computes: one target for all peers, five ways, against slow references written from the equations."""

import copy
import math

import oracle
import pytest
import torch
from tasks import EPOCHS, B, D, E, K, N, build, make_batch, make_outputs, make_peers, make_task
from torch import Tensor
from torch.nn import functional as F

from cutnmix.models.peers import Outputs
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.method import Task
from cutnmix.trainer.methods import kdcl
from cutnmix.trainer.methods.kdcl import KDCL, general_weights

VARIANTS = ("minlogit", "naive", "linear", "general", "mean")
EACH = pytest.mark.parametrize("variant", VARIANTS)
PEERS = make_peers(1)  # never looked at
T = {"mean": 4.0}


def make(variant: str, J: int = 3, **keys) -> KDCL:
    """In float64. Without held-out images, unless the keys say otherwise."""
    torch.manual_seed(0)
    return KDCL(make_task(J), variant=variant, **{"holdout": 0.0, **keys}).double()


def logits_only(logits_JBK: Tensor) -> Outputs:
    return Outputs(logits_JBK, tuple(torch.zeros(len(logits_JBK), logits_JBK.shape[1], D).double()))


def terms(method: KDCL, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    return method(outputs, batch, PEERS)


# References: an image at a time, a class at a time


def ce(z: Tensor, y: Tensor) -> Tensor:
    return -sum(y[c] * (z[c] - z.exp().sum().log()) for c in range(len(z)))


def best_on_grid(z_JK: Tensor, y: Tensor) -> Tensor:
    """The lowest of CE(sum a z, y) on a grid of a over the simplex, refined around the lowest point again and again."""
    J = len(z_JK)
    centre, width = torch.full((J,), 1 / J, dtype=torch.float64), 1.0
    for _ in range(60):
        offsets = torch.cartesian_prod(*[torch.linspace(-width, width, 5, dtype=torch.float64)] * (J - 1))
        free = centre[:-1] + offsets.reshape(-1, J - 1)
        a = torch.cat([free, 1 - free.sum(1, keepdim=True)], 1)
        a = a.clamp(min=0) / a.clamp(min=0).sum(1, keepdim=True)
        z = a @ z_JK
        centre = a[(z.logsumexp(1) - z @ y).argmin()]
        width *= 0.7
    return centre @ z_JK


def target_of(variant: str, z_JK: Tensor, y: Tensor) -> Tensor:
    J, classes = z_JK.shape
    if variant == "naive":
        return min(z_JK, key=lambda z: float(ce(z, y)))
    if variant == "linear":
        return best_on_grid(z_JK, y)
    if variant == "minlogit":
        own = [sum(y[c] * z[c] for c in range(classes)) for z in z_JK]
        return torch.stack([torch.stack([z_JK[i, c] - own[i] for i in range(J)]).min() for c in range(classes)])
    if variant == "general":  # before any weights are known
        return (sum(z.softmax(0) for z in z_JK) / J).log()
    return sum(z_JK) / J


def objective(j: int, variant: str, logits_JBK: Tensor, target_LBK: Tensor) -> Tensor:
    """L^j of the defaults, image by image, with the target detached."""
    t, total = T.get(variant, 3.0), 0.0
    own_BK, mean_BK = target_LBK.double().expand(len(logits_JBK), B, K)[j], target_LBK.mean(0).double()
    for b in range(B):
        z_t = target_of(variant, logits_JBK[:, b].detach(), mean_BK[b])
        kl = F.kl_div((logits_JBK[j, b] / t).log_softmax(0), (z_t / t).softmax(0), reduction="sum")
        ce_j = ce(logits_JBK[j, b], own_BK[b])
        total = total + (0.5 * ce_j + 0.5 * t**2 * kl if variant == "mean" else ce_j + t**2 * kl)
    return total / B


@pytest.mark.parametrize("J", [2, 3])
@pytest.mark.parametrize(("L", "soft"), [(1, False), (1, True), (3, True)])
@EACH
def test_each_peer_gets_the_gradient_of_its_own_objective(variant, L, soft, J):
    outputs, batch = make_outputs(J), make_batch(min(L, J), soft=soft)
    total = sum(terms(make(variant, J), outputs, batch).values())
    (actual,) = torch.autograd.grad(total, outputs.logits_JBK)
    per_peer = [objective(j, variant, outputs.logits_JBK, batch.target_LBK) for j in range(J)]
    near = 2e-3 if variant == "linear" else 1e-10  # the target itself is found by search
    torch.testing.assert_close(total, sum(per_peer), rtol=near, atol=0)
    for j in range(J):
        (expected,) = torch.autograd.grad(per_peer[j], outputs.logits_JBK, retain_graph=True)
        torch.testing.assert_close(actual[j], expected[j], rtol=near, atol=near)
        assert not expected[torch.arange(J) != j].any()


def test_minlogit_by_hand():
    logits_JBK = torch.tensor([[[2.0, 1.0, 0.0]], [[1.0, -1.0, 0.5]]])
    target_BK = torch.tensor([[1.0, 0.0, 0.0]])
    assert kdcl.minlogit(logits_JBK, target_BK).tolist() == [[0.0, -2.0, -2.0]]


def many(J: int, spread: float, soft: bool) -> tuple[Tensor, Tensor]:
    """Logits of 150 images that peers agree on by and large, most of them right; float32."""
    g = torch.Generator().manual_seed(J)
    label = torch.randint(10, (2, 150), generator=g)
    own, other = torch.eye(10)[label]
    common, apart = torch.randn(150, 10, generator=g), torch.randn(J, 150, 10, generator=g)
    right = torch.rand(J, 150, 1, generator=g) * own
    return spread * (common + 0.7 * apart + 3 * right), 0.6 * own + 0.4 * other if soft else own


@pytest.mark.parametrize(
    ("J", "spread", "soft", "tolerance"),
    [(2, 1.0, False, 1e-6), (2, 4.0, True, 1e-5), (3, 1.0, False, 1e-5), (3, 4.0, False, 1e-3), (4, 4.0, False, 1e-3)],
)
def test_linear_finds_the_best_point_of_the_simplex(J, spread, soft, tolerance):
    """Against a grid in float64, on 99 of 100 images; on all it is at least as good as the best peer."""
    z_JBK, y_BK = many(J, spread, soft)
    found, wanted = kdcl.linear(z_JBK, y_BK).double(), y_BK.double()
    best = torch.stack([best_on_grid(z.double(), y) for z, y in zip(z_JBK.unbind(1), wanted, strict=True)])

    def errors(z_BK: Tensor) -> Tensor:
        return -(wanted * z_BK.log_softmax(-1)).sum(-1)

    gap = errors(found) - errors(best)
    assert gap.quantile(0.99) < tolerance
    assert gap.min() > -1e-5  # else the reference were no optimum
    assert (errors(found) <= errors(kdcl.naive(z_JBK, y_BK).double()) + 1e-5).all()
    coordinates = torch.linalg.lstsq(z_JBK.double().permute(1, 2, 0), found[..., None]).solution[..., 0]
    torch.testing.assert_close(coordinates.sum(1), torch.ones(150).double(), rtol=0, atol=1e-4)
    assert coordinates.min() > -1e-4


@EACH
def test_order_of_peers_does_not_matter(variant):
    perm = [2, 0, 1]
    outputs, batch = make_outputs(), make_batch(3)
    other = logits_only(outputs.logits_JBK[perm])
    (expected,) = torch.autograd.grad(sum(terms(make(variant), outputs, batch).values()), outputs.logits_JBK)
    moved = terms(make(variant), other, batch._replace(target_LBK=batch.target_LBK[perm]))
    (actual,) = torch.autograd.grad(sum(moved.values()), other.logits_JBK)
    near = {"rtol": 1e-3, "atol": 1e-4} if variant == "linear" else {}
    torch.testing.assert_close(actual, expected[perm], **near)


@EACH
def test_identical_peers_have_nothing_to_tell_one_another(variant):
    logits_JBK = make_outputs().logits_JBK[:1].expand(3, -1, -1)
    assert terms(make(variant), logits_only(logits_JBK), make_batch())["kdcl"].abs() < 1e-12


@EACH
def test_weight_zero_is_the_baseline_exactly(variant):
    outputs = make_outputs()
    actual = terms(make(variant, weight=0.0), outputs, make_batch(3))
    assert actual == build("baseline")(outputs, make_batch(3), PEERS)


def test_weight_one_of_mean_leaves_no_cross_entropy():
    assert terms(make("mean", weight=1.0), make_outputs(), make_batch()).keys() == {"kdcl"}


def test_default_is_minlogit_and_holds_nothing_out():
    assert build("kdcl").variant == "minlogit" and not build("kdcl").state_dict()


# general: what is held out, and what is made of it


def full_batch(epoch: float, seed: int = 0) -> Batch:
    """All N images at once."""
    g = torch.Generator().manual_seed(seed)
    label_B = torch.randint(K, (N,), generator=g)
    image_VBCHW = torch.zeros(1, N, 3, 2, 2)
    target_LBK = torch.randn(1, N, K, generator=g).softmax(-1)
    return Batch(image_VBCHW, target_LBK, label_B, torch.arange(N), torch.tensor(epoch, dtype=torch.float64))


def full_logits(seed: int, J: int = 3) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    return logits_only((2 * torch.randn(J, N, K, generator=g, dtype=torch.float64)).requires_grad_())


@pytest.mark.parametrize("holdout", [0.01, 0.5, 0.8])
def test_held_out_images_are_a_fixed_share_and_at_least_one(holdout):
    held_out_N = make("general", holdout=holdout).held_out_N
    assert held_out_N.sum() == math.ceil(holdout * N) and len(held_out_N) == N
    assert torch.equal(held_out_N, make("general", holdout=holdout).held_out_N)


def test_held_out_images_weigh_nothing_and_the_mean_is_over_the_rest():
    method, outputs, batch = make("general", holdout=0.5), full_logits(0), full_batch(0.0)
    (rest,) = (~method.held_out_N).nonzero(as_tuple=True)
    losses = terms(method, outputs, batch)
    alone = logits_only(outputs.logits_JBK[:, rest])
    part = batch._replace(target_LBK=batch.target_LBK[:, rest], index_B=rest)
    torch.testing.assert_close(losses, terms(make("general"), alone, part))
    (grad_JBK,) = torch.autograd.grad(sum(losses.values()), outputs.logits_JBK)
    assert not grad_JBK[:, method.held_out_N].any() and grad_JBK[:, rest].any(-1).all()


def weights_of(errors: list[Tensor]) -> Tensor:
    """From errors (J, K) of images, pair by pair, in float64."""
    J = len(errors[0])
    c = torch.tensor([[sum(float(e[i] @ e[j]) for e in errors) / len(errors) for j in range(J)] for i in range(J)])
    c = c.double() + 1e-3 * sum(c[i, i] for i in range(J)) / J * torch.eye(J)
    w = torch.linalg.solve(c, torch.ones(J).double())
    w = (w / w.sum()).clamp(min=0)
    return w / w.sum()


def test_weights_are_those_of_the_last_epochs_held_out_images():
    method = make("general", holdout=0.5)
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for step in range(9):
        epoch, outputs, batch = step // 3, full_logits(step), full_batch(step / 3, step)
        losses = terms(method, outputs, batch)
        expected = weights_of(seen[epoch - 1]) if epoch else torch.full((3,), 1 / 3).double()
        torch.testing.assert_close(method.weight_J, expected, rtol=1e-6, atol=1e-6)
        rest = ~method.held_out_N
        p = sum(w * z.softmax(-1) for w, z in zip(expected, outputs.logits_JBK[:, rest], strict=True)).log() / 3
        kl = sum(F.kl_div((z[rest] / 3).log_softmax(-1), p.softmax(-1), reduction="sum") for z in outputs.logits_JBK)
        torch.testing.assert_close(losses["kdcl"], 9 * kl / rest.sum(), rtol=1e-5, atol=0)
        p_JBK = outputs.logits_JBK.detach().softmax(-1)
        seen[epoch] += [p_JBK[:, n] - batch.target_LBK[0, n].double() for n in range(N) if method.held_out_N[n]]
    assert not torch.allclose(method.weight_J, torch.full((3,), 1 / 3).double(), atol=0.01)


def test_evaluation_does_not_measure():
    method = make("general", holdout=0.5).eval()
    before = copy.deepcopy(method.state_dict())
    terms(method, full_logits(0), full_batch(2.0))
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_epochs_and_batches_without_held_out_images_keep_the_weights():
    method = make("general", holdout=0.1)
    (held_out,) = method.held_out_N.nonzero(as_tuple=True)
    terms(method, full_logits(0), full_batch(0.0))
    terms(method, full_logits(1), full_batch(1.0))
    weights = method.weight_J.clone()
    for epoch in (1.5, 2.0, 3.0, 4.5):
        batch = full_batch(epoch)._replace(index_B=((held_out + 1) % N).expand(N))
        losses = terms(method, full_logits(int(2 * epoch)), batch)
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        if epoch == 2.0:  # the second half of epoch 1 had none, the first had
            assert not torch.equal(method.weight_J, weights)
            weights = method.weight_J.clone()
    assert torch.equal(method.weight_J, weights)


def test_a_batch_of_held_out_images_alone_is_worth_nothing():
    method, outputs = make("general", holdout=0.1), full_logits(0)
    index_B = method.held_out_N.nonzero()[0].expand(N)
    losses = terms(method, outputs, full_batch(0.0)._replace(index_B=index_B))
    assert losses == {"ce": 0, "kdcl": 0}
    assert not torch.autograd.grad(sum(losses.values()), outputs.logits_JBK)[0].any()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_general_weights_by_hand(scale):
    """Errors that do not go together: each peer by the inverse of its own. Equal peers: equal weights."""
    weights = general_weights(scale * torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    torch.testing.assert_close(weights, torch.tensor([4.0, 2.0, 1.0]) / 7, rtol=2e-3, atol=0)
    torch.testing.assert_close(general_weights(scale * torch.ones(4, 4)), torch.full((4,), 0.25))


def test_a_peer_that_would_count_negatively_does_not_count():
    error_JJ = torch.tensor([[1.0, 1.5, 0.0], [1.5, 3.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.linalg.solve(error_JJ, torch.ones(3))[1] < 0
    weights = general_weights(error_JJ)
    assert weights[1] == 0 and weights.sum() == pytest.approx(1) and weights.min() >= 0


# The contract, for every variant: tests/test_methods.py holds the default one to it


@EACH
def test_huge_float16_logits_stay_finite(variant):
    signs = torch.randint(2, (3, N, K), generator=torch.Generator().manual_seed(0)) * 2 - 1
    method = make(variant, holdout=0.5).float()
    for epoch in (0.0, 1.0):
        outputs = logits_only((signs * 1e4).half().requires_grad_())
        losses = terms(method, outputs, full_batch(epoch))
        sum(losses.values()).backward()
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert outputs.logits_JBK.grad.isfinite().all()


@pytest.mark.parametrize("J", [2, 3])
@EACH
def test_compiles_to_one_graph_and_autocast_changes_nothing(variant, J):
    method = make(variant, J, holdout=0.5).float()
    twin, graphs = copy.deepcopy(method), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend=count)
    for step in range(4):
        outputs, batch = full_logits(step, J), full_batch(step / 2)
        outputs = outputs._replace(logits_JBK=outputs.logits_JBK.detach().float())
        with torch.autocast("cpu", torch.bfloat16):
            actual = compiled(outputs, batch, PEERS)
        torch.testing.assert_close(actual, terms(twin, outputs, batch), rtol=0, atol=0)
    torch.testing.assert_close(method.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert len(graphs) == 1


def test_state_is_complete():
    method = make("general", holdout=0.5)
    for step in range(3):
        terms(method, full_logits(step), full_batch(0.75 * step))
    torch.manual_seed(1)
    other = KDCL(make_task(3), variant="general", holdout=0.5).double()
    other.load_state_dict(method.state_dict())
    for epoch in (1.75, 2.0):
        assert terms(other, full_logits(3), full_batch(epoch)) == terms(method, full_logits(3), full_batch(epoch))
    torch.testing.assert_close(other.state_dict(), method.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("mode", ["dispatch", pytest.param("cuda", marks=pytest.mark.gpu)])
@EACH
def test_a_step_reads_nothing_back_to_the_host(variant, mode):
    device = "cuda" if mode == "cuda" else "cpu"
    method, batch = make(variant, holdout=0.5).to(device), full_batch(1.0)
    batch = Batch(*(x if x is None else x.to(device) for x in batch))
    logits_JBK = full_logits(0).logits_JBK.detach().to(device).requires_grad_()
    outputs = Outputs(logits_JBK, ())
    with oracle.Dispatches() as watched:
        sum(terms(method, outputs, batch).values()).backward()  # the first call sets the libraries up
        try:
            if mode == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            sum(terms(method, outputs, batch).values()).backward()
        finally:
            if mode == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert watched.waits == []
    assert logits_JBK.grad is not None


def test_peers_of_any_architecture():
    task = Task(2, K, (4, 9), E, num_images=N, epochs=EPOCHS, peers=None)
    z = make_outputs(2).logits_JBK
    outputs = Outputs(z, (torch.zeros(B, 4), torch.zeros(B, 9)))
    assert KDCL(task)(outputs, make_batch(), PEERS).keys() == {"ce", "kdcl"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": "mean", "weight": 1.5}, r"method\.weight must be <= 1 under method\.variant: mean, got 1\.5"),
        ({"variant": "general", "holdout": 0.99}, rf"method\.holdout must leave images .* 0\.99 of {N} is all"),
    ],
)
def test_values_that_do_not_fit_the_others_are_refused_with_their_key(keys, message):
    with pytest.raises(ValueError, match=message):
        KDCL(make_task(2), **keys)
