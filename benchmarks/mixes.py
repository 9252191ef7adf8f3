"""The mix alone: milliseconds and aten calls to mix J ready views of a batch, ours beside the public ways.

Two tasks, the same for all: normalised float32 views in, mixed ones and targets out; and uint8 views in, normalised
mixed float32 views and targets out, where the public ways are given a normalisation of two passes. They mix one view a
call. NOTES says what else differs.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cutnmix.benchmarks.loaders import check_even, kornia_cutmix, timm_cutmix, torchvision_cutmix
from cutnmix.benchmarks.measure import Clock, Spread, in_turn, installed, per_second
from cutnmix.benchmarks.records import Row, Sheet
from cutnmix.pipeline import CutnMix, Distort, Mix, MixBatch, Plan, Views, make_plan

Call = Callable[[], object]
SIZE, NUM_CLASSES = (32, 32), 100
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
WARMUP = 3  # calls
PLAN_STEPS = 100  # drawn at once, where an epoch of CIFAR has some hundreds
PUBLIC: dict[str, tuple[str, Callable[[], Any]]] = {  # name -> library, what makes a mix of one view
    "kornia RandomCutMixV2": ("kornia", kornia_cutmix),
    "torchvision v2.CutMix": ("torchvision", lambda: torchvision_cutmix(NUM_CLASSES)),
    "timm Mixup": ("timm", lambda: timm_cutmix(NUM_CLASSES)),
}
NOTES = [
    "kornia, torchvision and timm draw lambda, box and partner anew for each view, and make each a set of targets; "
    "CutnMix has a box a view, and one lambda, one partner and one set of targets for all. The partner is a random "
    "permutation (kornia, cutnmix), the batch rolled by one (torchvision) or reversed (timm). kornia returns labels "
    "and lambda, no soft targets.",
    "timm writes into the batch that it is given: from floats, it writes nothing but the box and the views are lost. "
    "On a copy it leaves them, as all others do.",
    "MixBatch executes draws that the plan made before, the others draw in the call. The plan's row is its cost of a "
    "batch, the draws of order, crop and flip included.",
]


def measure(*, views: list[int], batch: int, rounds: int, seconds: float, device: torch.device) -> list[Sheet]:
    """Milliseconds and aten calls a batch against J, for both tasks; what drawing the plan costs a batch.

    Raises: ConfigError for an odd batch, which timm refuses.
    """
    check_even(batch)
    clock, sheets = Clock(device), []

    def ms(call: Call) -> float:
        return 1000 / per_second(call, clock, seconds=seconds, warmup=WARMUP)

    tasks = {"Float views in, mixed views out": _floats, "Bytes in, normalised mixed views out": _bytes}
    for title, contenders_of in tasks.items():
        times: dict[str, Row] = {}
        calls: dict[str, Row] = {}
        for count in views:
            contenders = contenders_of(count, batch, device)
            there = {name: call for name, call in contenders.items() if call}
            seen = in_turn({name: partial(ms, call) for name, call in there.items()}, rounds)
            for name, call in contenders.items():
                times.setdefault(name, {})[str(count)] = Spread.of(seen[name]) if call else None
                calls.setdefault(name, {})[str(count)] = aten_calls(call) if call else None
        sheets.append(Sheet(f"{title}, batch {batch}", "ms a batch", "J", times))
        sheets.append(Sheet(f"{title}, aten calls", "calls a batch", "J", calls))
    plans: Row = {}
    for count in views:
        drawn = in_turn({"": lambda count=count: ms(lambda: _plan(count, batch)) / PLAN_STEPS}, rounds)[""]
        plans[str(count)] = Spread.of(drawn)
    sheets.append(Sheet("Drawing the plan, on the host", "ms a batch", "J", {"cutnmix plan": plans}))
    return sheets


def _plan(count: int, batch: int) -> Plan:
    return make_plan(
        seed=0,
        epoch=0,
        num_images=PLAN_STEPS * batch,
        size=SIZE,
        batch_size=batch,
        distort=Distort(),
        mix=Mix(name="cutnmix"),
        num_views=count,
        num_peers=count,
    )


def _public() -> dict[str, Callable[[Tensor, Tensor], Any] | None]:
    """The public mixes; None for those that are not installed."""
    return {name: make() if installed(library) else None for name, (library, make) in PUBLIC.items()}


def _each_view(mix: Callable[[Tensor, Tensor], Any], views: Callable[[], Tensor], label_B: Tensor) -> Call:
    return lambda: [mix(image_BCHW, label_B) for image_BCHW in views()]


def _floats(count: int, batch: int, device: torch.device) -> dict[str, Call | None]:
    image_VBCHW = torch.rand(count, batch, 3, *SIZE, device=device)
    label_B = torch.randint(NUM_CLASSES, (batch,), device=device)
    calls = {name: mix and _each_view(mix, lambda: image_VBCHW, label_B) for name, mix in _public().items()}
    timm = _public()["timm Mixup"]
    cutnmix = CutnMix(count, num_classes=NUM_CLASSES, data_keys=["input", "class"])
    return {
        **calls,
        "timm Mixup on a copy": timm and _each_view(timm, image_VBCHW.clone, label_B),
        "cutnmix CutnMix": lambda: cutnmix(image_VBCHW, label_B),
    }


def _bytes(count: int, batch: int, device: torch.device) -> dict[str, Call | None]:
    pixel_VBHWC = torch.randint(256, (count, batch, *SIZE, 3), dtype=torch.uint8, device=device)
    label_B = torch.randint(NUM_CLASSES, (batch,), device=device)
    pixel_VBCHW = pixel_VBHWC.permute(0, 1, 4, 2, 3).contiguous()  # as loaders of tensors hand them over
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    scale, shift = 1 / (255 * std), -mean / std

    def normalised() -> Tensor:
        return pixel_VBCHW.float().mul_(scale).add_(shift)

    calls = {name: mix and _each_view(mix, normalised, label_B) for name, mix in _public().items()}
    cutnmix = CutnMix(count, num_classes=NUM_CLASSES, data_keys=["input", "class"])
    mix_batch = MixBatch(mean=MEAN, std=STD, size=SIZE, num_classes=NUM_CLASSES).to(device)
    if device.type == "cuda":
        torch._dynamo.reset()  # as in loaders.py
        mix_batch.compile(dynamic=False)  # as a training run has it there; what it dispatches is not counted then
    views = Views(pixel_VBHWC.permute(0, 1, 4, 2, 3), None, label_B, torch.arange(batch, device=device))
    plan = _plan(count, batch).to(device)
    steps = cycle(range(len(plan)))
    return {
        **calls,
        "cutnmix CutnMix": lambda: cutnmix(normalised(), label_B),
        "cutnmix MixBatch": lambda: mix_batch(views, plan.step(next(steps))),
    }


class _Count(TorchDispatchMode):
    """Counts the aten calls that are dispatched within it, views and allocations included."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def aten_calls(call: Call) -> int:
    """How many aten operators one call dispatches."""
    call()  # what is made once and kept
    with _Count() as count:
        call()
    return count.calls
