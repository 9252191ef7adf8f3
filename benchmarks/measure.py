"""How figures are taken: contenders in turn, round after round, warm-up excluded, medians with their spread."""

import importlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cutnmix.pipeline.cores import available_cores
from cutnmix.trainer.run import hardware

CPU = torch.device("cpu")


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

    @classmethod
    def of_ratios(cls, above: list[float], below: list[float]) -> "Spread":
        """The spread of above / below, round by round: what slows a whole round down cancels."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


class Clock:
    """Seconds that a device is busy between `start` and `stop`, which waits for it.

    CUDA events on a GPU, which begin when all that came before is done; the host's clock elsewhere.
    """

    def __init__(self, device: torch.device = CPU):
        self.device = device
        self.began: Any = None

    def start(self) -> None:
        """Begin to count."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.began = torch.cuda.Event(enable_timing=True)
            self.began.record()
        else:
            self.began = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`."""
        if self.device.type == "cuda":
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            ended.synchronize()
            return self.began.elapsed_time(ended) / 1000
        return time.perf_counter() - self.began


def per_second(call: Callable[[], object], clock: Clock, *, seconds: float, warmup: int) -> float:
    """Calls a second: after `warmup` calls that are not counted, as many as begin within `seconds`, at least one."""
    for _ in range(warmup):
        call()
    clock.start()
    count, end = 0, time.perf_counter() + seconds
    while not count or time.perf_counter() < end:
        call()
        count += 1
    return count / clock.stop()


def in_turn(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each contender's figure once a round: what slows the machine down meets them all.

    One after the other, every second round backwards, so that none always follows the same one.
    """
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            seen[name].append(contenders[name]())
        order.reverse()
    return seen


def installed(library: str) -> bool:
    """Whether it can be imported here."""
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def checkout() -> Path | None:
    """The root of the checkout that this file is part of; None where the package was installed without one."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "benchmarks" / "results").is_dir() else None


def header(device: torch.device = CPU) -> dict[str, Any]:
    """What a figure is worth nothing without: hardware, threads, versions, commit, date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device.type,
        "hardware": hardware(device),
        "threads": f"{torch.get_num_threads()} of torch, on {available_cores()} cores",
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
    }


def _versions() -> list[str]:
    names = {"torch": "torch", "torchvision": "torchvision", "kornia": "kornia", "timm": "timm"}
    there = [f"{name} {version(package)}" for name, package in names.items() if installed(name)]
    if installed("nvidia.dali"):  # its package is named after the version of CUDA
        there.append(f"DALI {importlib.import_module('nvidia.dali').__version__}")
    return there


def commit() -> str:
    """The commit of the checkout, or the version of the package that was installed without one.

    Marked as dirty if files were changed since, other than the records of benchmarks themselves.
    """
    root = checkout()
    if root is None:
        return f"cutnmix {version('cutnmix')}"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        name = git("describe", "--always")
    except OSError:
        return "unknown"
    return name + ("-dirty" if changed else "") if name else "unknown"
