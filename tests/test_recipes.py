"""The shipped recipes train, and keep what the README promises of them."""

import math

import pytest
import torch

from cutnmix.configs import shipped
from cutnmix.models import NETWORKS
from cutnmix.models.cost import cost
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.folder import RunFolder
from cutnmix.trainer.run import train
from cutnmix.trainer.step import Tally


@pytest.mark.slow
def test_quickstart_learns_to_read_digits(tmp_path):
    result = train(load_config("quickstart", [f"runs={tmp_path}"]))
    assert result["headline"]["top1"] > 95  # the README states the figure; other CPUs round differently


@pytest.mark.cifar
@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_the_papers_recipe_trains_on_real_cifar100(loader, cifar_root, tmp_path):
    keys = [f"data.root={cifar_root}", "data.classes=5", "data.images_per_class=60"]
    run = [f"runs={tmp_path}", "name=run", f"loader={loader}", "epochs=2", "eval_every=2"]
    result = train(load_config("paper", [*keys, *run]))
    first, last = [record for record in RunFolder(tmp_path / "run").records() if record["kind"] == "train"]
    assert last["loss"]["ce"] < first["loss"]["ce"]
    assert result["steps"] == 2 * 5  # 300 images in batches of 64, the last one smaller


EVERY_NETWORK = [*NETWORKS, "torchvision.mobilenet_v3_small", "timm.mobilenetv3_small_050"]
# wrn28_10 in bf16 takes as long as ten others on a CPU that has no bf16; wrn16_8 is of the same blocks.
STEPS = [(name, dtype) for name in EVERY_NETWORK for dtype in ("bf16", "fp32") if (name, dtype) != ("wrn28_10", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "precision"), STEPS)
def test_every_network_makes_a_step_with_cutnmix(network, precision):
    keys = [f"peers.network={network}", f"precision={precision}", "batch_size=2", "loader=resident"]
    parts = build(load_config("quickstart", [*keys, "data=digits", "data.images_per_class=1"]))
    plan, tally = parts.plan(0), Tally([])
    views = next(iter(parts.loader.epoch(plan)))
    before = [p.detach().clone() for p in parts.learner.peers.parameters()]
    parts.step.train(parts.learner, views, plan.step(0), tally, lr=0.01, share=1.0, update=True)
    losses = tally.read()
    assert losses.keys() == {"ce", "dml", "mmd", "pt", "pt_ce", "total", "top1"}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses.pop("total") == pytest.approx(sum(loss for name, loss in losses.items() if name != "top1"))
    for (name, p), old in zip(parts.learner.peers.named_parameters(), before, strict=True):
        assert "momentum_buffer" in parts.learner.optimizer.state[p], name
        # MobileNet has shifts that a linear layer and a norm take out again: in bf16 their gradient may be exactly 0.
        assert not torch.equal(p, old) or (network not in NETWORKS and p.ndim == 1), name


@pytest.mark.parametrize("recipe", [name for name in shipped() if name.startswith("imagenet/")])
def test_the_recipes_for_imagenet_state_what_they_cost_and_differ_only_in_mix_and_peers(recipe):
    config, baseline = load_config(recipe), load_config("imagenet/resnet50_baseline")
    for key in ("seed", "epochs", "batch_size", "data", "distort", "optimizer", "schedule", "precision"):
        assert getattr(config, key) == getattr(baseline, key)
    macs = cost("torchvision.resnet50", 1000, (224, 224)).macs
    pflop = macs * 2 * 3 * 1_281_167 * config.epochs * config.peers.count / 1e15
    assert f"= {pflop:,.0f} PFLOP" in shipped()[recipe].read_text()


@pytest.mark.parametrize("recipe", [name for name in shipped() if name.startswith("table1/")])
def test_the_rows_of_table_1_have_the_papers_recipe_but_for_their_method(recipe):
    paper, row = load_config("paper"), load_config(recipe)
    for key in ("seed", "epochs", "batch_size", "data", "distort", "optimizer", "schedule", "loader", "precision"):
        assert getattr(row, key) == getattr(paper, key)
    assert row.peers.network == paper.peers.network


RAMPED = {"temperature": 3, "ramp_epochs": 80}
ROWS = {  # views, mix, peers, form, and the method's keys, those of its paper or its authors' code
    "baseline": ("shared", "none", 1, "nets", {}),
    "cutmix": ("shared", "cutmix", 1, "nets", {}),
    "dml": ("shared", "none", 2, "nets", {"temperature": 1, "alpha": 1}),
    "cs_kd": ("shared", "none", 1, "nets", {"temperature": 4, "weight": 1}),
    "ddgsd": ("shared", "none", 1, "nets", {"temperature": 3, "kl_weight": 1, "mmd_weight": 5e-4}),
    "kdcl": ("per_peer", "none", 2, "nets", {"variant": "mean", "temperature": 4, "weight": 0.5}),
    "one": ("shared", "none", 2, "branches", RAMPED | {"weight": 1}),
    "okddip": ("shared", "none", 3, "branches", RAMPED | {"weight": 1, "detach_logits": False}),
    "pcl": ("per_peer", "none", 3, "branches", RAMPED | {"en_weight": 1, "mean_weight": 1, "decay": 0.999}),
    "ps_kd": ("shared", "none", 1, "nets", {"alpha_T": 0.8}),
    "tf_kd": ("shared", "none", 1, "nets", {"variant": "reg", "formula": "code", "correct": 0.99, "multiplier": 1}),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_of_table_1_are_those_methods(name):
    config, (views, mix, count, form, keys) = load_config(f"table1/{name}"), ROWS[name]
    assert (config.views, config.mix.name, config.peers.count, config.peers.form) == (views, mix, count, form)
    assert config.mix.probability == 1  # Algorithm 1 mixes every batch
    assert config.method.items() >= keys.items() and config.method["name"] == {"cutmix": "baseline"}.get(name, name)
