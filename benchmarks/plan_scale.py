"""cutnmix plan-scale: the best mesh for J peers on N devices, by the formulae of scale.py.

What one peer costs on one device is measured here, or comes from a file that was measured elsewhere; how fast the
links are is the user's to say. `--check` compares predictions with real steps of real processes on this machine.

    python -m cutnmix.benchmarks.plan_scale '{"network": "resnet20", ...}'

measures in a process of its own, and prints what `Measured` holds as JSON.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from cutnmix.benchmarks import records, scale
from cutnmix.benchmarks.measure import Clock, Spread, header, in_turn, per_second
from cutnmix.benchmarks.memory import peak_mib
from cutnmix.models.cost import cost, made_for
from cutnmix.models.peers import Peers
from cutnmix.pipeline import Distort, Mix, MixBatch, Views, make_plan
from cutnmix.trainer import cli
from cutnmix.trainer.build import make_learner
from cutnmix.trainer.config import ConfigError, load_config
from cutnmix.trainer.device import Setting, choose, compile_modules
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.options import Network
from cutnmix.trainer.step import Step, Tally

GB, MIB = 1e9, 2**20
LR = 0.01
WARMUP = 1  # steps a turn
NOTE = (
    "ms: the exchange after the computation; at least: the longer of the two, the other hidden behind it. Exchanged: "
    "what a device adds to the all-reduces of a step. Without a loader."
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


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
    command = [sys.executable, "-m", "cutnmix.benchmarks.plan_scale", json.dumps(settings)]
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
    steps, peers = one_peer(network, classes, size, batches, setting)
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


def one_peer(
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


_CHECK_TAKES = {"peers", "devices", "network", "batch", "method", "threads", "rounds", "json_file", "check"}


@app.command()
def plan_scale(
    context: typer.Context,
    peers: Annotated[int, typer.Option(min=1, help="J; with --check the largest")] = 8,
    devices: Annotated[int, typer.Option(min=1, help="N; with --check processes on this machine")] = 2,
    network: Network = "resnet32",
    batch: Annotated[int, typer.Option(min=2, help="images of a step, on all devices together")] = 128,
    classes: Annotated[int, typer.Option(min=2, help="K")] = 100,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="height and width in pixels: what the network is made for")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(scale.METHODS))] = "cutnmix",
    link_gbps: Annotated[
        str,
        typer.Option(help="1e9 BITS/s of a device to the next, each way, if N > 1; peer,data where the axes differ"),
    ] = "",
    latency_us: Annotated[str, typer.Option(help="microseconds of a message, if N > 1; or peer,data")] = "",
    memory_gb: Annotated[float | None, typer.Option(min=0, help="of a device, 1e9 bytes; no limit")] = None,
    data_gb: Annotated[float, typer.Option(min=0, help="of a data set that every device keeps, 1e9 bytes")] = 0.0,
    measured: Annotated[Path | None, typer.Option(help="read what one peer costs instead of measuring it")] = None,
    save: Annotated[Path | None, typer.Option(help="write what was measured")] = None,
    device: Annotated[str, typer.Option(help="to measure on: auto, cpu or cuda")] = "auto",
    threads: Annotated[
        int, typer.Option(min=0, help="of a process on a CPU: its cores / the processes that share them; 0 for all")
    ] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="of which the median is taken")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="that each figure of a round takes")] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the plan to this file too; of a check, its plot beside it")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="run J = 1, 2, 4, ... on 1 and N processes here, and compare")
    ] = False,
) -> None:
    """The best mesh of N devices for J peers: memory, bytes exchanged, time of a step. Formulae: cutnmix's README."""
    if method not in scale.METHODS:
        raise ConfigError(f"--method: {method!r} is not planned for; choose one of {', '.join(scale.METHODS)}")
    if check:
        _refuse_what_a_check_ignores(context)
        from cutnmix.benchmarks import scale_check  # it needs torch.distributed

        scale_check.run(
            peers=peers, devices=devices, network=network, batch=batch, method=method, threads=threads or None,
            rounds=rounds, json_file=json_file, console=console,
        )  # fmt: skip
        return
    needed = METHODS[method.partition("-")[0]].needs.min_peers
    if peers < needed:
        raise ConfigError(f"--peers: {method} needs at least {needed}, got {peers}")
    links = _links(link_gbps, latency_us, devices)
    if save and measured:
        raise ConfigError("--save: nothing is measured where --measured reads a file")
    try:
        size = (image_size, image_size) if image_size else made_for(network)
        net = cost(network, classes, size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    good, refused = scale.meshes(devices, peers, batch)
    _check_any(good, refused, devices)
    if measured:
        seen = read(measured, network=network, classes=classes, image_size=size)
    else:
        console.print(f"measuring one peer of {network} on {device} ...")
        seen = measure(
            network=network, classes=classes, size=size, batches=_batches(good, batch), device=device,
            threads=threads or torch.get_num_threads(), rounds=rounds, seconds=seconds,
        )  # fmt: skip
    if save:
        records.write_json(save, seen.model_dump(mode="json"))
    if seen.precision == "float16":  # as the trainer has it
        refused |= {
            mesh: "fp16 skips steps, and processes with other peers would skip other ones"
            for mesh in good
            if mesh.peer > 1
        }
        good = [mesh for mesh in good if mesh.peer == 1]
        _check_any(good, refused, devices)
    job = scale.Job(method, peers, batch, classes, net.feature_dim, net.parameters, round(data_gb * GB))
    limit = None if memory_gb is None else memory_gb * GB
    predictions = scale.plan(job, good, seen.single(), links, limit)
    _show(job, predictions, refused, seen, limit)
    if json_file:
        records.write_json(json_file, _tree(job, predictions, refused, seen, links, limit))
    if not predictions[0].fits:
        raise ConfigError(
            f"--memory-gb: no mesh fits; the least that one needs is "
            f"{min(each.memory_bytes for each in predictions) / GB:.3g} GB a device"
        )


def _refuse_what_a_check_ignores(context: typer.Context) -> None:
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in _CHECK_TAKES}
    # By name: typer has a ParameterSource of its own, in a private module.
    if unused := [name for name, source in sources.items() if source and source.name != "DEFAULT"]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(f"--check: leave out {options}: it measures here, on handwritten digits and CPU processes")


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


def _check_any(good: list[scale.Mesh], refused: dict[scale.Mesh, str], devices: int) -> None:
    if not good:
        reasons = "; ".join(f"{name(mesh)}: {why}" for mesh, why in refused.items())
        raise ConfigError(f"--devices: no mesh of {devices}: {reasons}")


def _links(gbps: str, latency_us: str, devices: int) -> dict[str, scale.Link]:
    """Of the axes; one device has none."""
    if devices == 1:
        return {}
    given = {"--link-gbps": gbps, "--latency-us": latency_us}
    if missing := [option for option, text in given.items() if not text]:
        raise ConfigError(f"{' and '.join(missing)}: needed for more devices than one (--devices {devices})")
    speeds = _per_axis("--link-gbps", gbps, least=math.ulp(0.0))
    latencies = _per_axis("--latency-us", latency_us, least=0.0)
    return {
        axis: scale.Link(speed * 1e9 / 8, latency / 1e6)
        for axis, speed, latency in zip(("peer", "data"), speeds, latencies, strict=True)
    }


def _per_axis(option: str, text: str, least: float) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(least <= value < math.inf for value in values):
        above = "> 0" if least else ">= 0"
        raise ConfigError(
            f"{option}: must be a number {above}, or two of them, peer,data, such as 900,100; got {text!r}"
        )
    return values * 2 if len(values) == 1 else values


def _batches(good: list[scale.Mesh], batch: int) -> tuple[int, int]:
    """The sizes to measure: the smallest that a device would see, at least 2 images, and all."""
    low = max(2, batch // max(mesh.data for mesh in good))
    return (low, batch) if low < batch else (max(1, batch // 2), batch)


def name(mesh: scale.Mesh) -> str:
    """D x P."""
    return f"{mesh.data} x {mesh.peer}"


def _show(
    job: scale.Job,
    predictions: list[scale.Prediction],
    refused: dict[scale.Mesh, str],
    seen: Measured,
    limit: float | None,
) -> None:
    for key in ("hardware", "threads", "versions", "commit"):
        console.print(f"{key}: {getattr(seen, key)}", soft_wrap=True)
    low, high = seen.points
    points = ", ".join(
        f"{point.images} images {records.text(Spread(*point.step_ms))} ms, {point.peak_mib:,.0f} MiB"
        for point in seen.points
    )
    console.print(f"one peer of {seen.network}, {seen.precision}: {points}", soft_wrap=True)
    outside = sorted({each.images for each in predictions if not low.images <= each.images <= high.images})
    if outside:
        console.print(f"not measured, on the line through what was: {', '.join(map(str, outside))} images")
    heads = (
        "mesh",
        "peers",
        "images",
        "memory, GB",
        "exchanged peer, MB",
        "data, MB",
        "ms",
        "at least",
        "images/s",
        "",
    )
    title = f"{job.J} peers, batch {job.B}, {job.K} classes, {job.method}: data x peer; a device, a step"
    table = Table(*heads, title=title, title_justify="left", caption=NOTE, caption_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for index, each in enumerate(predictions):
        word = "best" if index == 0 and each.fits else ""
        if not each.fits:
            word = f"more than {(limit or 0) / GB:g} GB"
        figures = (each.memory_bytes / GB, each.peer_bytes / 1e6, each.data_bytes / 1e6)
        speeds = (1e3 * each.step_s, 1e3 * each.least_s, job.B / each.step_s)
        cells = [str(each.peers), str(each.images), *(records.number(value or 0) for value in (*figures, *speeds))]
        table.add_row(name(each.mesh), *cells, word)
    for mesh, why in refused.items():
        table.add_row(name(mesh), *[""] * 8, why)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # in a file or a pipe, a row is a line
    console.print(table)


def _tree(
    job: scale.Job,
    predictions: list[scale.Prediction],
    refused: dict[scale.Mesh, str],
    seen: Measured,
    links: dict[str, scale.Link],
    limit: float | None,
) -> dict[str, Any]:
    """The plan as JSON has it. The first mesh is the best one, if it fits."""

    def row(each: scale.Prediction) -> dict[str, Any]:
        reduced = [found._asdict() for found in scale.exchanges(job, each.mesh)]
        return {
            **each._asdict(),
            "mesh": each.mesh._asdict(),
            "step_s": each.step_s,
            "least_s": each.least_s,
            "all_reduces": reduced,
        }

    return {
        "job": job._asdict(),
        "links": {axis: link._asdict() for axis, link in links.items()},
        "memory_limit_bytes": limit,
        "measured": seen.model_dump(mode="json"),
        "meshes": [row(each) for each in predictions],
        "refused": [{**mesh._asdict(), "why": why} for mesh, why in refused.items()],
    }


if __name__ == "__main__":
    cli.main(lambda: print(probe(**json.loads(sys.argv[1])).model_dump_json()))
