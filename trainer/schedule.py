"""The factor on the learning rate, a pure function of progress: no state to save, nothing to step twice."""

import math

from cutnmix.trainer.keys import Schedule


def never_reached(schedule: Schedule, epochs: int) -> list[str]:
    """Lines for the user about what a run of so many epochs, shortened perhaps, ends before."""
    lines = []
    if schedule.name == "step" and schedule.milestones and min(schedule.milestones) >= epochs:
        milestones = ", ".join(f"{milestone:g}" for milestone in schedule.milestones)
        lines.append(f"schedule.milestones: {milestones} are not reached in {epochs} epochs: the learning rate stays")
    if schedule.warmup_epochs >= epochs:
        lines.append(f"schedule.warmup_epochs: {schedule.warmup_epochs:g} of {epochs} epochs: all is warm-up")
    return lines


def lr_factor(schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Factor in [0, 1] for the step that comes after `step` steps, at t = step / steps_per_epoch epochs.

    step: gamma^(number of milestones <= t). cosine: (1 + cos(pi * s)) / 2, s from 0 at the end of the warm-up to 1 at
    the end of the last epoch. Warm-up multiplies either by (step + 1) / (its number of steps) until that reaches 1.
    """
    t = step / steps_per_epoch
    if schedule.name == "step":
        factor = schedule.gamma ** sum(t >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        rest = max(epochs - schedule.warmup_epochs, 1e-12)
        factor = (1 + math.cos(math.pi * min(max(t - schedule.warmup_epochs, 0.0) / rest, 1.0))) / 2
    else:
        factor = 1.0
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    return factor * min((step + 1) / warmup_steps, 1.0) if warmup_steps else factor
