"""The training loop: epochs of steps, an evaluation after each, everything on record, resumable at any step."""

import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.datasets import TestImages
from cutnmix.pipeline.plan import Draws, Plan
from cutnmix.trainer import checkpoint
from cutnmix.trainer.build import Parts, build
from cutnmix.trainer.display import Display
from cutnmix.trainer.export import export_peers
from cutnmix.trainer.folder import Position, RunError, RunFolder, Stopped, write_atomically, written
from cutnmix.trainer.keys import Config
from cutnmix.trainer.mesh import Mesh, joined, leave_it_to_the_first
from cutnmix.trainer.metrics import Scores, evaluate
from cutnmix.trainer.schedule import lr_factor
from cutnmix.trainer.step import Tally

_CURE = "start another run (name=NAME) with a lower optimizer.lr or another precision"


def train(config: Config, display: Display | None = None, stop: list[int] | None = None) -> dict[str, Any]:
    """Train to the end (from the last checkpoint, under resume=auto) and return what result.json holds.

    Under torchrun every process calls this, and the first one gets the result; the others get {}. A caller that notes
    signals itself hands their list in as `stop`: one that came while the run was made counts too.

    Raises:
        ConfigError, DataError, RunError: before any work is done, naming the key, file or folder; RunError also when
            the loss is no longer finite.
        Stopped: on SIGTERM or SIGINT to any process, after saving, in all of them after the same step (in the main
            thread; elsewhere signals are the caller's).
        LostError: when another process has died or does not answer.
    """
    with joined(config) as mesh:
        return _train(config, mesh, display or Display(), stop)


def _train(config: Config, mesh: Mesh, display: Display, stop: list[int] | None) -> dict[str, Any]:
    if not mesh.first:
        display = Display(Console(quiet=True))
    folder = RunFolder(config.folder)

    def refuse() -> None:
        folder.check(config)
        folder.expect_free()

    _on_first(mesh, refuse)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    torch.use_deterministic_algorithms(config.deterministic)
    # Nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.manual_seed(config.seed + (mesh.rank << 32))  # peers and images of different processes: other dropout
    parts = build(config, mesh)
    for note in parts.notes:
        display.note(note)
    with ExitStack() as held, noted_signals() if stop is None else nullcontext(stop) as requested:

        def begin() -> None:
            held.enter_context(folder.locked())
            folder.check(config)  # again: another process may have started it meanwhile
            folder.begin(config)

        _on_first(mesh, begin)
        try:
            return _Run(config, parts, folder, display, requested).go()
        finally:
            # Closing waits for the GPU, which may wait for a process that has died; that is told when this is left.
            on_cpu = parts.setting.device.type == "cpu"
            if mesh.size == 1 or on_cpu or isinstance(sys.exception(), Stopped | RunError | None):
                parts.close()


def _on_first(mesh: Mesh, action: Callable[[], None]) -> None:
    """Let the first process do it, and the others wait; if it is refused there, they leave without a word."""
    refused = None
    if mesh.first:
        try:
            action()
        except RunError as error:
            refused = error
    if mesh.same(refused is not None):
        if refused is None:
            leave_it_to_the_first()
        raise refused


class _Run:
    """The loop's own state: where it is, what it has seen since the last record, and whom it tells."""

    def __init__(self, config: Config, parts: Parts, folder: RunFolder, display: Display, requested: list[int]):
        self.config, self.parts, self.folder, self.display = config, parts, folder, display
        self.requested, self.mesh = requested, parts.mesh
        self.position, self.tally, self.best_top1 = Position(0, 0), Tally([]), -math.inf
        self.steps_per_epoch = len(parts.plan(0))
        self.timer = _Timer()
        if config.resume == "auto" and self.mesh.same(folder.last.exists()):
            state = checkpoint.load(folder.last, parts.setting.device)
            self.position, self.tally, self.best_top1 = checkpoint.restore(state, parts.learner, self.mesh)
            going_on = f"going on at epoch {self.position.epoch + 1}, step {self.position.step}"
            display.note(f"{folder.path}: {'is finished' if self.finished else going_on}")
        self.began, self.saved_at = time.perf_counter(), self.global_step
        if parts.setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(parts.setting.device)
        self.writer, self.hours_before = None, None  # of the first process, which alone writes the folder
        if self.mesh.first:
            records = folder.rewind(self.position, self.global_step)
            self.hours_before = records[-1].get("hours") if records else 0.0  # None: begun before hours were on record
            with written(folder.tensorboard):
                self.writer = SummaryWriter(str(folder.tensorboard), purge_step=self.global_step + 1)

    @property
    def global_step(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.step

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.position.epoch == self.config.epochs

    def go(self) -> dict[str, Any]:
        """All epochs that are left."""
        if self.writer and not self.finished:
            self._begin_session()
        self.display.start(self.folder.path, self.config.epochs, self.steps_per_epoch, self.global_step)
        try:
            while not self.finished:
                self._epoch()
        finally:
            if self.writer:
                with suppress(OSError):  # of a full disk, which is told of otherwise; metrics.jsonl has the same
                    self.writer.close()
            self.display.stop()
        return self._finish()

    def _epoch(self) -> None:
        config, epoch, start = self.config, self.position.epoch, self.position.step
        plan = self.parts.plan(epoch)
        picture = None if not self.mesh.first or self.folder.batch.exists() else _telling_step(plan)
        self.timer = _Timer()
        for step, views in enumerate(self.parts.loader.epoch(plan, start), start):
            if step == picture:
                self._draw(views, plan.step(step))
            self._step(views, plan, step)
        done = epoch + 1
        if done % config.eval_every == 0 or done == config.epochs:
            self._test(done)
        self.position = Position(done, 0)
        if done % config.checkpoint.every_epochs == 0 or done == config.epochs:
            self._save()

    def _step(self, views: Views, plan: Plan, step: int) -> None:
        config, epoch = self.config, self.position.epoch
        first = step - step % config.optimizer.accumulate  # the batches first ... last - 1 make one update
        last = min(first + config.optimizer.accumulate, len(plan))
        lr = config.optimizer.lr * lr_factor(config.schedule, self.global_step, self.steps_per_epoch, config.epochs)
        self.parts.step.train(
            self.parts.learner,
            views,
            plan.step(step),
            self.tally,
            lr=lr,
            share=1 / (last - first),
            update=step + 1 == last,
            weight=plan.weight(step),
        )
        self.position = Position(epoch, step + 1)
        self.timer.images += len(views.index_B) // (1 + plan.second) * self.mesh.data
        self.display.advance()
        if (step + 1) % config.log_every == 0 or step + 1 == len(plan):
            self._log(epoch + (step + 1) / len(plan), lr)
        if step + 1 == last:  # gradients between two updates are no part of a checkpoint
            if config.checkpoint.every_steps and self.global_step - self.saved_at >= config.checkpoint.every_steps:
                self._save()
            self._poll()

    def _log(self, epoch: float, lr: float) -> None:
        losses = self.tally.read(self.mesh)
        self._check_finite(losses)
        top1 = losses.pop("top1")
        record = {
            "kind": "train",
            "epoch": round(epoch, 6),
            "step": self.global_step,
            "lr": lr,
            "loss": losses,
            "top1": top1,
            "images_per_s": self.timer.read(),
        }
        self._record(record, {**{f"loss/{k}": v for k, v in losses.items()}, "train/top1": top1, "train/lr": lr})
        self.display.losses(losses, record["images_per_s"])

    def _check_finite(self, losses: dict[str, float]) -> None:
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            raise RunError(f"step {self.global_step}: {', '.join(bad)} is not finite; {_CURE}")

    def _test(self, done: int) -> None:
        scores = score(self.parts, poll=self._poll)
        record = {"kind": "test", "epoch": done, "step": self.global_step, "scores": scores}
        flat = {f"test/{key}/{name}": value for name, score in scores.items() for key, value in score.items()}
        self._record(record, flat)
        if scores["mean"]["top1"] > self.best_top1:
            self.best_top1 = scores["mean"]["top1"]
            if self.config.checkpoint.best:
                self._save(self.folder.best)
        self.display.scores(done, scores)

    def _record(self, record: dict[str, Any], scalars: dict[str, float]) -> None:
        if not self.writer:
            return
        self.folder.append(record | self._cost())
        with written(self.folder.tensorboard):  # a thread writes: it may fail of an earlier record
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, record["step"])

    def _cost(self) -> dict[str, float]:
        """What the run has taken so far, all its sessions together; work lost to a kill and done again counts once."""
        cost: dict[str, float] = {}
        if self.hours_before is not None:
            cost["hours"] = round(self.hours_before + (time.perf_counter() - self.began) / 3600, 6)
        if self.parts.setting.device.type == "cuda":
            cost["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.parts.setting.device)
        return cost

    def _save(self, path: Path | None = None) -> None:
        path = path or self.folder.last
        # A good checkpoint is not written over. The losses, of a copy of the tally, are of the weights before the last
        # update, so the weights are looked at too.
        self._check_finite(replace(self.tally).read(self.mesh))
        if self.mesh.agree(int(not _all_finite(self.parts.learner.peers))):
            raise RunError(f"step {self.global_step}: a peer's weights are not finite; {_CURE}")
        checkpoint.save(path, self.parts.learner, self.position, self.tally, self.best_top1, self.mesh)
        if path == self.folder.last:
            self.saved_at = self.global_step

    def _poll(self) -> None:
        if signum := self.mesh.agree(self.requested[0] if self.requested else 0):
            self._save()
            self._record(self._now("stopped") | {"by": signal.Signals(signum).name}, {})  # with the hours until here
            raise Stopped(signum, self.folder.path)

    def _now(self, kind: str) -> dict[str, Any]:
        """The head of a record between two steps."""
        epoch = self.position.epoch + self.position.step / self.steps_per_epoch
        return {"kind": kind, "epoch": round(epoch, 6), "step": self.global_step}

    def _session(self) -> dict[str, Any]:
        """What this start of the run computes with: a resumed run may go on with something else."""
        setting = self.parts.setting
        return {
            "hardware": hardware(setting.device),
            "mesh": {"data": self.mesh.data, "peer": self.mesh.peer},
            "precision": str(setting.dtype).removeprefix("torch."),
            "compile": setting.compile,
            "versions": {name: version(name) for name in ("cutnmix", "torch", "kornia", "numpy")},
        }

    def _begin_session(self) -> None:
        before, now = self.folder.records("session"), self._session()
        if before and before[-1]["precision"] != now["precision"]:  # of `auto`: no other may change
            self.display.note(f"precision: going on in {now['precision']}, so far {before[-1]['precision']}")
        self._record(self._now("session") | now, {})

    def _draw(self, views: Views, draws: Draws) -> None:
        from cutnmix.trainer.picture import draw_batch  # here, because matplotlib takes a second: only the first draws

        batch, train = self.parts.step.mix(views, draws), self.parts.splits.train
        draw_batch(views, batch, draws, classes=train.classes, mean=train.mean, std=train.std, path=self.folder.batch)

    def _finish(self) -> dict[str, Any]:
        export_peers(self.parts, self.folder.peers)
        parameters = sum(self.mesh.of_all_peers(sum(p.numel() for p in self.parts.learner.peers.parameters())))
        if not self.mesh.first:
            return {}
        from cutnmix.trainer.figures import draw_curves  # here, as draw_batch above

        records = self.folder.records()
        tests = [record for record in records if record["kind"] == "test"]
        last, best = tests[-1], max(tests, key=lambda record: record["scores"]["mean"]["top1"])
        sessions = [record for record in records if record["kind"] == "session"] or [self._session()]
        result = {
            "headline": {"what": "last epoch, mean over peers, top-1 percent", "top1": last["scores"]["mean"]["top1"]},
            "last_epoch": {"epoch": last["epoch"], "scores": last["scores"]},
            "best_epoch_on_test": {"epoch": best["epoch"], "scores": best["scores"]},
            "images_per_s": statistics.median(r["images_per_s"] for r in records if r["kind"] == "train"),
            "hours": last.get("hours"),  # of training and evaluation, building left out
            "peak_memory_bytes": max((r["peak_memory_bytes"] for r in tests if "peak_memory_bytes" in r), default=None),
            "steps": self.global_step,
            "parameters": parameters,
            **{key: _in_turn(session[key] for session in sessions) for key in ("hardware", "precision", "compile")},
            **{key: sessions[-1][key] for key in ("mesh", "versions")},
        }
        write_atomically(self.folder.result, json.dumps(result, indent=2) + "\n")
        draw_curves(records, self.folder.curves, self.folder.path.name)
        self.display.finish(self.folder, result)
        return result


def _in_turn(values: Iterable[str]) -> str:
    """What a run's sessions had, each once: `bfloat16`, or `bfloat16, then float32`."""
    return ", then ".join(dict.fromkeys(values))


def _all_finite(module: nn.Module) -> bool:
    """Whether all of its weights and buffers are. The host waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in module.state_dict().values()]).all())


def _telling_step(plan: Plan) -> int:
    """The step whose picture tells most about the mix: lam nearest to 0.6, where box and rest are both well seen."""
    return 0 if plan.lam_SL is None else int((plan.lam_SL.mean(1) - 0.6).abs().argmin())


def saved(run: Path, *, best: bool = False) -> Path:
    """A run's last checkpoint, or best.pt. Raises RunError where there is none."""
    folder = RunFolder(run)
    path = folder.best if best else folder.last
    if not path.exists():
        raise RunError(f"{path} is not there: the run has not saved a checkpoint yet")
    return path


@contextmanager
def trained(
    run: Path, *, best: bool = False, test: TestImages = "test", root: Path | None = None, device: str | None = None
) -> Iterator[tuple[Parts, float]]:
    """The parts of a run with its last checkpoint, or with best.pt, and the epochs that it has trained.

    Args:
        run: its folder.
        best: best.pt.
        test: what it is to be scored on, see load_splits.
        root: where its data are here; None: in its own data.root. Nothing is downloaded.
        device: of this machine; None: as its own keys have it.

    Raises: RunError where there is none.
    """
    config, path = RunFolder(run).read_config(), saved(run, best=best)
    here = {"download": False} | ({} if root is None else {"root": root})
    # A CUDA graph is of training: what is trained so can be scored without it.
    keys = {"compile": "auto" if config.compile == "graph" else config.compile, "device": device or config.device}
    parts = build(config.model_copy(update=keys | {"data": config.data.model_copy(update=here)}), test=test)
    try:
        position, _, _ = checkpoint.restore(checkpoint.load(path, parts.setting.device), parts.learner)
        yield parts, position.epoch + position.step / len(parts.plan(0))
    finally:
        parts.close()


def score(parts: Parts, poll: Callable[[], None] = lambda: None) -> Scores:
    """The scores of the peers as they are now, on all test images. `poll` is called by all processes together."""
    plan = parts.test_plan()
    shared = iter(range(-parts.mesh.agree(-len(plan))))  # a process may have a batch more than another one

    def poll_together() -> None:
        if next(shared, None) is not None:
            poll()

    return evaluate(
        parts.learner,
        parts.test_step,
        parts.test_loader.epoch(plan),
        plan,
        num_classes=len(parts.splits.test.classes),
        poll=poll_together,
        mesh=parts.mesh,
    )


def hardware(device: torch.device) -> str:
    """One line: the GPU, or the CPU with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


class _Timer:
    """Images per second since the last reading, evaluation excluded (an epoch starts a new one)."""

    def __init__(self) -> None:
        self.images, self.since = 0, time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        rate = self.images / (now - self.since)
        self.images, self.since = 0, now
        return round(rate, 1)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT append to the list instead of killing; the second SIGINT is an ordinary KeyboardInterrupt."""
    requested: list[int] = []
    before: dict[int, Any] = {}

    def handler(signum: int, _frame: Any) -> None:
        requested.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            before[signum] = signal.signal(signum, handler)
    except ValueError:  # not the main thread: signals stay the caller's
        pass
    try:
        yield requested
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
