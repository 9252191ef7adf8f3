"""Views per second: J distorted, cut-and-mixed, normalised float32 views of CIFAR images, ours beside the public ways.

Every contender does the same work with its own tools: pad 4, random crop, flip, normalise, CutMix, per view. All run
in this one process, in turn, round after round; the figure is the median over rounds.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from cutnmix.pipeline import Dataset, Distort, Mix, MixBatch, make_loader, make_plan

Batches = Generator[Any, None, None]


def _normal(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(data.mean), torch.tensor(data.std)


class _Views(TorchDataset):
    """J torchvision-distorted views of one image."""

    def __init__(self, data: Dataset, views: int):
        self.data, self.views = data, views
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.data.array[index]
        return torch.stack([self.transform(image) for _ in range(self.views)]), int(self.data.labels[index])


@contextmanager
def torchvision_dataloader(data: Dataset, views: int, batch: int) -> Iterator[Batches]:
    """Transforms of torchvision v2 in a DataLoader with 2 workers, then v2.CutMix on each view's batch."""
    cutmix = v2.CutMix(num_classes=len(data.classes))

    def batches() -> Batches:
        while True:
            for image_BV, label_B in DataLoader(
                _Views(data, views), batch, shuffle=True, num_workers=2, drop_last=True
            ):
                yield [cutmix(image_BV[:, v], label_B) for v in range(views)]

    iterator = batches()
    yield iterator
    iterator.close()


def _index_batches(data: Dataset, batch: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.randperm(len(data))[: len(data) // batch * batch].view(-1, batch)


@contextmanager
def kornia_sequential(data: Dataset, views: int, batch: int) -> Iterator[Batches]:
    """Kornia's AugmentationSequential and RandomCutMixV2 on batches of tensors."""
    image_NCHW, label_N = torch.from_numpy(data.array).permute(0, 3, 1, 2), torch.from_numpy(data.labels)
    distort = K.AugmentationSequential(
        K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip(), K.Normalize(*_normal(data))
    )
    cutmix = K.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True, same_on_batch=True)

    def batches() -> Batches:
        for index_B in _index_batches(data, batch):
            image_BCHW, label_B = image_NCHW[index_B].float() / 255, label_N[index_B]
            yield [cutmix(distort(image_BCHW), label_B) for _ in range(views)]

    yield batches()


@contextmanager
def tensor_crops(data: Dataset, views: int, batch: int) -> Iterator[Batches]:
    """Crops of a batch of padded tensors by one gather, as loaders that keep the data on the device do; v2.CutMix."""
    padded_NCHW = torch.nn.functional.pad(torch.from_numpy(data.array).permute(0, 3, 1, 2), (4, 4, 4, 4))
    label_N, (mean, std) = torch.from_numpy(data.labels), _normal(data)
    cutmix = v2.CutMix(num_classes=len(data.classes))
    reach = torch.arange(32)

    def view(image_BCHW: torch.Tensor) -> torch.Tensor:
        count = len(image_BCHW)
        row_BH = torch.randint(0, 9, (count, 1)) + reach
        column_BW = torch.randint(0, 9, (count, 1)) + reach
        column_BW = torch.where(torch.rand(count, 1) < 0.5, column_BW.flip(1), column_BW)
        cropped = image_BCHW.gather(2, row_BH[:, None, :, None].expand(-1, 3, -1, 40))
        cropped = cropped.gather(3, column_BW[:, None, None, :].expand(-1, 3, 32, -1))
        return (cropped.float() / 255 - mean[:, None, None]) / std[:, None, None]

    def batches() -> Batches:
        for index_B in _index_batches(data, batch):
            image_BCHW, label_B = padded_NCHW[index_B], label_N[index_B]
            yield [cutmix(view(image_BCHW), label_B) for _ in range(views)]

    yield batches()


@contextmanager
def plain_dali(data: Dataset, views: int, batch: int) -> Iterator[Batches]:
    """DALI with its own random operators, a crop_mirror_normalize a view, then v2.CutMix."""
    import nvidia.dali as dali
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    fn: Any = dali.fn
    types: Any = dali.types
    padded_NHWC = np.pad(data.array, ((0, 0), (4, 4), (4, 4), (0, 0)))
    indices = _index_batches(data, batch)
    mean, std = ([255 * value for value in values] for values in (data.mean, data.std))

    def read() -> list[np.ndarray]:
        index_B = next(indices).numpy()
        return [padded_NHWC[index_B], data.labels[index_B]]

    def graph() -> tuple[Any, ...]:
        image, label = fn.external_source(source=read, num_outputs=2, batch=True, layout=["HWC", ""])
        crops = [
            fn.crop_mirror_normalize(
                image,
                crop=(32, 32),
                crop_pos_x=fn.random.uniform(range=(0, 1)),
                crop_pos_y=fn.random.uniform(range=(0, 1)),
                mirror=fn.random.coin_flip(),
                mean=mean,
                std=std,
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            for _ in range(views)
        ]
        return (*crops, label)

    pipeline_def: Any = dali.pipeline_def
    pipeline = pipeline_def(graph)(batch_size=batch, num_threads=2, device_id=None)
    names = [f"view{v}" for v in range(views)]
    iterator = DALIGenericIterator(pipeline, [*names, "label"])
    cutmix = v2.CutMix(num_classes=len(data.classes))

    def batches() -> Batches:
        for (out,) in iterator:
            yield [cutmix(out[name], out["label"].flatten()) for name in names]

    yield batches()


def ours(name: str) -> Callable:
    """One of this package's loaders, then MixBatch with CutnMix."""

    @contextmanager
    def contender(data: Dataset, views: int, batch: int) -> Iterator[Batches]:
        distort, size = Distort(), (32, 32)
        loader = make_loader(name, data, distort, num_views=views, batch_size=batch)
        mix = MixBatch(mean=data.mean, std=data.std, size=size, num_classes=len(data.classes))

        def batches() -> Batches:
            epoch = 0
            while True:
                plan = make_plan(
                    seed=0,
                    epoch=epoch,
                    num_images=len(data),
                    size=size,
                    batch_size=batch,
                    distort=distort,
                    mix=Mix(name="cutnmix"),
                    num_views=views,
                    num_peers=views,
                    drop_last=True,
                )
                for step, out in enumerate(loader.epoch(plan)):
                    yield mix(out, plan.step(step))
                epoch += 1

        iterator = batches()
        yield iterator
        iterator.close()
        loader.close()

    return contender


@contextmanager
def copy_limit(data: Dataset, views: int, batch: int) -> Iterator[Batches]:
    """No work at all: the batch's bytes read once, J float32 batches written once."""
    image_N = torch.from_numpy(data.array).flatten(1)
    out = torch.empty(views, batch, image_N.shape[1])

    def batches() -> Batches:
        start = 0
        while True:
            yield out.copy_(image_N[start : start + batch])
            start = (start + batch) % (len(image_N) - batch)

    yield batches()


CONTENDERS: dict[str, Callable] = {
    "torchvision DataLoader": torchvision_dataloader,
    "kornia Sequential": kornia_sequential,
    "tensor crops": tensor_crops,
    "plain DALI": plain_dali,
    "cutnmix dali": ours("dali"),
    "cutnmix resident": ours("resident"),
    "copy limit": copy_limit,
}
