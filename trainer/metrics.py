"""Test scores of every peer, of their mean, of the ensemble and of what else the method predicts by.

    top1, top5   percent of images whose class is the first / among the first five (fewer classes: all of them)
    nll          mean of -log p(class), nats
    ece          expected calibration error, percent: |confidence - accuracy| over 15 equal bins (Guo et al. 2017)

`mean` is the mean of the peers' scores, the headline; `best_peer` the peer with the best top1 on these very images, an
optimistic choice, so named; `ensemble` predicts by the mean of the peers' probabilities.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.plan import Plan
from cutnmix.trainer.step import Learner, Step

Scores = dict[str, dict[str, float]]


@torch.no_grad()
def evaluate(
    learner: Learner, step: Step, batches: Iterable[Views], plan: Plan, *, num_classes: int, poll: Callable[[], None]
) -> Scores:
    """Scores by name: peer0, peer1, ..., mean, best_peer, ensemble and the method's own predictions, such as teacher.

    The method's own names must be others than these.

    In eval mode, which the learner leaves again. One host synchronisation, at the end. `poll` is called after each
    batch, so that a signal need not wait for the last one.
    """
    learner.peers.eval()
    learner.method.eval()
    metrics: dict[str, MetricCollection] = {}
    for s, views in enumerate(batches):
        batch, outputs = step.predict(learner, views, plan.step(s))
        log_prob_JBK = outputs.logits_JBK.float().log_softmax(-1)
        log_probs = {f"peer{j}": log_prob_BK for j, log_prob_BK in enumerate(log_prob_JBK)}
        log_probs["ensemble"] = log_prob_JBK.logsumexp(0) - math.log(len(log_prob_JBK))
        with step.autocast():
            others = learner.method.predictions(outputs, batch)
        log_probs |= {name: logits_BK.float().log_softmax(-1) for name, logits_BK in others.items()}
        for name, log_prob_BK in log_probs.items():
            if name not in metrics:
                metrics[name] = _metrics(num_classes, log_prob_BK.device)
            _update(metrics[name], log_prob_BK, batch.label_B)
        poll()
    learner.peers.train()
    learner.method.train()
    scores = {name: _read(metric) for name, metric in metrics.items()}
    peers = [score for name, score in scores.items() if name.startswith("peer") and name[4:].isdigit()]
    return {
        **scores,
        "mean": {key: sum(peer[key] for peer in peers) / len(peers) for key in peers[0]},
        "best_peer": max(peers, key=lambda peer: peer["top1"]),
    }


def _metrics(num_classes: int, device: torch.device) -> MetricCollection:
    with device:  # built there: moving them would make the host wait
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(
                    num_classes, top_k=min(5, num_classes), average="micro", validate_args=False
                ),
                "nll": MeanMetric(nan_strategy="disable"),
                "ece": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False),
            }
        )


def _update(metric: MetricCollection, log_prob_BK: Tensor, label_B: Tensor) -> None:
    prob_BK = log_prob_BK.exp()
    for name in ("top1", "top5", "ece"):
        metric[name].update(prob_BK, label_B)
    metric["nll"].update(-log_prob_BK.gather(1, label_B[:, None]))


def _read(metric: MetricCollection) -> dict[str, float]:
    percent = {"top1": 100, "top5": 100, "nll": 1, "ece": 100}
    return {name: factor * float(metric[name].compute()) for name, factor in percent.items()}
