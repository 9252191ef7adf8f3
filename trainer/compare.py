"""Trained runs beside each other on the same images: how far they are apart, and how much of that chance may make.

A group is a run, or over seeds all runs of one configuration. With h_sn the share of the peers of its run of seed s
that are right about image n (of the ensemble, or a teacher: 1 or 0), n = 1 ... N, and d_sn = h_sn - h0_sn, where h0 is
of the first group's run of the same seed; n_s seeds have both. (Single runs: of the first run, whatever its seed.)

    top-1              100 mean_s mean_n h_sn                   error: 100 sd_n(mean_s h_sn) / sqrt(N)
    difference         100 mean_s mean_n d_sn        difference_error: 100 sd_n(mean_s d_sn) / sqrt(N)
                                                           seed_error: 100 sd_s(mean_n d_sn) / sqrt(n_s), for n_s > 1
    p                  two-sided t test of d over seeds for n_s > 1, and of one pair of runs over images

The errors over images are of these very networks and of images drawn anew: what another seed would have given is not in
them. The error over seeds is of these very images and of training anew. What a network gets right by luck, image by
image, is in both, so that they do not add up. From two or three seeds sd_s is itself hardly known: p takes that into
account, a multiple of the error does not.

A RUN is a folder, or a file of predictions that `keep` left of one, see predicted.py: both say the same.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cutnmix.pipeline.datasets import TestImages
from cutnmix.trainer.folder import (
    RunError,
    RunFolder,
    csv_text,
    expect_writable,
    name_of,
    same,
    same_but_seed,
    write_atomically,
)
from cutnmix.trainer.keys import Config
from cutnmix.trainer.predicted import Predicted, predict_run, read, write
from cutnmix.trainer.run import saved

_SAME = {  # keys under `data` that say which images those are
    "test": ("name", "classes", "val", "corrupt"),
    "unused": ("name", "classes", "train", "images_per_class", "corrupt"),
}
_ALIKE = 1e-12  # differences in a share that are rounding


class Compared(NamedTuple):
    """One prediction of one group, in percent and points of it."""

    run: str  # the folder's name; of several seeds what their names have in common
    prediction: str  # "mean" of the peers, "ensemble", and what else the method predicts by
    top1: float
    error: float
    less: str | None  # the first group; None for itself, and where nothing of that name and seed is in both
    difference: float | None  # None where `less` is; so are the others
    difference_error: float | None
    p: float | None  # None too where all differences are alike
    seeds: int  # n_s; without a difference, the group's
    seed_error: float | None  # None too for one seed


class Comparison(NamedTuple):
    """All groups, in the order of their first runs."""

    images: int  # N
    rows: list[Compared]
    seeds: list[tuple[str, list[int]]]  # of each group


class _Group(NamedTuple):
    """Runs that are averaged."""

    name: str
    runs: dict[int, Path]  # by what they are paired by: the seed, or 0 for a run by itself


def compare(
    runs: Sequence[Path],
    *,
    best: bool = False,
    test: TestImages = "test",
    over_seeds: bool = False,
    keep: Path | None = None,
    root: Path | None = None,
    device: str | None = None,
) -> Comparison:
    """Score the last checkpoints, or with `best` those chosen on the test images, on the images that `test` names.

    Args:
        runs: folders, and files of predictions.
        best: of best.pt.
        test: what they are scored on, see load_splits.
        over_seeds: average runs whose configurations differ by the seed alone, and pair them by it.
        keep: the folder that is to hold the predictions of each run that is scored, NAME.safetensors.
        root, device: of this machine, see run.trained.

    Raises: RunError, before anything is scored, unless all runs have checkpoints, keys that say the same of the images,
        and seeds of their own in a group; then where the images prove to be others.
    """
    if absent := [run for run in runs if run.suffix == ".safetensors" and not os.path.exists(run)]:
        raise RunError(f"{absent[0]} is not there")
    files = {run: read(run) for run in runs if os.path.isfile(run)}
    configs = {run: files[run].config if run in files else RunFolder(run).read_config() for run in runs}
    _check(files, configs, best, test, keep)
    names = {run: files[run].run if run in files else name_of(run) for run in configs}
    groups = _over_seeds(configs, names) if over_seeds else [_Group(names[run], {0: run}) for run in configs]

    def predict(run: Path) -> Predicted:
        return predict_run(run, best=best, test=test, root=root, device=device)

    hits = {run: found.hits() for run, found in _predicted(files, configs, predict, keep).items()}

    def of(group: _Group, name: str) -> dict[int, np.ndarray]:
        return {key: hits[run][name] for key, run in group.runs.items() if name in hits[run]}

    first, *_ = groups
    rows = [
        _compared(group.name, name, of(group, name), first.name, {} if group is first else of(first, name))
        for group in groups
        for name in hits[next(iter(group.runs.values()))]
    ]
    seeds = [(group.name, [configs[run].seed for run in group.runs.values()]) for group in groups]
    return Comparison(len(hits[runs[0]]["mean"]), rows, seeds)


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


def _check(
    files: Mapping[Path, Predicted], configs: Mapping[Path, Config], best: bool, test: TestImages, keep: Path | None
) -> None:
    """Refuse what can be refused before anything is scored."""
    first, named = next(iter(configs)), {}
    for run, config in configs.items():
        _check_keys(first, configs[first], run, config, test)
        if run in files:
            _check_file(run, files[run], best, test)
            continue
        saved(run, best=best)
        if keep and (other := named.setdefault(name_of(run), run)) != run:
            raise RunError(f"--keep: {other} and {run} would both be {_kept(keep, run)}; keep them in two folders")
        if keep and (kept := _kept(keep, run)).is_file():
            _check_kept(kept, run, config, best, test)
    if keep:
        expect_writable(keep)


def _check_kept(kept: Path, run: Path, config: Config, best: bool, test: TestImages) -> None:
    """Refuse to write over the predictions of something else: they may be the only ones that there are."""
    old = read(kept)
    if not same(old.config, config):
        raise RunError(f"--keep: {kept} is of a run with other keys than {run}; keep it in another folder")
    if (old.on, old.checkpoint == "best") != (test, best):
        what = f"predictions of {_images(old.on)} by {old.checkpoint}.pt"
        raise RunError(f"--keep: {kept} holds {what}; keep these in another folder")


def _over_seeds(configs: Mapping[Path, Config], names: Mapping[Path, str]) -> list[_Group]:
    """The runs by configuration and seed."""
    groups: list[dict[int, Path]] = []
    for run, config in configs.items():
        found = [group for group in groups if same_but_seed(configs[next(iter(group.values()))], config)]
        if not found:
            groups.append({config.seed: run})
        elif other := found[0].get(config.seed):
            raise RunError(f"--over-seeds: {other} and {run} are both of seed {config.seed} and of one configuration")
        else:
            found[0][config.seed] = run
    return [_Group(_common([(seed, names[run]) for seed, run in group.items()]), group) for group in groups]


def _common(named: list[tuple[int, str]]) -> str:
    """The name of runs without -seedN, where that leaves the same of all; otherwise the first one's."""
    stems = {name.removesuffix(f"-seed{seed}") for seed, name in named}
    return stems.pop() if len(stems) == 1 else named[0][1]


def _predicted(
    files: Mapping[Path, Predicted],
    configs: Mapping[Path, Config],
    predict: Callable[[Path], Predicted],
    keep: Path | None,
) -> dict[Path, Predicted]:
    """The predictions of each run, in order: those on file as they are read, of folders made, and kept."""
    predicted: dict[Path, Predicted] = {}
    for run in [*files, *(run for run in configs if run not in files)]:  # what may be refused before what takes time
        predicted[run] = files.get(run) or predict(run)
        _check_digest(next(iter(predicted.items())), (run, predicted[run]))
        if keep and run not in files:
            kept = _kept(keep, run)
            if kept.is_file() and read(kept).digest != predicted[run].digest:
                raise RunError(f"--keep: {kept} holds predictions of other images; keep these in another folder")
            write(kept, predicted[run])
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


def _compared(
    run: str, name: str, hits: Mapping[int, np.ndarray], less: str, firsts: Mapping[int, np.ndarray]
) -> Compared:
    """`hits` and `firsts`: h_N by what they are paired by; the first group itself has none to be compared with."""
    top1, error = _mean(np.mean([*hits.values()], axis=0))
    d_SN = np.array([hit_N - firsts[key] for key, hit_N in hits.items() if key in firsts])
    if not len(d_SN):
        return Compared(run, name, top1, error, None, None, None, None, len(hits), None)
    difference, difference_error = _mean(d_SN.mean(0))
    if len(d_SN) == 1:
        return Compared(run, name, top1, error, less, difference, difference_error, _p(d_SN[0]), 1, None)
    d_S = d_SN.mean(1)
    return Compared(run, name, top1, error, less, difference, difference_error, _p(d_S), len(d_S), _mean(d_S)[1])


def _p(difference_X: np.ndarray) -> float | None:
    """Of a two-sided t test that their mean is 0; None where all are alike."""
    from scipy.stats import ttest_1samp  # here, because importing it takes a second

    test: Any = ttest_1samp(difference_X, 0) if np.ptp(difference_X) > _ALIKE else None
    return float(test.pvalue) if test else None


def _mean(value_X: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, times 100."""
    return 100 * float(value_X.mean()), 100 * float(value_X.std(ddof=1)) / len(value_X) ** 0.5
