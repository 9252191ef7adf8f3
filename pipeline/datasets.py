"""Data sets as values: images or paths, labels, class names, mean and std of each split, checked before use.

CIFAR files are unpickled only after their md5 proved right, because a pickle can run any code. A file that exists but
is wrong is named and left alone: nothing here overwrites what a user put there.
"""

import difflib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from http.client import HTTPException
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from filelock import FileLock
from PIL import Image

from cutnmix.pipeline.shards import IMAGES, DataError, Members, find_shards, read_members

if TYPE_CHECKING:  # torchvision is imported where it is used: it takes seconds, and digits need none of it
    from torchvision.datasets import CIFAR10

SUFFIXES = tuple(f".{kind}" for kind in IMAGES)  # of `folder`, in any case
TestImages = Literal["test", "unused"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split. The arrays are shared by everything that reads them: treat them as constants.

    They stay writable only because torch.from_numpy warns of arrays that are not.
    """

    name: str  # such as "cifar100/train"
    images: np.ndarray | tuple[Path, ...] | Members  # uint8 (N, H, W, C), any strides; or N files; or N parts of tars
    labels: np.ndarray  # int64 (N,), 0..K-1
    classes: tuple[str, ...]  # K names
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    left_out: tuple[str, ...] = ()  # the images that do not decode, where check.py looked for them

    def __post_init__(self) -> None:
        if isinstance(images := self.images, np.ndarray) and not (
            images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == len(self.mean) == len(self.std)
        ):
            raise DataError(
                f"{self.name}: images must be uint8 (N, H, W, C) with a mean and a std for each of C channels, "
                f"not {images.dtype} {images.shape} with {len(self.mean)} and {len(self.std)}"
            )
        if not isinstance(images, np.ndarray) and not len(self.mean) == len(self.std) == 3:
            raise DataError(
                f"{self.name}: files are read as RGB, with 3 numbers of mean and std, not {len(self.mean)} and "
                f"{len(self.std)}"
            )
        if not all(std > 0 for std in self.std):
            raise DataError(f"{self.name}: std must be above 0 for every channel, not {self.std}")
        if self.labels.dtype != np.int64 or self.labels.shape != (len(images),):
            raise DataError(
                f"{self.name}: labels must be int64 ({len(images)},), not {self.labels.dtype} {self.labels.shape}"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(
                f"{self.name}: labels must lie within 0..{len(self.classes) - 1}, for {len(self.classes)} classes, "
                f"not {self.labels.min()}..{self.labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether `images` is an array; otherwise they are files to decode."""
        return isinstance(self.images, np.ndarray)

    @property
    def array(self) -> np.ndarray:
        """`images` of a data set that is in memory."""
        assert isinstance(self.images, np.ndarray)
        return self.images

    @property
    def files(self) -> tuple[Path, ...]:
        """`images` of a data set of files."""
        assert isinstance(self.images, tuple)
        return self.images

    @property
    def files_or_shards(self) -> tuple[Path, ...]:
        """The files that hold the images of a data set that is not in memory."""
        return self.images.shards if isinstance(self.images, Members) else self.files

    def encoded(self, i: int) -> bytes:
        """The content of image file i, as it lies on the disk. Raises OSError."""
        return self.images.read(i) if isinstance(self.images, Members) else self.files[i].read_bytes()

    def where(self, i: int) -> str:
        """The name of image file i, for messages."""
        return self.images.name(i) if isinstance(self.images, Members) else str(self.files[i])

    def identities(self) -> np.ndarray:
        """(N,) uint64, one a state of an image file: place, size and time of change. 0 where there is no file."""
        if isinstance(self.images, Members):
            stated = [_state(path) for path in self.images.shards]
            parts = zip(self.images.shard_N, self.images.offset_N, self.images.size_N, strict=True)
            states = (stated[shard] and f"{stated[shard]} {offset} {size}" for shard, offset, size in parts)
        else:
            states = (_state(path) for path in self.files)
        digests = b"".join(blake2b(state.encode(), digest_size=8).digest() if state else bytes(8) for state in states)
        return np.frombuffer(digests, dtype=np.uint64)

    def digest(self) -> str:
        """32 hex digits that are the same wherever the same images lie in the same order, with labels of one meaning.

        Of pixels where they are in memory. Of files it is their sizes in bytes, in order, not their places or times,
        so that every machine finds the same and none must read them; an image in the place of another one of its very
        size is not told apart.

        Raises: DataError that names a file that is gone.
        """
        told = blake2b(repr((len(self), self.classes)).encode(), digest_size=16)
        told.update(self.labels.astype("<i8").tobytes())
        if isinstance(self.images, np.ndarray):
            told.update(repr(self.images.shape).encode())
            told.update(np.ascontiguousarray(self.images).data)
            return told.hexdigest()
        try:
            sizes = self.images.size_N if isinstance(self.images, Members) else [p.stat().st_size for p in self.images]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error
        told.update(np.asarray(sizes, dtype="<i8").tobytes())
        return told.hexdigest()

    def keep(self, kept_N: np.ndarray) -> "Dataset":
        """The images where `kept_N` is True, in their order."""
        images = self.images
        images = tuple(compress(images, kept_N)) if isinstance(images, tuple) else _kept(images, kept_N)
        return replace(self, images=images, labels=self.labels[kept_N])


class Splits(NamedTuple):
    """The two halves of a data set, with the same classes, mean and std."""

    train: Dataset
    test: Dataset


@contextmanager
def _below_root() -> Iterator[None]:
    """Such as a folder that one may not look into is said of the key."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data.root: {error}") from error


def cifar10(root: Path | None, download: bool = True) -> Splits:
    """CIFAR-10: 50,000 + 10,000 images of 32x32, 10 classes."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, root, download, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(root: Path | None, download: bool = True) -> Splits:
    """CIFAR-100 with its fine labels: 50,000 + 10,000 images of 32x32, 100 classes."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, root, download, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def digits(root: Path | None = None, download: bool = True) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8 scaled up to 32x32 RGB; both arguments are unused: it is built in.

    Test: the 5th, 10th, 15th... image of each class, 355 in all (34 to 36 a class); train: the other 1,442.
    The same people wrote both halves, so a high accuracy says nothing about other people's digits.
    """
    return _digits("digits", 32)


def digits16(root: Path | None = None, download: bool = True) -> Splits:
    """`digits` at 16x16: a quarter of the work for a network, and still four pixels for each that there was."""
    return _digits("digits16", 16)


@_below_root()
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


@_below_root()
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
            f"data.name: {name!r} is none of {', '.join(DATASETS)}; the nearest is {_nearest(name, DATASETS)!r}"
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
        chosen = _choose(splits.train.classes, classes)
        splits = Splits(*(_subset(split, chosen) for split in splits))
    if images_per_class is not None:
        first_N = _first(splits.train, images_per_class)
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


@_below_root()
def _cifar(
    name: str,
    source: "type[CIFAR10]",
    root: Path | None,
    download: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Splits:
    """Both halves as torchvision reads them, after a check that names the file at fault; torchvision's names none."""
    if root is None:
        raise DataError(f"data.root: {name} needs the folder that holds {source.base_folder}/, or is to hold it")
    place = root / source.base_folder
    md5s = dict(source.train_list + source.test_list) | {source.meta["filename"]: source.meta["md5"]}
    missing = [file for file in md5s if not (place / file).exists()]
    for file, md5 in md5s.items():
        if file not in missing:
            _verify(place / file, md5, source)
    if missing and not download and not (root / source.filename).exists():
        raise DataError(
            f"data.root: {place} lacks {', '.join(missing)}; "
            f"a training with data.download=true fetches it, or put {source.url} (md5 {source.tgz_md5}) into {root}"
        )
    if missing:
        _fetch(source, root, missing)

    def half(split: str) -> Dataset:
        data = source(root, train=split == "train")  # checks every md5 once more before it unpickles
        images, labels = np.ascontiguousarray(data.data), np.array(data.targets, dtype=np.int64)
        return Dataset(f"{name}/{split}", images, labels, tuple(data.classes), mean, std)

    return Splits(half("train"), half("test"))


def _verify(path: Path, md5: str, source: "type[CIFAR10]") -> None:
    from torchvision.datasets.utils import calculate_md5

    found = calculate_md5(path) if path.is_file() else "none, as it is no file"
    if found != md5:
        raise DataError(
            f"data.root: {path} is damaged: md5 {found}, expected {md5}; "
            f"remove it and run again, or replace it by the one of {source.url}"
        )


def _fetch(source: "type[CIFAR10]", root: Path, missing: list[str]) -> None:
    """Put the missing files under root, each whole or not at all, from the archive in root or else from its URL.

    Several processes may do this at once (the ranks of one run): the first works, the others wait and find it done.
    Not torchvision's download=True: that overwrites files, and leaves half a file when it is killed.
    """
    from torchvision.datasets.utils import download_url

    place, archive = root / source.base_folder, root / source.filename
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{source.filename}.lock"), TemporaryDirectory(prefix=".unpack-", dir=root) as scratch:
            missing = [file for file in missing if not (place / file).exists()]
            if not missing:
                return
            if archive.exists():
                _verify(archive, source.tgz_md5, source)
            else:
                download_url(source.url, scratch, source.filename, source.tgz_md5)
                archive = Path(scratch, source.filename)
            place.mkdir(exist_ok=True)
            with tarfile.open(archive) as tar:
                for member in tar:
                    parent, _, file = member.name.rpartition("/")
                    if parent == source.base_folder and file in missing and (content := tar.extractfile(member)):
                        whole = Path(scratch, file)
                        whole.write_bytes(content.read())
                        whole.replace(place / file)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: torchvision's for a wrong md5
        raise DataError(
            f"data.root: could not get {source.url} into {root} ({error}); "
            f"where there is no connection, put that file (md5 {source.tgz_md5}) into {root} by hand and run again"
        ) from error


def _choose(names: tuple[str, ...], classes: int | Sequence[int | str]) -> list[int]:
    """Indices of the selected classes, in the order asked for."""
    if isinstance(classes, int):
        if not 2 <= classes <= len(names):
            raise DataError(f"data.classes: {classes} is not within 2..{len(names)}, the number of classes")
        return list(range(classes))
    chosen = []
    for key in [classes] if isinstance(classes, str) else classes:
        if isinstance(key, str) and key not in names:
            raise DataError(f"data.classes: there is no class {key!r}; the nearest is {_nearest(key, names)!r}")
        if isinstance(key, int) and not 0 <= key < len(names):
            raise DataError(f"data.classes: index {key} is not within 0..{len(names) - 1}")
        if isinstance(key, str) and names.count(key) > 1:
            alike = ", ".join(str(index) for index, name in enumerate(names) if name == key)
            raise DataError(f"data.classes: several classes are called {key!r}: say which by index, {alike}")
        index = names.index(key) if isinstance(key, str) else key
        if index in chosen:
            raise DataError(f"data.classes: class {key!r} ({names[index]}, index {index}) is selected twice")
        chosen.append(index)
    if len(chosen) < 2:
        raise DataError(f"data.classes: {classes!r} selects {len(chosen)} class(es), at least 2 are needed")
    return chosen


def _subset(data: Dataset, chosen: list[int]) -> Dataset:
    """The images of the chosen classes in data set order, relabelled by position in `chosen`."""
    renumber = np.full(len(data.classes), -1)
    renumber[chosen] = np.arange(len(chosen))
    labels = renumber[data.labels]
    kept_N = labels >= 0
    classes = tuple(data.classes[index] for index in chosen)
    return replace(data.keep(kept_N), labels=labels[kept_N], classes=classes)


def _first(data: Dataset, images_per_class: int) -> np.ndarray:
    """(N,) bool: the first so many images of each class."""
    if images_per_class < 1:
        raise DataError(f"data.images_per_class: {images_per_class} is not at least 1")
    first_N = np.full(len(data), False)
    for label, name in enumerate(data.classes):
        members = np.flatnonzero(data.labels == label)
        if len(members) < images_per_class:
            raise DataError(
                f"data.images_per_class: {images_per_class} asked, but class {name!r} of {data.name} has {len(members)}"
            )
        first_N[members[:images_per_class]] = True
    return first_N


def _lines(path: Path) -> list[str]:
    """The names in a file, one a line; only empty lines at its end are none."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8: {error}") from error
    if not all(names):
        raise DataError(f"{path}: line {names.index('') + 1} is empty, and line k names class k - 1")
    return names


def _kept(images: np.ndarray | Members, kept_N: np.ndarray) -> np.ndarray | Members:
    return images.keep(kept_N) if isinstance(images, Members) else images[kept_N]


def _state(path: Path) -> str:
    """Place, size and time of change of a file; empty where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    return f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}"


def _nearest(word: str, allowed: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.0)[0]
