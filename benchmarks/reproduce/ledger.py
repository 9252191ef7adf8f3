"""What happened to the runs of a grid, one JSON record a line.

It is there to be read. The state of a run is its folder, and nothing is lost with the ledger.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from cutnmix.trainer.folder import RunError


class Ledger:
    """OUT/ledger.jsonl: {"time", "event", "run", "grid", "scale", "host", "pid", ...}, appended to by every process.

    A record is written at once and is on the disk when `append` returns. What a kill cut short is passed over: the
    next record starts a line of its own.
    """

    def __init__(self, path: Path, grid: str, scale: float):
        self.path, self.grid, self.scale = path, grid, scale

    def append(self, event: str, run: str, *, pid: int | None = None, **details: Any) -> None:
        """One more record."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": now, "event": event, "run": run, "grid": self.grid, "scale": self.scale}
        record |= {"host": socket.gethostname(), "pid": pid or os.getpid(), **details}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out: {self.path.parent} cannot be made: {error.strerror}") from error
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("ab+") as file:
            if file.tell():  # it opens at its end
                file.seek(-1, os.SEEK_END)
                cut = file.read(1) != b"\n"
            else:
                cut = False
            file.write((b"\n" if cut else b"") + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All whole records, of all grids that share the file."""
        records = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:  # cut short by a kill
                continue
        return records
