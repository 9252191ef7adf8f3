"""Binds `cutnmix` to this tree, so that tests run the code beside them whatever is installed."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
package = types.ModuleType("cutnmix")
package.__path__ = [str(ROOT)]
sys.modules["cutnmix"] = package

for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # by these Rich would print otherwise
    os.environ.pop(name, None)

# Processes that tests start find the modules that stand here: small_network, imported.
TESTS = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """The folder that holds the real cifar-100-python/, or a visible skip."""
    root = os.environ.get("CUTNMIX_DATA")
    if not root or not (Path(root) / "cifar-100-python").is_dir():
        pytest.skip("set CUTNMIX_DATA to the folder that holds cifar-100-python/ for the tests on real CIFAR-100")
    return Path(root)


# The files that take longest, the longest first: `make test` gives its processes one file after another in this
# order, and the last should be short, lest one works at the end while the other waits.
LONGEST = ["test_mesh", "test_cuda_step", "test_recipes", "test_reproduce", "test_cli", "test_training", "test_resume"]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device: run `make test-gpu` on a machine that has one")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
