"""Which loader, by name. Both keep one contract and give the same pixels."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Protocol

import torch

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.cores import available_cores
from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.laws import Distort
from cutnmix.pipeline.plan import Plan
from cutnmix.pipeline.resident import ResidentLoader

_NO_DALI = "dali is not installed here (it exists for Linux only)"


class Loader(Protocol):
    """Executes plans: the same plan gives the same views, whatever the loader did before."""

    def epoch(self, plan: Plan, start: int = 0) -> Iterator[Views]:
        """The views of steps start, start + 1, ... of a plan that is on the loader's device."""
        ...

    def close(self) -> None:
        """Release threads and buffers."""
        ...


def check_decoder(dataset: Dataset) -> None:
    """Raise DataError if nothing here reads the images."""
    if not dataset.in_memory and not _has_dali():
        raise DataError(f"data.name: {dataset.name} is a set of image files, which DALI reads; {_NO_DALI}")


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia.dali") is not None if importlib.util.find_spec("nvidia") else False


def default_threads(dataset: Dataset, device: torch.device | str) -> int:
    """How many threads DALI gets: 1 beside training on a CPU, which needs them more; beside a GPU this process's share
    of the cores, at most 16 to decode files and 8 for arrays. Not torch's number of threads: torchrun sets that to 1.
    """
    if torch.device(device).type != "cuda":
        return 1
    share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8 if dataset.in_memory else 16, share))


def make_loader(
    name: str,
    dataset: Dataset,
    distort: Distort,
    device: torch.device | str = "cpu",
    *,
    num_views: int,
    batch_size: int,
    num_threads: int = 2,
    prefetch: int = 2,
) -> Loader:
    """The loader `dali`, `resident`, or `auto`: dali where it is installed, resident elsewhere.

    `num_views`, `batch_size`, `num_threads` and `prefetch` shape DALI's pipeline.

    Raises:
        DataError: for another name, if dali is asked for or needed and not installed, or resident for image files.
    """
    if name not in (allowed := ("auto", "dali", "resident")):
        raise DataError(f"loader.name: {name!r} is none of {', '.join(allowed)}")
    check_decoder(dataset)
    if name == "dali" and not _has_dali():
        raise DataError(f"loader.name: {_NO_DALI}; use loader.name=resident")
    if name == "resident" or not _has_dali():
        return ResidentLoader(dataset, distort, device)
    from cutnmix.pipeline.dali import DaliLoader  # here, because platforms without DALI can do without it

    return DaliLoader(
        dataset,
        distort,
        device,
        num_views=num_views,
        batch_size=batch_size,
        num_threads=num_threads,
        prefetch=prefetch,
    )
