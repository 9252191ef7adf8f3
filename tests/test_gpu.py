"""What only a GPU can tell, of training as a whole: `make test-gpu`. The loaders by themselves: test_loaders.py.

Parity with the CPU, no waiting, graph == compiled == eager, memory, the hand-over of DALI's buffers, exact resume.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import oracle
import pytest
import test_resume
import torch
from torch import Tensor

from cutnmix.pipeline import Distort, Mix, make_loader, make_plan
from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer.build import Parts, build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.metrics import evaluate
from cutnmix.trainer.step import Tally

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # Dynamo's and Inductor's own warnings
LOADERS = pytest.mark.parametrize("loader", ["resident", "dali"])
# 130 images: four batches of 30 and one of 10.
KEYS = [
    "device=cuda",
    "data=digits",
    "data.images_per_class=13",
    "batch_size=30",
    "peers.network=resnet20",
    "distort.flip=0.5",
]
LR = 1e-4  # so that rounding does not grow over twenty steps: the same gradients are what is compared


@pytest.fixture(autouse=True)
def full_float32(monkeypatch) -> Iterator[None]:
    """No TF32 in convolutions (matrix products have none by default), and nothing compiled for another test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()


@contextmanager
def parts_of(*overrides: str) -> Iterator[Parts]:
    parts = build(load_config("quickstart", [*KEYS, *overrides]))
    yield parts
    parts.close()


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps(parts: Parts, epoch: int = 0) -> Iterator[tuple[Views, Draws]]:
    plan = parts.plan(epoch)
    for s, views in enumerate(parts.loader.epoch(plan)):
        yield views, plan.step(s)


def train(parts: Parts, batches: Iterator[tuple[Views, Draws]], tally: Tally | None = None) -> list[dict[str, float]]:
    """The losses of each step, unless there is a tally to add them to."""
    seen = []
    for views, draws in batches:
        mine = tally or Tally([])
        parts.step.train(parts.learner, views, draws, mine, lr=LR, share=1.0, update=True)
        if tally is None:
            seen.append(mine.read())
    return seen


def assert_close(one: list[dict[str, float]], other: list[dict[str, float]], rel: float) -> None:
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert {**a, "top1": 0} == pytest.approx({**b, "top1": 0}, rel=rel, abs=rel), f"step {step}"


# Parity with the CPU


def test_three_loaders_give_the_same_pixels():
    made: dict[str, list[Tensor]] = {}
    for device, loader in (("cpu", "resident"), ("cuda", "resident"), ("cuda", "dali")):
        with parts_of(f"device={device}", f"loader={loader}", "compile=none") as parts:
            made[f"{device} {loader}"] = [views.image_VBCHW.cpu() for views, _ in steps(parts)]
    expected = made.pop("cpu resident")
    for name, images in made.items():
        assert all(torch.equal(one, other) for one, other in zip(images, expected, strict=True)), name


@LOADERS
@pytest.mark.parametrize("method", ["baseline", "dml", "cutnmix"])
def test_the_first_losses_are_those_of_the_cpu(method, loader):
    losses = []
    for device in ("cpu", "cuda"):
        keys = [f"device={device}", f"method={method}", f"loader={loader}", "precision=fp32", "compile=none"]
        with parts_of(*keys) as parts:
            views, draws = next(batches := steps(parts))
            losses.append(train(parts, iter([(views, draws)])))
            batches.close()
    assert_close(*losses, rel=1e-3)


def test_a_compiled_mix_is_the_eager_one():
    batches = {}
    for compile in ("none", "peers"):
        with parts_of("loader=resident", f"compile={compile}", "precision=fp32") as parts:
            batches[compile] = [parts.step.mix(views, draws) for views, draws in steps(parts)]
    for one, other in zip(*batches.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


# Waiting


@LOADERS
@pytest.mark.parametrize("compile", ["none", "peers", "graph"])
def test_in_an_epoch_of_training_torch_never_waits(loader, compile):
    """Torch's own calls only: in C++, DALI waits on the host until a read is there."""
    with parts_of(f"loader={loader}", f"compile={compile}", "data.images_per_class=40") as parts:
        tally = Tally([])
        train(parts, steps(parts), tally)  # compiles, captures, and copies to the device what is copied once
        batches = steps(parts, 1)
        first = next(batches)  # DALI begins an epoch
        with no_waiting():
            train(parts, iter([first]), tally)
            train(parts, batches, tally)
        assert np.isfinite(tally.read()["total"])


def test_a_plan_is_uploaded_without_waiting():
    plan = make_plan(
        seed=0, epoch=0, num_images=50_000, size=(32, 32), batch_size=128, distort=Distort(), mix=Mix(name="cutnmix"),
        num_views=4, num_peers=4,
    )  # fmt: skip
    plan.to("cuda")  # pinned memory is kept for the next time
    with no_waiting():
        there = plan.to("cuda")
        draws = there.step(100)
    back = there.to("cpu")
    for name, field in vars(plan).items():
        assert torch.equal(vars(back)[name], field) if isinstance(field, Tensor) else vars(back)[name] == field
    assert all(field.is_cuda for field in draws if isinstance(field, Tensor))


def test_an_evaluation_does_not_wait_between_its_first_batch_and_its_end():
    with parts_of("loader=resident", "compile=none", "eval_batch_size=64") as parts:
        plan, done = parts.test_plan(), 0

        def poll() -> None:
            nonlocal done
            done += 1
            torch.cuda.set_sync_debug_mode("error" if done < len(plan) else "default")

        batches = parts.test_loader.epoch(plan)
        try:
            scores = evaluate(parts.learner, parts.test_step, batches, plan, num_classes=10, poll=poll)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert done == len(plan) > 2 and 0 <= scores["mean"]["top1"] <= 100


# One step, three ways


@pytest.mark.parametrize("compile", ["peers", "step", "graph"])
@pytest.mark.parametrize(("precision", "rel"), [("fp32", 2e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("method", ["dml", "cutnmix"])
def test_compiled_and_captured_steps_are_the_eager_ones(method, precision, rel, compile):
    """Twenty steps in four epochs, of which every fifth has a smaller batch."""
    seen, weights = {}, {}
    for grain in ("none", compile):
        with parts_of("loader=resident", f"method={method}", f"precision={precision}", f"compile={grain}") as parts:
            seen[grain] = [losses for epoch in range(4) for losses in train(parts, steps(parts, epoch))]
            weights[grain] = parts.learner.peers.state_dict()
    assert len(seen[compile]) == 20
    assert_close(seen[compile], seen["none"], rel)
    torch.testing.assert_close(weights[compile], weights["none"], rtol=10 * rel, atol=rel)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_accumulates_and_updates_as_eager_steps_do(accumulate):
    weights = []
    for grain in ("none", "graph"):
        with parts_of("loader=resident", "precision=fp32", f"compile={grain}", "drop_last=true") as parts:
            for epoch in range(3):
                for s, (views, draws) in enumerate(steps(parts, epoch)):
                    update, share = (s + 1) % accumulate == 0, 1 / accumulate
                    parts.step.train(parts.learner, views, draws, Tally([]), lr=LR, share=share, update=update)
            weights.append(parts.learner.peers.state_dict())
    torch.testing.assert_close(*weights, rtol=2e-2, atol=2e-3)


def test_what_leaves_a_graph_is_not_written_over():
    with parts_of("loader=resident", "compile=graph", "drop_last=true") as parts:
        batches = [*steps(parts, 0), *steps(parts, 1)]
        kept, copies = [], []
        for views, draws in batches:
            made = parts.step._gradients(parts.learner, views, draws, 1.0)
            kept.append(made)
            copies.append(tuple(x.clone() for x in (*made[0].values(), *made[1:])))
        assert len(kept) > 2 * 3  # the first three are not captured
        for (losses, *others), copied in zip(kept, copies, strict=True):
            assert all(torch.equal(one, copy) for one, copy in zip((*losses.values(), *others), copied, strict=True))
        assert not torch.equal(kept[-1][1], kept[-2][1])


# Memory


@LOADERS
@pytest.mark.parametrize("compile", ["none", "peers", "graph"])
def test_memory_of_torch_is_flat_over_epochs(loader, compile):
    with parts_of(f"loader={loader}", f"compile={compile}") as parts:
        tally, taken = Tally([]), []
        for epoch in range(5):
            train(parts, steps(parts, epoch), tally)
            tally.read()
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_allocated())
    assert taken[1] == taken[4]


# DALI's buffers


def test_of_dalis_outputs_few_are_held_however_many_epochs_pass(monkeypatch):
    """Their memory is not torch's, so that the test above would not see it grow."""
    dali = pytest.importorskip("cutnmix.pipeline.dali", exc_type=ImportError)
    monkeypatch.setattr(dali, "_READ", 1)  # a batch a read
    with parts_of("loader=dali", "compile=none") as parts:
        for epoch in range(5):
            train(parts, steps(parts, epoch))
            torch.cuda.synchronize()
        views, _ = next(batches := steps(parts, 5))
        assert views.image_VBCHW.is_cuda and len(parts.loader._held) == 1  # pyright: ignore[reportAttributeAccessIssue]
        batches.close()


@pytest.fixture
def noise():
    return oracle.images(4096, 16, 16)


def test_dalis_outputs_are_handed_over_without_a_copy(noise):
    pytest.importorskip("nvidia.dali")
    plan = make_plan(
        seed=0, epoch=0, num_images=len(noise), size=(16, 16), batch_size=512, distort=Distort(), mix=Mix(),
        num_views=2, num_peers=2,
    )  # fmt: skip
    loader = make_loader("dali", noise, Distort(), "cuda", num_views=2, batch_size=512)
    loader._start(loader._reads(plan, 0), False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    (outputs,) = next(iter(loader._iterator))
    assert all(image.is_cuda for image in outputs.values())
    assert torch.cuda.memory_allocated() == before  # they lie in DALI's memory, not in torch's
    loader.close()


@pytest.mark.parametrize("stream", ["default", "other"])
def test_views_are_right_however_far_the_gpu_lags_behind(stream, noise):
    """DALI works ahead on a stream of its own, and may write a buffer anew once torch has let it go.

    Here the GPU sleeps before it copies each batch, and the host is epochs ahead of it.
    """
    pytest.importorskip("nvidia.dali")
    plan = make_plan(
        seed=0, epoch=0, num_images=len(noise), size=(16, 16), batch_size=256, distort=Distort(), mix=Mix(),
        num_views=2, num_peers=2,
    )  # fmt: skip
    expected = make_loader("resident", noise, Distort(), "cpu", num_views=2, batch_size=256)
    loader = make_loader("dali", noise, Distort(), "cuda", num_views=2, batch_size=256)
    on_gpu = plan.to("cuda")
    torch.cuda.synchronize()
    place = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    with torch.cuda.stream(place):
        seen, batches = [], loader.epoch(on_gpu)
        for _ in range(len(plan)):
            torch.cuda._sleep(50_000_000)  # tens of milliseconds
            seen.append(next(batches).image_VBCHW.clone())
    torch.cuda.synchronize()
    for s, (one, other) in enumerate(zip(seen, expected.epoch(plan), strict=True)):
        assert torch.equal(one.cpu(), other.image_VBCHW), f"step {s}"
    loader.close()


# Resume


@LOADERS
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(loader, tmp_path: Path):
    keys = ["device=cuda", "deterministic=true", f"loader={loader}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert test_resume.start(straight, *keys).wait() == 0
    process = test_resume.start(killed, *keys)
    test_resume.wait_for_step(process, killed, 8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert test_resume.start(killed, *keys).wait() == 0
    test_resume.assert_same(test_resume.final_state(killed), test_resume.final_state(straight))
