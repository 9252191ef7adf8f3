"""The loop over a plan: start what is missing, go on with what was cut off, retry a failure once, report."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from cutnmix.benchmarks.reproduce import report
from cutnmix.benchmarks.reproduce.grid import Grid, Planned, Scale, with_what_lies_there
from cutnmix.benchmarks.reproduce.ledger import Ledger
from cutnmix.benchmarks.reproduce.workers import OTHERWISE, RESCHEDULES, Event, Events
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import RunFolder, Stopped
from cutnmix.trainer.run import noted_signals

ATTEMPTS = 2  # of a run that fails
LEDGER = "ledger.jsonl"  # under --out

State = Literal["done", "cut off", "missing"]
Place = Callable[[deque[Planned], list[int]], Events]


class Summary(NamedTuple):
    """How it ended, by the names of the runs' folders."""

    finished: list[str]
    failed: dict[str, str]  # run -> reason, after all attempts
    taken: list[str]  # another process is at work on them
    page: Path | None  # report.html, if it could be written


class _Ends:
    """How the runs ended so far, by the names of their folders."""

    def __init__(self):
        self.finished: list[str] = []
        self.failed: dict[str, str] = {}
        self.taken: list[str] = []
        self._times: Counter[tuple[str, str]] = Counter()

    def again(self, event: Event) -> bool:
        """Note an end; whether the run is to start once more: after a first failure, and after a few foreign stops."""
        name, what = event.planned.config.folder.name, event.what
        self._times[name, what] += 1
        times = self._times[name, what]
        if what in ("finished", "done"):
            self.finished.append(name)
        elif what == "taken":
            self.taken.append(name)
        elif what == "failed":
            if times < ATTEMPTS:
                return True
            self.failed[name] = event.reason
        elif what == "stopped":
            if times <= RESCHEDULES:
                return True
            self.failed[name] = f"stopped {times} times, and not by this command; it is saved"
        return False


class Halted(Stopped):
    """A signal stopped the grid; all that ran has saved."""

    def __init__(self, signum: int, out: Path):
        super().__init__(signum, out)
        text = str(self).partition(";")[0]
        self.args = (f"{text}; {out} is saved: the same command goes on from there",)


def state(planned: Planned) -> State:
    """What a run's folder holds.

    Raises: RunError if it holds a run with other keys.
    """
    folder = RunFolder(planned.config.folder)
    folder.check(planned.config, OTHERWISE)
    if folder.result.exists():
        return "done"
    return "cut off" if folder.config.exists() else "missing"


def page_folder(grid: Grid, scale: float, out: Path) -> Path:
    """Where the report of a grid at a scale goes; the runs lie beside it."""
    return out / f"{grid.name}{Scale(scale).stamp}"


def reproduce(
    grid: Grid,
    plan: Sequence[Planned],
    scale: float,
    out: Path,
    place: Place,
    display: Display,
    leave_out: Collection[str] = (),
) -> Summary:
    """Run all of the plan that is not done, in that place, and write the report after each run and at the end.

    The report is of all that lies in `out` of the grid at that scale, whatever of it was planned this time.
    A run that was stopped, but not by this command, goes on. Runs on the data sets in `leave_out` stay as they are.
    Raises: RunError for a folder with other keys, before any work; Halted on SIGTERM and SIGINT.
    """
    states = [state(planned) for planned in plan]
    todo = deque(
        planned
        for planned, kept in zip(plan, states, strict=True)
        if kept != "done" and planned.cell.data not in leave_out
    )
    ledger = Ledger(out / LEDGER, grid.name, scale)
    ends = _Ends()
    numbers: dict[str, int] = {}  # in the order in which they begin
    total = len(todo)

    def write_report() -> Path | None:
        try:
            return report.write(
                grid, with_what_lies_there(grid, plan, scale, out), scale, page_folder(grid, scale, out)
            )
        except Exception as error:  # the runs matter more, and how they ended
            display.note(f"the report could not be written: {type(error).__name__}: {error}")

    with noted_signals() as stop, closing(place(todo, stop)) as events:
        for event in events:
            name = event.planned.config.folder.name
            number = numbers.setdefault(name, len(numbers) + 1)
            if event.what == "started":
                ledger.append("started", name, pid=event.pid)
                display.note(f"[{number}/{total}] {name}")
                continue
            details = {key: value for key, value in event._asdict().items() if key in _TOLD and value}
            ledger.append(event.what, name, pid=event.pid, **details)
            display.note(f"{name}: {_WORDS[event.what]}{': ' if event.reason else ''}{event.reason}")
            if ends.again(event) and not stop:
                if event.what == "failed":
                    ledger.append("retried", name)
                todo.append(event.planned)
            if event.what in ("finished", "done"):
                write_report()
    page = write_report()
    if stop:
        raise Halted(stop[0], out)
    return Summary(ends.finished, ends.failed, ends.taken, page)


_TOLD = ("reason", "traceback")
_WORDS = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped and saved",
    "taken": "another process is at work on it; left to that",
    "done": "finished meanwhile by another process",
}
