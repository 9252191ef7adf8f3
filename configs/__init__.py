"""The recipes that come with the package: `cutnmix train NAME` finds configs/NAME.yaml here."""

from pathlib import Path


def shipped() -> dict[str, Path]:
    """Name -> YAML file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
