"""A data set as a value: images or paths, labels, class names, mean and std of each split; and parts of it."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cutnmix.pipeline.shards import DataError, Members


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
def below_root() -> Iterator[None]:
    """Such as a folder that one may not look into is said of the key."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data.root: {error}") from error


def choose_classes(names: tuple[str, ...], classes: int | Sequence[int | str]) -> list[int]:
    """Indices of the selected classes, in the order asked for."""
    if isinstance(classes, int):
        if not 2 <= classes <= len(names):
            raise DataError(f"data.classes: {classes} is not within 2..{len(names)}, the number of classes")
        return list(range(classes))
    chosen = []
    for key in [classes] if isinstance(classes, str) else classes:
        if isinstance(key, str) and key not in names:
            raise DataError(f"data.classes: there is no class {key!r}; the nearest is {nearest(key, names)!r}")
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


def of_classes(data: Dataset, chosen: list[int]) -> Dataset:
    """The images of the chosen classes in data set order, relabelled by position in `chosen`."""
    renumber = np.full(len(data.classes), -1)
    renumber[chosen] = np.arange(len(chosen))
    labels = renumber[data.labels]
    kept_N = labels >= 0
    classes = tuple(data.classes[index] for index in chosen)
    return replace(data.keep(kept_N), labels=labels[kept_N], classes=classes)


def first_of_each_class(data: Dataset, images_per_class: int) -> np.ndarray:
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


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The one of those allowed that is most like a word."""
    return difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.0)[0]


def _kept(images: np.ndarray | Members, kept_N: np.ndarray) -> np.ndarray | Members:
    return images.keep(kept_N) if isinstance(images, Members) else images[kept_N]


def _state(path: Path) -> str:
    """Place, size and time of change of a file; empty where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    return f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}"
