"""The learning rate is a closed form of the place in training."""

import math

import pytest
import torch

from cutnmix.trainer.keys import Schedule
from cutnmix.trainer.schedule import lr_factor, never_reached

PAPER, EPOCHS, S = Schedule(), 240, 100  # S steps an epoch
EACH = pytest.mark.parametrize("name", ["step", "cosine", "constant"])


def at(epoch: float, schedule: Schedule = PAPER, epochs: int = EPOCHS) -> float:
    """The factor of the step that begins when so many epochs are done."""
    return lr_factor(schedule, round(epoch * S), S, epochs)


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1), (149.99, 1), (150, 0.1), (179.99, 0.1), (180, 0.01), (209.99, 0.01), (210, 0.001), (239.99, 0.001)],
)
def test_the_papers_steps(epoch, factor):
    assert at(epoch) == pytest.approx(factor, rel=1e-12)


def test_steps_are_those_of_torch():
    """Of MultiStepLR, which the paper's lineage steps after every epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5], gamma=0.1)
    schedule = Schedule(milestones=[2, 5], gamma=0.1)
    for epoch in range(7):
        rate = optimizer.param_groups[0]["lr"]
        assert [lr_factor(schedule, 3 * epoch + step, 3, 7) for step in range(3)] == pytest.approx([rate] * 3)
        optimizer.step()
        scheduler.step()


def test_the_order_of_milestones_does_not_matter():
    shuffled = Schedule(milestones=[210, 150, 180])
    assert all(at(epoch, shuffled) == at(epoch) for epoch in range(EPOCHS))


def test_without_milestones_the_rate_stays():
    assert at(239.99, Schedule(milestones=[])) == 1


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1), (10, 0.75), (15, 0.5), (20, 0.25), (30, 0)])
def test_cosine_falls_from_one_to_zero(epoch, factor):
    assert at(epoch, Schedule(name="cosine"), 30) == pytest.approx(factor, abs=1e-12)


def test_cosine_begins_after_the_warm_up():
    schedule = Schedule(name="cosine", warmup_epochs=5)
    for epoch in (5, 6.5, 12, 25):
        assert at(epoch, schedule, 25) == pytest.approx((1 + math.cos(math.pi * (epoch - 5) / 20)) / 2, abs=1e-12)


@EACH
def test_the_warm_up_rises_in_proportion_from_the_first_step_on_and_then_is_over(name):
    schedule = Schedule(name=name, warmup_epochs=4)
    factors = [lr_factor(schedule, step, S, EPOCHS) for step in range(4 * S + 1)]
    assert factors == pytest.approx([*((step + 1) / (4 * S) for step in range(4 * S)), 1.0])
    if name != "cosine":  # which the warm-up moves
        assert at(200, schedule) == at(200, Schedule(name=name))


@EACH
@pytest.mark.parametrize("warmup", [0, 0.5, 3])
def test_no_step_is_lost_and_after_the_warm_up_the_rate_only_falls(name, warmup):
    factors = [lr_factor(Schedule(name=name, warmup_epochs=warmup), step, 7, EPOCHS) for step in range(7 * EPOCHS)]
    assert all(0 < factor <= 1 for factor in factors)
    after = factors[math.ceil(7 * warmup) :]
    assert after == sorted(after, reverse=True)


@EACH
def test_a_warm_up_as_long_as_the_run_only_rises(name):
    schedule = Schedule(name=name, warmup_epochs=10, milestones=[])
    assert [lr_factor(schedule, step, 7, 10) for step in range(70)] == pytest.approx([i / 70 for i in range(1, 71)])


@pytest.mark.parametrize(
    ("schedule", "epochs", "said"),
    [
        (PAPER, 240, []),
        (PAPER, 151, []),
        (PAPER, 150, ["schedule.milestones: 150, 180, 210 are not reached in 150 epochs: the learning rate stays"]),
        (Schedule(name="cosine"), 20, []),
        (Schedule(name="constant", warmup_epochs=3), 4, []),
        (Schedule(name="constant", warmup_epochs=3), 3, ["schedule.warmup_epochs: 3 of 3 epochs: all is warm-up"]),
    ],
)
def test_what_a_shortened_run_does_not_reach_is_said(schedule, epochs, said):
    assert never_reached(schedule, epochs) == said
