"""What J peers cost: a training step with CutnMix and all its losses, beside J steps of one plain network."""

from collections.abc import Callable

from cutnmix.benchmarks.measure import Spread, seconds_per_call
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.step import Tally


def step_seconds(network: str, batch: int, counts: list[int], rounds: int) -> dict[int, tuple[Spread, Spread]]:
    """J -> (seconds of its step, ratio to J times the step of one baseline network), measured in turn."""
    baseline = _stepper(network, batch, 1, "method=baseline", "mix=none")
    steppers = {
        count: _stepper(network, batch, count, "method=baseline" if count == 1 else "method=cutnmix")
        for count in counts
    }
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    ratios: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count, step in steppers.items():
            one = seconds_per_call(baseline, calls=5)
            many = seconds_per_call(step, calls=5)
            one = (one + seconds_per_call(baseline, calls=5)) / 2  # before and after: the machine's speed drifts
            seconds[count].append(many)
            ratios[count].append(many / (count * one))
    return {count: (Spread.of(seconds[count]), Spread.of(ratios[count])) for count in counts}


def _stepper(network: str, batch: int, count: int, *keys: str) -> Callable[[], None]:
    """A function that does one training step, data and update included, on handwritten digits."""
    overrides = [f"peers.network={network}", f"peers.count={count}", f"batch_size={batch}", "loader=resident", *keys]
    parts = build(load_config("quickstart", overrides))
    plan = parts.plan(0)
    tally = Tally([])

    def step() -> None:
        views = next(iter(parts.loader.epoch(plan)))
        parts.step.train(parts.learner, views, plan.step(0), tally, lr=0.01, share=1.0, update=True)

    return step
