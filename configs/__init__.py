"""The recipes that come with the package: `cutnmix train NAME` finds configs/NAME.yaml here, NAME as in table1/dml."""

from pathlib import Path

NO_RECIPES = ("grids", "paper")  # folders here that hold grids of runs, and the paper's numbers


def shipped() -> dict[str, Path]:
    """Name -> YAML file of every recipe that comes with the package."""
    folder = Path(__file__).parent
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in names.items() if not name.startswith(tuple(f"{n}/" for n in NO_RECIPES))}
