"""Test scores of every peer, of their mean, of the ensemble and of what else the method predicts by.

    top1, top5   percent of images whose class is the first / among the first five (fewer classes: all of them)
    nll          mean of -log p(class), nats
    ece          expected calibration error, percent: |confidence - accuracy| over 15 equal bins (Guo et al. 2017)

`mean` is the mean of the peers' scores, the headline; `best_peer` the peer with the best top1 on these very images, an
optimistic choice, so named; `ensemble` predicts by the mean of the peers' probabilities.

Over several processes each scores its own peers on its own part of the test images; torchmetrics adds up over the
images, and every process gets all scores.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.plan import Plan
from cutnmix.trainer.exchange import Exchange
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.mesh import ONE, Mesh
from cutnmix.trainer.step import Learner, Step

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Scores = dict[str, dict[str, float]]
OVER_PEERS = ("mean", "best_peer", "ensemble")  # beside peer0, peer1, ...: names that no method may give


@torch.no_grad()
def evaluate(
    learner: Learner,
    step: Step,
    batches: Iterable[Views],
    plan: Plan,
    *,
    num_classes: int,
    poll: Callable[[], None],
    mesh: Mesh = ONE,
) -> Scores:
    """Scores by name: peer0, peer1, ..., mean, best_peer, ensemble and the method's own predictions, such as teacher.

    In eval mode, which the learner leaves again. No host synchronisation before the end. `poll` is called after each
    batch, so that a signal need not wait for the last one.

    Local batch norms of several processes have statistics of their own: all score with those of the first.

    Raises: RunError where a prediction of the method's own has one of these names.
    """
    metrics: dict[str, MetricCollection] = {}
    for log_probs, label_B in predict(learner, step, batches, plan, mesh):
        for name, log_prob_BK in log_probs.items():
            if name not in metrics:
                metrics[name] = _metrics(num_classes, log_prob_BK.device, mesh)
            _update(metrics[name], log_prob_BK, label_B)
        poll()
    parts = mesh.of_all_peers({name: _read(metric) for name, metric in metrics.items()})
    scores = {name: score for part in parts for name, score in part.items() if is_peer(name)} | parts[0]
    peers = [score for name, score in scores.items() if is_peer(name)]
    return {
        **scores,
        "mean": {key: sum(peer[key] for peer in peers) / len(peers) for key in peers[0]},
        "best_peer": max(peers, key=lambda peer: peer["top1"]),
    }


@torch.no_grad()
def predict(
    learner: Learner, step: Step, batches: Iterable[Views], plan: Plan, mesh: Mesh = ONE
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """({name: log_prob_BK, float32}, label_B) of each batch, for every name of `evaluate` that predicts an image.

    In eval mode, which the learner leaves again after the last batch.
    """
    mesh.share_buffers(learner.peers, learner.method)
    learner.peers.eval()
    learner.method.eval()
    for s, views in enumerate(batches):
        batch, outputs = step.predict(learner, views, plan.step(s))
        log_prob_JBK = outputs.logits_JBK.float().log_softmax(-1)
        own = mesh.over.own(mesh.over.peers(len(log_prob_JBK)))
        log_probs = {f"peer{j}": log_prob_BK for j, log_prob_BK in zip(own, log_prob_JBK, strict=True)}
        log_probs["ensemble"] = _ensemble(log_prob_JBK, mesh.over)
        with step.autocast():
            others = learner.method.predictions(outputs, batch)
        if taken := [name for name in others if name in OVER_PEERS or is_peer(name)]:
            raise RunError(f"method {type(learner.method).__name__}: no prediction of its own may be named {taken[0]}")
        log_probs |= {name: logits_BK.float().log_softmax(-1) for name, logits_BK in others.items()}
        yield log_probs, batch.label_B
    learner.peers.train()
    learner.method.train()


def is_peer(name: str) -> bool:
    """Whether a name of `evaluate` is that of one peer."""
    return name.startswith("peer") and name[4:].isdigit()


def peer_names(names: Iterable[str]) -> list[str]:
    """Those of peers, in the order of their numbers."""
    return sorted(filter(is_peer, names), key=lambda name: int(name[4:]))


def _ensemble(log_prob_JBK: Tensor, over: Exchange) -> Tensor:
    """The ensemble's log mean_j p_j (B, K). Over processes the sum is in float64, which holds p down to 1e-308.

    At most 0: rounding can end a hair above it, and where one is above 1 torchmetrics takes the whole batch for logits.
    """
    num_peers = over.peers(len(log_prob_JBK))
    if over.peer is None:
        return (log_prob_JBK.logsumexp(0) - math.log(num_peers)).clamp(max=0)
    (prob_BK,) = over.total(log_prob_JBK.double().exp().sum(0))
    return (prob_BK / num_peers).log().clamp(max=0).to(log_prob_JBK.dtype)


def _metrics(num_classes: int, device: torch.device, mesh: Mesh) -> "MetricCollection":
    # Here, because importing it takes two seconds (it imports scipy.signal), and what only trains or fails needs none.
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    top5, group = min(5, num_classes), mesh.data_group
    with device:  # built there, so that no state is moved
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False, process_group=group),
                "top5": MulticlassAccuracy(
                    num_classes, top_k=top5, average="micro", validate_args=False, process_group=group
                ),
                "nll": MeanMetric(nan_strategy="disable", process_group=group),
                "ece": MulticlassCalibrationError(
                    num_classes, n_bins=15, norm="l1", validate_args=False, process_group=group
                ),
            }
        )


def _update(metric: "MetricCollection", log_prob_BK: Tensor, label_B: Tensor) -> None:
    # torchmetrics gives a confidence of exactly 1 a bin of its own, the sixteenth.
    prob_BK = log_prob_BK.exp().clamp(max=1 - torch.finfo(torch.float32).eps / 2)
    for name in ("top1", "top5", "ece"):
        metric[name].update(prob_BK, label_B)
    metric["nll"].update(-log_prob_BK.gather(1, label_B[:, None]))


def _read(metric: "MetricCollection") -> dict[str, float]:
    percent = {"top1": 100, "top5": 100, "nll": 1, "ece": 100}
    return {name: factor * float(metric[name].compute()) for name, factor in percent.items()}
