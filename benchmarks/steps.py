"""A whole training step: what the data costs on top of it, and what it is beside the plain way of training peers.

The price of the data is total / compute: a step with loader, plan and mix against the same step on one batch that was
mixed before. `lineage` is mutual learning as public code of its kind trains it: see there.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from cutnmix.benchmarks.measure import Clock, Spread, in_turn, installed, per_second
from cutnmix.benchmarks.records import Row, Sheet
from cutnmix.models.peers import build_peer
from cutnmix.pipeline import Dataset, Views
from cutnmix.pipeline.batch import Batch
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.overview import batches
from cutnmix.trainer.step import Step, Tally

LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
WARMUP = 6  # steps a turn: more than a DataLoader has ready from the last one
STEP = Callable[[], None]


def keys(root: Path | None, network: str, batch: int, count: int, device: torch.device, *more: str) -> list[str]:
    """The overrides of a configuration: CIFAR-100, 100 images a class, where there is a root; else digits."""
    data = ["data=digits"]
    if root:  # not all of it, because every way of a benchmark holds a data set of its own
        data = ["data=cifar100", f"data.root={root}", "data.download=false", "data.images_per_class=100"]
    size = [f"batch_size={batch}", "drop_last=true", f"peers.network={network}", f"peers.count={count}"]
    return [*data, *size, f"device={device}", "distort.flip=0.5", f"optimizer.lr={LR}", *more]


@contextmanager
def training(overrides: list[str], *, replay: bool = False) -> Iterator[STEP]:
    """What does one training step: data, forward, losses, backward, update. `replay`: on one batch, mixed before."""
    torch._dynamo.reset()  # it compiles no function more than a few times a process, then it is eager without a word
    torch.backends.cudnn.benchmark = True  # as a run has it
    parts = build(load_config("quickstart", overrides))
    step, given = parts.step, batches(parts)
    if replay:
        views, draws = next(given)
        mixed: Any = _Replay(step.mix(views, draws))
        step = Step(mixed, step.device_type, step.dtype, compiled=parts.setting.compile == "step")
        given.close()
        given = _again(views, draws)
    tally = Tally([])

    def one() -> None:
        step.train(parts.learner, *next(given), tally, lr=LR, share=1.0, update=True)

    yield one
    given.close()
    parts.close()


class _Replay(nn.Module):
    """In the place of a mix: the same batch every time."""

    def __init__(self, batch: Batch):
        super().__init__()
        self.batch = batch

    def forward(self, views: Views, draws: Draws) -> Batch:
        return self.batch


def _again(views: Views, draws: Draws) -> Generator[tuple[Views, Draws], None, None]:
    while True:
        yield views, draws


class _Pictures(TorchDataset):
    """PIL images through torchvision's transforms, one at a time."""

    def __init__(self, data: Dataset):
        self.data = data
        self.transform: Callable[[Image.Image], Any] = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data.array[index])), int(self.data.labels[index])


def mutual_loss(logits: list[Tensor], j: int, label_B: Tensor) -> Tensor:
    """CE(z_j, y) + 1 / (J - 1) sum_{k != j} KL(p_k || p_j), pair by pair, as it is usually written."""
    loss = F.cross_entropy(logits[j], label_B)
    for k, other_BK in enumerate(logits):
        if k != j:
            teacher_BK, student_BK = F.softmax(other_BK.detach(), dim=1), F.log_softmax(logits[j], dim=1)
            loss = loss + F.kl_div(student_BK, teacher_BK, reduction="batchmean") / (len(logits) - 1)
    return loss


@contextmanager
def lineage(
    data: Dataset, network: str, batch: int, count: int, device: torch.device, workers: int = 2
) -> Iterator[STEP]:
    """What does one step of deep mutual learning the plain way: float32 NCHW, eager, an SGD a net, two .item() a net.

    PIL transforms in a DataLoader with worker processes. All nets see the same images; each is updated by its cross
    entropy plus the mean KL divergence from the other nets, as they were before the step, to it.
    """
    nets = [build_peer(network, len(data.classes), seed=0, j=j).to(device) for j in range(count)]
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
        for net in nets
    ]
    totals = {"loss": [0.0] * count, "top1": [0.0] * count}

    def endless() -> Generator[Any, None, None]:
        on_gpu = device.type == "cuda"
        while True:
            yield from DataLoader(
                _Pictures(data), batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=on_gpu
            )

    batches = endless()

    def one() -> None:
        image_BCHW, label_B = (part.to(device, non_blocking=True) for part in next(batches))
        logits = [net(image_BCHW)[0] for net in nets]
        for j, optimizer in enumerate(optimizers):
            loss = mutual_loss(logits, j, label_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals["loss"][j] += loss.item()
            totals["top1"][j] += (logits[j].argmax(1) == label_B).float().mean().item()

    yield one
    batches.close()


LINEAGE, OURS, OURS_FP32 = "DML the plain way", "cutnmix DML", "cutnmix DML in float32"
REPLAYED, TOTALS = "cutnmix, replayed batch", {"cutnmix, resident": "resident", "cutnmix, dali": "dali"}
GRAPH = "cutnmix, resident, compile=graph"  # on a GPU
NOTES = [
    "images/s counts the images of a batch, each of which every peer sees. A replayed batch is mixed and ready: its "
    "step has no loader, no plan and no mix. Of CIFAR-100 the first 100 images a class.",
    "DML the plain way: eager float32 in NCHW, an SGD and two .item() a net, PIL transforms in a DataLoader of two "
    "workers. cutnmix DML: the same networks, batch, loss and distortions, by this package's defaults on the device.",
]


def measure(
    *,
    root: Path | None,
    data: Dataset,
    network: str,
    views: list[int],
    batch: int,
    rounds: int,
    seconds: float,
    device: torch.device,
) -> list[Sheet]:
    """Milliseconds, images a second, the price of the data and the gain over the plain way, for J networks."""
    ms: dict[str, Row] = {}
    rate: dict[str, Row] = {}
    price: dict[str, Row] = {}
    gain: dict[str, Row] = {}
    there = {name: loader for name, loader in TOTALS.items() if loader != "dali" or installed("nvidia.dali")}
    for count in views:
        method, mutual = ("method=cutnmix", "method=dml") if count > 1 else ("method=baseline", "method=baseline")
        dml = [mutual, "mix=none", "views=shared", "loader=resident"]
        config = partial(keys, root, network, batch, count, device)
        ways: dict[str, AbstractContextManager[STEP]] = {
            REPLAYED: training(config(method, "loader=resident"), replay=True),
            **{name: training(config(method, f"loader={loader}")) for name, loader in there.items()},
            **({GRAPH: training(config(method, "loader=resident", "compile=graph"))} if device.type == "cuda" else {}),
            LINEAGE: lineage(data, network, batch, count, device),
            OURS: training(config(*dml)),
            OURS_FP32: training(config(*dml, "precision=fp32")),
        }
        with ExitStack() as stack:
            clock = Clock(device)
            steps = {name: stack.enter_context(way) for name, way in ways.items()}
            timed = partial(per_second, clock=clock, seconds=seconds, warmup=WARMUP)
            seen = in_turn({name: partial(timed, step) for name, step in steps.items()}, rounds)
        for name, per_s in seen.items():
            ms.setdefault(name, {})[str(count)] = Spread.of([1000 / value for value in per_s])
            rate.setdefault(name, {})[str(count)] = Spread.of([batch * value for value in per_s])
        for name in there:
            price.setdefault(name, {})[str(count)] = Spread.of_ratios(seen[REPLAYED], seen[name])
        for name in (OURS, OURS_FP32):
            gain.setdefault(name, {})[str(count)] = Spread.of_ratios(seen[name], seen[LINEAGE])
    title = f"{network}, batch {batch}, {data.name}"
    return [
        Sheet(f"A training step, {title}", "ms", "J", ms),
        Sheet(f"Images a second, {title}", "images/s", "J", rate),
        Sheet("The price of the data: time of a step / that on a replayed batch", "ratio", "J", price),
        Sheet("The gain: images/s / those of DML the plain way", "ratio", "J", gain),
    ]
