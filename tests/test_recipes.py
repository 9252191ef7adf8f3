"""The shipped recipes train, and keep what the README promises of them."""

import pytest

from cutnmix.trainer.config import load_config
from cutnmix.trainer.run import train


@pytest.mark.slow
def test_quickstart_learns_to_read_digits(tmp_path):
    result = train(load_config("quickstart", [f"runs={tmp_path}"]))
    assert result["headline"]["top1"] > 95  # the README states the figure; other CPUs round differently


@pytest.mark.cifar
@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_the_papers_recipe_trains_on_real_cifar100(loader, cifar_root, tmp_path):
    keys = [f"data.root={cifar_root}", f"runs={tmp_path}", f"loader={loader}", "data.classes=20"]
    result = train(load_config("paper", [*keys, "data.images_per_class=50", "epochs=3"]))
    assert result["headline"]["top1"] > 100 / 20
    assert result["steps"] == 3 * 16  # 1,000 images in batches of 64, the last one smaller
