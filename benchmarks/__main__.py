"""cutnmix bench loader | mix | step | peers | methods | memory | all | tables: what things cost on this machine.

Each prints tables, and leaves NAME.json and NAME.png in runs/bench, or --out. `python -m cutnmix.benchmarks` is the
same.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from cutnmix.benchmarks import loaders, memory, methods, mixes, peers, plots, records, steps, tables
from cutnmix.benchmarks.measure import checkout
from cutnmix.pipeline import Dataset, load_splits
from cutnmix.trainer.cli import main
from cutnmix.trainer.folder import RunError, expect_writable
from cutnmix.trainer.options import Network

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure what things cost here.", pretty_exceptions_enable=False
)
console = Console(highlight=False)
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Root = Annotated[Path | None, typer.Option(help="folder with cifar-100-python/; without it, handwritten digits")]
Views = Annotated[str, typer.Option(help="the values of J, with commas")]
Rounds = Annotated[int, typer.Option(min=1, help="of which the median is taken; all contenders run once in each")]
Seconds = Annotated[float, typer.Option(min=0, help="that each figure of a round takes, without its warm-up")]
Batch = Annotated[int, typer.Option(min=2, help="images")]


def _made(folder: Path) -> Path:
    """Refused before anything is measured."""
    try:
        expect_writable(folder)
    except RunError as error:
        raise typer.BadParameter(str(error)) from error
    return folder


def _within_a_folder(file: Path | None) -> Path | None:
    if file:
        _made(file.parent)
    return file


HERE = Path("runs/bench")
Out = Annotated[Path, typer.Option(callback=_made, help="folder of the records and plots")]
Json = Annotated[
    Path | None, typer.Option("--json", callback=_within_a_folder, help="write the record to this file too")
]


@app.command()
def loader(
    device: Device = "cpu",
    root: Root = None,
    views: Views = "1,2,4,8,16",
    batch: Batch = 128,
    batches: Annotated[str, typer.Option(help="batch sizes to compare at J = 2; empty for none")] = "32,128,512",
    jpeg: Annotated[bool, typer.Option(help="generated JPEG files instead of arrays")] = False,
    images: Annotated[int, typer.Option(min=8, help="how many JPEG files")] = 400,
    workers: Annotated[int, typer.Option(min=1, help="processes of a DataLoader, threads of DALI")] = 2,
    rounds: Rounds = 5,
    seconds: Seconds = 0.5,
    json: Json = None,
    out: Out = HERE,
) -> records.Record:
    """Views a second of each loader with its mix, against J and the batch size."""
    settings = {"batch": batch, "workers": workers, "rounds": rounds, "seconds": seconds}
    with TemporaryDirectory() as folder:
        if jpeg:
            settings["images"] = images
            batches = ""
        data = loaders.write_jpegs(Path(folder), images).train if jpeg else _data(root)
        sheets = loaders.measure(
            data,
            views=_numbers(views, "--views"),
            batch=batch,
            batches=_numbers(batches, "--batches") if batches else [],
            rounds=rounds,
            seconds=seconds,
            device=_device(device),
            workers=workers,
        )
    name, options = ("loader-jpeg", " --jpeg") if jpeg else ("loader", _root_option(root))
    notes, command = [_warmup(loaders.WARMUP, "batches")], f"cutnmix bench loader{options}"
    return _leave(name, sheets, settings, notes, device, json, out, command)


@app.command()
def mix(
    device: Device = "cpu",
    views: Views = "1,2,4,8,16",
    batch: Batch = 128,
    rounds: Rounds = 5,
    seconds: Seconds = 0.1,
    json: Json = None,
    out: Out = HERE,
) -> records.Record:
    """Milliseconds and aten calls of the mix alone, on views that are ready."""
    sheets = mixes.measure(
        views=_numbers(views, "--views"), batch=batch, rounds=rounds, seconds=seconds, device=_device(device)
    )
    settings = {"batch": batch, "rounds": rounds, "seconds": seconds}
    notes = [*mixes.NOTES, _warmup(mixes.WARMUP, "calls")]
    return _leave("mix", sheets, settings, notes, device, json, out)


@app.command()
def step(
    device: Device = "cpu",
    root: Root = None,
    views: Views = "2",
    network: Network = "resnet32",
    batch: Batch = 64,
    rounds: Rounds = 5,
    seconds: Seconds = 2.0,
    json: Json = None,
    out: Out = HERE,
) -> records.Record:
    """A whole training step against one without data, and against the plain way of training peers."""
    sheets = steps.measure(
        root=root,
        data=_data(root),
        network=network,
        views=_numbers(views, "--views"),
        batch=batch,
        rounds=rounds,
        seconds=seconds,
        device=_device(device),
    )
    settings = {"network": network, "batch": batch, "rounds": rounds, "seconds": seconds}
    notes = [*steps.NOTES, _warmup(steps.WARMUP, "steps")]
    return _leave("step", sheets, settings, notes, device, json, out, f"cutnmix bench step{_root_option(root)}")


@app.command("peers")
def peer_steps(
    device: Device = "cpu",
    views: Views = "1,2,4,8,16",
    network: Network = "resnet32",
    batch: Batch = 64,
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json: Json = None,
    out: Out = HERE,
) -> records.Record:
    """Milliseconds of a training step with J peers, and its ratio to J steps of one plain network."""
    sheets = peers.measure(
        network=network,
        views=_numbers(views, "--views"),
        batch=batch,
        rounds=rounds,
        seconds=seconds,
        device=_device(device),
    )
    settings = {"network": network, "batch": batch, "rounds": rounds, "seconds": seconds}
    notes = [*peers.NOTES, _warmup(peers.WARMUP, "steps")]
    return _leave("peers", sheets, settings, notes, device, json, out)


@app.command("methods")
def method_steps(
    device: Device = "cpu",
    root: Root = None,
    count: Annotated[
        int, typer.Option(min=1, help="J; one and pcl have at least 3, as in their papers, okddip two and a leader")
    ] = 2,
    network: Network = "resnet32",
    batch: Batch = 64,
    rounds: Rounds = 5,
    seconds: Seconds = 1.0,
    json: Json = None,
    out: Out = HERE,
) -> records.Record:
    """Milliseconds of a training step of each method, and its ratio to J steps of one plain network."""
    sheets = methods.measure(
        root=root,
        data=_data(root),
        network=network,
        count=count,
        batch=batch,
        rounds=rounds,
        seconds=seconds,
        device=_device(device),
    )
    settings = {"network": network, "batch": batch, "rounds": rounds, "seconds": seconds}
    notes = [*methods.NOTES, _warmup(methods.WARMUP, "steps")]
    return _leave("methods", sheets, settings, notes, device, json, out, f"cutnmix bench methods{_root_option(root)}")


@app.command("memory")
def peer_memory(
    device: Device = "cpu",
    views: Views = "1,2,4,8,16",
    network: Network = "resnet32",
    batch: Batch = 64,
    compile: Annotated[bool, typer.Option(help="compile time too: on a CPU, minutes")] = False,
    json: Json = None,
    out: Out = HERE,
) -> records.Record:
    """Peak memory of training J peers, a process each; how long compiling them takes."""
    sheets = memory.measure(
        network=network, views=_numbers(views, "--views"), batch=batch, device=_device(device), compiled=compile
    )
    settings = {"network": network, "batch": batch}
    notes = [*memory.NOTES, *([memory.COMPILE_NOTE] if compile else [])]
    return _leave("memory", sheets, settings, notes, device, json, out)


@app.command("all")
def everything(
    device: Device = "cpu",
    root: Root = None,
    views: Views = "1,2,4,8,16",
    rounds: Rounds = 5,
    json: Annotated[Path | None, typer.Option("--json", help="write all records to this file too, as a list")] = None,
    out: Out = HERE,
) -> None:
    """All of them, with their defaults."""
    few = ",".join(str(count) for count in _numbers(views, "--views") if count <= 4) or views  # a JPEG's view is 600 kB
    left = [
        loader(device, root, views, rounds=rounds, out=out),
        loader(device, views=few, batch=32, jpeg=True, rounds=rounds, out=out),
        mix(device, views, rounds=rounds, out=out),
        step(device, root, rounds=rounds, out=out),
        peer_steps(device, views, rounds=rounds, out=out),
        method_steps(device, rounds=rounds, out=out),
        peer_memory(device, views, out=out),
    ]
    if json:
        records.write_json(json, left)


@app.command("tables")
def write_tables(
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit 1 if something would change")] = False,
    document: Annotated[
        Path | None,
        typer.Option(help="the file with the markers: README.md and benchmarks/RESULTS.md of this checkout"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the folder of the records, if not benchmarks/results of it")] = None,
) -> None:
    """Make the documents' tables from the records: what stands between <!-- bench:NAME --> and <!-- /bench -->.

    So from NAME/runs.csv, the report.csv of cutnmix reproduce, between <!-- runs:NAME --> and <!-- /runs -->, and from
    NAME/compared.csv, of cutnmix compare, between <!-- compared:NAME --> and <!-- /compared -->; of the second,
    compared.png is drawn beside it, which --check does not look at.
    """
    root = checkout() or Path()
    documents = [document] if document else [root / name for name in tables.DOCUMENTS]
    kept = out or root / "benchmarks" / "results"
    try:
        made = {path: tables.fill(path, kept) for path in documents}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from error
    stale = [path for path, new in made.items() if path.read_text() != new]
    for path, new in made.items():
        if path not in stale:
            console.print(f"{path} is as the records have it")
        elif check:
            console.print(f"{path} differs from the records: run cutnmix bench tables")
        else:
            path.write_text(new)
            console.print(f"{path} written")
    if check:
        raise typer.Exit(1 if stale else 0)
    for path in dict.fromkeys(path for document in documents for path in tables.compared_files(document, kept)):
        picture, differences = path.with_suffix(".png"), tables.read_compared(path)
        if len(differences.rows) > 1:
            plots.draw_compared(differences, picture)
            console.print(f"{picture} drawn")


def _leave(
    name: str,
    sheets: list[records.Sheet],
    settings: dict[str, Any],
    notes: list[str],
    device: str,
    json: Path | None,
    out: Path,
    command: str | None = None,
) -> records.Record:
    """Make a record, show it, and write it and its plot."""
    record = records.make_record(name, sheets, settings, notes, _device(device), command)
    records.show(record, console)
    records.write_json(out / f"{record['benchmark']}.json", record)
    plots.draw_record(record, out / f"{record['benchmark']}.png")
    if json:
        records.write_json(json, record)
    return record


def _data(root: Path | None) -> Dataset:
    return (load_splits("cifar100", root, download=False) if root else load_splits("digits")).train


def _root_option(root: Path | None) -> str:
    """As a record has it, which others may repeat."""
    return " --root DIR" if root else ""


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        numbers = [0]
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1,2,4", param_hint=option)
    return numbers


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is neither cpu nor cuda", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here", param_hint="--device")
    return torch.device(name)


def _warmup(count: int, what: str) -> str:
    return f"Warm-up, {what} before each figure that are not counted: {count}."


if __name__ == "__main__":
    main(partial(app, prog_name="python -m cutnmix.benchmarks"))
