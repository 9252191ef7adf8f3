"""Which loader, by name. Both keep one contract and give the same pixels."""

import importlib.util
from collections.abc import Iterator
from typing import Protocol

import torch

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.datasets import DataError, Dataset
from cutnmix.pipeline.plan import Distort, Plan
from cutnmix.pipeline.resident import ResidentLoader


class Loader(Protocol):
    """Executes plans: the same plan gives the same views, whatever the loader did before."""

    def epoch(self, plan: Plan, start: int = 0) -> Iterator[Views]:
        """The views of steps start, start + 1, ... of a plan that is on the loader's device."""
        ...

    def close(self) -> None:
        """Release threads and buffers."""
        ...


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
        DataError: if dali is asked for and not installed, or resident for a folder of files.
    """
    has_dali = importlib.util.find_spec("nvidia.dali") is not None if importlib.util.find_spec("nvidia") else False
    if name == "dali" and not has_dali:
        raise DataError("loader.name: dali is not installed here (it exists for Linux only); use loader.name=resident")
    if name == "resident" or not has_dali:
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
