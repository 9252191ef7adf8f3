"""Trained runs beside each other on the same images: how far they are apart, and how much of that the images may make.

With h_n the share of a run's peers that are right about image n (of the ensemble, or a teacher: 1 or 0), n = 1 ... N:

    top-1 = 100 mean_n h_n                        standard error 100 sd_n(h_n) / sqrt(N)
    difference to the first run, d_n = h_n - h0_n:  100 mean_n d_n, 100 sd_n(d_n) / sqrt(N), two-sided paired t test

That is of these trained networks and of images drawn anew. What another seed would have given is not in it: for that,
train more seeds (cutnmix reproduce, whose report tests over seeds).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cutnmix.pipeline.datasets import TestImages
from cutnmix.trainer.config import Config
from cutnmix.trainer.folder import RunError, RunFolder, csv_text, write_atomically
from cutnmix.trainer.metrics import is_peer, predict
from cutnmix.trainer.run import saved, trained

_SAME = {  # keys under `data` that say which images those are
    "test": ("name", "classes", "val", "corrupt"),
    "unused": ("name", "classes", "train", "images_per_class", "corrupt"),
}


class Compared(NamedTuple):
    """One prediction of one run, in percent and points of it."""

    run: str  # the folder's name
    prediction: str  # "mean" of the peers, "ensemble", and what else the method predicts by
    top1: float
    error: float  # the standard error of top1
    difference: float | None  # to the first run's prediction of that name; None for itself, and where it has none
    difference_error: float | None
    p: float | None  # None too where the two are right about the same images


class Comparison(NamedTuple):
    """All runs, in their order."""

    images: int  # N
    rows: list[Compared]


def compare(runs: Sequence[Path], *, best: bool = False, test: TestImages = "test") -> Comparison:
    """Score the last checkpoints, or with `best` those chosen on the test images, on the images that `test` names.

    Raises: RunError, before anything is scored, unless all runs have checkpoints and were made for the same images.
    """
    configs = {run: RunFolder(run).read_config() for run in runs}
    for run, config in configs.items():
        _check_same(runs[0], configs[runs[0]], run, config, test)
        saved(run, best=best)
    hits = {run: _hits(run, best, test) for run in configs}
    first = hits[runs[0]]
    rows = [
        _compared(run.name, name, hit_N, None if run == runs[0] else first.get(name))
        for run, found in hits.items()
        for name, hit_N in found.items()
    ]
    return Comparison(len(next(iter(first.values()))), rows)


def told(test: str, count: int) -> str:
    """So many images and what they are, for people."""
    return f"{count:,} {'test images' if test == 'test' else 'training images that no run has used'}"


def p_digits(p: float) -> str:
    """A p value to three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_csv(path: Path, compared: Comparison, test: TestImages) -> None:
    """A line a row, with the number of images and what they are."""
    write_atomically(
        path, csv_text([{"on": test, "images": compared.images, **row._asdict()} for row in compared.rows])
    )


def _check_same(first: Path, wanted: Config, run: Path, config: Config, test: TestImages) -> None:
    for key in _SAME[test]:
        ours, theirs = getattr(config.data, key), getattr(wanted.data, key)
        if ours != theirs:
            raise RunError(
                f"{run}: its data.{key} is {ours!r}, of {first} it is {theirs!r}: the images must be the same"
            )


def _hits(run: Path, best: bool, test: TestImages) -> dict[str, np.ndarray]:
    """h_n by name, float64 (N,): `mean`, `ensemble`, then the method's own."""
    found: dict[str, list[torch.Tensor]] = {}
    with trained(run, best=best, test=test) as (parts, _):
        plan = parts.test_plan()
        for log_probs, label_B in predict(parts.learner, parts.test_step, parts.test_loader.epoch(plan), plan):
            for name, log_prob_BK in log_probs.items():
                found.setdefault(name, []).append(log_prob_BK.argmax(-1) == label_B)
    whole = {name: torch.cat(parts).double().cpu().numpy() for name, parts in found.items()}
    mean_N = np.mean([hit_N for name, hit_N in whole.items() if is_peer(name)], axis=0)
    return {"mean": mean_N} | {name: hit_N for name, hit_N in whole.items() if not is_peer(name)}


def _compared(run: str, name: str, hit_N: np.ndarray, first_N: np.ndarray | None) -> Compared:
    from scipy.stats import ttest_1samp  # here, because importing it takes a second

    top1, error = _mean(hit_N)
    if first_N is None:
        return Compared(run, name, top1, error, None, None, None)
    difference, difference_error = _mean(hit_N - first_N)
    test: Any = ttest_1samp(hit_N - first_N, 0) if difference_error else None
    return Compared(run, name, top1, error, difference, difference_error, float(test.pvalue) if test else None)


def _mean(value_N: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, times 100."""
    return 100 * float(value_N.mean()), 100 * float(value_N.std(ddof=1)) / len(value_N) ** 0.5
