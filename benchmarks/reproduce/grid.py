"""A grid: the runs behind a table or a figure, data sets x networks x rows x seeds, read from configs/grids/*.yaml.

Every run is an ordinary one: a shipped recipe and KEY=VALUE overrides, in this order: the recipe, the grid's, the
cell's data set and network, the row's, the user's; then the scale.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cutnmix import configs
from cutnmix.pipeline.dataset import DataError
from cutnmix.trainer.build import load_data
from cutnmix.trainer.config import dump_config, load_config, parse_config, read_yaml
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.keys import Config, ConfigError, Data

GRIDS = Path(configs.__file__).parent / "grids"
AXES = ("data", "network", "method")  # what --only selects by; a method is the name of a row
_OURS = {  # keys that a run of a grid has from elsewhere
    "seed": "--seeds",
    "runs": "--out",
    "name": "the grid",
    "resume": "reproduce itself",
    "data.name": "data=NAME, which selects",
    "peers.network": "network=NAME, which selects",
}
IMAGES_PER_CLASS = {"cifar10": 5000, "cifar100": 500}  # training images; of other data sets they are counted
EVALUATIONS = 10  # at most, of a run with a scale below 1


class Row(BaseModel):
    """One line of a table: how its networks are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # part of the run's folder name
    label: str
    recipe: str
    overrides: list[str] = []
    note: str = ""  # how it is read where the paper leaves a choice


class Grid(BaseModel):
    """Every row with every network on every data set, once a seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # the file's: "table1", "ablation/box_rule"
    title: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    data: Annotated[list[str], Field(min_length=1)]
    networks: Annotated[list[str], Field(min_length=1)]
    overrides: list[str] = []  # of every run
    rows: Annotated[list[Row], Field(min_length=1)]
    paper: str | None = None  # the file of configs/paper that holds the published cells, without .yaml
    note: str = ""

    @field_validator("rows")
    @classmethod
    def _one_of_a_name(cls, rows: list[Row]) -> list[Row]:
        if twice := sorted(_repeated(row.name for row in rows)):
            raise ValueError(f"rows of the same name: {', '.join(twice)}")
        return rows

    @field_validator("seeds", "data", "networks")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        if repeated := _repeated(values):
            raise ValueError(f"{', '.join(map(str, repeated))} given twice")
        return values


class Cell(NamedTuple):
    """One cell of a table."""

    data: str
    network: str
    row: Row


class Planned(NamedTuple):
    """One run of a grid; its folder is `config.folder`."""

    cell: Cell
    seed: int
    config: Config
    overrides: tuple[str, ...] = ()  # the user's, which are all runs'


class Scale:
    """A shorter run of the same shape: s times the epochs on s times the training images, so s^2 of the cost.

        epochs E' = max(1, round(s E))
        images a class n' = round(s n), of each class the first
        milestones, warm-up, a method's *_epochs: times E' / E, not rounded, so they keep their share of the run
        evaluations: no more than 10

    All else stays: batch, learning rate, classes, networks, test images. E' / E is not quite s where E is small.
    """

    def __init__(self, value: float):
        """Raises: ConfigError unless 0 < value <= 1."""
        if not 0 < value <= 1:
            raise ConfigError(f"--scale: must be > 0 and at most 1, got {value:g}")
        self.value = value

    @property
    def stamp(self) -> str:
        """What marks a folder of short runs, "" for full ones."""
        return "" if self.value == 1 else f"-scale{self.value:g}"

    def apply(self, config: Config) -> Config:
        """The shorter run.

        Raises: ConfigError, naming the least allowed value, where less than an image a class would be left.
        """
        if self.value == 1:
            return config
        images = config.data.images_per_class or images_per_class(config.data)
        scaled_images = round(self.value * images)
        if not scaled_images:
            raise ConfigError(
                f"--scale: {self.value:g} leaves none of {config.data.name}'s {images} training images a class; "
                f"it must be above {0.5 / images:g}"  # round() takes a half to the even 0
            )
        epochs = max(1, round(self.value * config.epochs))
        factor = epochs / config.epochs
        tree = dump_config(config)
        tree["epochs"], tree["data"]["images_per_class"] = epochs, scaled_images
        tree["eval_every"] = max(round(config.eval_every * factor), math.ceil(epochs / EVALUATIONS), 1)
        schedule = tree["schedule"]
        schedule["milestones"] = [_short(milestone * factor) for milestone in schedule["milestones"]]
        schedule["warmup_epochs"] = _short(schedule["warmup_epochs"] * factor)
        for key in tree["method"]:
            if key.endswith("_epochs"):
                tree["method"][key] = _short(tree["method"][key] * factor)
        if config.schedule.name != "step":  # its milestones are the default's and mean nothing
            schedule["milestones"] = dump_config(config)["schedule"]["milestones"]
        return parse_config(tree, f"--scale {self.value:g}")


def images_per_class(data: Data) -> int:
    """Training images of the smallest selected class, by heart for CIFAR; others are counted."""
    if data.name in IMAGES_PER_CLASS:
        return IMAGES_PER_CLASS[data.name]
    return _counted(data.model_copy(update={"images_per_class": None, "download": False}).model_dump_json())


@cache
def _counted(data: str) -> int:
    """Of the keys under `data` as JSON, which has a hash."""
    return int(np.bincount(load_data(Data.model_validate_json(data)).train.labels).min())


def grids() -> list[str]:
    """The names of the shipped grids."""
    return [path.relative_to(GRIDS).with_suffix("").as_posix() for path in sorted(GRIDS.rglob("*.yaml"))]


def load_grid(name: str) -> Grid:
    """A shipped grid by name, or one from a YAML file.

    Raises: ConfigError, naming the file and the key.
    """
    shipped = name in grids()
    path = GRIDS / f"{name}.yaml" if shipped else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, grids(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}: neither a YAML file nor a shipped grid ({', '.join(grids())}){hint}")
    try:
        tree = read_yaml(path.read_text())
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: must be a mapping of the keys {', '.join(Grid.model_fields)}")
        if "rows" not in tree and tree.keys() & {"method", "peers"}:
            raise ConfigError(f"{path}: is the recipe of one run: cutnmix train {name}")
        return Grid.model_validate({"name": name if shipped else path.stem, **tree})
    except ValidationError as error:
        lines = (f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError("\n".join(lines)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def plan_grid(
    grid: Grid,
    *,
    only: Mapping[str, Sequence[str]] | None = None,  # by AXES
    seeds: Sequence[int] | None = None,  # None: the grid's
    scale: float = 1.0,
    out: Path = Path("runs/reproduce"),
    overrides: Sequence[str] = (),
) -> list[Planned]:
    """All runs of the selected cells, each with its validated Config, seed by seed: the first seed fills the table.

    The runs lie in `out`, and grids that share it share the runs that they have in common.
    Raises: ConfigError, naming the key and the allowed values.
    """
    short, told = Scale(scale), tuple(overrides)
    chosen = _chosen(grid, only or {})
    if repeated := _repeated(seeds or []):
        raise ConfigError(f"--seeds: {', '.join(map(str, repeated))} given twice")
    for text in overrides:
        key = text.partition("=")[0]
        if key in _OURS:
            raise ConfigError(f"{text}: {key} of a run of a grid is set by {_OURS[key]}")
    cells = _cells(grid, chosen)
    return [
        _planned(grid, cell, seed, short, out, told)
        for seed in (grid.seeds if seeds is None else seeds)
        for cell in cells
    ]


def with_what_lies_there(grid: Grid, plan: Sequence[Planned], scale: float, out: Path) -> list[Planned]:
    """The plan, and what else of the grid lies in `out`, of any cell and seed, planned with the same overrides.

    Cell by cell, as the grid has them. A cell that the overrides make no run of is left out.
    """
    short, told = Scale(scale), plan[0].overrides
    cells = {_stem(cell): cell for cell in _cells(grid, _chosen(grid, {}))}
    runs = {run.config.folder.name: run for run in plan}
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        parts = re.fullmatch(rf"(.+)-seed(\d+){re.escape(short.stamp)}", path.name)
        if parts and parts[1] in cells and path.name not in runs and RunFolder(path).config.exists():
            with suppress(ConfigError, DataError):
                runs[path.name] = _planned(grid, cells[parts[1]], int(parts[2]), short, out, told)
    order = list(cells)
    return sorted(runs.values(), key=lambda run: (order.index(_stem(run.cell)), run.seed))


def _cells(grid: Grid, chosen: Mapping[str, Sequence[str]]) -> list[Cell]:
    return [
        Cell(data, network, row)
        for data in chosen["data"]
        for network in chosen["network"]
        for row in grid.rows
        if row.name in chosen["method"]
    ]


def _planned(grid: Grid, cell: Cell, seed: int, scale: Scale, out: Path, overrides: tuple[str, ...]) -> Planned:
    name = run_name(cell, seed, scale)
    place = [f"runs={json.dumps(str(out))}", f"name={name}", f"seed={seed}", "resume=auto"]
    try:
        config = own_config(grid, cell, [*overrides, *place])
    except ConfigError as error:
        raise _blamed(error, grid, cell) from None
    return Planned(cell, seed, scale.apply(config), overrides)


def own_config(grid: Grid, cell: Cell, overrides: Sequence[str] = ()) -> Config:
    """The run of a cell as the grid has it, at full length, but for these overrides. Raises: ConfigError."""
    own = [f"data={cell.data}", f"peers.network={cell.network}", *cell.row.overrides]
    return load_config(cell.row.recipe, [*grid.overrides, *own, *overrides])


def _blamed(error: ConfigError, grid: Grid, cell: Cell) -> ConfigError:
    """The error, named with grid and row where these are wrong by themselves, without what the user overrides."""
    try:
        own_config(grid, cell)
    except ConfigError as theirs:
        said = str(theirs).replace("(command line)", "(its overrides)")
        return ConfigError(f"grid {grid.name}, row {cell.row.name}: {said}")
    return error


def run_name(cell: Cell, seed: int, scale: Scale) -> str:
    """The run's folder under `out`: its cell and seed, and the scale where it is not 1."""
    return f"{_stem(cell)}-seed{seed}{scale.stamp}"


def _stem(cell: Cell) -> str:
    network = re.sub(r"[^A-Za-z0-9_.]", "_", cell.network)
    return f"{cell.data}-{network}-{cell.row.name}"


def _chosen(grid: Grid, only: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What of each axis is selected, in the grid's order."""
    every = {"data": grid.data, "network": grid.networks, "method": [row.name for row in grid.rows]}
    for axis, values in only.items():
        if axis not in every:
            raise ConfigError(f"--only {axis}: a grid is selected by {', '.join(AXES)}")
        for value in values:
            if value not in every[axis]:
                near = difflib.get_close_matches(value, every[axis], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"--only {axis}={value}: {grid.name} has {', '.join(every[axis])}{hint}")
    return {axis: [v for v in values if axis not in only or v in only[axis]] for axis, values in every.items()}


def _repeated(values: Iterable[Any]) -> list[Any]:
    values = list(values)
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]


def _short(epochs: float) -> float:
    return round(epochs, 6)
