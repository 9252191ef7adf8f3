"""cutnmix reproduce GRID: a table, the figure or an ablation of the paper, from the plan to the page.

`python -m cutnmix.benchmarks.reproduce` is the same.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from cutnmix.benchmarks.reproduce import show, workers
from cutnmix.benchmarks.reproduce.drive import LEDGER, Place, reproduce, state
from cutnmix.benchmarks.reproduce.estimate import absent_data
from cutnmix.benchmarks.reproduce.grid import AXES, grids, load_grid, plan_grid
from cutnmix.benchmarks.reproduce.ledger import Ledger
from cutnmix.pipeline.cores import available_cores
from cutnmix.pipeline.dataset import DataError
from cutnmix.trainer import cli
from cutnmix.trainer.display import Display
from cutnmix.trainer.keys import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(no_args_is_help=True)
def main(
    grid: Annotated[
        str | None, typer.Argument(metavar="GRID", help="table1, table2, figure1, s1, ablation NAME, or a YAML file")
    ] = None,
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [KEY=VALUE]...",
            help="NAME of an ablation; data=, network=, method= select as --only does, other keys are all runs'",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2 ...", help="select by data, network and method")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="with commas; the grid's, if not given")] = None,
    scale: Annotated[
        float, typer.Option(help="shortens epochs and training images together: 0.1 costs a hundredth")
    ] = 1,
    out: Annotated[Path, typer.Option(help="folder of runs, ledger and reports")] = Path("runs/reproduce"),
    root: Annotated[Path | None, typer.Option(help="folder that holds the data sets; data, if not given")] = None,
    processes: Annotated[
        int | None, typer.Option("--workers", min=1, help="so many local processes, which share the GPU")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS|local", help="on a Ray cluster, or one started here")
    ] = None,
    gpus: Annotated[float, typer.Option("--gpus-per-run", min=0, help="of Ray's, where it has any")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a run")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and what it costs, and stop")] = False,
    measure: Annotated[bool, typer.Option(help="time a few steps of each network, for the estimate")] = True,
    listed: Annotated[bool, typer.Option("--list", help="list the grids")] = False,
):
    """Run what a table of the paper needs and is not there yet, and put it beside the paper's numbers.

    For example: cutnmix reproduce table1 --scale 0.02 --only network=resnet32 method=baseline,dml,cutnmix --seeds 95
    """
    display = Display()
    if not display.console.is_terminal:
        display.console.width = sys.maxsize  # in a file or a pipe, a row is a line
    if listed:
        display.console.print(show.grids_table())
        return
    if grid is None:
        raise ConfigError(f"name a grid: {', '.join(grids())}, or a YAML file")
    name, selection, overrides = _sort(rest or [], only or [])
    chosen = load_grid(_full_name(grid, name))
    if root is not None:
        overrides.insert(0, f"data.root={json.dumps(str(root))}")
    if threads is not None:
        torch.set_num_threads(threads)
    out = Path(os.path.expanduser(out))
    place, where = _place(processes, ray, gpus, threads, Ledger(out / LEDGER, chosen.name, scale), display)
    plan = plan_grid(chosen, only=selection, seeds=_numbers(seeds), scale=scale, out=out, overrides=overrides)
    unfinished = [run for run in plan if state(run) != "done"]  # refuses folders of other runs
    absent = absent_data(unfinished, download=not dry_run)
    if absent and not dry_run and ("data" in selection or len(absent) == len({run.cell.data for run in unfinished})):
        raise DataError("; ".join(absent.values()))
    where = f"{where}; into {out}"
    show.plan(chosen, plan, scale, where, absent=absent, measure=measure, dry=dry_run, display=display)
    if dry_run:
        return
    summary = reproduce(chosen, plan, scale, out, place, display, leave_out=absent)
    show.summary(summary, chosen, scale, absent, display)
    if summary.failed or not summary.page:
        raise typer.Exit(1)


def _full_name(grid: str, name: str | None) -> str:
    """`ablation NAME` is the grid ablation/NAME."""
    inner = [shipped.removeprefix(f"{grid}/") for shipped in grids() if shipped.startswith(f"{grid}/")]
    if name is None and inner:
        raise ConfigError(f"{grid}: name one of {', '.join(inner)}")
    if name is not None and not inner:
        raise ConfigError(f"{name}: {grid} is one grid; write KEY=VALUE to override a key of all its runs")
    return grid if name is None else f"{grid}/{name}"


def _sort(rest: Sequence[str], only: Sequence[str]) -> tuple[str | None, dict[str, list[str]], list[str]]:
    """(NAME, what --only selects, overrides). After --only more KEY=VALUE may follow: a shell passes them apart."""
    names = [text for text in rest if "=" not in text]
    if len(names) > 1:
        raise ConfigError(f"{names[1]}: write KEY=VALUE, such as network=resnet32 or precision=fp32")
    selection: dict[str, list[str]] = {}
    overrides = []
    for text in [*only, *(text for text in rest if "=" in text)]:
        key, _, values = text.partition("=")
        if key in AXES:
            selection.setdefault(key, []).extend(value for value in values.split(",") if value)
        elif text in only:
            raise ConfigError(f"--only {text}: a grid is selected by {', '.join(f'{axis}=' for axis in AXES)}")
        else:
            overrides.append(text)
    if empty := [axis for axis, values in selection.items() if not values]:
        raise ConfigError(f"--only {empty[0]}=: names nothing")
    return names[0] if names else None, selection, overrides


def _numbers(seeds: str | None) -> list[int] | None:
    if seeds is None:
        return None
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"--seeds: {seeds!r} is not whole numbers from 0, with commas, such as 95,96,97")
    return numbers


def _place(
    count: int | None, ray: str | None, gpus: float, threads: int | None, ledger: Ledger, display: Display
) -> tuple[Place, str]:
    """Where the runs run, and that in words."""
    if ray is not None:
        if ray != "local" and count is not None:
            raise ConfigError("--workers: of a Ray cluster at an address its resources decide how many run at once")
        each = threads or 1
        count = (count or max(1, available_cores() // each)) if ray == "local" else 0
        words = f"on Ray ({ray}), {each} CPU(s) each{f', {count} at a time' if count else ''}"
        return partial(workers.on_ray, ledger=ledger, address=ray, count=count, threads=each, gpus=gpus), words
    if count is not None:
        each = threads or max(1, available_cores() // count)
        return partial(workers.processes, count=count, threads=each), f"in {count} processes of {each} CPU thread(s)"
    return partial(workers.here, display=display), "in this process, one after another"


if __name__ == "__main__":
    cli.main(partial(app, prog_name="python -m cutnmix.benchmarks.reproduce"))
