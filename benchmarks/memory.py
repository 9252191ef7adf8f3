"""Peak memory of training J peers, and how long compiling them takes: a process of its own for every J.

    python -m cutnmix.benchmarks.memory '["peers.count=2", ...]'

runs three steps of that configuration and prints {"peak_mib", "first_s", "later_s"} as JSON.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from cutnmix.benchmarks.measure import Clock
from cutnmix.benchmarks.peers import method_of
from cutnmix.benchmarks.records import Row, Sheet
from cutnmix.benchmarks.steps import keys, training
from cutnmix.trainer.cli import main
from cutnmix.trainer.folder import RunError

NOTES = [
    "Peak: the most memory (resident on a CPU, allocated by torch on a GPU) of a process that takes three steps, above "
    "what it had taken, on a GPU what it then held, after a step of one peer on two images. One run a J, uncompiled."
]
COMPILE_NOTE = "Compile time: the first step less a later one, with compile=peers and empty caches. One run a J."


def measure(*, network: str, views: list[int], batch: int, device: torch.device, compiled: bool) -> list[Sheet]:
    """MiB against J, and over J times those of the least J; where asked for, seconds of compilation against J."""
    config = partial(keys, None, network, batch)
    peak: Row = {}
    compile_s: Row = {}
    for count in views:
        overrides = config(count, device, "loader=resident", method_of(count))
        peak[str(count)] = _apart([*overrides, "compile=none"])["peak_mib"]
        if compiled:
            seen = _apart([*overrides, "compile=peers"])
            compile_s[str(count)] = seen["first_s"] - seen["later_s"]
    least = min(views)
    unit = peak[str(least)]
    assert isinstance(unit, float)
    share: Row = {j: value / (int(j) / least * unit) for j, value in peak.items() if isinstance(value, float)}
    single = "J x one peer's" if least == 1 else f"J / {least} x the peak of {least} peers"
    title = f"{network}, batch {batch}, CutnMix with all losses"
    sheets = [
        Sheet(f"Peak memory of training, {title}", "MiB", "J", {"cutnmix": peak}),
        Sheet(f"The same / ({single})", "ratio", "J", {"cutnmix": share}),
    ]
    return [*sheets, Sheet("Compile time, compile=peers", "s", "J", {"cutnmix": compile_s})] if compiled else sheets


def _apart(overrides: list[str]) -> dict[str, float]:
    """What `probe` finds in a new process, whose compiler's caches are empty. Raises: RunError where it fails."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "cutnmix.benchmarks.memory", json.dumps(overrides)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise RunError(f"measuring memory ended with code {done.returncode}; the reason stands above")
    return json.loads(done.stdout.splitlines()[-1])


def probe(overrides: list[str]) -> dict[str, float]:
    """Three steps of a configuration: peak memory in MiB, seconds of the first step and of the last.

    One step of one peer on two images comes first, uncompiled: what libraries take at first use is nobody's cost.
    """
    device = torch.device(next(key for key in overrides if key.startswith("device=")).removeprefix("device="))
    with training([*overrides, "peers.count=1", "method=baseline", "batch_size=2", "compile=none"]) as step:
        step()
    del step  # on a GPU it holds that small run
    clock, before, times = Clock(device), settled_mib(device), []
    with training(overrides) as step:
        for _ in range(3):
            clock.start()
            step()
            times.append(clock.stop())
    return {"peak_mib": peak_mib(device) - before, "first_s": times[0], "later_s": times[-1]}


def settled_mib(device: torch.device) -> float:
    """What is held for good, from which a GPU's peak begins anew; elsewhere the peak, which no process takes back."""
    if device.type != "cuda":
        return peak_mib(device)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def peak_mib(device: torch.device) -> float:
    """The most memory that this process ever held: on the device, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:  # unlike ru_maxrss, this one does not start from the peak of the process that started this one
        if line.startswith("VmHWM"):  # not in every sandbox
            return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main(lambda: print(json.dumps(probe(json.loads(sys.argv[1])))))
