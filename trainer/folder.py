"""A run is a folder: what is in it, who may write to it, and how an interrupted one goes on.

config.yaml               the resolved configuration
metrics.jsonl             a record a line: {"kind": "train" | "test" | "session" | "stopped", "epoch", "step", ...}
                          (session: a start, and what it computes with; stopped: the end of one, by a signal)
tensorboard/              the same, for TensorBoard
batch.png, curves.png     one batch as the peers see it; losses, accuracies, learning rate
checkpoints/last.pt       the state to resume from
                          (several processes write it as a folder, and this is a link to that)
checkpoints/best.pt       the best TEST accuracy (mean of the peers), chosen on the test images and named for it
peers/peer0.safetensors   the final weights, one file a peer
result.json               the last epoch's scores, hardware, versions
log.txt                   what it said, where it was started by another process (cutnmix reproduce)
"""

import contextlib
import csv
import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import yaml
from filelock import FileLock, Timeout

from cutnmix.trainer.config import dump_config, parse_config, read_yaml, yaml_of
from cutnmix.trainer.keys import Config, ConfigError

# Keys that may differ when a run is resumed: they change neither the data nor the arithmetic (the mesh and the loader:
# but rounding, and the mesh the statistics of batch norms that are not synchronised).
_FREE_ON_RESUME = ("name", "runs", "resume", "loader", "checkpoint", "log_every", "data.root", "data.download", "mesh")


class RunError(Exception):
    """A run folder is taken, missing, or belongs to another run; or the run itself went wrong."""


class Taken(RunError):
    """Another process is at work in the folder."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved and resume=auto goes on."""

    def __init__(self, signum: int, folder: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {folder} is saved: resume=auto goes on from there")
        self.signum = signum


class Position(NamedTuple):
    """Steps `step` of epoch `epoch` are done; both count from 0."""

    epoch: int
    step: int


class RunFolder:
    """The paths of a run, and the rules about them."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.batch = path / "batch.png"
        self.curves = path / "curves.png"
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"
        self.peers = path / "peers"
        self.result = path / "result.json"

    def check(self, config: Config, otherwise: str = "name=NAME starts another") -> None:
        """Refuse to mix two runs in one folder; `otherwise` says what to do about it.

        Raises:
            RunError: the folder holds a run and `resume` is never, or it holds a run with other keys.
        """
        if not self._holds_a_run():
            return
        if config.resume == "never":
            raise RunError(f"{self.path} holds a run already: resume=auto goes on with it, {otherwise}")
        before = self.read_config()
        elsewhere = config.data.own_files and before.data.absolute_root != config.data.absolute_root
        free = [key for key in _FREE_ON_RESUME if not (key == "data.root" and elsewhere)]
        changed = [f"{key} (was {was!r}, now {now!r})" for key, was, now in _changed(before, config, free)]
        if changed:
            raise RunError(f"{self.path} was started with other keys: {'; '.join(changed)}; {otherwise}")

    def expect_free(self) -> None:
        """Raise what `locked` would, before what takes long, and leave nothing."""
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if there == self.path:
            with self.locked():
                return
        with self._made(), TemporaryFile(dir=there):
            pass

    @contextlib.contextmanager
    def _made(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"runs, name: {self.path} cannot be made: {error.strerror}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock dies with the process, however it ends.

        Raises:
            Taken: another process holds it.
            RunError: it cannot be made.
        """
        with self._made():
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Taken(f"{self.path} is in use by another process") from None
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, config: Config) -> None:
        """Make the sub-folders and write the resolved configuration."""
        with written(self.path):
            for folder in (self.last.parent, self.peers, self.tensorboard):
                folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, yaml_of(config))

    def expect(self) -> None:
        """Raise RunError where it is no run's folder."""
        if not self._holds_a_run():
            raise RunError(f"{self.path} is not a run: it has no config.yaml")

    def _holds_a_run(self) -> bool:
        try:
            return self.config.exists()
        except OSError as error:  # one may not look there, or no folder can have that name
            raise RunError(f"{self.path}: {error.strerror}") from error

    def read_config(self) -> Config:
        """The configuration that the run was started with."""
        try:
            self.expect()
            return parse_config(read_yaml(self.config.read_text()), str(self.config))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.config}: {error}") from error

    def append(self, record: dict[str, Any]) -> None:
        """One more line of metrics.jsonl, on the disk when this returns. Raises: RunError."""
        with written(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl (a kill can cut the last one short), or those of one kind.

        Raises: RunError that names a line that is no record.
        """
        if not self.metrics.exists():
            return []
        text = self.metrics.read_text(errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        begin = f'{{"kind": "{kind}"' if kind else ""  # so that the others, which are far more, need not be parsed
        records = []
        for number, line in enumerate(lines, 1):
            if line.startswith(begin):
                try:
                    record = json.loads(line)
                    _ = record["kind"], record["epoch"], record["step"]
                except (ValueError, LookupError, TypeError) as error:
                    raise RunError(f"{self.metrics}: line {number} is damaged ({error}); remove it") from error
                records.append(record)
        return records

    def rewind(self, position: Position, global_step: int) -> list[dict[str, Any]]:
        """Drop the records of what the checkpoint at `position` has not seen: it will be done, and written, again.

        Returns those that are left.
        """

        def seen(record: dict[str, Any]) -> bool:
            if record["kind"] == "test":
                return record["epoch"] <= position.epoch
            # Of a session that began there no step is left.
            return record["step"] < global_step or (record["step"] == global_step and record["kind"] != "session")

        kept = [record for record in self.records() if seen(record)]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept


def name_of(run: Path) -> str:
    """The name of a run's folder, `.` included."""
    return Path(os.path.abspath(run)).name


def same(config: Config, other: Config) -> bool:
    """Whether two runs are one: every key alike that changes data or arithmetic."""
    return not _changed(config, other)


def same_but_seed(config: Config, other: Config) -> bool:
    """Whether two runs are one experiment: every key alike that changes data or arithmetic, the seed apart."""
    return all(key == "seed" for key, _, _ in _changed(config, other))


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row below the keys, which are those of the first."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Where this fails because it cannot be written, say so of `path`. Raises: RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def expect_writable(folder: Path) -> None:
    """Make the folder, and see whether a file can be in it: before what takes long. Raises: RunError."""
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


def write_atomically(path: Path, content: str | bytes) -> None:
    """Old or new, never half; where it fails, nothing is left of the new. Makes the folder. Raises: RunError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same
    try:
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _changed(before: Config, now: Config, free: Sequence[str] = _FREE_ON_RESUME) -> list[tuple[str, Any, Any]]:
    """The keys that differ, with both values, without the free ones and what is below them."""
    was, is_now = _flat(dump_config(before)), _flat(dump_config(now))
    prefixes = tuple(f"{key}." for key in free)
    return [
        (key, was.get(key), is_now.get(key))
        for key in sorted(was.keys() | is_now.keys())
        if was.get(key) != is_now.get(key) and not f"{key}.".startswith(prefixes)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
