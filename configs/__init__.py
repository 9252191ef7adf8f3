"""The recipes that come with the package: `cutnmix train NAME` finds configs/NAME.yaml here, NAME as in table1/dml."""

from pathlib import Path


def shipped() -> dict[str, Path]:
    """Name -> YAML file of every recipe that comes with the package."""
    folder = Path(__file__).parent
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
