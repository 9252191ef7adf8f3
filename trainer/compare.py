"""Trained runs beside each other on the same images: how far they are apart, and how much of that the images may make.

With h_n the share of a run's peers that are right about image n (of the ensemble, or a teacher: 1 or 0), n = 1 ... N:

    top-1 = 100 mean_n h_n                        standard error 100 sd_n(h_n) / sqrt(N)
    difference to the first run, d_n = h_n - h0_n:  100 mean_n d_n, 100 sd_n(d_n) / sqrt(N), two-sided paired t test

That is of these trained networks and of images drawn anew. What another seed would have given is not in it.

A RUN is a folder, or a file of predictions that `keep` left of one, see predicted.py: both say the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cutnmix.pipeline.datasets import TestImages
from cutnmix.trainer.config import Config
from cutnmix.trainer.folder import RunError, RunFolder, csv_text, write_atomically
from cutnmix.trainer.predicted import Predicted, name_of, predict_run, read, write
from cutnmix.trainer.run import saved

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


def compare(
    runs: Sequence[Path], *, best: bool = False, test: TestImages = "test", keep: Path | None = None
) -> Comparison:
    """Score the last checkpoints, or with `best` those chosen on the test images, on the images that `test` names.

    `keep`: the folder that is to hold the predictions of each run that is scored, NAME.safetensors.

    Raises: RunError, before anything is scored, unless all runs have checkpoints and were made for the same images.
    """
    predicted = _predicted(runs, best, test, keep)
    hits = {run: found.hits() for run, found in predicted.items()}
    first = hits[runs[0]]
    rows = [
        _compared(predicted[run].run, name, hit_N, None if run == runs[0] else first.get(name))
        for run, found in hits.items()
        for name, hit_N in found.items()
    ]
    return Comparison(len(next(iter(first.values()))), rows)


def told(test: str, count: int) -> str:
    """So many images and what they are, for people."""
    return f"{count:,} {_images(test)}"


def p_digits(p: float) -> str:
    """A p value to three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_csv(path: Path, compared: Comparison, test: TestImages) -> None:
    """A line a row, with the number of images and what they are."""
    write_atomically(
        path, csv_text([{"on": test, "images": compared.images, **row._asdict()} for row in compared.rows])
    )


def _images(test: str) -> str:
    return "test images" if test == "test" else "training images that no run has used"


def _predicted(runs: Sequence[Path], best: bool, test: TestImages, keep: Path | None) -> dict[Path, Predicted]:
    """The predictions of each run once, in order: those on file as they are read, of folders made, and kept."""
    files = {run: read(run) for run in runs if run.is_file()}
    configs = {run: files[run].config if run in files else RunFolder(run).read_config() for run in runs}
    named: dict[str, Path] = {}
    for run, config in configs.items():
        _check_keys(runs[0], configs[runs[0]], run, config, test)
        if run in files:
            _check_file(run, files[run], best, test)
            continue
        saved(run, best=best)
        if keep and (other := named.setdefault(name_of(run), run)) != run:
            raise RunError(f"--keep: {other} and {run} would both be {_kept(keep, run)}; keep them in two folders")
    predicted: dict[Path, Predicted] = {}
    for run in [*files, *(run for run in configs if run not in files)]:  # what may be refused before what takes time
        predicted[run] = files.get(run) or predict_run(run, best=best, test=test)
        _check_digest(next(iter(predicted.items())), (run, predicted[run]))
        if keep and run not in files:
            write(_kept(keep, run), predicted[run])
    return {run: predicted[run] for run in configs}


def _kept(keep: Path, run: Path) -> Path:
    return keep / f"{name_of(run)}.safetensors"


def _check_keys(first: Path, wanted: Config, run: Path, config: Config, test: TestImages) -> None:
    for key in _SAME[test]:
        ours, theirs = getattr(config.data, key), getattr(wanted.data, key)
        if ours != theirs:
            raise RunError(
                f"{run}: its data.{key} is {ours!r}, of {first} it is {theirs!r}: the images must be the same"
            )


def _check_file(file: Path, kept: Predicted, best: bool, test: TestImages) -> None:
    if kept.on != test:
        raise RunError(f"{file} holds predictions of {_images(kept.on)}: it goes with --on {kept.on}, not {test}")
    if (kept.checkpoint == "best") != best:
        wanted = "with --best" if kept.checkpoint == "best" else "without --best"
        raise RunError(f"{file} holds predictions of {kept.checkpoint}.pt: it can only be compared {wanted}")


def _check_digest(first: tuple[Path, Predicted], other: tuple[Path, Predicted]) -> None:
    (run, predicted), (wanted, expected) = other, first
    if predicted.digest != expected.digest:
        raise RunError(
            f"{run}: its {told(predicted.on, len(predicted.label_N))} or their labels are others than the "
            f"{len(expected.label_N):,} of {wanted}: the images must be the same"
        )


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
