"""One step is what it says: J ordinary trainings side by side, and the host never waits for the device."""

import copy
import math

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutnmix.models import NETWORKS
from cutnmix.models.peers import Outputs
from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer import run
from cutnmix.trainer.build import Parts, build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.step import Learner, Step, Tally

EACH = pytest.mark.parametrize("method", ["baseline", "dml", "cutnmix"])  # the others: test_methods.py
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
LR = 0.05
SMALL = [
    "data.classes=4",
    "data.images_per_class=6",
    "batch_size=8",
    "loader=resident",
    "peers.network=tiny",
    "precision=fp32",
]


class Tiny(nn.Module):
    """A network in the smallest sense."""

    feature_dim = 6

    def __init__(self, num_classes: int, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=3)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, num_classes)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        feature_BD = self.norm(self.conv(image_BCHW)).relu().mean((2, 3))
        return self.head(feature_BD), feature_BD


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", lambda num_classes: Tiny(num_classes, norm=False))
    monkeypatch.setitem(NETWORKS, "normed", lambda num_classes: Tiny(num_classes, norm=True))


def parts_of(*overrides: str) -> Parts:
    """24 digits of 4 classes, in 3 batches of 8."""
    return build(load_config("quickstart", [*SMALL, *overrides]))


def batches(parts: Parts, epoch: int = 0) -> list[tuple[Views, Draws]]:
    plan = parts.plan(epoch)
    return [(views, plan.step(s)) for s, views in enumerate(parts.loader.epoch(plan))]


def train(parts: Parts, num_steps: int = 2, lr: float = LR) -> Tally:
    tally = Tally([])
    for views, draws in batches(parts)[:num_steps]:
        parts.step.train(parts.learner, views, draws, tally, lr=lr, share=1.0, update=True)
    return tally


def weights(learner: Learner) -> dict[str, Tensor]:
    parts = {"peers": learner.peers, "method": learner.method}
    return {f"{part}.{name}": p.detach().clone() for part, m in parts.items() for name, p in m.named_parameters()}


@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_a_batch_may_be_larger_than_any_data(loader):
    """DALI takes no batch size that does not fit into 32 bits."""
    keys = [f"{key}={3_000_000_000}" for key in ("batch_size", "eval_batch_size")]
    parts = parts_of(f"loader={loader}", *keys, "method=cs_kd", "mix=none")
    ((views, _),) = batches(parts)
    (test,) = parts.test_loader.epoch(parts.test_plan())
    assert views.label_B.shape == (2 * 24,) and len(test.label_B) == len(parts.splits.test)
    parts.close()


# The same by hand


def objective(j: int, outputs: Outputs, target_BK: Tensor, teacher_BK: Tensor | None, keys: dict[str, float]) -> Tensor:
    """L^j of Eq. 8, pair by pair, all others held fixed."""
    logits, features = outputs.logits_JBK, outputs.features
    T, others = keys["temperature"], [k for k in range(len(logits)) if k != j]

    def divergence(teacher_BK: Tensor) -> Tensor:
        fixed_BK = (teacher_BK.detach() / T).softmax(-1)
        return T**2 * F.kl_div((logits[j] / T).log_softmax(-1), fixed_BK, reduction="batchmean")

    loss = F.cross_entropy(logits[j], target_BK)
    if keys["alpha"]:
        loss = loss + keys["alpha"] * sum(divergence(logits[k]) for k in others) / len(others)
    if keys["beta"]:
        gaps = ((features[j].mean(0) - features[k].mean(0).detach()).square().sum() for k in others)
        loss = loss + keys["beta"] * sum(gaps) / len(others)
    return loss if teacher_BK is None else loss + keys["gamma"] * divergence(teacher_BK)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("baseline", {"temperature": 1.0, "alpha": 0.0, "beta": 0.0}),
        ("dml", {"temperature": 1.0, "alpha": 1.0, "beta": 0.0}),
        ("cutnmix", {"temperature": 3.0, "alpha": 0.6, "beta": 0.3, "gamma": 0.1}),
    ],
)
@pytest.mark.parametrize("J", [2, 3])
def test_steps_are_those_of_j_optimizers_and_j_backward_passes(method, keys, J):
    parts = parts_of(f"method={method}", f"peers.count={J}", "peers.network=normed")
    nets, own = copy.deepcopy(parts.learner.peers.nets), copy.deepcopy(parts.learner.method)

    def sgd(module: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4)

    optimizers = [sgd(net) for net in nets] + ([sgd(own)] if list(own.parameters()) else [])
    for views, draws in batches(parts)[:2]:
        batch = parts.step.mix(views, draws)
        logits, features = zip(*map(lambda n, x: n(x), nets, batch.image_VBCHW), strict=True)
        outputs = Outputs(torch.stack(logits), features)
        target_BK = batch.target_LBK[0]
        teacher_BK = own.peer_teacher(torch.cat(features, -1).detach()) if "gamma" in keys else None
        for j in range(J):
            objective(j, outputs, target_BK, teacher_BK, keys).backward(retain_graph=True)
        if teacher_BK is not None:
            F.cross_entropy(teacher_BK, target_BK).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    train(parts)
    expected = Learner(nn.ModuleDict({"nets": nets}), own, parts.learner.optimizer, parts.learner.scaler)
    torch.testing.assert_close(weights(parts.learner), weights(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["baseline", "dml"])  # not cutnmix: the MMD is no mean over the batch
def test_two_half_batches_make_the_step_of_the_whole(method):
    whole, halves = (parts_of("mix=none", f"method={method}", f"batch_size={size}") for size in (8, 4))
    train(whole, num_steps=1)
    for i, (views, draws) in enumerate(batches(halves)[:2]):
        halves.step.train(halves.learner, views, draws, Tally([]), lr=LR, share=0.5, update=i == 1)
    torch.testing.assert_close(weights(halves.learner), weights(whole.learner), rtol=1e-5, atol=1e-7)


def test_a_group_cut_short_by_the_epochs_end_is_a_whole_update(tmp_path, monkeypatch):
    calls = []

    def spy(self, *_, share: float, update: bool, **__) -> None:
        calls.append((share, update))
        original(self, *_, share=share, update=update, **__)

    original = Step.train
    monkeypatch.setattr(Step, "train", spy)
    keys = ["batch_size=5", "optimizer.accumulate=2", "epochs=1", f"runs={tmp_path}"]  # 24 images: 5, 5, 5, 5, 4
    run.train(load_config("quickstart", [*SMALL, *keys]))
    assert calls == [(0.5, False), (0.5, True), (0.5, False), (0.5, True), (1.0, True)]


def test_without_an_update_only_gradients_change():
    parts = parts_of()
    before = weights(parts.learner)
    views, draws = batches(parts)[0]
    parts.step.train(parts.learner, views, draws, Tally([]), lr=LR, share=0.5, update=False)
    torch.testing.assert_close(weights(parts.learner), before, rtol=0, atol=0)
    assert not parts.learner.optimizer.state and all(p.grad is not None for p in parts.learner.peers.parameters())


def test_the_step_takes_the_rate_it_is_given():
    slow, fast = (parts_of("optimizer.weight_decay=0", "mix=none") for _ in range(2))
    start = weights(slow.learner)
    train(slow, 1, lr=0.01), train(fast, 1, lr=0.02)
    moved, twice = ({n: w - start[n] for n, w in weights(p.learner).items()} for p in (slow, fast))
    torch.testing.assert_close({name: 2 * move for name, move in moved.items()}, twice, rtol=1e-3, atol=1e-6)


def test_weight_decay_is_of_every_parameter_norms_and_biases_too():
    """As in the lineage; the first update of Nesterov moves by lr (1 + momentum) times the gradient, decay included."""
    plain, decayed = (parts_of("peers.network=normed", f"optimizer.weight_decay={decay}") for decay in (0, 0.5))
    start = weights(plain.learner)
    train(plain, 1), train(decayed, 1)
    ours, less = weights(plain.learner), weights(decayed.learner)
    taken, expected = {n: ours[n] - less[n] for n in start}, {n: LR * 1.9 * 0.5 * w for n, w in start.items()}
    torch.testing.assert_close(taken, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (torch.ones(()), "Tensor"),
        ({"ce": torch.ones(2)}, r"\{'ce': \(2,\)\}"),
        ({"ce": torch.ones(()), "kl": 0.0}, r"\{'ce': \(\), 'kl': 'float'\}"),
        ({}, r"\{\}"),
    ],
    ids=["one tensor", "a loss a peer", "a plain number", "none"],
)
def test_losses_that_cannot_be_added_up_are_told_with_the_method(losses, told, monkeypatch):
    parts = parts_of("method=dml")
    monkeypatch.setattr(parts.learner.method, "forward", lambda *_: losses)
    with pytest.raises(RunError, match=rf"^method: forward of DML must return named losses, .*; it returns {told}$"):
        train(parts, 1)


@pytest.mark.parametrize("name", ["total", "top1"])
def test_a_loss_has_no_name_that_the_record_has_for_its_own(name, monkeypatch):
    parts = parts_of("method=dml")
    monkeypatch.setattr(parts.learner.method, "forward", lambda *_: {"ce": torch.ones(()), name: torch.ones(())})
    with pytest.raises(RunError, match=f"^method: no loss of DML may be named {name}, as in the record$"):
        train(parts, 1)


# What it is made of


def test_the_seed_decides_data_and_weights_of_peers_and_method():
    def made(seed: int) -> list[Tensor]:
        parts = parts_of(f"seed={seed}")
        modules, plan = [*parts.learner.peers.nets, parts.learner.method], parts.plan(0)
        flat = [torch.cat([p.detach().flatten() for p in module.parameters()]) for module in modules]
        return [plan.index_N, plan.crop_VN2, plan.lam_SL, *flat]

    for one, same, other in zip(made(1), made(1), made(2), strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_drop_last_is_of_the_runs_plan():
    counts = [len(parts_of("batch_size=10", f"drop_last={drop}").plan(0).index_N) for drop in ("false", "true")]
    assert counts == [24, 20]


def test_test_images_come_as_they_are():
    parts = parts_of("distort.flip=1.0", "distort.cutout=4", "distort.rotation=20", "eval_batch_size=50")
    plan, images = parts.test_plan(), torch.from_numpy(parts.splits.test.array)
    made = torch.cat([views.image_VBCHW[0] for views in parts.test_loader.epoch(plan)])
    assert torch.equal(made, images.permute(0, 3, 1, 2)) and plan.step(0).hole_VB4 is None


def test_a_method_is_told_of_its_task():
    method = parts_of("method=ps_kd", "mix=none", "epochs=7").learner.method
    assert method.epochs == 7 and method.past_JNK.shape == (2, 24, 4)


# Compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@EACH
@pytest.mark.parametrize("grain", ["peers", "step"])
def test_compiled_is_eager(method, grain):
    torch._dynamo.reset()
    eager, compiled = (parts_of(f"method={method}", "peers.network=normed") for _ in range(2))
    step, learner = compiled.step, compiled.learner
    if grain == "peers":
        for module in (*learner.peers.nets, learner.method, step.mix):
            module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        step._forward = torch.compile(step.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    losses = [train(parts).read() for parts in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights(learner), weights(eager.learner), rtol=1e-4, atol=1e-6)


def test_peers_of_any_number_compile_to_the_same_few_graphs():
    """One for all peers: compile time does not grow with J."""
    counts = []
    for J in (2, 5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        parts = parts_of(f"peers.count={J}", "peers.network=normed")
        for net in parts.learner.peers.nets:
            net.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        train(parts)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [1, 1]


def test_compiled_modules_keep_the_names_of_a_checkpoint():
    parts = parts_of()
    names = parts.learner.state_dict()["peers"].keys()
    for net in parts.learner.peers.nets:
        net.compile(backend="aot_eager")
    assert parts.learner.state_dict()["peers"].keys() == names


# No waiting


@EACH
@PRECISIONS
def test_a_training_step_reads_no_value(method, precision):
    parts = parts_of(f"method={method}", f"precision={precision}", "distort.cutout=4", "peers.network=normed")
    tally = train(parts, 1)  # what is made once is not watched
    plan = parts.plan(1)
    with oracle.Dispatches() as watched:
        for s, views in enumerate(parts.loader.epoch(plan)):
            parts.step.train(parts.learner, views, plan.step(s), tally, lr=LR, share=1.0, update=True)
    assert watched.waits == []


# Cost


def count_calls(method: str, J: int) -> int:
    parts = parts_of(f"method={method}", f"peers.count={J}", "peers.network=normed")
    train(parts, 1)
    views, draws = batches(parts)[1]
    with oracle.Dispatches() as watched:
        parts.step.train(parts.learner, views, draws, Tally([]), lr=LR, share=1.0, update=True)
    return len(watched.calls)


@EACH
def test_aten_calls_of_a_step_grow_linearly_with_peers(method):
    calls = [count_calls(method, J) for J in (2, 3, 4, 8)]
    each = calls[1] - calls[0]
    assert calls[2] - calls[1] == each and calls[3] - calls[2] == 4 * each


@EACH
def test_aten_calls_of_the_losses_do_not_depend_on_peers(method):
    counts = []
    for J in (2, 3, 8):
        parts = parts_of(f"method={method}", f"peers.count={J}")
        batch = parts.step.mix(*batches(parts)[0])
        logits_JBK, features, _ = parts.learner.peers(batch.image_VBCHW)
        feature_JBD = torch.stack(features).detach().requires_grad_()
        outputs = Outputs(logits_JBK.detach().requires_grad_(), feature_JBD.unbind())
        with oracle.Dispatches() as watched:
            torch.stack([*parts.learner.method(outputs, batch, parts.learner.peers).values()]).sum().backward()
        # Taking a stack apart for its J parts costs no kernel.
        counts.append(sum(str(call) != "select" for call in watched.calls))
    assert counts == [counts[0]] * 3


# Precision


@EACH
@PRECISIONS
def test_every_method_trains_two_steps_in_every_precision(method, precision):
    parts = parts_of(f"method={method}", f"precision={precision}", "peers.network=normed")
    before = weights(parts.learner)
    losses = train(parts).read()
    assert all(math.isfinite(value) for value in losses.values())
    after = weights(parts.learner)
    assert all(w.isfinite().all() and not torch.equal(w, before[name]) for name, w in after.items())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@EACH
def test_logits_are_narrow_and_losses_and_weights_are_not(method, precision, dtype):
    parts = parts_of(f"method={method}", f"precision={precision}", "peers.network=resnet20")
    batch, outputs, losses = parts.step.forward(parts.learner, *batches(parts)[0])
    assert batch.image_VBCHW.dtype == outputs.logits_JBK.dtype == dtype
    assert batch.target_LBK.dtype == torch.float32
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {w.dtype for w in weights(parts.learner).values()} == {torch.float32}


def test_an_overflow_is_skipped_and_the_scale_halved():
    parts = parts_of("precision=fp16")
    learner = parts.learner
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = weights(learner)
    train(parts, 1)
    torch.testing.assert_close(weights(learner), before, rtol=0, atol=0)
    assert learner.scaler.get_scale() == 2.0**59
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train(parts, 1)
    assert not any(torch.equal(w, before[name]) for name, w in weights(learner).items())


def test_a_first_step_that_overflows_leaves_no_momentum():
    """torch's fused SGD leaves a buffer that it makes in such a step as memory happens to be."""
    straight, overflowed = (parts_of("precision=fp16") for _ in range(2))
    overflowed.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    train(overflowed, 1)
    torch.use_deterministic_algorithms(False)
    for parts in (straight, overflowed):
        parts.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        train(parts)
    torch.testing.assert_close(weights(overflowed.learner), weights(straight.learner), rtol=0, atol=0)


def test_the_loss_scale_does_not_change_the_step():
    plain, scaled = (parts_of() for _ in range(2))
    scaled.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(plain), train(scaled)
    torch.testing.assert_close(weights(scaled.learner), weights(plain.learner), rtol=1e-6, atol=1e-8)


# State


@EACH
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_learner_goes_on_from_its_state_dict(method, precision):
    first, second = (parts_of(f"method={method}", f"precision={precision}", "peers.network=normed") for _ in range(2))
    train(first)
    second.learner.load_state_dict(copy.deepcopy(first.learner.state_dict()))
    losses = [train(parts).read() for parts in (first, second)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(weights(second.learner), weights(first.learner), rtol=0, atol=0)
    assert first.learner.scaler.state_dict() == second.learner.scaler.state_dict()


# The tally


def test_a_tally_reads_means_since_the_last_reading():
    tally, target_LBK = Tally([]), torch.eye(3)[None]
    assert tally.read() == {}
    for ce, kl in ((1.0, 5.0), (2.0, 7.0)):
        tally.add({"ce": torch.tensor(ce), "kl": torch.tensor(kl)}, torch.eye(3)[None], target_LBK)
    assert tally.read() == {"ce": 1.5, "kl": 6.0, "total": 7.5, "top1": 100.0}
    assert tally.read() == {}
    tally.add({"ce": torch.tensor(4.0)}, torch.eye(3)[None], target_LBK)
    assert tally.read() == {"ce": 4.0, "total": 4.0, "top1": 100.0}


def test_a_guess_counts_by_its_share_of_the_target():
    target_BK = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3]])
    first, second = torch.eye(3)[[0, 2]], torch.eye(3)[[2, 1]]
    tally = Tally([])
    tally.add({}, torch.stack([first, second]), target_BK[None])
    assert tally.read()["top1"] == pytest.approx(100 * (0.7 + 0.3 + 0.0 + 0.7) / 4)


def test_peers_with_targets_of_their_own_are_measured_by_them():
    one, two = torch.eye(3)[[0, 1]], torch.eye(3)[[2, 1]]
    tally = Tally([])
    tally.add({}, torch.stack([one, one]), torch.stack([one, two]))
    assert tally.read()["top1"] == pytest.approx(75)


def test_a_tally_holds_no_graph():
    parts = parts_of()
    assert not train(parts, 1).sums.requires_grad
