"""`compile: graph` as far as a CPU reaches: who is refused, what goes into the graph's buffers, what runs without it.

The graph itself is tested on a GPU: test_gpu.py.
"""

import copy

import oracle
import pytest
import torch
from torch import Tensor

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.plan import Draws
from cutnmix.pipeline.resident import ResidentLoader
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.graph import Fixed, Graphed
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.step import Step, Tally

SMALL = ["data.classes=4", "data.images_per_class=6", "batch_size=10", "loader=resident", "peers.network=resnet20"]
DISTORT = Distort(colour=Colour(hue=30), cutout=4)


def batches(mix: str, second: str | None = None, batch_size: int = 4) -> list[tuple[Views, Draws]]:
    dataset = oracle.images(10, 8, 8)
    plan = make_plan(
        seed=0, epoch=0, num_images=10, size=(8, 8), batch_size=batch_size, distort=DISTORT, mix=Mix(name=mix),
        num_views=2, num_peers=2, second=second, label_N=dataset.labels,
    )  # fmt: skip
    return [(views.made(), plan.step(s)) for s, views in enumerate(ResidentLoader(dataset, DISTORT).epoch(plan))]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("auto", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="auto is CUDA here"))],
)
def test_without_cuda_a_graph_is_refused_when_the_run_is_built(device):
    config = load_config("quickstart", [*SMALL, f"device={device}", "compile=graph"])
    with pytest.raises(
        ConfigError, match=r"^compile: graph needs a CUDA device, and this run is on cpu; write auto, "
    ) as e:
        build(config)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("mix", ["none", "cutmix", "cutnmix", "mixup", "cutout"])
@pytest.mark.parametrize("second", [None, "class"])
def test_a_batch_is_copied_whole_to_places_that_stay(mix, second):
    first, later, short = batches(mix, second)
    fixed = Fixed(first)
    views, draws = fixed.tree
    assert isinstance(views, Views) and isinstance(draws, Draws)
    places = [leaf.data_ptr() for leaf in (*views, *draws) if isinstance(leaf, Tensor)]
    for batch in (first, later):
        assert fixed.fits(batch)
        with oracle.Dispatches() as watched:
            fixed.fill(batch)
        assert watched.waits == []
        torch.testing.assert_close(fixed.tree, batch, rtol=0, atol=0)
        assert views.image_VBCHW.stride() == batch[0].image_VBCHW.stride()
    assert [leaf.data_ptr() for leaf in (*views, *draws) if isinstance(leaf, Tensor)] == places
    assert not {*places} & {leaf.data_ptr() for leaf in (*later[0], *later[1]) if isinstance(leaf, Tensor)}
    assert not fixed.fits(short)


def test_a_batch_of_another_structure_does_not_fit():
    (views, draws), *_ = batches("cutnmix")
    fixed = Fixed((views, draws))
    assert not fixed.fits((views._replace(holes=None), draws))
    assert not fixed.fits((views, draws._replace(second=True)))
    assert not fixed.fits((views._replace(pixels=views.image_VBCHW.half()), draws))


def test_a_smaller_batch_runs_eagerly():
    seen = []
    graphed = Graphed(lambda *given: seen.append(given), num_images=4)
    *_, (views, draws) = batches("cutnmix")
    graphed("learner", views, draws, 0.5)
    assert seen == [("learner", views, draws, 0.5)] and graphed.inputs is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_stay_in_place_train_as_those_that_do_not(accumulate):
    """Of batches of 10, 10 and 4 images none is of 99, so that no step needs a graph."""
    parts = build(load_config("quickstart", [*SMALL, "device=cpu"]))
    learners = [parts.learner, copy.deepcopy(parts.learner)]
    for learner in learners:
        learner.optimizer = torch.optim.SGD(learner.peers.parameters(), lr=0.1, fused=True)
    steps = parts.step, Step(parts.step.mix, "cpu", parts.step.dtype, graphed=99)
    plan, tallies, places = parts.plan(0), [Tally([]), Tally([])], []
    for s, views in enumerate(parts.loader.epoch(plan)):
        for step, learner, tally in zip(steps, learners, tallies, strict=True):
            update = (s + 1) % accumulate == 0
            step.train(learner, views, plan.step(s), tally, lr=0.1, share=1 / accumulate, update=update)
        places.append([p.grad.data_ptr() for p in learners[1].peers.parameters()])
    assert places[0] == places[-1]
    assert tallies[0].read() == tallies[1].read()
    for one, other in zip(learners[0].peers.parameters(), learners[1].peers.parameters(), strict=True):
        assert torch.equal(one, other)
