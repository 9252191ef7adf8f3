"""The data sets by name, and the part of one that a run's keys select: checked before use."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from cutnmix.pipeline.cifar import cifar10, cifar100
from cutnmix.pipeline.dataset import (
    Dataset,
    Splits,
    below_root,
    choose_classes,
    first_of_each_class,
    nearest,
    of_classes,
)
from cutnmix.pipeline.shards import IMAGES, DataError, find_shards, read_members

SUFFIXES = tuple(f".{kind}" for kind in IMAGES)  # of `folder`, in any case
TestImages = Literal["test", "unused"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits(root: Path | None = None, download: bool = True) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8 scaled up to 32x32 RGB; both arguments are unused: it is built in.

    Test: the 5th, 10th, 15th... image of each class, 355 in all (34 to 36 a class); train: the other 1,442.
    The same people wrote both halves, so a high accuracy says nothing about other people's digits.
    """
    return _digits("digits", 32)


def digits16(root: Path | None = None, download: bool = True) -> Splits:
    """`digits` at 16x16: a quarter of the work for a network, and still four pixels for each that there was."""
    return _digits("digits16", 16)


@below_root()
def folder(root: Path | None, download: bool = True) -> Splits:
    """JPEG and PNG files in root/train/CLASS and root/val/CLASS, at any depth below; `download` is unused.

    Classes are sorted by name and files by path. Every class must have images in both halves. No file is opened here:
    `check.without_corrupt` leaves out what does not decode, or else the loader names it when its turn comes.
    """
    from torchvision.datasets.folder import find_classes, make_dataset

    if root is None:
        raise DataError("data.root: folder needs the folder that holds train/CLASS/* and val/CLASS/*")
    for place in (root, root / "train", root / "val"):
        if not place.is_dir():
            raise DataError(
                f"data.root: there is no folder {place}; folder needs train/CLASS/* and val/CLASS/* in {root}"
            )
    try:
        classes, index = find_classes(root / "train")
    except FileNotFoundError:
        raise DataError(f"data.root: {root / 'train'} holds no class folders") from None
    if extra := sorted(path.name for path in (root / "val").iterdir() if path.is_dir() and path.name not in index):
        raise DataError(f"data.root: {root / 'val'} has classes that {root / 'train'} has not: {', '.join(extra)}")

    def half(name: str) -> Dataset:
        found = make_dataset(root / name, index, SUFFIXES, allow_empty=True)
        filled = {label for _, label in found}
        if empty := [str(root / name / key) for key in classes if index[key] not in filled]:
            raise DataError(f"data.root: class folders without images ({', '.join(SUFFIXES)}): {', '.join(empty)}")
        images, labels = tuple(Path(path) for path, _ in found), np.array([label for _, label in found], dtype=np.int64)
        return Dataset(f"folder/{name}", images, labels, tuple(classes), IMAGENET_MEAN, IMAGENET_STD)

    return Splits(half("train"), half("val"))


@below_root()
def webdataset(root: Path | None, download: bool = True, train: str | None = None, val: str | None = None) -> Splits:
    """Tar shards of KEY.jpg (.jpeg, .png) beside KEY.cls, see shards.py; `download` is unused.

    Args:
        root: the folder that holds them, and perhaps classes.txt: K names, one a line. Without it classes are numbers.
        download: unused.
        train: pattern of the training shards below root, default "train/*.tar"; such as "train-{0000..1023}.tar".
        val: pattern of the test shards, default "val/*.tar".

    Images keep the order of shards (by path) and members. Every class 0..K-1 must have images in both halves.
    """
    if root is None:
        raise DataError("data.root: webdataset needs the folder that holds the shards (train/*.tar and val/*.tar)")
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {root}")
    halves = {
        "train": read_members(find_shards(root, train or "train/*.tar", "data.train")),
        "val": read_members(find_shards(root, val or "val/*.tar", "data.val")),
    }
    named = root / "classes.txt"
    names = _lines(named) if named.is_file() else None
    highest = max(int(labels.max()) for _, labels in halves.values())
    num_classes = highest + 1 if names is None else len(names)
    for name, (members, labels) in halves.items():
        present = np.unique(labels)  # before anything of K entries is made: one stray number may be a billion
        gaps = np.flatnonzero(present != np.arange(len(present))).tolist()
        empty = gaps[0] if gaps else len(present)
        if labels.max() < num_classes and empty == num_classes:
            continue
        where = f"{members.name(int(labels.argmax()))} is of class {labels.max()}"
        if labels.max() >= num_classes:
            raise DataError(f"{where}, and {named} names {num_classes} classes, from 0")
        raise DataError(f"data.root: no images in the {name} shards of {root} are of class {empty}, and {where}")
    classes = tuple(names or map(str, range(num_classes)))
    return Splits(
        *(
            Dataset(f"webdataset/{name}", members, labels, classes, IMAGENET_MEAN, IMAGENET_STD)
            for name, (members, labels) in halves.items()
        )
    )


DATASETS: dict[str, Callable[[Path | None, bool], Splits]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "digits16": digits16,
    "folder": folder,
    "webdataset": webdataset,
}


def load_splits(
    name: str,
    root: str | Path | None = None,
    *,
    classes: int | Sequence[int | str] | None = None,
    images_per_class: int | None = None,
    download: bool = True,
    train: str | None = None,
    val: str | None = None,
    test: TestImages = "test",
) -> Splits:
    """The data set of this name, or the part of it that the keys of the same names under `data` select.

    Args:
        name: a key of DATASETS.
        root: the folder that holds the data; `digits` needs none.
        classes: n for the first n, or names or indices, whose order then numbers the labels 0..n-1. At least 2.
        images_per_class: the first n training images of each class; the test half keeps all images of its classes.
        download: whether CIFAR files that are missing may be fetched; an archive that lies in root is unpacked anyway.
        train: `webdataset`: the pattern of the training shards.
        val: `webdataset`: the pattern of the test shards.
        test: what the second half is; "unused": the training images that `images_per_class` leaves out, on which what
            was trained on the others can be tested too.

    Raises: DataError for data or keys that are wrong.
    """
    if name not in DATASETS:
        raise DataError(
            f"data.name: {name!r} is none of {', '.join(DATASETS)}; the nearest is {nearest(name, DATASETS)!r}"
        )
    if test not in get_args(TestImages):
        raise DataError(f"test: {test!r} is none of {', '.join(get_args(TestImages))}")
    root = None if root is None else Path(os.path.expanduser(root))  # Path's own raises for a user who is not there
    try:
        splits = webdataset(root, download, train, val) if name == "webdataset" else DATASETS[name](root, download)
    except OSError as error:  # of a data set of the user's own
        raise DataError(f"data.name: {name} cannot be read: {error}") from error
    if not (isinstance(splits, Splits) and all(isinstance(half, Dataset) for half in splits)):
        raise DataError(f"data.name: DATASETS[{name!r}] must return Splits of two Dataset, got {splits!r:.80}")
    fields = ("classes", "mean", "std")  # by those of one half is understood what peers make of the other
    if wrong := [field for field in fields if getattr(splits.train, field) != getattr(splits.test, field)]:
        raise DataError(f"data.name: both halves of {name} must have the same {', '.join(wrong)}")
    if classes is not None:
        chosen = choose_classes(splits.train.classes, classes)
        splits = Splits(*(of_classes(split, chosen) for split in splits))
    if images_per_class is not None:
        first_N = first_of_each_class(splits.train, images_per_class)
        rest = splits.train.keep(~first_N) if test == "unused" else splits.test
        splits = Splits(splits.train.keep(first_N), rest)
    if test == "unused":
        if images_per_class is None or not len(splits.test):
            raise DataError(f"data.images_per_class: {images_per_class} leaves no training image of {name} unused")
        splits = splits._replace(test=replace(splits.test, name=f"{name}/unused"))
    return splits


@cache  # half a second each time, and a grid or a test asks often
def _digits(name: str, side: int) -> Splits:
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    small, labels = load_digits(return_X_y=True)
    small = np.rint(small.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(i).resize((side, side), Image.Resampling.BILINEAR)) for i in small])
    images = np.repeat(large[..., None], 3, axis=-1)
    labels = labels.astype(np.int64)

    tested = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        tested[np.flatnonzero(labels == label)[4::5]] = True
    seen = large[~tested] / 255
    classes, mean, std = tuple("0123456789"), (float(seen.mean()),) * 3, (float(seen.std()),) * 3
    return Splits(
        Dataset(f"{name}/train", images[~tested], labels[~tested], classes, mean, std),
        Dataset(f"{name}/test", images[tested], labels[tested], classes, mean, std),
    )


def _lines(path: Path) -> list[str]:
    """The names in a file, one a line; only empty lines at its end are none."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8: {error}") from error
    if not all(names):
        raise DataError(f"{path}: line {names.index('') + 1} is empty, and line k names class k - 1")
    return names
