"""python -m cutnmix.benchmarks loader | peers [--json FILE]: tables on the terminal, records in a file."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cutnmix.benchmarks import loaders, peers
from cutnmix.benchmarks.measure import Spread, batches_per_s, header
from cutnmix.pipeline import load_splits

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)
Root = Annotated[Path | None, typer.Option(help="folder with cifar-100-python/; without it, handwritten digits")]
Json = Annotated[Path | None, typer.Option("--json", help="write the record to this file")]


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Both benchmarks, when none is named."""
    if context.invoked_subcommand is None:
        loader()
        peer_steps()


@app.command()
def loader(
    root: Root = None, batch: int = 128, rounds: int = 5, seconds: float = 1.0, views: str = "1,2,4,8", out: Json = None
) -> None:
    """Views per second of each loader with its mix, against J."""
    data = (load_splits("cifar100", root, download=False) if root else load_splits("digits")).train
    counts = [int(text) for text in views.split(",")]
    rates: dict[str, dict[str, Spread]] = {name: {} for name in loaders.CONTENDERS}
    for count in counts:
        seen: dict[str, list[float]] = {name: [] for name in loaders.CONTENDERS}
        for _ in range(rounds):
            for name, contender in loaders.CONTENDERS.items():
                with contender(data, count, batch) as batches:
                    seen[name].append(count * batch * batches_per_s(batches, seconds))
        for name, values in seen.items():
            rates[name][str(count)] = Spread.of(values)
    table = Table("", *(f"J = {count}" for count in counts), title=f"views/s, {data.name}, batch {batch}")
    for name, row in rates.items():
        table.add_row(name, *(_cell(row[str(count)]) for count in counts))
    _report(table, {"benchmark": "loader", "data": data.name, "batch": batch, "views_per_s": rates}, out)


@app.command("peers")
def peer_steps(
    network: str = "resnet32", batch: int = 64, rounds: int = 5, counts: str = "1,2,4,8", out: Json = None
) -> None:
    """Seconds of a whole training step with J peers, and its ratio to J steps with one."""
    result = peers.step_seconds(network, batch, [int(text) for text in counts.split(",")], rounds)
    table = Table("J", "ms a step", "/ (J x one baseline)", title=f"{network}, batch {batch}, CutnMix with all losses")
    for count, (seconds, ratio) in result.items():
        table.add_row(
            str(count), f"{1000 * seconds.median:.0f}", f"{ratio.median:.3f} ({ratio.low:.3f}..{ratio.high:.3f})"
        )
    _report(table, {"benchmark": "peers", "network": network, "batch": batch, "steps": result}, out)


def _cell(rate: Spread) -> str:
    median, low, high = (f"{value / 1000:.0f}" for value in rate[:3])
    return f"{median}k ({low}..{high})"


def _report(table: Table, record: dict[str, Any], out: Path | None) -> None:
    head = header()
    for key, value in head.items():
        console.print(f"{key}: {value}", soft_wrap=True)
    console.print(table)
    if out:
        out.write_text(json.dumps({**head, **record}, indent=2) + "\n")


app()
