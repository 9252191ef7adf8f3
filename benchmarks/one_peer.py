"""What one peer costs on one device: measured in a process of its own, kept in a file, read from it again.

    python -m cutnmix.benchmarks.one_peer '{"network": "resnet20", ...}'

measures, and prints what `Measured` holds as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cutnmix.benchmarks import scale
from cutnmix.benchmarks.measure import Clock, Spread, header, in_turn, per_second
from cutnmix.benchmarks.memory import peak_mib
from cutnmix.models.peers import Peers
from cutnmix.pipeline import Distort, Mix, MixBatch, Views, make_plan
from cutnmix.trainer import cli
from cutnmix.trainer.build import make_learner
from cutnmix.trainer.config import load_config
from cutnmix.trainer.device import Setting, choose, compile_modules
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.step import Step, Tally

MIB = 2**20
LR = 0.01
WARMUP = 1  # steps a turn


class Point(BaseModel):
    """One peer on one device, at one batch size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Annotated[int, Field(ge=1)]
    step_ms: tuple[float, float, float, int]  # median, lowest, highest, n
    peak_mib: Annotated[float, Field(gt=0)]


class Measured(BaseModel):
    """A step of one peer of a network on a device, at two batch sizes, and where that was."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: str
    classes: int
    image_size: tuple[int, int]  # (H, W)
    parameters: int
    precision: str
    compile: str
    points: tuple[Point, Point]  # the smaller batch first
    date: str
    commit: str
    device: str
    hardware: str
    threads: str
    versions: str

    def single(self, dataset_bytes: int = 0) -> scale.Single:
        """For the formulae: what is left of the peak without the peer and its activations is fixed."""
        low, high = self.points
        autocast = self.precision != "float32"
        step_s, peak = (
            scale.Line.through((low.images, a), (high.images, b))
            for a, b in (
                (low.step_ms[0] / 1e3, high.step_ms[0] / 1e3),
                (low.peak_mib * MIB, high.peak_mib * MIB),
            )
        )
        peer = scale.kept_bytes(autocast) * self.parameters
        return scale.Single(step_s, scale.Line(0.0, peak.slope), max(0.0, peak.fixed - peer), autocast)


def measure(
    *, network: str, classes: int, size: tuple[int, int], batches: tuple[int, int], device: str, **how: Any
) -> Measured:
    """A new process does, so that no other memory is counted. `how`: threads, rounds and seconds, see `probe`."""
    settings = {"network": network, "classes": classes, "size": size, "batches": batches, "device": device, **how}
    command = [sys.executable, "-m", "cutnmix.benchmarks.one_peer", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"measuring one peer of {network} ended with code {done.returncode}; its reason stands above")
    return Measured.model_validate_json(done.stdout.splitlines()[-1])


def probe(
    *,
    network: str,
    classes: int,
    size: tuple[int, int],
    batches: tuple[int, int],
    device: str,
    threads: int,
    rounds: int,
    seconds: float,
) -> Measured:
    """Measure in this process: time in turn, memory from the smaller batch to the larger one."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # as a run has it
    setting = choose(load_config("quickstart", [f"device={device}"]))
    steps, peers = make_steps(network, classes, size, batches, setting)
    peaks = []
    for images in sorted(batches):
        for _ in range(2):  # the first one makes gradients and momentum
            steps[images]()
        peaks.append(peak_mib(setting.device))
    clock = Clock(setting.device)
    turns: dict[str, Callable[[], float]] = {
        str(images): lambda step=step: 1000 / per_second(step, clock, seconds=seconds, warmup=WARMUP)
        for images, step in steps.items()
    }
    ms = in_turn(turns, rounds)
    low, high = (
        Point(images=images, step_ms=Spread.of(ms[str(images)]), peak_mib=peak)
        for images, peak in zip(sorted(batches), peaks, strict=True)
    )
    return Measured(
        network=network,
        classes=classes,
        image_size=size,
        parameters=sum(p.numel() for p in peers.parameters()),
        precision=str(setting.dtype).removeprefix("torch."),
        compile=setting.compile,
        points=(low, high),
        **header(setting.device),
    )


def make_steps(
    network: str, classes: int, size: tuple[int, int], batches: tuple[int, ...], setting: Setting
) -> tuple[dict[int, Callable[[], None]], Peers]:
    """Batch size -> what does one training step of one peer, without a loader: mix, forward, backward, update.

    On random pixels, cut and mixed; by the trainer's defaults on the device.
    """
    device = setting.device
    config = load_config("quickstart", ["method=baseline", "peers.count=1", f"peers.network={network}"])
    learner = make_learner(config, setting, num_classes=classes, num_images=max(batches))
    peers = learner.peers
    mix = MixBatch(mean=(0.5,) * 3, std=(0.25,) * 3, size=size, num_classes=classes, dtype=setting.dtype).to(device)
    step = Step(mix, device.type, setting.dtype, compiled=setting.compile == "step")
    compile_modules(setting.compile, *peers.compile_units(), mix)
    tally = Tally([])

    def stepping(images: int) -> Callable[[], None]:
        pixels_VBHWC = torch.randint(256, (1, images, *size, 3), dtype=torch.uint8, device=device)
        label_B = torch.randint(classes, (images,), device=device)
        views = Views(pixels_VBHWC.permute(0, 1, 4, 2, 3), None, label_B, torch.arange(images, device=device))
        drawn = make_plan(
            seed=0,
            epoch=0,
            num_images=images,
            size=size,
            batch_size=images,
            distort=Distort(),
            mix=Mix(name="cutnmix"),
            num_views=1,
            num_peers=1,
        ).to(device)
        return lambda: step.train(learner, views, drawn.step(0), tally, lr=LR, share=1.0, update=True)

    return {images: stepping(images) for images in sorted(batches)}, peers


def read(path: Path, **asked: Any) -> Measured:
    """A file that `--save` wrote, of what is asked for.

    Raises:
        ConfigError: naming the file, and what is wrong with it.
    """
    try:
        seen = Measured.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--measured: {path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"--measured: {path} is no measurement: {where + ': ' if where else ''}{first['msg']}"
        ) from None
    low, high = seen.points
    if low.images >= high.images:
        raise ConfigError(f"--measured: {path} is no measurement: points: the smaller batch comes first")
    for key, value in asked.items():
        if (there := getattr(seen, key)) != value:
            raise ConfigError(f"--measured: {path} has {key} {there}, not {value}: give --{key.replace('_', '-')}")
    return seen


if __name__ == "__main__":
    cli.main(lambda: print(probe(**json.loads(sys.argv[1])).model_dump_json()))
