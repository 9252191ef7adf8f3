"""What J peers cost: a training step with CutnMix and all its losses, beside J steps of one plain network."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch

from cutnmix.benchmarks.measure import Clock, Spread, per_second
from cutnmix.benchmarks.records import Row, Sheet
from cutnmix.benchmarks.steps import keys, training
from cutnmix.trainer.overview import beside

WARMUP = 1  # steps a turn: the data is ready at once
NOTES = [
    "Handwritten digits by the resident loader; data and update included. J = 1 is the baseline method on CutnMix's "
    "batches, beside itself without a mix: its spread is the machine's."
]


def method_of(count: int) -> str:
    """CutnMix with all its losses; alone, a peer has nobody to learn from."""
    return "method=cutnmix" if count > 1 else "method=baseline"


def measure(
    *,
    network: str,
    views: list[int],
    batch: int,
    rounds: int,
    seconds: float,
    device: torch.device,
) -> list[Sheet]:
    """Milliseconds of a step against J, and its ratio to J times the step of one plain network, measured in turn."""
    config, clock = partial(keys, None, network, batch), Clock(device)
    with ExitStack() as stack:

        def enter(count: int, *more: str) -> Callable[[], float]:
            step = stack.enter_context(training(config(count, device, "loader=resident", *more)))
            return lambda: 1000 / per_second(step, clock, seconds=seconds, warmup=WARMUP)

        plain = enter(1, "method=baseline", "mix=none")
        many = {str(count): enter(count, method_of(count)) for count in views}
        for figure in (plain, *many.values()):  # what is made at first use
            figure()
        ms, ratios_to_one = beside(plain, many, rounds)
    title = f"{network}, batch {batch}, CutnMix with all losses"
    times: Row = {j: Spread.of(values) for j, values in ms.items()}
    ratios: Row = {j: Spread.of([ratio / int(j) for ratio in values]) for j, values in ratios_to_one.items()}
    return [
        Sheet(f"A training step of J peers, {title}", "ms", "J", {"cutnmix": times}),
        Sheet("The same / (J x a plain step of one network)", "ratio", "J", {"cutnmix": ratios}),
    ]
