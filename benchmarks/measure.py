"""How figures are taken: contenders in turn, round after round, warm-up excluded, medians with their spread."""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cutnmix.trainer.run import hardware


class Spread(NamedTuple):
    """Median, lowest and highest of n rounds."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def batches_per_s(batches: Iterator[Any], seconds: float, warmup: int = 5) -> float:
    """Batches a second over about `seconds`, after `warmup` batches."""
    for _ in range(warmup):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - start)


def seconds_per_call(call: Callable[[], object], calls: int, warmup: int = 2) -> float:
    """Median seconds of one call. For work on the CPU: nothing here waits for a GPU."""
    times = []
    for _ in range(warmup + calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def header() -> dict[str, str]:
    """What a figure is worth nothing without: hardware, threads, versions, commit."""
    names = ("torch", "torchvision", "kornia")
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return {
        "hardware": hardware(torch.device("cpu")),
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
        "commit": git.stdout.strip() or "not a git checkout",
    }
