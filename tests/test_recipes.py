"""The shipped recipes train, and keep what the README promises of them."""

import pytest

from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.run import train


@pytest.mark.slow
def test_quickstart_learns_to_read_digits(tmp_path):
    result = train(load_config("quickstart", [f"runs={tmp_path}"]))
    assert result["headline"]["top1"] > 95  # the README states the figure; other CPUs round differently


@pytest.mark.cifar
@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_the_papers_recipe_trains_on_real_cifar100(loader, cifar_root, tmp_path):
    keys = [f"data.root={cifar_root}", "data.classes=5", "data.images_per_class=100"]
    run = [f"runs={tmp_path}", "name=run", f"loader={loader}", "epochs=2"]
    result = train(load_config("paper", [*keys, *run]))
    first, last = [record for record in RunFolder(tmp_path / "run").records() if record["kind"] == "train"]
    assert last["loss"]["ce"] < first["loss"]["ce"]
    assert result["steps"] == 2 * 8  # 500 images in batches of 64, the last one smaller
