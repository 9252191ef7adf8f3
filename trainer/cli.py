"""The command line: cutnmix train | config | evaluate | compare | report | export | models | methods | bench |
reproduce | plan-scale.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from cutnmix.models import NETWORKS
from cutnmix.models.cost import blueprint, cost, made_for, parameters, source
from cutnmix.pipeline.dataset import DataError
from cutnmix.pipeline.datasets import TestImages
from cutnmix.trainer.config import load_config, yaml_of
from cutnmix.trainer.display import Display
from cutnmix.trainer.folder import RunError, RunFolder, Stopped, expect_writable, name_of
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.mesh import LostError, leave_it_to_the_first
from cutnmix.trainer.options import Network

EXIT_USAGE = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by SIGTERM with its state saved; a scheduler may start the same command again
EXIT_INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Online knowledge distillation of J peers on J distorted, cut-and-mixed views.",
    pretty_exceptions_enable=False,
)
Recipe = Annotated[str, typer.Argument(help="a shipped recipe or a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for example epochs=10 method=dml")
]
Run = Annotated[Path, typer.Argument(help="a run's folder")]
Best = Annotated[bool, typer.Option("--best", help="best.pt, chosen on the test images")]
On = Annotated[str, typer.Option("--on", help="test, or unused: training images that data.images_per_class left out")]
Root = Annotated[Path | None, typer.Option(help="where the data are here, if not in the run's data.root")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N, if not the run's")]


@app.command()
def train(config: Recipe, overrides: Overrides = None):
    """Train a recipe. resume=auto goes on where an interrupted run stopped."""
    from cutnmix.trainer.run import train as run  # TensorBoard and torchmetrics take seconds: not for --help

    run(load_config(config, overrides or []))


@app.command("config")
def show_config(config: Recipe, overrides: Overrides = None):
    """Print all keys that train would take, as a YAML file to read or to change."""
    print(yaml_of(load_config(config, overrides or [])), end="")


@app.command()
def evaluate(run: Run, best: Best = False, on: On = "test", root: Root = None, device: Device = None):
    """Score a run's last checkpoint on its test images."""
    from cutnmix.trainer.compare import told
    from cutnmix.trainer.run import score, trained

    with trained(run, best=best, test=_test_images(on), root=root, device=device) as (parts, epochs):
        title = f"{run}, {'best' if best else 'last'}.pt: {epochs:.4g} epochs; {told(on, len(parts.splits.test))}"
        Display().table(title, score(parts))


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of runs on the same images, or files that --keep left"),
    ],
    best: Best = False,
    on: On = "test",
    over_seeds: Annotated[
        bool, typer.Option("--over-seeds", help="average the runs that differ by seed alone, and pair them by it")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="a folder to leave each run's predictions in, RUN.safetensors")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="write the table to this file too")] = None,
    root: Root = None,
    device: Device = None,
):
    """Put runs beside the first of them, image by image: differences in top-1, and whether chance alone explains them.

    Errors over images are of these trained networks: how much another seed would change, --over-seeds says of several.

    A file that --keep left stands for its run, whose checkpoint and data need not be here.
    """
    from cutnmix.trainer import compare as comparison

    test = _test_images(on)
    if csv:
        expect_writable(csv.parent)
    compared = comparison.compare(
        runs, best=best, test=test, over_seeds=over_seeds, keep=keep, root=root, device=device
    )
    of_seeds = ["over seeds", "seeds"] if over_seeds else []
    table = Table("run", "prediction", "top-1 %", f"less {compared.rows[0].run}", *of_seeds, "p")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in compared.rows:
        less = "" if row.difference is None else f"{row.difference:+.2f} \u00b1 {row.difference_error:.2f}"
        seed_error = "" if row.seed_error is None else f"\u00b1 {row.seed_error:.2f}"
        p = "" if row.p is None else comparison.p_digits(row.p)
        cells = [row.run, row.prediction, f"{row.top1:.2f} \u00b1 {row.error:.2f}", less]
        table.add_row(*cells, *([seed_error, str(row.seeds)] if over_seeds else []), p)
    note = f"{comparison.told(test, compared.images)}; \u00b1 standard errors over images, "
    if over_seeds:
        note += "then over seeds; p of a paired t test over seeds, of one seed over images"
        found = (f"{name} {', '.join(map(str, seeds))}" for name, seeds in compared.seeds)
        note += f"\nseeds: {'; '.join(found)}"
    else:
        note += "p of a paired t test"
    Display().note(note)
    _print(table)
    if csv:
        comparison.write_csv(csv, compared, test)


@app.command()
def report(run: Run):
    """Show a run's last evaluation and draw its curves anew; works while it trains."""
    from cutnmix.trainer.figures import draw_curves  # matplotlib takes a second: not for the other commands

    folder = RunFolder(run)
    folder.expect()  # nothing of its configuration is needed, nor the modules that it may import
    records = folder.records()
    tests = [record for record in records if record["kind"] == "test"]
    display = Display()
    if tests:
        best = max(tests, key=lambda record: record["scores"]["mean"]["top1"])
        display.table(f"{run}, epoch {tests[-1]['epoch']}", tests[-1]["scores"])
        display.note(f"best epoch on the test images: {best['epoch']}, mean {best['scores']['mean']['top1']:.2f}")
    else:
        trained = sum(record["kind"] == "train" for record in records)
        display.note(f"{run}: no evaluation yet, {trained} training records")
    draw_curves(records, folder.curves, name_of(run))
    display.note(f"curves: {folder.curves}")


@app.command()
def export(
    run: Run,
    format: Annotated[str, typer.Option(help="safetensors, torch_export or onnx")],
    peer: Annotated[str, typer.Option(help="best (chosen on the test images), mean (of all peers), or a number")],
    out: Annotated[Path | None, typer.Option(help="the file; by default in RUN/export")] = None,
    checkpoint: Annotated[str, typer.Option(help="last, or best (chosen on the test images)")] = "last",
):
    """Write a trained peer, or the mean of all, as one file for other programs."""
    from cutnmix.trainer.export import export as write

    path, what = write(run, format, peer, out, checkpoint)
    Display().note(f"{path}: {what}")


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="also torchvision.NAME, timm.NAME")] = None,
    classes: Annotated[int, typer.Option(min=1, help="K of the MACs and of the second count of parameters")] = 100,
):
    """List the networks: what each costs, and its plan. MACs are of convolutions and matrix products."""
    table = Table(
        "network", *(f"parameters, K = {K}" for K in (10, classes)), f"MACs, K = {classes}", "image", "feature", "plan"
    )
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name in names or NETWORKS:
        try:
            size = made_for(name)
            row = cost(name, classes, size)
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("peers.network: ")) from error
        counts = (parameters(blueprint(name, 10)), row.parameters)
        cells = (*(f"{count:,}" for count in counts), f"{row.macs / 1e6:,.1f} M", f"{size[0]} x {size[1]}")
        table.add_row(name, *cells, str(row.feature_dim), source(name))
    _print(table)


@app.command()
def methods(
    network: Network = "resnet20",
    peers: Annotated[int, typer.Option(min=1, help="J, or as many as a method needs")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="of each method, timed in turn with the baseline")] = 5,
    cost: Annotated[bool, typer.Option(help="measure what a step costs: a minute or two")] = True,
):
    """List the methods: what each needs, its keys, what it remembers of CIFAR-100, what a step of it costs here."""
    from cutnmix.trainer.overview import make_tables, overview

    for table in make_tables(overview(network, peers, steps if cost else 0)):
        _print(table)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context):
    """Measure what things cost here: loader, mix, step, peers, methods, memory or all. See cutnmix bench --help."""
    from cutnmix.benchmarks.__main__ import app as benchmarks  # it imports all that it compares with

    benchmarks(context.args, prog_name="cutnmix bench")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def reproduce(context: typer.Context):
    """Reproduce a table or the figure of the paper, or an ablation. See cutnmix reproduce --help."""
    from cutnmix.benchmarks.reproduce.__main__ import app as reproduction  # torch, TensorBoard and matplotlib

    reproduction(context.args, prog_name="cutnmix reproduce")


@app.command(
    "plan-scale", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def plan_scale(context: typer.Context):
    """Plan J peers on N devices: the best mesh, its memory, exchange and step. See cutnmix plan-scale --help."""
    from cutnmix.benchmarks.plan_scale import app as planner

    planner(context.args, prog_name="cutnmix plan-scale")


def _test_images(name: str) -> TestImages:
    known = get_args(TestImages)
    if name not in known:
        raise ConfigError(f"--on: {name!r} is none of {', '.join(known)}")
    return known[known.index(name)]


def _print(table: Table) -> None:
    console = Display().console
    if not console.is_terminal:
        console.width = sys.maxsize  # in a file or a pipe, a row is a line
    console.print(table)


def main(command: Callable[[], Any] = app) -> None:
    """Run a command line; what the user can mend is one line on standard error, without a traceback."""
    try:
        command()
    except (ConfigError, DataError, RunError, LostError) as error:
        rank = int(os.environ.get("RANK", 0))
        if rank and isinstance(error, ConfigError):  # all processes of torchrun read the same keys
            leave_it_to_the_first()
        print(f"rank {rank}: error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USAGE)
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(EXIT_REQUEUE if error.signum == signal.SIGTERM else EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
