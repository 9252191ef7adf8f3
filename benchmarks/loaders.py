"""Views per second: J distorted, cut-and-mixed, normalised float32 views of a batch, ours beside the public ways.

Every contender does the same work with its own tools, the public ones a view at a time with CutMix, ours all J at once
with CutnMix: on arrays pad 4, random crop, flip, normalise, mix; on JPEG files decode (once an image), random resized
crop, flip, normalise, mix. All run in this one process, in turn, round after round; the figure is the median over
rounds. What comes out is on the device.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cutnmix.benchmarks.measure import Clock, Spread, in_turn, installed, per_second
from cutnmix.benchmarks.records import Cell, Sheet
from cutnmix.pipeline import Dataset, Distort, Mix, MixBatch, Splits, load_splits, make_loader, make_plan, view_size
from cutnmix.trainer.keys import ConfigError

Batches = Generator[Any, None, None]
WARMUP = 4  # batches
SHARED_J = 2  # of the figures against the batch size
JPEG_SIDE = 256  # pixels


class Case(NamedTuple):
    """What is loaded, and with what."""

    data: Dataset
    distort: Distort
    views: int  # J
    batch: int
    device: torch.device
    workers: int  # processes of a DataLoader, threads of DALI


class Contender(NamedTuple):
    """A way to load, and the library without which it is left out."""

    library: str
    open: Callable[[Case], AbstractContextManager[Batches]]


def measure(
    data: Dataset,
    *,
    views: list[int],
    batch: int,
    batches: list[int],
    rounds: int,
    seconds: float,
    device: torch.device,
    workers: int = 2,
) -> list[Sheet]:
    """Thousand views a second against J at one batch size, and against `batches` (where given) at J = 2.

    Raises: ConfigError for a batch that a contender cannot make, before anything is measured.
    """
    if (most := max([batch, *batches])) >= len(data):
        raise ConfigError(
            f"a batch of {most} is too large: it must be less than the {len(data):,} images of {data.name}"
        )
    contenders = ARRAYS if data.in_memory else JPEGS
    if data.in_memory:
        check_even(batch, *batches)
    distort, clock = Distort(), Clock(device)
    cells: dict[tuple[int, int], dict[str, Cell]] = {}
    for count, size in dict.fromkeys([*((count, batch) for count in views), *((SHARED_J, size) for size in batches)]):
        case = Case(data, distort, count, size, device, workers)
        there = {name: way for name, way in contenders.items() if installed(way.library)}
        seen = in_turn({name: partial(_rate, way, case, clock, seconds) for name, way in there.items()}, rounds)
        cells[count, size] = {name: Spread.of(seen[name]) if name in seen else None for name in contenders}

    def sheet(title: str, axis: str, columns: dict[int, tuple[int, int]]) -> Sheet:
        rows = {name: {str(column): cells[at][name] for column, at in columns.items()} for name in contenders}
        return Sheet(f"{data.name}, {title}", "thousand views/s", axis, rows)

    sheets = [sheet(f"batch {batch}", "J", {count: (count, batch) for count in views})]
    if batches:
        sheets.append(sheet(f"J = {SHARED_J}", "batch", {size: (SHARED_J, size) for size in sorted(batches)}))
    return sheets


def _rate(contender: Contender, case: Case, clock: Clock, seconds: float) -> float:
    with contender.open(case) as batches:
        each = case.views * case.batch / 1000
        return each * per_second(lambda: next(batches), clock, seconds=seconds, warmup=WARMUP)


def write_jpegs(folder: Path, count: int, seed: int = 0) -> Splits:
    """`count` generated JPEGs, 256 x 256, of four classes, as the data set `folder` has them.

    Smooth colour with some grain: about 19 kB each at quality 90.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = folder / ("val" if i < 4 else "train") / f"class{i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.integers(-6, 7, (JPEG_SIDE, JPEG_SIDE, 1))
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(place / f"{i:05}.jpg", quality=90)
    return load_splits("folder", folder)


# What several contenders share


def _normal(case: Case) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=case.device)[:, None, None] for values in (case.data.mean, case.data.std))
    return mean, std


def torchvision_cutmix(num_classes: int) -> Callable[[Tensor, Tensor], Any]:
    """v2.CutMix: the partner is the batch rolled by one."""
    return v2.CutMix(num_classes=num_classes)


def timm_cutmix(num_classes: int) -> Callable[[Tensor, Tensor], Any]:
    """Timm's Mixup in its CutMix mode, one box a batch: the partner is the batch reversed. It works in place."""
    from timm.data import Mixup  # timm is an extra

    return Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=num_classes)


def check_even(*batches: int) -> None:
    """Raise ConfigError for a batch that timm refuses, where timm is here."""
    if installed("timm") and (odd := [batch for batch in batches if batch % 2]):
        raise ConfigError(f"a batch of {odd[0]} is odd: timm's Mixup takes even ones only")


def _index_batches(case: Case) -> Iterator[Tensor]:
    whole = len(case.data) // case.batch * case.batch
    while True:
        yield from torch.randperm(len(case.data))[:whole].view(-1, case.batch)


# The contenders


class _Views(TorchDataset):
    """J torchvision-distorted views of one image, by the transform."""

    def __init__(self, data: Dataset, transform: Callable[[Any], Tensor], views: int):
        self.data, self.transform, self.views = data, transform, views

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.data.array[index]
        return torch.stack([self.transform(image) for _ in range(self.views)]), int(self.data.labels[index])


def _normalised(case: Case) -> list[Callable]:
    return [
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(case.data.mean, case.data.std),
    ]


@contextmanager
def torchvision_dataloader(case: Case) -> Iterator[Batches]:
    """Transforms of torchvision v2 in a DataLoader with worker processes, then v2.CutMix on each view's batch."""
    if case.data.in_memory:
        transform = v2.Compose([v2.ToImage(), v2.RandomCrop(32, padding=4), *_normalised(case)])
        source: Any = _Views(case.data, transform, case.views)
    else:
        transform = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(case.distort.image_size), *_normalised(case)])
        folder = case.data.files[0].parents[1]
        source = ImageFolder(str(folder), lambda image: torch.stack([transform(image) for _ in range(case.views)]))
    cutmix = torchvision_cutmix(len(case.data.classes))
    on_gpu = case.device.type == "cuda"

    def batches() -> Batches:
        while True:
            for image_BV, label_B in DataLoader(
                source, case.batch, shuffle=True, num_workers=case.workers, drop_last=True, pin_memory=on_gpu
            ):
                image_BV = image_BV.to(case.device, non_blocking=True)
                label_B = label_B.to(case.device, non_blocking=True)
                yield [cutmix(image_BV[:, v], label_B) for v in range(case.views)]

    iterator = batches()
    yield iterator
    iterator.close()


@contextmanager
def kornia_sequential(case: Case) -> Iterator[Batches]:
    """Kornia's AugmentationSequential and RandomCutMixV2 on batches of tensors."""
    image_NCHW = torch.from_numpy(case.data.array).permute(0, 3, 1, 2).to(case.device)
    label_N = torch.from_numpy(case.data.labels).to(case.device)
    mean, std = (values.flatten() for values in _normal(case))
    distort = K.AugmentationSequential(
        K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip(), K.Normalize(mean, std)
    )
    cutmix = kornia_cutmix()

    def batches() -> Batches:
        for index_B in _index_batches(case):
            index_B = index_B.to(case.device)
            image_BCHW, label_B = image_NCHW[index_B].float() / 255, label_N[index_B]
            yield [cutmix(distort(image_BCHW), label_B) for _ in range(case.views)]

    yield batches()


def kornia_cutmix() -> Callable[[Tensor, Tensor], Any]:
    """Kornia's RandomCutMixV2, one box a batch; labels come as rows (label, partner's label, lambda)."""
    return K.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True, same_on_batch=True)


@contextmanager
def tensor_crops(cutmix_of: Callable[[int], Callable[[Tensor, Tensor], Any]], case: Case) -> Iterator[Batches]:
    """Crops of a batch of padded tensors by one gather, as loaders that keep the data on the device do; then a mix."""
    image_NCHW = torch.from_numpy(case.data.array).permute(0, 3, 1, 2)
    padded_NCHW = torch.nn.functional.pad(image_NCHW, (4, 4, 4, 4)).to(case.device)
    label_N, (mean, std) = torch.from_numpy(case.data.labels).to(case.device), _normal(case)
    cutmix = cutmix_of(len(case.data.classes))
    reach = torch.arange(32, device=case.device)

    def view(image_BCHW: Tensor) -> Tensor:
        count = len(image_BCHW)
        row_BH = torch.randint(0, 9, (count, 1), device=case.device) + reach
        column_BW = torch.randint(0, 9, (count, 1), device=case.device) + reach
        column_BW = torch.where(torch.rand(count, 1, device=case.device) < 0.5, column_BW.flip(1), column_BW)
        cropped = image_BCHW.gather(2, row_BH[:, None, :, None].expand(-1, 3, -1, 40))
        cropped = cropped.gather(3, column_BW[:, None, None, :].expand(-1, 3, 32, -1))
        return (cropped.float() / 255 - mean) / std

    def batches() -> Batches:
        for index_B in _index_batches(case):
            index_B = index_B.to(case.device)
            image_BCHW, label_B = padded_NCHW[index_B], label_N[index_B]
            yield [cutmix(view(image_BCHW), label_B) for _ in range(case.views)]

    yield batches()


@contextmanager
def plain_dali(case: Case) -> Iterator[Batches]:
    """DALI with its own random operators, a crop_mirror_normalize a view, then v2.CutMix."""
    import nvidia.dali as dali
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    fn: Any = dali.fn
    types: Any = dali.types
    pipeline_def: Any = dali.pipeline_def
    on_gpu = case.device.type == "cuda"
    mean, std = ([255 * value for value in values] for values in (case.data.mean, case.data.std))
    normal = {"mean": mean, "std": std, "dtype": types.FLOAT, "output_layout": "CHW"}

    def arrays() -> tuple[Any, ...]:
        padded_NHWC, indices = np.pad(case.data.array, ((0, 0), (4, 4), (4, 4), (0, 0))), _index_batches(case)

        def read() -> list[np.ndarray]:
            index_B = next(indices).numpy()
            return [padded_NHWC[index_B], case.data.labels[index_B]]

        image, label = fn.external_source(source=read, num_outputs=2, batch=True, layout=["HWC", ""])
        image = image.gpu() if on_gpu else image
        crops = [
            fn.crop_mirror_normalize(
                image,
                crop=(32, 32),
                crop_pos_x=fn.random.uniform(range=(0, 1)),
                crop_pos_y=fn.random.uniform(range=(0, 1)),
                mirror=fn.random.coin_flip(),
                **normal,
            )
            for _ in range(case.views)
        ]
        return (*crops, label)

    def jpegs() -> tuple[Any, ...]:
        files = [str(path) for path in case.data.files]
        encoded, label = fn.readers.file(files=files, labels=case.data.labels.tolist(), random_shuffle=True)
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        size = case.distort.image_size
        crops = [fn.random_resized_crop(image, size=(size, size)) for _ in range(case.views)]
        return (*(fn.crop_mirror_normalize(crop, mirror=fn.random.coin_flip(), **normal) for crop in crops), label)

    pipeline = pipeline_def(arrays if case.data.in_memory else jpegs)(
        batch_size=case.batch, num_threads=case.workers, device_id=(case.device.index or 0) if on_gpu else None
    )
    names = [f"view{v}" for v in range(case.views)]
    iterator = DALIGenericIterator(pipeline, [*names, "label"])
    cutmix = torchvision_cutmix(len(case.data.classes))

    def batches() -> Batches:
        for (out,) in iterator:
            label_B = out["label"].flatten().long().to(case.device)
            yield [cutmix(out[name], label_B) for name in names]

    yield batches()


@contextmanager
def ours(name: str, compiled: bool, case: Case) -> Iterator[Batches]:
    """One of this package's loaders, then MixBatch with CutnMix; on a GPU compiled, as a training run has it."""
    data, size = case.data, view_size(case.data, case.distort)
    loader = make_loader(
        name,
        data,
        case.distort,
        case.device,
        num_views=case.views,
        batch_size=case.batch,
        num_threads=case.workers,
    )
    mix = MixBatch(mean=data.mean, std=data.std, size=size, num_classes=len(data.classes)).to(case.device)
    if compiled or case.device.type == "cuda":
        torch._dynamo.reset()  # it compiles no function more than a few times a process, then it is eager
        mix.compile(dynamic=False)

    def batches() -> Batches:
        epoch = 0
        while True:
            plan = make_plan(
                seed=0,
                epoch=epoch,
                num_images=len(data),
                size=size,
                batch_size=case.batch,
                distort=case.distort,
                mix=Mix(name="cutnmix"),
                num_views=case.views,
                num_peers=case.views,
                files=not data.in_memory,
                drop_last=True,
            ).to(case.device)
            for step, out in enumerate(loader.epoch(plan)):
                yield mix(out, plan.step(step))
            epoch += 1

    iterator = batches()
    yield iterator
    iterator.close()
    loader.close()


@contextmanager
def copy_limit(case: Case) -> Iterator[Batches]:
    """No work at all: the batch's bytes read once, J float32 batches written once."""
    image_N = torch.from_numpy(case.data.array).flatten(1).to(case.device)
    out = torch.empty(case.views, case.batch, image_N.shape[1], device=case.device)

    def batches() -> Batches:
        start = 0
        while True:
            yield out.copy_(image_N[start : start + case.batch])
            start = (start + case.batch) % (len(image_N) - case.batch)

    yield batches()


ARRAYS: dict[str, Contender] = {
    "torchvision DataLoader + v2.CutMix": Contender("torchvision", torchvision_dataloader),
    "kornia Sequential + RandomCutMixV2": Contender("kornia", kornia_sequential),
    "tensor crops + v2.CutMix": Contender("torchvision", partial(tensor_crops, torchvision_cutmix)),
    "tensor crops + timm Mixup": Contender("timm", partial(tensor_crops, timm_cutmix)),
    "plain DALI + v2.CutMix": Contender("nvidia.dali", plain_dali),
    "cutnmix dali": Contender("nvidia.dali", partial(ours, "dali", False)),
    "cutnmix resident": Contender("torch", partial(ours, "resident", False)),
    "cutnmix resident, compiled": Contender("torch", partial(ours, "resident", True)),
    "copy limit": Contender("torch", copy_limit),
}
JPEGS: dict[str, Contender] = {
    "torchvision ImageFolder + v2.CutMix": Contender("torchvision", torchvision_dataloader),
    "plain DALI + v2.CutMix": Contender("nvidia.dali", plain_dali),
    "cutnmix dali": Contender("nvidia.dali", partial(ours, "dali", False)),
}
