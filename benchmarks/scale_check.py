"""cutnmix plan-scale --check: predicted steps beside real ones, of gloo processes on this machine.

    python -m torch.distributed.run --standalone --nproc-per-node N -m cutnmix.benchmarks.scale_check '{...}'

What a prediction starts from is measured before and after the steps that it predicts, because other work on the machine
slows all of them: one peer on one process alone, one on each of all N at once, all-reduces of two sizes between them.
The steps are the trainer's, of J peers on each mesh, loader and update included. What they exchange is counted too.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count as count_up
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from cutnmix.benchmarks import plots, records, scale
from cutnmix.benchmarks.measure import Spread
from cutnmix.benchmarks.one_peer import make_steps
from cutnmix.benchmarks.records import Record, Row, Sheet, make_record
from cutnmix.benchmarks.steps import LR, keys
from cutnmix.models.cost import check_image_size, cost
from cutnmix.pipeline import load_splits
from cutnmix.pipeline.cores import available_cores
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.device import choose
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.keys import Config, ConfigError
from cutnmix.trainer.mesh import ONE, Mesh, joined
from cutnmix.trainer.step import Tally

CPU = torch.device("cpu")
SIZE, CLASSES = (32, 32), 10  # handwritten digits
SMALL, LARGE = 2**10, 2**20  # numbers of an all-reduce
TIMEOUT_S = 120.0  # for which a process waits for another one
STEPS, REDUCES = 4, 20  # of one peer, and of all-reduces, a turn
PEER_STEPS = 8  # a turn: 8 / J steps of J peers
ALONE = scale.Mesh(1, 1)
NOTES = [
    "Steps of the trainer on handwritten digits by gloo on this machine, the resident loader and the update included.",
    "Predicted from one peer on one process (alone for 1 x 1, on all processes at once for the others) and from "
    "all-reduces of 4 KiB and 4 MiB, measured before and after.",
    "Counted is what a process gives to the all-reduces of a step, but for 8 bytes by which all agree whether to stop.",
]
Figures = dict[str, float]  # seconds: "one 32", "all 32", "sum 1024": who does how much


class Case(NamedTuple):
    """J peers on a mesh."""

    mesh: scale.Mesh
    J: int


class Sent(TorchDispatchMode):
    """Counts the all-reduces of tensors within, and adds up their bytes."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Each call goes on as it is."""
        if func.overloadpacket is torch.ops._c10d_functional.all_reduce:
            self.count += 1
            self.bytes += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


class Turn(NamedTuple):
    """A step of a case, and what a prediction of it starts from."""

    step_s: float
    basis: Figures


def run(
    *,
    peers: int,
    devices: int,
    network: str,
    batch: int,
    method: str,
    threads: int | None,
    rounds: int,
    json_file: Path | None,
    console: Console,
) -> Record:
    """Measure in processes of their own, and tell how far the predictions are off."""
    if devices < 2:
        raise ConfigError("--devices: at least 2 processes can exchange something, got 1")
    if batch % devices:
        raise ConfigError(f"--batch: {batch} cannot be cut into {devices} parts")
    if batch > (images := len(load_splits("digits").train)):
        raise ConfigError(f"--batch: {batch} is more than the {images:,} handwritten digits that it trains on")
    try:
        check_image_size(network, CLASSES, SIZE)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    settings = {
        "peers": peers, "devices": devices, "network": network, "batch": batch, "method": method,
        "threads": threads or max(1, available_cores() // devices), "rounds": rounds,
    }  # fmt: skip
    console.print(f"training on 1 and {devices} processes, {settings['threads']} threads each ...")
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]  # its own name may not resolve
    command += ["--nproc-per-node", str(devices)]
    done = subprocess.run(
        [sys.executable, *command, "-m", "cutnmix.benchmarks.scale_check", json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": str(settings["threads"])},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RunError(f"the processes ended with code {done.returncode}; the reason stands above")
    record = json.loads(done.stdout.splitlines()[-1])
    records.show(record, console)
    if json_file:
        records.write_json(json_file, record)
        plots.draw_record(record, json_file.with_suffix(".png"))
    return record


def cases(devices: int, most: int, batch: int) -> list[Case]:
    """J = 1, 2, 4, ... on one process, and on every mesh of all of them."""
    counts = [2**i for i in range(most.bit_length())]
    meshes = {J: [ALONE, *(mesh for mesh in scale.meshes(devices, J, batch)[0] if mesh != ALONE)] for J in counts}
    return [Case(mesh, J) for J in counts for mesh in meshes[J]]


def work(settings: dict[str, Any]) -> Record | None:
    """What each process does; the first one has the record."""
    torch.set_num_threads(settings["threads"])
    devices, network, batch = settings["devices"], settings["network"], settings["batch"]
    wanted = cases(devices, settings["peers"], batch)
    with joined(_config(settings, Case(scale.Mesh(devices, 1), 1))) as whole, ExitStack() as stack:
        over = {mesh: _mesh(mesh, whole) for mesh in {case.mesh: None for case in wanted}}
        steps: dict[Case, Callable[[], None]] = {
            case: stack.enter_context(_stepping(settings, case, over[case.mesh]))
            for case in wanted
            if whole.first or case.mesh != ALONE
        }
        sizes = (batch // devices, batch)
        single, _ = make_steps(network, CLASSES, SIZE, sizes, choose(_config(settings, Case(ALONE, 1))))
        ring = over.get(scale.Mesh(1, devices)) or _mesh(scale.Mesh(1, devices), whole)
        sums = {size: torch.ones(size) for size in (SMALL, LARGE)}

        def timed(call: Callable[[], object] | None, times: int) -> Callable[[], float]:
            """Seconds of a call, from when all are ready until all are done; without one, to wait for the others."""

            def figure() -> float:
                whole.wait()
                begun = time.perf_counter()
                for _ in range(times if call else 0):
                    call()  # pyright: ignore[reportOptionalCall]
                whole.wait()
                return (time.perf_counter() - begun) / times

            return figure

        basis = {f"all {images}": timed(step, STEPS) for images, step in single.items()}
        basis[f"one {batch}"] = timed(single[batch] if whole.first else None, STEPS)
        for size, numbers in sums.items():
            basis[f"sum {size}"] = timed(lambda numbers=numbers: ring.over.total(numbers), REDUCES)
        figures = {case: timed(steps.get(case), max(1, PEER_STEPS // case.J)) for case in wanted}
        _turns(figures, basis, 1)  # what is made at first use
        seen = _turns(figures, basis, settings["rounds"])
        sent = {case: _counted(step) for case, step in steps.items()}
    return _record(settings, seen, sent) if whole.first else None


def _counted(step: Callable[[], None]) -> Sent:
    """What this process exchanges in a step."""
    with Sent() as sent:
        step()
    return sent


def _turns(
    figures: dict[Case, Callable[[], float]], basis: dict[str, Callable[[], float]], rounds: int
) -> dict[Case, list[Turn]]:
    """Each case once a round, every second round backwards; the basis in between, a mean of the two around a case."""
    seen: dict[Case, list[Turn]] = {case: [] for case in figures}
    order = list(figures)
    before = {key: figure() for key, figure in basis.items()}
    for _ in range(rounds):
        for case in order:
            step_s, after = figures[case](), {key: figure() for key, figure in basis.items()}
            seen[case].append(Turn(step_s, {key: (before[key] + after[key]) / 2 for key in basis}))
            before = after
        order.reverse()
    return seen


def _record(settings: dict[str, Any], seen: dict[Case, list[Turn]], sent: dict[Case, Sent]) -> Record:
    """Milliseconds measured and predicted, the ratio of the two turn by turn, and what was exchanged."""
    net, batch, devices = cost(settings["network"], CLASSES, SIZE), settings["batch"], settings["devices"]
    tables: dict[str, dict[str, Row]] = {"measured": {}, "predicted": {}, "ratio": {}, "count": {}, "bytes": {}}
    for case, turns in seen.items():
        method = settings["method"] if case.J > 1 else "baseline"
        job = scale.Job(method, case.J, batch, CLASSES, net.feature_dim, net.parameters)
        measured = [turn.step_s for turn in turns]
        predicted = [predict(job, case.mesh, turn.basis, devices) for turn in turns]
        row, column = str(case.mesh), str(case.J)
        tables["measured"].setdefault(row, {})[column] = Spread.of([1e3 * value for value in measured])
        tables["predicted"].setdefault(row, {})[column] = Spread.of([1e3 * value for value in predicted])
        tables["ratio"].setdefault(row, {})[column] = Spread.of_ratios(predicted, measured)
        if case.mesh != ALONE:
            tables["count"].setdefault(row, {})[column] = sent[case].count
            tables["bytes"].setdefault(row, {})[column] = sent[case].bytes
    title = f"{settings['network']}, batch {batch}, {settings['method']}, data x peer processes"
    links = [link_of(turn.basis, devices) for turns in seen.values() for turn in turns]
    latency: Row = {"us": Spread.of([1e6 * each.latency_s for each in links])}
    bandwidth: Row = {"Gbit/s": Spread.of([8e-9 * each.bytes_per_s for each in links])}
    processes = f"{devices} processes"
    sheets = [
        Sheet(f"A training step, measured, {title}", "ms", "J", tables["measured"]),
        Sheet("The same, predicted", "ms", "J", tables["predicted"]),
        Sheet("Predicted / measured", "ratio", "J", tables["ratio"]),
        Sheet("All-reduces of a step, counted", "calls", "J", tables["count"]),
        Sheet("What they take from each process, counted", "bytes", "J", tables["bytes"]),
        Sheet("The link: latency", "us", "", {processes: latency}),
        Sheet("The link: bandwidth", "Gbit/s", "", {processes: bandwidth}),
    ]
    return make_record("plan-scale", sheets, settings, NOTES, command="cutnmix plan-scale --check")


def predict(job: scale.Job, mesh: scale.Mesh, basis: Figures, devices: int) -> float:
    """Seconds of a step, nothing overlapping, from the basis; one process alone has no other one beside it."""
    if mesh == ALONE:
        step_s = scale.Line(0.0, basis[f"one {job.B}"] / job.B)
    else:
        low, high = ((size, basis[f"all {size}"]) for size in (job.B // devices, job.B))
        step_s = scale.Line.through(low, high)
    link = link_of(basis, devices)
    single = scale.Single(step_s, activation_bytes=scale.Line(0.0, 0.0), fixed_bytes=0.0)
    return scale.predict(job, mesh, single, {"peer": link, "data": link}).step_s


def link_of(basis: Figures, n: int) -> scale.Link:
    """From all-reduces of two sizes over n processes: the ring formula, turned round."""
    low, high = ((scale.FLOAT * size, basis[f"sum {size}"]) for size in (SMALL, LARGE))
    line = scale.Line.through(low, high)
    bytes_per_s = 2 * (n - 1) / n / line.slope if line.slope else math.inf  # the larger one was no slower
    return scale.Link(bytes_per_s, line.fixed / (2 * (n - 1)))


def _config(settings: dict[str, Any], case: Case) -> Config:
    """The trainer's own, of a case. With one peer there is nobody to learn from."""
    method, _, variant = (settings["method"] if case.J > 1 else "baseline").partition("-")
    more = [f"method={method}", *([f"method.variant={variant}"] if variant else [])]
    mesh = [f"mesh.data={case.mesh.data}", f"mesh.peer={case.mesh.peer}", f"mesh.timeout_s={TIMEOUT_S}"]
    overrides = keys(None, settings["network"], settings["batch"], case.J, CPU, "loader=resident", *more, *mesh)
    return load_config("quickstart", overrides)


def _mesh(mesh: scale.Mesh, whole: Mesh) -> Mesh:
    """The processes of `whole` on another mesh, all of them or each alone."""
    if mesh == ALONE:
        return ONE
    return Mesh(*mesh, whole.rank, init_device_mesh("cpu", mesh, mesh_dim_names=("data", "peer")))


@contextmanager
def _stepping(settings: dict[str, Any], case: Case, mesh: Mesh) -> Iterator[Callable[[], None]]:
    """What does a training step as the trainer's loop: data, forward, losses, exchange, backward, update, signals."""
    parts = build(_config(settings, case), mesh)
    tally = Tally([])

    def batches():
        for epoch in count_up():
            plan = parts.plan(epoch)
            for step, views in enumerate(parts.loader.epoch(plan)):
                yield views, plan.step(step), plan.weight(step)

    made = batches()

    def one() -> None:
        views, draws, weight = next(made)
        parts.step.train(parts.learner, views, draws, tally, lr=LR, share=1.0, update=True, weight=weight)
        mesh.agree(0)

    yield one
    made.close()
    parts.close()


if __name__ == "__main__":
    record = work(json.loads(sys.argv[1]))
    if record:
        print(json.dumps(record))
