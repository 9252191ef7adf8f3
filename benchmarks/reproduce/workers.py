"""Where runs run: in this process, in local processes, or on a Ray cluster. One function a place, all alike:

    place(todo, stop, ...) -> Events

Each takes runs from `todo`, to which its caller may append between two events (a run to retry), until it is empty and
nothing runs, or until a signal is in `stop`: then what runs is told to save, and ends with an event `stopped`. So does
a run that somebody else told, to a process or to a worker of Ray, while `stop` is empty.
The state of a run is its folder, so whoever starts it next goes on.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from cutnmix.benchmarks.reproduce.grid import Planned
from cutnmix.benchmarks.reproduce.ledger import Ledger
from cutnmix.pipeline.dataset import DataError
from cutnmix.trainer.cli import EXIT_REQUEUE
from cutnmix.trainer.config import dump_config, parse_config
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import RunError, RunFolder, Stopped, Taken
from cutnmix.trainer.keys import Config, ConfigError
from cutnmix.trainer.run import train

LOG = "log.txt"  # in the run's folder: what a run says that has no terminal
POLL = 0.1  # seconds
OTHERWISE = "another --out keeps the two apart"  # what to do about a folder that holds a run with other keys
RESCHEDULES = 5  # of a run that was stopped, or whose Ray worker was killed, before that counts as a failure of it
_RAY_STORE = 100 * 2**20  # bytes of a local Ray's object store; only configurations travel

Outcome = Literal["finished", "failed", "stopped", "taken", "done"]  # done: somebody else has finished it meanwhile


class Ending(NamedTuple):
    """How an attempt at a run ended."""

    what: Outcome
    reason: str = ""  # of a failure, one line
    traceback: str = ""


class Event(NamedTuple):
    """Something that happened to a run."""

    planned: Planned
    what: Literal["started"] | Outcome
    pid: int | None = None
    reason: str = ""
    traceback: str = ""

    @classmethod
    def end(cls, planned: Planned, ending: Ending, pid: int | None = None) -> "Event":
        """That an attempt ended."""
        return cls(planned, ending.what, pid, ending.reason, ending.traceback)


Events = Generator[Event, None, None]


def attempt(config: Config, display: Display | None = None, stop: list[int] | None = None) -> Ending:
    """Train a run to its end in this process, or to a signal, see train. Whatever goes wrong is a way to end."""
    folder = RunFolder(config.folder)
    try:
        folder.check(config, OTHERWISE)
        if folder.result.exists():
            return Ending("done")
        train(config, display, stop)
        return Ending("finished")
    except Stopped:
        return Ending("stopped")
    except Taken:
        return Ending("taken")
    except (ConfigError, DataError, RunError) as error:
        return Ending("failed", str(error))
    except Exception as error:  # a grid goes on without it
        return Ending("failed", _one_line(error), traceback.format_exc())
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def here(todo: deque[Planned], stop: list[int], display: Display | None = None) -> Events:
    """One after another in this process."""
    while todo and not stop:
        run = todo.popleft()
        yield Event(run, "started", os.getpid())
        yield Event.end(run, attempt(run.config, display, stop), os.getpid())


def processes(todo: deque[Planned], stop: list[int], count: int, threads: int) -> Events:
    """`count` at a time, each `cutnmix train` in a process of its own with so many CPU threads.

    All see the same GPU, or where there are several, one each in turn.
    """
    running: dict[subprocess.Popen[bytes], tuple[int, Planned]] = {}  # with its slot, 0 ... count - 1
    told = False
    try:
        while running or (todo and not stop):
            while todo and len(running) < count and not stop:
                run = todo.popleft()
                slot = min(set(range(count)) - {slot for slot, _ in running.values()})
                ending = _claim(run.config)
                if ending is None:
                    process = _spawn(run.config, slot, threads)
                    running[process] = slot, run
                    yield Event(run, "started", process.pid)
                else:
                    yield Event.end(run, ending)
            if stop and not told:
                told = True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            for process in [process for process in running if process.poll() is not None]:
                _, run = running.pop(process)
                yield Event.end(run, _ended(process.returncode, run.config), process.pid)
            if running:
                time.sleep(POLL)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()


def on_ray(
    todo: deque[Planned], stop: list[int], ledger: Ledger, address: str, count: int, threads: int, gpus: float
) -> Events:
    """Each a Ray task of `threads` CPUs and, where the cluster has any, `gpus` GPUs; `local` starts a Ray here.

    A task whose worker was killed is rescheduled by Ray, up to RESCHEDULES times, and goes on from its last checkpoint.
    The folders of the runs, and the data, must be the same on all machines: their paths are made absolute here. Tasks
    write their own `started` into the ledger, so that it shows each time that one was scheduled.

    Raises: ConfigError where Ray is not installed or cannot be reached.
    """
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        local = {"num_cpus": count * threads, "object_store_memory": _RAY_STORE, "include_dashboard": False}
        try:
            ray.init(address, log_to_driver=False, logging_level="error", **(local if address == "local" else {}))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--ray {address}: {_one_line(error)}") from error
    share = gpus if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=threads, num_gpus=share, max_retries=RESCHEDULES)(_task)
    ledger = Ledger(ledger.path.absolute(), ledger.grid, ledger.scale)
    running: dict[Any, Planned] = {}
    told = False
    try:
        while running or (todo and not stop):
            while todo and not stop:
                run = todo.popleft()
                running[task.remote(dump_config(_absolute(run.config)), ledger)] = run
            if stop and not told:
                told = True
                for reference in running:
                    ray.cancel(reference)  # SIGINT to the task, which saves
            ended, _ = ray.wait([*running], timeout=POLL)
            for reference in ended:
                run = running.pop(reference)
                try:
                    ending, pid = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if told:  # cancelled before it trained: nothing to save
                        continue
                    ending, pid = Ending("failed", _one_line(error), str(error)), None
                yield Event.end(run, ending, pid)
    finally:
        for reference in running:
            ray.cancel(reference)
        if began:
            ray.shutdown()


def _task(tree: dict[str, Any], ledger: Ledger) -> tuple[Ending, int]:
    """On the worker: a run from its resolved configuration to its end, and the process."""
    config = parse_config(tree)
    ledger.append("started", config.folder.name)
    config.folder.mkdir(parents=True, exist_ok=True)
    with (config.folder / LOG).open("a") as log:
        ending = attempt(config, Display(Console(file=log, markup=False, emoji=False, highlight=False)))
    return ending, os.getpid()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError('--ray: Ray is not installed: pip install "cutnmix[ray]"') from None
    return ray


def _absolute(config: Config) -> Config:
    """The same run for a process with another working folder."""
    data = config.data.model_copy(update={"root": config.data.absolute_root})
    return config.model_copy(update={"runs": config.folder.parent.absolute(), "data": data})


def _claim(config: Config) -> Ending | None:
    """None, with its configuration in its folder, if the run is there to be started."""
    folder = RunFolder(config.folder)
    try:
        with folder.locked():
            folder.check(config, OTHERWISE)
            if folder.result.exists():
                return Ending("done")
            folder.begin(config)
            return None
    except Taken:
        return Ending("taken")
    except (ConfigError, RunError) as error:
        return Ending("failed", str(error))


def _spawn(config: Config, slot: int, threads: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cutnmix.trainer", "train", str(RunFolder(config.folder).config)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if gpus := _gpus():
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with (config.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then tells all to save
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """In the child: SIGTERM, on which it saves, when the parent is gone, however that ended. Linux only."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _gpus() -> list[str]:
    """What to write into CUDA_VISIBLE_DEVICES for each GPU; empty where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


def _ended(code: int, config: Config) -> Ending:
    """Of a process that has ended so, whoever told it to."""
    if code == 0:
        return Ending("finished")
    if code in (EXIT_REQUEUE, -signal.SIGTERM):  # the latter before it trained: nothing to save
        return Ending("stopped")
    if code < 0:
        return Ending("failed", f"killed by {signal.Signals(-code).name}")
    return Ending("failed", _last_line(config.folder / LOG))


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1].removeprefix('error: ')} (all of it: {path})" if lines else f"no word in {path}"


def _one_line(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
