"""Images inside tar files (WebDataset shards), read by their byte ranges: random access, so the plan's order holds.

A shard is an uncompressed tar of samples: KEY.jpg (.jpeg, .png) beside KEY.cls, which holds the class as a number. KEY
is the member's path up to the first dot of its last part, as WebDataset has it; members of other kinds are ignored.
The headers of a shard are read once. The index that this gives (offset, size and label of every image: 24 bytes each)
is kept in `cache_folder()` and belongs to the shard's path, size and time of change: another shard is read again.

Why not DALI's `fn.readers.webdataset`: it shuffles within a buffer of the `initial_fill` samples last read (1024 by
default), with random state of its own. Then the order is no function of (seed, epoch), the views of a sample cannot be
told from its position, and resuming at a step means to read all before it. Here the plan stays the only randomness:
order, resume and sharding are those of a folder, pixel for pixel.

What that costs is access: every sample is one read at a random place, without an open file for each. A local disk or a
parallel file system serves that (NVMe: 10^5 reads/s and more); a rotating disk or an object store of 10 ms a read
serves 100 samples/s a reader, and needs whole shards read in sequence into a buffer, at the price named above. For
those, copy the shards to a local disk first.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock

IMAGES = ("jpg", "jpeg", "png")  # members that are images, in any case


class DataError(Exception):
    """A data set is missing, damaged or empty; the message names the file, folder or key and what to do."""


@dataclass(frozen=True, eq=False)
class Members:
    """N images as byte ranges of tar files."""

    shards: tuple[Path, ...]
    shard_N: np.ndarray  # int32, position in `shards`
    offset_N: np.ndarray  # int64, bytes
    size_N: np.ndarray  # int64, bytes

    def __len__(self) -> int:
        return len(self.shard_N)

    def read(self, i: int) -> bytes:
        """The encoded image. Raises OSError."""
        file = os.open(self.shards[self.shard_N[i]], os.O_RDONLY)  # thousands of shards: more than may stay open
        try:
            return os.pread(file, int(self.size_N[i]), int(self.offset_N[i]))
        finally:
            os.close(file)

    def name(self, i: int) -> str:
        """Such as "train/000017.tar: n01440764_10026.jpg"; for messages: it reads the shard's headers again."""
        shard = self.shards[self.shard_N[i]]
        try:
            with tarfile.open(shard, "r:") as tar:
                found = (member.name for member in tar if member.offset_data == self.offset_N[i])
                return f"{shard}: {next(found, 'an image that is no longer there')}"
        except (OSError, tarfile.TarError) as error:
            return f"{shard}: {error}"

    def keep(self, kept_N: np.ndarray) -> "Members":
        """Those where `kept_N` is True."""
        return replace(self, **{key: getattr(self, key)[kept_N] for key in ("shard_N", "offset_N", "size_N")})


class _Index(NamedTuple):
    """The images of one shard, in its order."""

    offset: np.ndarray  # int64
    size: np.ndarray  # int64
    label: np.ndarray  # int64


def find_shards(root: Path, pattern: str, key: str) -> tuple[Path, ...]:
    """The files of a pattern below root, sorted: braces ({0000..1023}, {a,b}), each of which must be there, and * ? [].

    Raises: DataError that names `key` and the missing shard, or the pattern that fits no file.
    """
    found: list[Path] = []
    for name in _expand_braces(pattern):
        matches = glob.glob(name, root_dir=root) if glob.has_magic(name) else [name]
        if not matches:
            raise DataError(f"{key}: no file fits {root / name}")
        found += [root / match for match in matches]
    if not found:
        raise DataError(f"{key}: {pattern} names no file, as its range runs downwards")
    if missing := [str(path) for path in found if not path.is_file()]:
        raise DataError(f"{key}: {len(missing)} of {len(found)} shards are missing: {', '.join(missing[:3])}")
    return tuple(sorted(set(found)))


def read_members(shards: tuple[Path, ...]) -> tuple[Members, np.ndarray]:
    """All images of these shards and their labels (int64), in the order of the shards and of their members.

    Raises: DataError that names the shard, and the sample.
    """
    folder = cache_folder("shards")
    try:
        # The ranks of a run come at once: the first reads the headers, the others wait and find them read.
        with FileLock(folder / ".lock"), ThreadPoolExecutor(8) as pool:
            indices = list(pool.map(lambda shard: _cached_index(shard, folder), shards))
    except OSError as error:
        raise DataError(f"data.root: {error}") from error
    members = Members(
        shards,
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.label) for index in indices]),
        np.concatenate([index.offset for index in indices]),
        np.concatenate([index.size for index in indices]),
    )
    return members, np.concatenate([index.label for index in indices])


def cache_folder(kind: str) -> Path:
    """Where what is known of files is kept: $XDG_CACHE_HOME/cutnmix/KIND, or ~/.cache/cutnmix/KIND; it is made.

    Raises: DataError where nothing can be written there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cutnmix", kind)
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # the latter: of a user without a home
        raise DataError(f"{folder} cannot be written to ({error}): set XDG_CACHE_HOME to a folder that can") from error
    return folder


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Old or new, never half, as .npz."""
    with NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        partial = Path(file.name)
        try:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] (its stub takes the names for options)
        except BaseException:
            partial.unlink()
            raise
    partial.replace(path)


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `save_arrays` saved; None where there is nothing, or nothing whole."""
    try:
        with path.open("rb") as content, np.load(content) as file:  # np.load leaves a file open that is no whole zip
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None


def digest(*parts: object) -> str:
    """A name for these facts, 16 hexadecimal digits."""
    return blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def _cached_index(shard: Path, folder: Path) -> _Index:
    facts = shard.stat()
    state = np.array([facts.st_size, facts.st_mtime_ns])
    path = folder / f"{digest('v1', shard.resolve())}.npz"
    known = load_arrays(path)
    if known is not None and known.keys() == {"state", *_Index._fields} and np.array_equal(known.pop("state"), state):
        return _Index(**known)
    index = _read_index(shard)
    save_arrays(path, {"state": state, **index._asdict()})
    return index


def _read_index(shard: Path) -> _Index:
    """The headers of a shard, and its labels."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                parent, slash, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key, suffix = f"{parent}{slash}{stem}", suffix.lower()
                if member.isreg() and (suffix in IMAGES or suffix == "cls"):
                    known = images if suffix in IMAGES else labels
                    if key in known:
                        raise DataError(f"{shard}: sample {key} is there twice ({member.name})")
                    if suffix in IMAGES:
                        images[key] = member.offset_data, member.size
                    else:
                        labels[key] = _label(shard, member.name, tar.extractfile(member).read())  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard} is damaged, or no plain tar ({error}): shards must not be compressed") from error
    if alone := sorted(images.keys() ^ labels.keys()):
        lacks = f"{alone[0]}.cls" if alone[0] in images else f"an image ({', '.join(IMAGES)})"
        raise DataError(f"{shard}: sample {alone[0]} lacks {lacks}")
    if not images:
        raise DataError(f"{shard} holds no samples: KEY.jpg beside KEY.cls")
    offset, size = np.array(list(images.values()), dtype=np.int64).T
    return _Index(offset, size, np.array([labels[key] for key in images], dtype=np.int64))


def _label(shard: Path, name: str, content: bytes) -> int:
    if not re.fullmatch(rb"\s*\d{1,9}\s*", content):
        raise DataError(f"{shard}: {name} must hold a class as a number from 0, not {content[:20]!r}")
    return int(content)


def _expand_braces(pattern: str) -> Iterable[str]:
    """a{1,2}b{08..10} -> a1b08, a1b09, a1b10, a2b08, ...; innermost braces first."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        width = len(span[1]) if span[1].startswith("0") else 0
        words = [f"{number:0{width}}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        words = found[1].split(",")
    return [name for word in words for name in _expand_braces(f"{head}{word}{tail}")]
