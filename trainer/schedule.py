"""The factor on the learning rate, a pure function of progress: no state to save, nothing to step twice."""

import math

from cutnmix.trainer.config import Schedule


def lr_factor(schedule: Schedule, epoch: float, epochs: int) -> float:
    """Factor in (0, 1] at a point of training counted in epochs (3.5 = the middle of the fourth).

    step: gamma^(number of milestones passed). cosine: (1 + cos(pi * t)) / 2 with t from 0 after the warm-up to 1 at the
    end. Warm-up multiplies the start of either by epoch / warmup_epochs, rising from the first step on.
    """
    if schedule.name == "step":
        factor = schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        rest = max(epochs - schedule.warmup_epochs, 1e-12)
        progress = min(max(epoch - schedule.warmup_epochs, 0.0) / rest, 1.0)
        factor = (1 + math.cos(math.pi * progress)) / 2
    else:
        factor = 1.0
    return factor * min(epoch / schedule.warmup_epochs, 1.0) if schedule.warmup_epochs else factor
