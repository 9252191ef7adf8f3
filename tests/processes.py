"""Processes of `cutnmix` that start in a moment: children of one that has imported everything already.

Each is a process of its own, with its own threads, signals and exit code; only the ten seconds of imports are saved.
They leave without Python's end (os._exit): what that could do to an exit code is for the tests of the command line.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

CONTEXT = get_context("forkserver")  # forks from one that has one thread, which those of pytest may not have
CONTEXT.set_forkserver_preload(["imported"])
SMALL_NETWORK = ["imports=[small_network]", "peers.network=small"]  # where any network will do


class Started:
    """`cutnmix ARGUMENTS` with all that it prints at the end of the file `log`; as subprocess.Popen otherwise."""

    def __init__(self, arguments: Sequence[str], log: Path):
        # daemon: a test that fails leaves none behind
        self._process = fork(log, _cutnmix, [*arguments], daemon=True)
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, -N where signal N ended it; None as long as it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def wait_until(done: Callable[[], object], process: Started | subprocess.Popen) -> None:
    """Until `done`, or the end of the process. The deadline is far beyond what busy cores take."""
    deadline = time.monotonic() + 600
    while process.poll() is None and not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fork(log: Path, function: Callable[..., None], *arguments: Any, daemon: bool) -> ForkServerProcess:
    """A process that calls the function, its output at the end of the file. A daemon may start no others."""
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # for the first one, from which the others come
        process = CONTEXT.Process(target=_logged, args=(log, function, arguments), daemon=daemon)
        process.start()
    return process


def _logged(log: Path, function: Callable[..., None], arguments: tuple) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)


def _cutnmix(arguments: list[str]) -> None:
    from cutnmix.trainer.cli import main

    sys.argv = ["cutnmix", *arguments]
    main()
