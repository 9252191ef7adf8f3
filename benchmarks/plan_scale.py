"""cutnmix plan-scale: the best mesh for J peers on N devices, by the formulae of scale.py.

What one peer costs on one device is measured here, or comes from a file that was measured elsewhere (one_peer.py); how
fast the links are is the user's to say. `--check` compares predictions with real steps of real processes on this
machine.
"""

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from cutnmix.benchmarks import one_peer, records, scale
from cutnmix.benchmarks.measure import Spread
from cutnmix.benchmarks.one_peer import Measured
from cutnmix.models.cost import cost, made_for
from cutnmix.trainer.folder import expect_writable
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.options import Network

GB = 1e9
NOTE = (
    "ms: the exchange after the computation; at least: the longer of the two, the other hidden behind it. Exchanged: "
    "what a device adds to the all-reduces of a step. Without a loader."
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


class Ranking(NamedTuple):
    """The meshes, the best one first, and what they were judged by."""

    meshes: list[scale.Prediction]
    refused: dict[scale.Mesh, str]
    job: scale.Job
    seen: Measured
    links: dict[str, scale.Link]
    memory_limit: float | None  # bytes of a device


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
        int,
        typer.Option(
            min=0, help="of a process on a CPU: its cores / those that share them; 0: all, of --check its share"
        ),
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
    for file in (save, json_file):
        if file:
            expect_writable(file.parent)
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
    good, refused = _meshes(devices, peers, batch)
    if measured:
        seen = one_peer.read(measured, network=network, classes=classes, image_size=size)
    else:
        console.print(f"measuring one peer of {network} on {device} ...")
        seen = one_peer.measure(
            network=network, classes=classes, size=size, batches=_batches(good, batch), device=device,
            threads=threads or torch.get_num_threads(), rounds=rounds, seconds=seconds,
        )  # fmt: skip
    if save:
        records.write_json(save, seen.model_dump(mode="json"))
    if seen.precision == "float16":
        good, refused = _meshes(devices, peers, batch, fp16=True)
    job = scale.Job(method, peers, batch, classes, net.feature_dim, net.parameters, round(data_gb * GB))
    limit = None if memory_gb is None else memory_gb * GB
    ranking = Ranking(scale.plan(job, good, seen.single(), links, limit), refused, job, seen, links, limit)
    _show(ranking)
    if json_file:
        records.write_json(json_file, _tree(ranking))
    if not ranking.meshes[0].fits:
        least = min(each.memory_bytes for each in ranking.meshes)
        raise ConfigError(f"--memory-gb: no mesh fits; the least that one needs is {least / GB:.3g} GB a device")


def _refuse_what_a_check_ignores(context: typer.Context) -> None:
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in _CHECK_TAKES}
    # By name: typer has a ParameterSource of its own, in a private module.
    if unused := [name for name, source in sources.items() if source and source.name != "DEFAULT"]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(f"--check: leave out {options}: it measures here, on handwritten digits and CPU processes")


def _meshes(devices: int, peers: int, batch: int, fp16: bool = False) -> tuple[list[scale.Mesh], dict[scale.Mesh, str]]:
    """Those that the trainer takes, and why not the others. Raises: ConfigError if it takes none."""
    good, refused = scale.meshes(devices, peers, batch)
    if fp16:
        apart = [mesh for mesh in good if mesh.peer > 1]
        refused |= dict.fromkeys(apart, "fp16 skips steps, and processes with other peers would skip other ones")
        good = [mesh for mesh in good if mesh.peer == 1]
    if not good:
        reasons = "; ".join(f"{mesh}: {why}" for mesh, why in refused.items())
        raise ConfigError(f"--devices: no mesh of {devices}: {reasons}")
    return good, refused


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


def _show(ranking: Ranking) -> None:
    job, seen = ranking.job, ranking.seen
    for key in ("hardware", "threads", "versions", "commit"):
        console.print(f"{key}: {getattr(seen, key)}", soft_wrap=True)
    low, high = seen.points
    points = ", ".join(
        f"{point.images} images {records.text(Spread(*point.step_ms))} ms, {point.peak_mib:,.0f} MiB"
        for point in seen.points
    )
    console.print(f"one peer of {seen.network}, {seen.precision}: {points}", soft_wrap=True)
    outside = sorted({each.images for each in ranking.meshes if not low.images <= each.images <= high.images})
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
    for index, each in enumerate(ranking.meshes):
        word = "best" if index == 0 and each.fits else ""
        if not each.fits:
            word = f"more than {(ranking.memory_limit or 0) / GB:g} GB"
        figures = (each.memory_bytes / GB, each.peer_bytes / 1e6, each.data_bytes / 1e6)
        speeds = (1e3 * each.step_s, 1e3 * each.least_s, job.B / each.step_s)
        cells = [str(each.peers), str(each.images), *(records.number(value or 0) for value in (*figures, *speeds))]
        table.add_row(str(each.mesh), *cells, word)
    for mesh, why in ranking.refused.items():
        table.add_row(str(mesh), *[""] * 8, why)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # in a file or a pipe, a row is a line
    console.print(table)


def _tree(ranking: Ranking) -> dict[str, Any]:
    """The plan as JSON has it. The first mesh is the best one, if it fits."""

    def row(each: scale.Prediction) -> dict[str, Any]:
        reduced = [found._asdict() for found in scale.exchanges(ranking.job, each.mesh)]
        return {
            **each._asdict(),
            "mesh": each.mesh._asdict(),
            "step_s": each.step_s,
            "least_s": each.least_s,
            "all_reduces": reduced,
        }

    return {
        "job": ranking.job._asdict(),
        "links": {axis: link._asdict() for axis, link in ranking.links.items()},
        "memory_limit_bytes": ranking.memory_limit,
        "measured": ranking.seen.model_dump(mode="json"),
        "meshes": [row(each) for each in ranking.meshes],
        "refused": [{**mesh._asdict(), "why": why} for mesh, why in ranking.refused.items()],
    }
