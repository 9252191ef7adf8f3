"""The DALI loader (the default): one read and one decode an image, V distorted views out, on GPU or CPU.

One graph for both devices. It owns no random operator: offsets, flips, regions, angles and colours come in from the
plan by external source, as per-sample arguments. Images leave as HWC bytes, so `permute` makes them channels_last
without a copy, and normalisation is left to the mix, which writes floats once.

Image files, alone or in tar shards, are read as they are by threads that work ahead of DALI, which decodes them. An
EXIF orientation is ignored, as by torchvision's data sets and so by the figures published with them. A second view of
the same image (the plan's `second`) is one view more of one decode.
"""

import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor
from torch.nn import functional as F

from cutnmix.pipeline.ahead import ahead
from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.check import undecodable
from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.distort import (
    colour_matrix,
    crop_start,
    hole_mask,
    source_images,
    view_matrix,
    view_size,
)
from cutnmix.pipeline.laws import Distort
from cutnmix.pipeline.plan import Draws, Plan

# DALI makes its operators at run time and its stubs do not type the code of a graph: to the type checker they are Any.
fn: Any = dali.fn
math: Any = dali.math
types: Any = dali.types
pipeline_def: Any = dali.pipeline_def

# The shorter side of a test image is scaled to 256 / 224 of the crop, then the centre is cut out: the field's standard.
# We cut first, which changes the outermost pixels only.
_CENTRE_FRACTION = 224 / 256

_READ = 512  # images of one run, for arrays


class DaliLoader:
    """Yields the Views of a plan, read, decoded and distorted by a DALI pipeline that prefetches.

    Args:
        dataset: arrays, or image files.
        distort: which distortions the plans to come will draw.
        device: a CUDA device runs the pipeline there, the CPU runs the same graph with `device_id=None`.
        num_views: V.
        batch_size: B, the most that a plan's step holds.
        num_threads: DALI's CPU threads.
        prefetch: batches that DALI works ahead; as many more files are read ahead of that.

    Raises:
        DataError: for colours of images that are not RGB; while iterating, naming the first image file that does not
            decode.
    """

    def __init__(
        self,
        dataset: Dataset,
        distort: Distort,
        device: torch.device | str = "cpu",
        *,
        num_views: int,
        batch_size: int,
        num_threads: int = 2,
        prefetch: int = 2,
    ):
        self.dataset = dataset
        self.distort = distort
        self.num_views = num_views
        self.label_N = torch.from_numpy(dataset.labels).to(device)
        self.device = self.label_N.device  # "cuda" is torch's current device, which need not be DALI's first
        self.size = view_size(dataset, distort)
        if dataset.in_memory:
            self._source_NHWC = source_images(dataset, distort)
        self._feed: Iterator[list] = iter(())
        self._held: deque[tuple[torch.cuda.Event, dict[str, Tensor]]] = deque()
        self._started = False
        self._prefetch, self._num_threads, self._batch_size = prefetch, num_threads, batch_size
        # Part of a run's cost is fixed, so that batches of small images go through the graph several at a time.
        self._steps_per_read = max(1, _READ // batch_size) if dataset.in_memory else 1
        self._pairs = False  # whether each image read is for two positions of a step, the second views' included
        self._iterator: Any = self._build()

    def _build(self) -> Any:
        on_gpu = self.device.type == "cuda"
        views = self.num_views * (1 + self._pairs)
        pipeline = _graph(
            self._next_feed,
            self.dataset.in_memory,
            self.distort,
            self.size,
            views,
            on_gpu,
            self._num_threads,
            batch_size=self._steps_per_read * self._batch_size,
            num_threads=self._num_threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=self._prefetch,
        )
        with warnings.catch_warnings():  # without the CUDA toolkit DALI misses a library of which nothing here is used
            warnings.filterwarnings("ignore", r"nvidia-dali-\w+ is no longer shipped with CUDA runtime.*NPP is")
            # prepare_first_batch would run the graph before there is a plan to run.
            return DALIGenericIterator(pipeline, [f"view{v}" for v in range(views)], prepare_first_batch=False)

    def epoch(self, plan: Plan, start: int = 0) -> Iterator[Views]:
        """The views of steps start, start + 1, ... of a plan. An epoch left early costs nothing but its prefetch.

        Raises: ValueError for a plan that this loader was not made for, RuntimeError after `close`.
        """
        plan.check(self.distort, self.size, not self.dataset.in_memory, self.num_views, self._batch_size)
        on_host = plan.host
        feed = self._reads(on_host, start)
        self._start(feed, not self.dataset.in_memory and _pairs(on_host))
        step = start
        try:
            for (outputs,) in self._iterator:
                images = [*self._split(outputs, plan.batch_size)]
                self._hold(outputs)
                for image_VBHWC in images:
                    draws = plan.step(step)
                    hole_VBHW = None if draws.hole_VB4 is None else hole_mask(draws.hole_VB4, self.size)
                    label_B = self.label_N[draws.index_B]
                    yield Views(image_VBHWC.permute(0, 1, 4, 2, 3), hole_VBHW, label_B, draws.index_B)
                    step += 1
                    if self._feed is not feed:
                        raise RuntimeError("this epoch is over: a later epoch of the same loader has begun")
        except RuntimeError as error:
            self._name_culprit(error, on_host, step)
            raise
        finally:
            if self._feed is feed:
                self._feed = iter(())
            feed.close()

    def _reads(self, plan: Plan, start: int) -> Generator[list, None, None]:
        """What DALI is fed: `self._steps_per_read` steps at a time."""
        total, size = len(plan.index_N), self._steps_per_read * plan.batch_size
        spans = ((first, min(first + size, total)) for first in range(start * plan.batch_size, total, size))
        if self.dataset.in_memory:
            yield from (self._read(plan.positions(*span)) for span in spans)
        else:
            yield from ahead(lambda span: self._read(plan.positions(*span)), spans, depth=self._prefetch)

    def _split(self, outputs: dict[str, Tensor], batch_size: int) -> Iterator[Tensor]:
        """One read's outputs as (V, B, H, W, C) of each of its steps, contiguous."""
        views = list(outputs.values())
        if self._pairs:
            batch_size //= 2
        for step_views in zip(*(view.split(batch_size) for view in views), strict=True):
            image = torch.stack(step_views)  # (V, B, ...); of pairs (2 V, B / 2, ...), a view's second one after it
            yield image.view(self.num_views, -1, *image.shape[2:])

    def _hold(self, outputs: dict[str, Tensor]) -> None:
        """Keep the outputs of a read until their copies are made.

        DALI fills a buffer anew once nobody holds it, in its own order of work, which does not wait for torch's stream.
        """
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
            self._held.append((copied, outputs))
            while self._held[0][0].query() and len(self._held) > 1:
                self._held.popleft()

    def close(self) -> None:
        """Release DALI's threads and buffers."""
        if self._held:
            self._held[-1][0].synchronize()
        self._held.clear()
        self._iterator = None

    def _next_feed(self) -> list:
        return next(self._feed)  # StopIteration ends DALI's epoch

    def _read(self, draws: Draws) -> list:
        """One read for the external source: the images, then each view's arguments."""
        if self._pairs:
            draws = _as_more_views(draws)
        index_B = draws.index_B.numpy()
        if self.dataset.in_memory:
            feed: list = [self._source_NHWC[index_B]]
        else:
            feed = [[self._encoded(int(i)) for i in index_B]]
        if draws.angle_VB is not None:
            geometry = view_matrix(draws.crop_VB2, draws.flip_VB, draws.angle_VB, self.size)
        elif self.dataset.in_memory:
            geometry = crop_start(draws.crop_VB2, draws.flip_VB, self.size[1], self.distort.pad)
        else:
            geometry = draws.flip_VB.int()
        colour_VB34 = None if draws.colour_VB4 is None else colour_matrix(draws.colour_VB4)
        for v in range(len(geometry)):
            if draws.region_VB4 is not None:
                feed += [column.contiguous().numpy() for column in draws.region_VB4[v].unbind(-1)]
            feed.append(geometry[v].numpy())
            if colour_VB34 is not None:
                feed.append(colour_VB34[v].numpy())
        return feed

    def _encoded(self, i: int) -> np.ndarray:
        """The bytes of image file i. Of one that cannot be read a byte that is no image: DALI stops at its turn."""
        try:
            content = self.dataset.encoded(i)
        except OSError:
            content = b""
        return np.frombuffer(content or bytes(1), dtype=np.uint8)

    def _start(self, feed: Iterator[list], pairs: bool) -> None:
        """Begin a DALI epoch. DALI ignores a reset before it saw the end of the last one, so show it that end first."""
        if self._iterator is None:
            raise RuntimeError("this loader is closed")
        self._feed = iter(())
        if (self._started and not self._drained()) or pairs != self._pairs:
            self._pairs, self._started = pairs, False
            self._iterator = self._build()
        self._feed = feed
        if self._started:
            self._iterator.reset()
        self._started = True

    def _drained(self) -> bool:
        """Whether what was prefetched of an epoch that was left early came out; after an error DALI is of no more use.

        That error is nobody's: the image that does not decode was not asked for.
        """
        try:
            for _ in self._iterator:
                pass
        except RuntimeError:
            return False
        return True

    def _name_culprit(self, error: RuntimeError, plan: Plan, step: int) -> None:
        """If an image of the batches in flight does not decode, say which one."""
        if self.dataset.in_memory:
            return
        in_flight = plan.index_N[step * plan.batch_size : (step + self._prefetch + 2) * plan.batch_size]
        for i, reason in undecodable(self.dataset, in_flight.tolist()):
            raise DataError(
                f"{self.dataset.where(i)} does not decode ({reason}): repair or remove it, "
                f"or leave out all such images by data.corrupt=skip"
            ) from error


def _pairs(plan: Plan) -> bool:
    """Whether the second views of a plan show the images of the first."""
    steps = plan.index_N.split(plan.batch_size) if plan.second else ()
    return bool(steps) and all(torch.equal(*step.chunk(2)) for step in steps)


def _as_more_views(draws: Draws) -> Draws:
    """A step of B images and their B second views as one of B images with twice the views: 0, 0', 1, 1', ..."""
    size = len(draws.index_B) // 2

    def folded(field: Tensor | None) -> Tensor | None:
        return None if field is None else field.reshape(-1, size, *field.shape[2:])

    return draws._replace(
        index_B=draws.index_B[:size],
        crop_VB2=draws.crop_VB2.reshape(-1, size, 2),
        flip_VB=draws.flip_VB.reshape(-1, size),
        region_VB4=folded(draws.region_VB4),
        colour_VB4=folded(draws.colour_VB4),
        angle_VB=folded(draws.angle_VB),
    )


def _num_region(distort: Distort, in_memory: bool) -> int:
    """How many per-sample arguments tell a view's region: scale, ratio, x, y, or none."""
    return 0 if in_memory or distort.region == "centre" else 4


def _num_arguments(distort: Distort, in_memory: bool) -> int:
    """How many per-sample arguments a view is fed, in the order in which `_read` feeds and `_graph` takes them.

    Its region; the matrix of a rotation, or the start of a crop, or the mirror flag; the matrix of the colours.
    """
    return _num_region(distort, in_memory) + 1 + (1 if distort.colour.active else 0)


@pipeline_def(exec_dynamic=True)
def _graph(
    source, in_memory: bool, distort: Distort, size: tuple[int, int], num_views: int, on_gpu: bool, scalers: int
):
    """The one graph: read (and decode) once, then V times region, crop, flip or turn, and colour."""
    height, width = size
    count = _num_arguments(distort, in_memory)
    total = 1 + num_views * count
    layout = ["HWC" if in_memory else ""] + [""] * (total - 1)
    image, *fed = fn.external_source(source=source, num_outputs=total, batch=True, layout=layout)
    fed = [fed[v * count : (v + 1) * count] for v in range(num_views)]
    if in_memory:
        images = num_views * [image.gpu() if on_gpu else image]
    else:
        shape = fn.cast(fn.peek_image_shape(image, adjust_orientation=False), dtype=types.FLOAT)
        image = fn.decoders.image(
            image,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # of chroma, as on a CPU: else a GPU repeats its pixels
        )
        boxes = [_box(shape[0], shape[1], distort, arguments) for arguments in fed]
        images = _scaled_by_dali(image, boxes, size) if on_gpu else _scaled_by_torch(image, boxes, size, scalers)
    views = []
    for view, arguments in zip(images, fed, strict=True):
        geometry, *colour = arguments[_num_region(distort, in_memory) :]
        if distort.rotation:
            view = fn.warp_affine(view, matrix=geometry, inverse_map=True, size=size, fill_value=0, dtype=types.FLOAT)
        elif in_memory:
            view = fn.slice(view, start=geometry, shape=(width, height), axes=(1, 0))
        else:
            view = fn.flip(view, horizontal=geometry)
        for matrix in colour:
            view = fn.coord_transform(view, MT=matrix, dtype=types.FLOAT)
        views.append(view)
    return tuple(views)


def _box(full_height: Any, full_width: Any, distort: Distort, arguments: list[Any]) -> Any:
    """(top, left, height, width) of the drawn region, or of the centre, int32: whole pixels, as torchvision's crops."""
    if distort.region == "random":
        scale, ratio, at_x, at_y = arguments[:4]
        area = full_height * full_width * scale
        height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    else:
        height = width = math.min(full_height, full_width) * _CENTRE_FRACTION
        at_x = at_y = 0.5

    def part(length: Any, full: Any, at: Any) -> tuple[Any, Any]:
        length = math.clamp(math.floor(length + 0.5), 1.0, full)
        return math.floor((full - length) * at + 0.5), length

    (top, height), (left, width) = part(height, full_height, at_y), part(width, full_width, at_x)
    return fn.cast(fn.stack(top, left, height, width), dtype=types.INT32)


def _scaled_by_dali(image: Any, boxes: list[Any], size: tuple[int, int]) -> list[Any]:
    """The boxes of an image, each cut out and scaled to `size`, bilinear with antialiasing."""
    parts = [fn.slice(image, start=box[:2], shape=box[2:], axes=(0, 1)) for box in boxes]
    return [fn.resize(part, size=size, interp_type=types.INTERP_LINEAR, antialias=True) for part in parts]


def _scaled_by_torch(image: Any, boxes: list[Any], size: tuple[int, int], scalers: int) -> list[Any]:
    """The same on a CPU, where torch scales bytes 7 to 15 times as fast as DALI (benchmarks/LOG.md).

    They differ by rounding, and by up to 8 in the outermost pixels: there torch shortens the filter, as Pillow does,
    and DALI repeats the last pixel.
    """
    pool = ThreadPoolExecutor(scalers, thread_name_prefix="scale")

    def views_of(image_HWC: np.ndarray, *box_V4: np.ndarray) -> list[np.ndarray]:
        image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
        parts = (image_CHW[None, :, y : y + h, x : x + w] for y, x, h, w in (box.tolist() for box in box_V4))
        views = (F.interpolate(part, size=size, mode="bilinear", antialias=True) for part in parts)
        return [view[0].permute(1, 2, 0).numpy() for view in views]

    def batch(images: list[np.ndarray], *boxes_VB: list[np.ndarray]) -> tuple[list[np.ndarray], ...] | list[np.ndarray]:
        made = [list(views_B) for views_B in zip(*pool.map(views_of, images, *boxes_VB), strict=True)]
        return tuple(made) if len(made) > 1 else made[0]

    views = fn.python_function(
        image,
        *boxes,
        function=batch,
        num_outputs=len(boxes),
        batch_processing=True,
        output_layouts=["HWC"] * len(boxes),
    )
    return views if len(boxes) > 1 else [views]
