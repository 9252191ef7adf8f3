"""Which image files do not decode: asked of DALI's own decoder, remembered until a file changes.

DALI gives up a whole batch where one image is bad, so batches are tried first and the images of a bad one each alone.
What was found is kept in `cache_folder()` by each file's place, size and time of change, and by DALI's version: a
second run, or another rank, decodes nothing, and after a change only what changed.

Bad images are left out of the data set, before anything is drawn. So a plan stays a pure function of (seed, epoch), the
same on every rank, and no batch is short, which it would be if they were skipped when their turn comes. What a file
turns into later is met by the loader, which names it.
"""

import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as dali
from filelock import FileLock
from PIL import Image, UnidentifiedImageError

from cutnmix.pipeline.ahead import ahead
from cutnmix.pipeline.cores import available_cores
from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.shards import cache_folder, digest, load_arrays, save_arrays

# DALI makes its operators at run time: to the type checker they are Any.
fn: Any = dali.fn
types: Any = dali.types
pipeline_def: Any = dali.pipeline_def

_BATCH = 64
_SAVE_EVERY = 60.0  # seconds: what a kill may lose


def without_corrupt(dataset: Dataset) -> Dataset:
    """The images that decode; the names of the others are `left_out`.

    Raises:
        DataError: no image of a class is left, or what is known of the files cannot be kept.
    """
    good_N = _good(dataset)
    names = tuple(dataset.where(int(i)) for i in np.flatnonzero(~good_N))
    left = replace(dataset.keep(good_N), left_out=names)
    before_K, after_K = (np.bincount(data.labels, minlength=len(data.classes)) for data in (dataset, left))
    if empty := np.flatnonzero((before_K > 0) & (after_K == 0)).tolist():  # of `unused` images a class may have none
        first = dataset.where(int(np.flatnonzero(dataset.labels == empty[0])[0]))
        raise DataError(f"{dataset.name}: no image of class {left.classes[empty[0]]!r} decodes: {first} and all others")
    return left


def undecodable(dataset: Dataset, indices: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Those of these images that DALI's CPU decoder refuses, each with the reason, in order."""
    trial = _Trial(available_cores())
    chunks = (indices[i : i + _BATCH] for i in range(0, len(indices), _BATCH))
    for chunk in ahead(lambda chunk: [(i, _content(dataset, i)) for i in chunk], chunks, depth=2):
        if trial.decodes([content for _, content in chunk]):
            continue
        for i, content in chunk:
            if not trial.decodes([content]):
                yield i, _reason(dataset, i)


def _good(dataset: Dataset) -> np.ndarray:
    """(N,) bool: whether each image decodes, as far as is known, and else by trying."""
    folder, place = cache_folder("decodes"), Path(os.path.commonpath(dataset.files_or_shards))
    path = folder / f"{digest(dali.__version__, dataset.name, place.absolute())}.npz"
    identity_N = dataset.identities()
    try:
        with FileLock(path.with_suffix(".lock")):  # the ranks of a run come at once: the first tries, the others read
            known = load_arrays(path) or {}
            tried, decodes = known.get("tried", np.zeros(0, np.uint64)), known.get("decodes", np.zeros(0, bool))
            new = np.flatnonzero(~np.isin(identity_N, tried))
            saved = time.monotonic()
            for first in range(0, len(new), 64 * _BATCH):
                part = new[first : first + 64 * _BATCH]
                bad = [i for i, _ in undecodable(dataset, part.tolist())]
                tried, decodes = np.append(tried, identity_N[part]), np.append(decodes, ~np.isin(part, bad))
                if time.monotonic() - saved > _SAVE_EVERY or part[-1] == new[-1]:
                    present = tried != 0  # 0 is a file that is not there: ask again
                    save_arrays(path, {"tried": tried[present], "decodes": decodes[present]})
                    saved = time.monotonic()
    except OSError as error:
        raise DataError(f"data.corrupt: {error}") from error
    order = np.argsort(tried)
    return decodes[order[np.searchsorted(tried, identity_N, sorter=order)]]


class _Trial:
    """DALI's CPU decoder for any list of contents, up to _BATCH."""

    def __init__(self, threads: int):
        self._threads = threads
        self._pipeline: Any = None

    def decodes(self, contents: list[bytes]) -> bool:
        """Whether all of them decode."""
        if not all(contents):
            return False
        if self._pipeline is None:
            self._pipeline = _decode(batch_size=_BATCH, num_threads=self._threads, device_id=None, exec_dynamic=True)
            self._pipeline.build()
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8) for content in contents])
            self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # after an error it is of no more use
            return False
        return True


@pipeline_def(prefetch_queue_depth=1)
def _decode():
    return fn.decoders.image(fn.external_source(name="encoded"), device="cpu", output_type=types.RGB)


def _content(dataset: Dataset, i: int) -> bytes:
    try:
        return dataset.encoded(i)
    except OSError:
        return b""


def _reason(dataset: Dataset, i: int) -> str:
    """In the words of the system and of Pillow, which say more than DALI's."""
    try:
        content = dataset.encoded(i)
    except OSError as error:
        return str(error)
    if not content:
        return "it is empty"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return f"DALI has no decoder for this {image.format}"
    except UnidentifiedImageError:
        return "it is no image"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        return f"{type(error).__name__}: {error}"
