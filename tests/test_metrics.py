"""The scores are those of a loop over images in NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cutnmix.models.peers import Outputs
from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Distort, Mix
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.metrics import Scores, evaluate
from cutnmix.trainer.step import Learner, Step

N, BATCH = 53, 16  # three full batches and one of 5


class Known(nn.Module):
    """Peers whose outputs are looked up by the number of the image."""

    def __init__(self, logits_JNK: Tensor):
        super().__init__()
        self.logits_JNK = logits_JNK

    def forward(self, index_B: Tensor) -> Outputs:
        return Outputs(self.logits_JNK[:, index_B], (index_B[:, None].float(),) * len(self.logits_JNK))


class Taught(nn.Module):
    """A method that predicts on its own, under any names, by logits that are looked up as well."""

    def __init__(self, logits: dict[str, Tensor]):
        super().__init__()
        self.logits = logits

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert not self.training
        index_B = outputs.features[0][:, 0].long()
        assert torch.equal(index_B, batch.index_B)
        return {name: logits_NK[index_B] for name, logits_NK in self.logits.items()}


def evaluated(
    logits_JNK: np.ndarray, label_N: np.ndarray, *, peers=Known, poll=lambda: None, **predictions: np.ndarray
) -> Scores:
    plan = make_plan(
        seed=0, epoch=0, num_images=len(label_N), size=(2, 2), batch_size=BATCH, distort=Distort().evaluation(),
        mix=Mix(), num_views=1, num_peers=1, shuffle=False,
    )  # fmt: skip
    method = Taught({name: torch.from_numpy(logits_NK).float() for name, logits_NK in predictions.items()})
    learner = Learner(peers(torch.from_numpy(logits_JNK).float()), method, None, None)
    views = (Views(torch.zeros(1), None, torch.from_numpy(label_N)[i], i) for i in plan.index_N.split(BATCH))
    scores = evaluate(
        learner, Step(unmixed, "cpu", torch.float32), views, plan, num_classes=logits_JNK.shape[-1], poll=poll
    )
    assert learner.peers.training and learner.method.training
    return scores


def unmixed(views: Views, draws) -> Batch:
    return Batch(views.index_B, torch.zeros(1), views.label_B, views.index_B, draws.epoch)


def reference(prob_NK: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """One image at a time."""
    first, five, nll = 0, 0, 0.0
    bins = [[] for _ in range(15)]
    for prob_K, label in zip(prob_NK, label_N, strict=True):
        order = sorted(range(len(prob_K)), key=lambda k: -prob_K[k])
        first += order[0] == label
        five += label in order[:5]
        nll -= np.log(prob_K[label])
        bins[int(prob_K.max() * 15)].append((prob_K.max(), order[0] == label))
    gaps = (len(b) * abs(np.mean([c for c, _ in b]) - np.mean([hit for _, hit in b])) for b in bins if b)
    scores = {"top1": 100 * first, "top5": 100 * five, "nll": nll, "ece": 100 * sum(gaps)}
    return {name: value / len(label_N) for name, value in scores.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def drawn(J: int, K: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of peers that are right more often than not, and labels."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(0, K, N)
    return 2 * rng.standard_normal((J, N, K)) + 2 * np.eye(K)[label_N], label_N


@pytest.mark.parametrize("K", [2, 3, 5, 6, 20])
@pytest.mark.parametrize("J", [1, 3])
def test_scores_are_those_of_a_loop_over_images(J, K):
    logits_JNK, label_N = drawn(J, K)
    (teacher_NK, leader_NK), _ = drawn(2, K, seed=1)
    made = evaluated(logits_JNK, label_N, teacher=teacher_NK, leader=leader_NK)
    probs = {f"peer{j}": softmax(logits_NK) for j, logits_NK in enumerate(logits_JNK)}
    probs |= {"ensemble": softmax(logits_JNK).mean(0), "teacher": softmax(teacher_NK), "leader": softmax(leader_NK)}
    for name, prob_NK in probs.items():
        assert made[name] == pytest.approx(reference(prob_NK, label_N), rel=1e-5, abs=1e-5), name
    assert made.keys() == {*probs, "mean", "best_peer"}


def test_the_mean_is_of_scores_and_the_best_peer_is_the_best_by_top1():
    logits_JNK, label_N = drawn(4, 10)
    made = evaluated(logits_JNK, label_N)
    peers = [made[f"peer{j}"] for j in range(4)]
    for key in ("top1", "top5", "nll", "ece"):
        assert made["mean"][key] == pytest.approx(np.mean([peer[key] for peer in peers]))
    assert made["best_peer"] == max(peers, key=lambda peer: peer["top1"])


def test_a_method_without_predictions_of_its_own_adds_no_score():
    assert evaluated(*drawn(2, 4)).keys() == {"peer0", "peer1", "ensemble", "mean", "best_peer"}


def test_what_the_method_predicts_is_no_peer():
    """The mean and the best are the peers' own, however good the method's predictions are."""
    logits_JNK, label_N = drawn(2, 4)
    alone, beside = (evaluated(logits_JNK, label_N, **more) for more in ({}, {"teacher": 9 * np.eye(4)[label_N]}))
    assert beside.pop("teacher")["top1"] == 100 > alone["best_peer"]["top1"]
    assert beside == alone


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_with_up_to_five_classes_all_are_among_the_first_five(K):
    assert evaluated(*drawn(2, K))["mean"]["top5"] == 100


def test_certainty_that_is_wrong_is_finite():
    logits_JNK, label_N = drawn(1, 3)
    logits_JNK[:] = 200 * np.eye(3)[(label_N + 1) % 3]
    scores = evaluated(logits_JNK, label_N)["peer0"]
    assert scores == pytest.approx({"top1": 0, "top5": 100, "nll": 200, "ece": 100})


@pytest.mark.parametrize("name", ["peer0", "peer7", "mean", "best_peer", "ensemble"])
def test_a_prediction_of_the_methods_own_has_no_name_of_the_evaluation(name):
    with pytest.raises(RunError, match=f"method Taught: no prediction of its own may be named {name}"):
        evaluated(*drawn(2, 4), **{name: np.eye(4)[drawn(2, 4)[1]]})


def test_full_certainty_falls_into_the_last_of_fifteen_bins():
    """torchmetrics has a sixteenth for it: here half of the last bin is certain and right, half unsure and wrong."""
    label_N = np.zeros(N, dtype=int)
    logits_JNK = np.zeros((1, N, 2))
    logits_JNK[:, ::2, 0] = 200
    logits_JNK[:, 1::2, 1] = np.log(0.95 / 0.05)
    right = (N + 1) // 2
    expected = 100 * abs((right + 0.95 * (N - right)) - right) / N
    assert evaluated(logits_JNK, label_N)["peer0"]["ece"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("J", range(2, 17))
def test_an_ensemble_of_certain_peers_is_certain(J):
    """Rounding puts log(sum of J ones) - log J above 0 for some J, and torchmetrics took such a batch for logits."""
    label_N = np.random.default_rng(0).integers(0, 10, N)
    logits_JNK = np.tile(200 * np.eye(10)[label_N], (J, 1, 1))
    logits_JNK[:, ::2] = np.random.default_rng(1).standard_normal((1, 1, 10))  # these are unsure, and all alike
    scores = evaluated(logits_JNK, label_N)
    assert scores["ensemble"] == pytest.approx(scores["peer0"], rel=1e-5, abs=1e-5)


def test_peers_are_evaluated_in_eval_mode_without_a_graph():
    modes = set()

    class Watched(Known):
        def forward(self, index_B: Tensor) -> Outputs:
            modes.add((self.training, torch.is_grad_enabled()))
            return super().forward(index_B)

    evaluated(*drawn(2, 4), peers=Watched)
    assert modes == {(False, False)}


def test_a_signal_is_polled_after_every_batch():
    polls = []
    evaluated(*drawn(1, 4), poll=lambda: polls.append(1))
    assert len(polls) == 4
