"""What a run shows: a live bar on a terminal, a line an evaluation anywhere else."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.metrics import OVER_PEERS, Scores, is_peer, peer_names


class _Console(Console):
    """Falls silent where nobody reads any more, or the disk is full: all that a run tells is in its folder."""

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError as error:
            with suppress(OSError):
                print(f"nothing more can be shown here: {error.strerror}", file=sys.stderr)
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


class Display:
    """Owns the console. On a terminal: epoch, step, images/s, loss parts and ETA, live; elsewhere no bar at all."""

    def __init__(self, console: Console | None = None):
        self.console = console or _Console(highlight=False, markup=False, emoji=False)  # a path is shown as it is
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._epochs = 0
        self._steps = 1

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True)

    def start(self, folder: Path, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Begin at global step `done`."""
        self._epochs, self._steps = epochs, steps_per_epoch
        self.note(f"{folder}: {epochs} epochs of {steps_per_epoch} steps")
        if not self.console.is_terminal:
            return
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # the losses alone are cut where 80 columns are all
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]} step {task.fields[step]}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[losses]}", table_column=rest),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=epochs * steps_per_epoch, completed=done, rate="", losses="", epoch="", step=""
        )
        self._progress.start()

    def advance(self) -> None:
        """One step more."""
        if self._progress:
            done = int(self._progress.tasks[0].completed) + 1
            epoch, step = divmod(done - 1, self._steps)
            self._progress.update(
                self._task,
                completed=done,
                epoch=f"{epoch + 1}/{self._epochs}",
                step=f"{step + 1}/{self._steps}",
            )

    def losses(self, losses: dict[str, float], images_per_s: float) -> None:
        """The means that were just logged."""
        if self._progress:
            total_first = {"total": losses["total"]} | losses
            text = " ".join(f"{name} {value:.3g}" for name, value in total_first.items())
            self._progress.update(self._task, rate=f"{images_per_s:,.0f} images/s", losses=text)

    def scores(self, epoch: int, scores: Scores) -> None:
        """One line for one evaluation."""
        parts = [f"{name.replace('_', ' ')} {scores[name]['top1']:.2f}" for name in (*OVER_PEERS, *_own(scores))]
        width = len(str(self._epochs))
        self.note(f"epoch {epoch:{width}}/{self._epochs}  top-1 %: {', '.join(parts)}")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def table(self, title: str, scores: Scores) -> None:
        """A row each for the mean (the headline), the peers, the best of them, the ensemble and the teacher."""
        table = Table("", "top-1 %", "top-5 %", "NLL", "ECE %")
        for column in table.columns[1:]:
            column.justify = "right"
        for name in ("mean", *peer_names(scores), *OVER_PEERS[1:], *_own(scores)):
            score = scores[name]
            cells = (f"{score['top1']:.2f}", f"{score['top5']:.2f}", f"{score['nll']:.3f}", f"{score['ece']:.2f}")
            table.add_row(name.replace("_", " "), *cells, style="bold" if name == "mean" else "")
        self.note(title)
        self.console.print(table)

    def finish(self, folder: RunFolder, result: dict[str, Any]) -> None:
        """The table of the last epoch, and where to look."""
        self.table(f"{folder.path}, last epoch", result["last_epoch"]["scores"])
        self.note(f"curves: {folder.curves}   one batch: {folder.batch}   all numbers: {folder.result}")


def _own(scores: Scores) -> list[str]:
    """The method's own predictions: a teacher, a leader."""
    return [name for name in scores if name not in OVER_PEERS and not is_peer(name)]
