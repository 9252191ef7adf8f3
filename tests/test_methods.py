"""What the contract of trainer/method.py promises, held for every entry of METHODS.

What each method computes is tested in files of their own: test_mutual.py, test_self_distillation.py, test_kdcl.py and
test_branches.py.
"""

import copy
import inspect
import re
from typing import Any

import oracle
import pytest
import torch
from tasks import B, K, build, keys_of, leaves, make_batch, make_outputs, make_peers
from torch import nn

from cutnmix.trainer import method
from cutnmix.trainer.config import load_config
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.methods import METHODS

EACH = pytest.mark.parametrize("name", METHODS)
# name: the terms of the defaults
TERMS = {
    "baseline": {"ce"},
    "dml": {"ce", "dml"},
    "kdcl": {"ce", "kdcl"},
    "cs_kd": {"ce", "kl"},
    "ddgsd": {"ce", "kl", "mmd"},
    "ps_kd": {"ce"},
    "tf_kd": {"ce", "kl"},
    "kd": {"ce", "kl"},
    "one": {"ce", "teacher_ce", "kl"},
    "okddip": {"ce", "peer_kl", "leader_kl"},
    "pcl": {"ce", "en_ce", "en_kl", "mean_kl"},
    "cutnmix": {"ce", "dml", "mmd", "pt", "pt_ce"},
}


def num_peers(name: str) -> int:
    return max(3, METHODS[name].needs.min_peers)


@pytest.fixture
def made(name, tmp_path) -> Any:
    """The method with its defaults, and its peers."""
    peers = make_peers(num_peers(name), METHODS[name].needs.form or "nets")
    return build(name, num_peers(name), peers, **keys_of(name, tmp_path)), peers


def test_every_method_is_in_the_table_of_terms():
    assert METHODS.keys() == TERMS.keys()


@EACH
def test_keys_are_keyword_only_typed_and_have_defaults(name):
    task, *keys = inspect.signature(METHODS[name], eval_str=True).parameters.values()
    assert task.name == "task"
    for key in keys:
        assert key.kind is key.KEYWORD_ONLY
        assert key.annotation is not key.empty and key.default is not key.empty
    with pytest.raises(TypeError, match="temprature"):
        build(name, temprature=2.0)


NUMBERS = [
    (name, key)
    for name in METHODS
    for key, (_, default) in method.keys_of(METHODS[name]).items()
    if not isinstance(default, (bool, str))
]
BOUNDS = [  # just outside
    *((name, key, 0) for name, key in NUMBERS if key in ("temperature", "feature_dim")),
    *((name, "alpha", 1.1) for name in ("kd", "tf_kd")),
    ("ps_kd", "alpha_T", 1.1),
    ("pcl", "decay", 1),
    *(("kdcl", "holdout", value) for value in (0, 1)),
    *(("tf_kd", "correct", value) for value in (0, 1)),
]


@pytest.mark.parametrize("value", ["-1", ".nan", ".inf", "[1]"])
@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_a_number_without_meaning_is_refused_by_the_configuration(name, key, value):
    with pytest.raises(ConfigError, match=rf"^method\.{key} \(command line\): Input should be .*got"):
        load_config("paper", [f"method={name}", f"method.{key}={value}"])


@pytest.mark.parametrize(("name", "key", "value"), BOUNDS)
def test_bounds_of_a_number_are_kept_by_the_configuration(name, key, value):
    with pytest.raises(ConfigError, match=rf"^method\.{key} \(command line\): Input should be .*got {value}$"):
        load_config("paper", [f"method={name}", f"method.{key}={value}"])


@pytest.mark.parametrize(
    ("name", "variant", "key", "value", "belongs"),
    [
        *(("kdcl", variant, "holdout", "0.1", "general") for variant in ("minlogit", "naive", "linear", "mean")),
        ("tf_kd", "self", "correct", "0.9", "reg"),
        ("tf_kd", "self", "formula", "paper", "reg"),
        ("tf_kd", "reg", "teacher", "/runs/x", "self"),
        ("tf_kd", "reg", "teacher_peer", "1", "self"),
    ],
)
def test_a_key_of_another_variant_is_refused(name, variant, key, value, belongs):
    keys = [f"method={name}", f"method.{key}={value}"]
    said = f"method.{key} (command line): would do nothing under method.variant: {variant}"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        load_config("paper", [*keys, f"method.variant={variant}"])
    assert str(load_config("paper", [*keys, f"method.variant={belongs}"]).method[key]) == value


@EACH
@pytest.mark.parametrize("autocast", [False, True])
def test_terms_are_float32_scalars_that_reach_every_trained_parameter(name, autocast, made):
    method, peers = made
    outputs = make_outputs(num_peers(name), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = method(outputs, make_batch(), peers)
    assert losses.keys() == TERMS[name]
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    assert outputs.logits_JBK.grad is not None and outputs.logits_JBK.grad.isfinite().all()


@EACH
def test_huge_float16_logits_stay_finite(name, made):
    method, peers = made
    outputs = make_outputs(num_peers(name), torch.float16)
    signs = torch.randint(2, outputs.logits_JBK.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    outputs = outputs._replace(logits_JBK=(signs * 1e4).half().requires_grad_())
    losses = method(outputs, make_batch(), peers)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert outputs.logits_JBK.grad is not None and outputs.logits_JBK.grad.isfinite().all()


@EACH
def test_predictions_are_logits_of_the_batch(name, made):
    method, _ = made
    for logits_BK in method.eval().predictions(make_outputs(num_peers(name), torch.float32), make_batch()).values():
        assert logits_BK.shape == (B, K)


@EACH
def test_compiles_to_one_graph_while_epoch_and_memory_change(name, made):
    method, peers = made
    twin, twin_peers = copy.deepcopy(method), copy.deepcopy(peers)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend=count)
    for step in range(4):
        outputs = make_outputs(num_peers(name), torch.bfloat16, seed=step)
        batch = make_batch(epoch=0.5 + step, seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(outputs, batch, peers), twin(outputs, batch, twin_peers))
    torch.testing.assert_close(method.state_dict(), twin.state_dict())
    assert len(graphs) == 1


@EACH
def test_state_is_complete(name, made, tmp_path):
    """A method that is rebuilt and given the state of another goes on exactly as that one does."""
    method, peers = made
    for step in range(3):
        method(make_outputs(num_peers(name), torch.float32, seed=step), make_batch(epoch=float(step), seed=step), peers)
    other: nn.Module = build(name, num_peers(name), copy.deepcopy(peers), **keys_of(name, tmp_path))
    other.load_state_dict(method.state_dict())
    outputs, batch = make_outputs(num_peers(name), torch.float32), make_batch(epoch=3.0)
    torch.testing.assert_close(other(outputs, batch, peers), method(outputs, batch, peers), rtol=0, atol=0)


@EACH
def test_a_step_reads_nothing_back_to_the_host(name, made):
    method, peers = made
    outputs, batch = make_outputs(num_peers(name), torch.float32), make_batch()
    with oracle.Dispatches() as watched:
        losses = method(outputs, batch, peers)
        torch.stack(list(losses.values())).sum().backward()
    assert watched.waits == []
    assert leaves(outputs)[0].grad is not None
