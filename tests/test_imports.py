"""The data's way through has one direction, and so have the imports."""

import ast
from pathlib import Path

import pytest

from cutnmix import pipeline

ROOT = Path(pipeline.__file__).parents[1]
MAY_IMPORT = {
    "configs": set(),
    "pipeline": set(),
    "models": set(),
    "trainer": {"configs", "pipeline", "models"},
    "benchmarks": {"configs", "pipeline", "models", "trainer"},
}


def folders_imported(path: Path) -> set[str]:
    """The folders F of all `import cutnmix.F...` and `from cutnmix... import ...` of a file, at any depth."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("cutnmix.")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_stands_before_it(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        door = {"benchmarks"} if path == ROOT / "trainer" / "cli.py" else set()  # `cutnmix bench`: the door to all
        assert folders_imported(path) <= {folder} | MAY_IMPORT[folder] | door, path


def test_every_code_folder_is_covered():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == MAY_IMPORT.keys()
