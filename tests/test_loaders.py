"""DALI == resident == a loop over pixels, whatever is drawn, read ahead, resumed or left early."""

import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cutnmix.pipeline import loader as loaders
from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.datasets import load_splits
from cutnmix.pipeline.distort import colour_matrix
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.loader import make_loader
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws, Plan
from cutnmix.pipeline.resident import ResidentLoader

H, W, N, BATCH = 12, 16, 21, 8  # two full batches and one of 5
COLOUR = Colour(brightness=0.4, contrast=0.4, saturation=0.4, hue=40)
DISTORTIONS = {  # each with what its pixels may differ by, of 255
    "crop": (Distort(pad=3, flip=0.0), 0),
    "flip": (Distort(pad=0, flip=0.5), 0),
    "crop flip": (Distort(pad=3), 0),
    "cutout": (Distort(pad=3, cutout=7), 0),
    "colour": (Distort(pad=3, colour=COLOUR), 1e-2),
    "rotation": (Distort(pad=3, rotation=30.0), 0.05),
    "everything": (Distort(pad=3, rotation=180.0, colour=COLOUR, cutout=5), 0.05),
    "nothing": (Distort().evaluation(), 0),
}
DISTORTED = pytest.mark.parametrize("name", DISTORTIONS)
LOADERS = pytest.mark.parametrize("loader", ["dali", "resident"])
SECOND = pytest.mark.parametrize("second", ["image", "class"])
BARE = Distort(pad=3)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return oracle.images(N, H, W)


def plan_of(dataset: Dataset, distort: Distort = BARE, V: int = 2, J: int = 2, **changes) -> Plan:
    size = dataset.images.shape[1:3] if isinstance(dataset.images, np.ndarray) else (distort.image_size,) * 2
    arguments = dict(
        seed=5, epoch=1, num_images=len(dataset), size=size, batch_size=BATCH, distort=distort,
        mix=Mix(name="cutnmix"), num_views=V, num_peers=J, files=not dataset.in_memory, label_N=dataset.labels,
    )  # fmt: skip
    return make_plan(**(arguments | changes))


def loader_of(loader: str, dataset: Dataset, distort: Distort = BARE, V: int = 2, device: str = "cpu", **changes):
    if loader == "resident":
        return ResidentLoader(dataset, distort, device)
    dali = pytest.importorskip("cutnmix.pipeline.dali", reason="DALI runs on Linux", exc_type=ImportError)
    return dali.DaliLoader(dataset, distort, device, **({"num_views": V, "batch_size": BATCH} | changes))


def reference(dataset: Dataset, distort: Distort, draws: Draws) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of a batch and its second views, if it has them, as the loop over pixels makes them."""
    channel = (1, 1, 3, 1, 1)
    image = np.moveaxis(oracle.views(dataset, distort.pad, draws).clip(0, 255), -1, 2) / 255
    image = (image - np.reshape(dataset.mean, channel)) / np.reshape(dataset.std, channel)
    if draws.hole_VB4 is not None:
        image *= ~oracle.holes(draws, H, W)[:, :, None]
    if not draws.second:
        return oracle.mix(image, draws), None
    return oracle.mix(image[:, : image.shape[1] // 2], draws), oracle.mix(image[:, image.shape[1] // 2 :], draws)


def mixer_of(dataset: Dataset) -> MixBatch:
    return MixBatch(mean=dataset.mean, std=dataset.std, size=(H, W), num_classes=5)


def pixels(views: Views) -> np.ndarray:
    """(V, B, H, W, C) float64."""
    return views.image_VBCHW.permute(0, 1, 3, 4, 2).double().cpu().numpy()


def same(one: tuple, other: tuple) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def equal(one: Views, other: Views) -> bool:
    return same(one.made(), other.made())


def same_epoch(one: Iterator[Views], other: Iterator[Views]) -> bool:
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


# The pixels


@LOADERS
@DISTORTED
@pytest.mark.parametrize("V", [1, 3])
def test_views_are_the_loop_over_pixels(loader, name, V, dataset):
    distort, tolerance = DISTORTIONS[name]
    plan = plan_of(dataset, distort, V, J=3)
    steps = list(loader_of(loader, dataset, distort, V).epoch(plan))
    assert [len(views.label_B) for views in steps] == [8, 8, 5]
    for s in (0, 2):
        views, draws = steps[s], plan.step(s)
        np.testing.assert_allclose(pixels(views), oracle.views(dataset, distort.pad, draws), rtol=0, atol=tolerance)
        assert torch.equal(views.index_B, draws.index_B)
        assert views.label_B.tolist() == dataset.labels[draws.index_B].tolist()
        assert (views.hole_VBHW is None) == (distort.cutout == 0)
        if views.hole_VBHW is not None:
            assert np.array_equal(views.hole_VBHW.numpy(), oracle.holes(draws, H, W))


@DISTORTED
@pytest.mark.parametrize("V", [1, 2, 3])
def test_dali_is_resident(name, V, dataset):
    distort, tolerance = DISTORTIONS[name]
    plan = plan_of(dataset, distort, V, J=3)
    epochs = (loader_of(loader, dataset, distort, V).epoch(plan) for loader in ("dali", "resident"))
    for dali, resident in zip(*epochs, strict=True):
        assert dali.image_VBCHW.dtype == resident.image_VBCHW.dtype
        np.testing.assert_allclose(pixels(dali), pixels(resident), rtol=0, atol=tolerance)
        assert same(dali.made()[1:], resident.made()[1:])


@LOADERS
@pytest.mark.parametrize("name", ["nothing", "crop flip", "rotation"])
@pytest.mark.parametrize("order", ["channels first", "Fortran"])
def test_images_may_lie_in_memory_in_any_order(loader, name, order, dataset):
    axes = {"channels first": (0, 3, 1, 2), "Fortran": (3, 2, 1, 0)}[order]  # from the slowest
    stored = np.ascontiguousarray(dataset.images.transpose(axes)).transpose(np.argsort(axes))
    assert np.array_equal(stored, dataset.images) and not stored.flags.c_contiguous
    distort, _ = DISTORTIONS[name]
    epochs = (
        loader_of(loader, data, distort).epoch(plan_of(data, distort))
        for data in (replace(dataset, images=stored), dataset)
    )
    assert same_epoch(*epochs)


@LOADERS
@pytest.mark.parametrize(
    ("name", "mix"),
    [*product(DISTORTIONS, ["cutmix", "cutnmix"]), *product(["crop flip", "cutout", "rotation"], ["mixup"]),
     *product(["crop flip", "colour"], ["cutout"])],
)  # fmt: skip
def test_batches_are_the_loop_over_pixels(loader, name, mix, dataset):
    """Mixed and normalised: within rounding of float32, and of interpolation where there is any."""
    distort, tolerance = DISTORTIONS[name]
    plan = plan_of(dataset, distort, mix=Mix(name=mix, length=7 if mix == "cutout" else None))
    mixer = mixer_of(dataset)
    for s, views in enumerate(loader_of(loader, dataset, distort).epoch(plan, start=2), start=2):
        expected, _ = reference(dataset, distort, plan.step(s))
        batch = mixer(views, plan.step(s))
        np.testing.assert_allclose(batch.image_VBCHW, expected, rtol=0, atol=tolerance / 255 / 0.2 + 2e-6)
        if mix == "cutout":
            assert torch.equal(batch.target_LBK[0], torch.eye(5)[views.label_B])
            assert np.array_equal(views.hole_VBHW.numpy(), oracle.holes(plan.step(s), H, W))


@LOADERS
@SECOND
@pytest.mark.parametrize(
    ("name", "mix", "V"), [("crop flip", "none", 1), ("cutout", "mixup", 2), ("rotation", "cutnmix", 2)]
)
def test_second_views_are_the_loop_over_pixels(loader, second, name, mix, V, dataset):
    """From the loader, as they come, and from the mix, apart; the last batch is smaller."""
    distort, tolerance = DISTORTIONS[name]
    plan = plan_of(dataset, distort, V, mix=Mix(name=mix), second=second)
    mixer = mixer_of(dataset)
    steps = list(loader_of(loader, dataset, distort, V, batch_size=2 * BATCH).epoch(plan))
    assert [len(views.label_B) for views in steps] == [16, 16, 10]
    for s in (0, 2):
        views, draws = steps[s], plan.step(s)
        np.testing.assert_allclose(pixels(views), oracle.views(dataset, distort.pad, draws), rtol=0, atol=tolerance)
        assert torch.equal(views.index_B, draws.index_B)
        assert views.label_B.tolist() == dataset.labels[draws.index_B].tolist()
        firsts, seconds = views.label_B.chunk(2)
        assert torch.equal(firsts, seconds)
        batch = mixer(views, draws)
        for made, expected in zip(
            (batch.image_VBCHW, batch.second_VBCHW), reference(dataset, distort, draws), strict=True
        ):
            np.testing.assert_allclose(made, expected, rtol=0, atol=tolerance / 255 / 0.2 + 2e-6)
        assert torch.equal(batch.label_B, firsts) and torch.equal(batch.index_B, draws.index_B[: len(firsts)])


@LOADERS
@pytest.mark.parametrize("name", ["crop flip", "everything"])
def test_second_views_leave_the_pixels_of_the_first_as_they_are(loader, name, dataset):
    distort, _ = DISTORTIONS[name]
    alone = loader_of(loader, dataset, distort).epoch(plan_of(dataset, distort))
    beside = loader_of(loader, dataset, distort, batch_size=2 * BATCH).epoch(plan_of(dataset, distort, second="class"))
    for views, both in zip(alone, beside, strict=True):
        B = len(views.label_B)
        assert torch.equal(views.image_VBCHW, both.image_VBCHW[:, :B])
        assert torch.equal(views.index_B, both.index_B[:B])
        assert views.hole_VBHW is None or torch.equal(views.hole_VBHW, both.hole_VBHW[:, :B])


@SECOND
@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("at_a_time", [1, 2, 32])
def test_dali_gives_second_views_from_any_step_however_many_it_reads_at_a_time(
    second, start, at_a_time, dataset, monkeypatch
):
    dali = pytest.importorskip("cutnmix.pipeline.dali", reason="DALI runs on Linux", exc_type=ImportError)
    monkeypatch.setattr(dali, "_READ", at_a_time * 2 * BATCH)
    plan = plan_of(dataset, second=second)
    used = loader_of("dali", dataset, batch_size=2 * BATCH)
    next(left := used.epoch(plan_of(dataset, second=second, epoch=9)))
    left.close()
    whole = list(loader_of("resident", dataset).epoch(plan))
    assert same_epoch(used.epoch(plan, start=start), iter(whole[start:]))
    assert same_epoch(loader_of("resident", dataset).epoch(plan, start=start), iter(whole[start:]))


@LOADERS
@DISTORTED
def test_views_are_channels_last(loader, name, dataset):
    """So that the mix may see them as rows of bytes without a copy; and bytes unless pixels were computed."""
    distort, _ = DISTORTIONS[name]
    for views in loader_of(loader, dataset, distort).epoch(plan_of(dataset, distort)):
        assert views.image_VBCHW.permute(0, 1, 3, 4, 2).is_contiguous()
        computed = distort.colour.active or distort.rotation
        assert views.image_VBCHW.dtype == (torch.float32 if computed else torch.uint8)


@LOADERS
@pytest.mark.parametrize("pad", [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_every_offset_of_a_crop_is_exact(loader, pad):
    side = 2 * pad + 1
    dataset, distort = oracle.images(1, 3, 5), Distort(pad=pad)
    offsets = torch.tensor([(x, y) for x in range(side) for y in range(side)], dtype=torch.int32)
    plan = replace(
        plan_of(dataset, distort, V=1, mix=Mix(), num_images=side**2),
        index_N=torch.zeros(side**2, dtype=torch.int64),
        crop_VN2=offsets[None],
        flip_VN=(offsets.sum(1) % 3 == 0)[None],
    )
    for s, views in enumerate(loader_of(loader, dataset, distort, V=1).epoch(plan)):
        assert np.array_equal(pixels(views), oracle.views(dataset, pad, plan.step(s)))


@LOADERS
@pytest.mark.parametrize(("degrees", "quarters"), [(90.0, 1), (180.0, 2), (-90.0, -1)])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_is_counter_clockwise_and_comes_after_the_flip(loader, degrees, quarters, flip):
    dataset, distort = oracle.images(4, 8, 8), Distort(pad=0, flip=float(flip), rotation=180.0)
    plan = plan_of(dataset, distort, V=1)
    plan.angle_VN.fill_(degrees)
    (views,) = loader_of(loader, dataset, distort, V=1).epoch(plan)
    images = dataset.images[views.index_B]
    expected = np.rot90(images[:, :, ::-1] if flip else images, quarters, axes=(1, 2))
    np.testing.assert_allclose(pixels(views)[0], expected, rtol=0, atol=0.05)


def test_colour_is_dalis_color_twist(dataset):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    drawn = plan_of(dataset, Distort(colour=COLOUR), V=1).colour_VN4[0]

    @pipeline_def(batch_size=N, num_threads=1, device_id=None)
    def twist():
        image, brightness, contrast, saturation, hue = fn.external_source(
            source=lambda: [dataset.images, *drawn.T.contiguous().numpy()], num_outputs=5, layout=["HWC"] + [""] * 4
        )
        return fn.color_twist(
            image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, dtype=types.FLOAT
        )

    pipeline = twist()
    pipeline.build()
    expected = np.stack([np.asarray(image) for image in pipeline.run()[0]])
    matrix_B34 = colour_matrix(drawn[None])[0]
    made = torch.from_numpy(dataset.images).float() @ matrix_B34[:, None, :, :3].mT + matrix_B34[:, None, None, :, 3]
    np.testing.assert_allclose(made.numpy(), expected, rtol=0, atol=1e-2)


def test_resident_has_no_folders(folder):
    with pytest.raises(DataError, match=r"loader\.name.*resident.*folder/train"):
        ResidentLoader(folder, Distort())


# Epochs: the same pixels in any circumstances


@LOADERS
def test_several_epochs_in_a_row(loader, dataset):
    used = loader_of(loader, dataset)
    for epoch in range(4):
        plan = plan_of(dataset, epoch=epoch)
        assert same_epoch(used.epoch(plan), loader_of("resident", dataset).epoch(plan))


@LOADERS
def test_batches_that_were_kept_are_not_overwritten(loader, dataset):
    plan, used = plan_of(dataset, num_images=N), loader_of(loader, dataset)
    kept = [views for _ in range(3) for views in used.epoch(plan)]
    fresh = [views for _ in range(3) for views in loader_of("resident", dataset).epoch(plan)]
    assert same_epoch(iter(kept), iter(fresh))


@LOADERS
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_starting_at_a_step_gives_the_rest_of_the_epoch(loader, start, dataset):
    plan = plan_of(dataset)
    whole = list(loader_of(loader, dataset).epoch(plan))
    assert same_epoch(loader_of(loader, dataset).epoch(plan, start=start), iter(whole[start:]))


@LOADERS
@pytest.mark.parametrize("left_after", [[0], [1], [2], [0, 0, 1, 0, 2, 1]])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_an_epoch_left_early_leaves_no_trace(loader, left_after, prefetch, dataset):
    changes = {"prefetch": prefetch} if loader == "dali" else {}
    used = loader_of(loader, dataset, **changes)
    for epoch, steps in enumerate(left_after):
        left = used.epoch(plan_of(dataset, epoch=epoch + 10))
        for _ in range(steps):
            next(left)
        left.close()
    plan = plan_of(dataset)
    assert same_epoch(used.epoch(plan), loader_of("resident", dataset).epoch(plan))


@LOADERS
def test_an_epoch_never_closed_does_not_harm_the_next(loader, dataset):
    """As when an exception's traceback holds the old generator, which then dies in the middle of the new epoch."""
    used, plan = loader_of(loader, dataset), plan_of(dataset)
    old = used.epoch(plan_of(dataset, epoch=9))
    next(old)
    new = used.epoch(plan)
    first = next(new)
    del old
    assert same_epoch(iter([first, *new]), loader_of("resident", dataset).epoch(plan))


def test_outputs_of_dali_are_held_until_their_copies_are_made(monkeypatch):
    """On a GPU, in the order in which they were made; the last ones stay until the loader is closed."""
    dali = pytest.importorskip("cutnmix.pipeline.dali", reason="DALI runs on Linux", exc_type=ImportError)
    done: list[int] = []
    numbers = iter(range(9))

    class Event:
        def __init__(self):
            self.number = next(numbers)

        def record(self, stream):
            assert stream == "the current one"

        def query(self):
            return self.number in done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    loader = SimpleNamespace(device=torch.device("cuda"), _held=deque())
    held = []
    for ready in ([], [], [0, 1], [2, 3], []):
        done += ready
        dali.DaliLoader._hold(loader, {"number": len(held)})
        held.append([outputs["number"] for _, outputs in loader._held])
    assert held == [[0], [0, 1], [2], [3], [4]]


def test_an_old_epoch_of_dali_does_not_take_batches_of_a_new_one(dataset):
    used, plan = loader_of("dali", dataset), plan_of(dataset)
    old, new = used.epoch(plan_of(dataset, epoch=9)), used.epoch(plan)
    next(old)
    first = next(new)
    with pytest.raises(RuntimeError, match="later epoch"):
        next(old)
    assert same_epoch(iter([first, *new]), loader_of("resident", dataset).epoch(plan))


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_dalis_prefetch_and_threads_change_nothing(prefetch, num_threads, dataset):
    distort, _ = DISTORTIONS["everything"]
    plan = plan_of(dataset, distort)
    used = loader_of("dali", dataset, distort, prefetch=prefetch, num_threads=num_threads)
    assert same_epoch(used.epoch(plan), loader_of("dali", dataset, distort).epoch(plan))


@LOADERS
def test_two_loaders_at_once_do_not_disturb_each_other(loader, dataset):
    train, test = loader_of(loader, dataset), loader_of(loader, dataset, Distort().evaluation(), V=1)
    train_plan = plan_of(dataset)
    test_plan = plan_of(dataset, Distort().evaluation(), V=1, mix=Mix(), shuffle=False)
    for views, tested in zip(train.epoch(train_plan), test.epoch(test_plan), strict=True):
        assert views.image_VBCHW.shape[:2] == (2, len(tested.index_B))
        assert np.array_equal(pixels(tested)[0], dataset.images[tested.index_B])


@LOADERS
def test_the_views_of_two_peers_stay_when_there_are_three(loader, dataset):
    two, three = (loader_of(loader, dataset, V=J).epoch(plan_of(dataset, V=J, J=J)) for J in (2, 3))
    for a, b in zip(two, three, strict=True):
        assert torch.equal(a.image_VBCHW, b.image_VBCHW[:2])


@LOADERS
def test_an_epoch_without_steps_has_no_views(loader, dataset):
    used = loader_of(loader, dataset)
    assert list(used.epoch(plan_of(dataset, num_images=5, drop_last=True))) == []
    plan = plan_of(dataset)
    assert same_epoch(used.epoch(plan), loader_of("resident", dataset).epoch(plan))


def dalis_threads() -> set[str]:
    """Those of this process, which Python does not know of."""
    found = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # of a thread that ends just now
            if path.read_text().startswith("[DALI]"):
                found.add(path.parent.name)
    return found


@LOADERS
def test_can_be_closed_and_closed_again(loader, dataset):
    before, used = dalis_threads(), loader_of(loader, dataset)
    next(used.epoch(plan_of(dataset)))
    assert bool(dalis_threads() - before) == (loader == "dali")
    used.close()
    assert dalis_threads() <= before
    used.close()


@pytest.mark.parametrize("name", ["auto", "dali", "resident"])
def test_without_dali_image_files_are_refused_in_one_line(name, monkeypatch):
    monkeypatch.setattr(loaders, "_has_dali", lambda: False)
    files = Dataset("folder/train", (Path("a.jpg"),), np.zeros(1, np.int64), ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match=r"data.name: folder/train is a set of image files, which DALI reads"):
        make_loader(name, files, Distort(), num_views=1, batch_size=1)


def test_a_closed_dali_loader_says_so(dataset):
    used = loader_of("dali", dataset)
    used.close()
    with pytest.raises(RuntimeError, match="this loader is closed"):
        next(used.epoch(plan_of(dataset)))


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (Distort(pad=2), "distort.pad is 2 in the plan, 3 in the loader"),
        (BARE.model_copy(update={"colour": COLOUR}), "distort.colour is True in the plan, False in the loader"),
        (BARE.model_copy(update={"rotation": 5.0}), "distort.rotation is True in the plan, False in the loader"),
        (Distort(pad=3).evaluation(), "distort.pad is 0 in the plan, .*; distort.region is centre in the plan, random"),
    ],
)
@LOADERS
def test_a_plan_of_other_distortions_is_refused(loader, drawn, said, dataset):
    with pytest.raises(ValueError, match=f"this plan was not drawn for this loader: {said}"):
        next(loader_of(loader, dataset).epoch(plan_of(dataset, drawn)))


@LOADERS
def test_a_plan_of_image_files_is_refused_for_arrays(loader, dataset):
    """It has no crops; nor has a plan of arrays the regions of files."""
    with pytest.raises(ValueError, match="files is True in the plan, False in the loader"):
        next(loader_of(loader, dataset).epoch(plan_of(dataset, files=True)))


@LOADERS
@pytest.mark.parametrize("size", [(W, H), (H, W - 1)])
def test_a_plan_of_views_of_another_size_is_refused(loader, size, dataset):
    """Its boxes would not have the share of the pixels that its lambda says."""
    with pytest.raises(ValueError, match=rf"size is \({size[0]}, {size[1]}\) in the plan, \({H}, {W}\) in the loader"):
        next(loader_of(loader, dataset).epoch(plan_of(dataset, size=size)))


def test_dali_refuses_a_plan_of_larger_batches(dataset):
    with pytest.raises(ValueError, match="batch_size is 9 in the plan, 8 in the loader"):
        next(loader_of("dali", dataset).epoch(plan_of(dataset, batch_size=BATCH + 1)))


@LOADERS
def test_what_only_the_plan_decides_may_differ(loader, dataset):
    plan = plan_of(dataset, Distort(pad=3, flip=0.1, cutout=5))
    assert next(loader_of(loader, dataset).epoch(plan)).hole_VBHW is not None


def test_dali_refuses_a_plan_of_another_number_of_views(dataset):
    with pytest.raises(ValueError, match="num_views is 2 in the plan, 1 in the loader"):
        next(loader_of("dali", dataset, V=1).epoch(plan_of(dataset, V=2)))


@LOADERS
def test_grey_images_have_no_colours(loader, dataset):
    grey = replace(dataset, images=dataset.array[..., :1].copy(), mean=(0.5,), std=(0.2,))
    assert same(
        *([views.made() for views in loader_of(name, grey).epoch(plan_of(grey))][-1] for name in ("dali", "resident"))
    )
    with pytest.raises(DataError, match=r"distort\.colour: noise/train has 1 channel\(s\)"):
        loader_of(loader, grey, DISTORTIONS["colour"][0])


@pytest.mark.parametrize("name", ["residnet", "Resident", ""])
def test_another_loader_is_refused_with_what_there_is(name, dataset):
    with pytest.raises(DataError, match=f"loader.name: '{name}' is none of auto, dali, resident"):
        make_loader(name, dataset, BARE, num_views=2, batch_size=BATCH)


@pytest.mark.cifar
def test_dali_is_resident_on_real_cifar(cifar_root):
    dataset = load_splits("cifar100", cifar_root, classes=20, download=False).train
    for distort, tolerance in (DISTORTIONS["crop flip"], DISTORTIONS["everything"]):
        plan = plan_of(dataset, distort)
        epochs = [loader_of(loader, dataset, distort).epoch(plan) for loader in ("dali", "resident")]
        for _ in range(2):
            dali, resident = (next(epoch) for epoch in epochs)
            np.testing.assert_allclose(pixels(dali), pixels(resident), rtol=0, atol=tolerance)
            assert dali.label_B.tolist() == dataset.labels[resident.index_B].tolist()


# Image files, read and decoded by DALI


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Waves and some noise: a photograph's statistics, so that JPEG and scaling behave as on one."""
    y, x, c = np.mgrid[:height, :width, :channels]
    waves = 127 + 110 * np.sin(x / (3 + c) + y / (5 + 2 * c) + c + seed)
    noisy = waves + np.random.default_rng(seed).normal(0, 5, waves.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8).squeeze())


def files_dataset(paths: list[Path]) -> Dataset:
    labels = np.arange(len(paths), dtype=np.int64) % 3
    return Dataset("folder/train", tuple(paths), labels, ("a", "b", "c"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Dataset:
    """PNG and JPEG of several sizes and kinds, one of them taken with a turned camera."""
    root = tmp_path_factory.mktemp("images") / "Blümchen, 2 Stück"
    root.mkdir()
    sizes = [(40, 60), (61, 37), (24, 24), (100, 30), (13, 17), (57, 91), (33, 34)]
    pictures = {f"{height}x{width}.png": picture(height, width, seed=width) for height, width in sizes}
    pictures["grey.png"] = picture(45, 50, 1)
    pictures["palette.png"] = picture(45, 50).quantize(64)
    pictures["colour.jpg"] = picture(45, 50)
    pictures["grey.jpeg"] = picture(45, 50, 1)
    for name, made in pictures.items():
        made.save(root / name, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(30, 50).save(root / "turned.jpg", quality=95, exif=exif)
    return files_dataset(sorted(root.iterdir()))


def pil_view(path: Path, size: int, region: Tensor | None, flip: bool) -> np.ndarray:
    """The same view by Pillow: a resized crop of the drawn region, or of the middle 7/8 of the shorter side."""
    image = Image.open(path).convert("RGB")  # whatever its EXIF orientation, as torchvision reads it
    full = np.array(image.size, dtype=np.float32)  # width, height; float32 as in the graph
    if region is None:
        box, at = full.min().repeat(2) * np.float32(224 / 256), np.float32(0.5)
    else:
        scale, ratio, *at = region.numpy()
        box = np.sqrt(np.stack([full.prod() * scale * ratio, full.prod() * scale / ratio]))
    box = np.floor(box + np.float32(0.5)).clip(1, full)
    corner = np.floor((full - box) * at + np.float32(0.5))
    resized = image.crop((*corner, *corner + box)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.mirror(resized) if flip else resized, dtype=float)


@pytest.mark.parametrize("distort", [Distort(image_size=20), Distort(image_size=33, flip=0.0)], ids=["20", "33"])
@pytest.mark.parametrize(("evaluation", "second"), [(False, None), (True, None), (False, "class")])
def test_files_are_cut_and_scaled_as_by_pillow(distort, evaluation, second, folder):
    distort = distort.evaluation() if evaluation else distort
    plan = plan_of(folder, distort, second=second)
    seen = 0
    for s, views in enumerate(loader_of("dali", folder, distort, batch_size=plan.batch_size).epoch(plan)):
        draws = plan.step(s)
        assert views.image_VBCHW.dtype == torch.uint8
        assert views.label_B.tolist() == folder.labels[draws.index_B].tolist()
        for v, b in np.ndindex(2, len(draws.index_B)):
            region = None if draws.region_VB4 is None else draws.region_VB4[v, b]
            path = folder.images[draws.index_B[b]]
            error = np.abs(pixels(views)[v, b] - pil_view(path, distort.image_size, region, bool(draws.flip_VB[v, b])))
            assert error.max() <= 1, path
            seen += 1
    assert seen == (4 if second else 2) * len(folder)


@pytest.mark.parametrize("evaluation", [False, True])
def test_torch_scales_as_dali_does_on_a_gpu(evaluation, folder, monkeypatch):
    dali = pytest.importorskip("cutnmix.pipeline.dali", reason="DALI runs on Linux", exc_type=ImportError)
    distort = Distort(image_size=33).evaluation() if evaluation else Distort(image_size=33)
    plan = plan_of(folder, distort)
    by_torch = list(loader_of("dali", folder, distort).epoch(plan))
    monkeypatch.setattr(
        dali, "_scaled_by_torch", lambda image, boxes, size, _: dali._scaled_by_dali(image, boxes, size)
    )
    for ours, theirs in zip(by_torch, loader_of("dali", folder, distort).epoch(plan), strict=True):
        error = np.abs(pixels(ours) - pixels(theirs))
        # At an edge torch shortens the filter, as Pillow does, and DALI repeats the last pixel.
        assert error[:, :, 1:-1, 1:-1].max() <= 2 and error.max() <= 8


def test_peers_see_different_regions_of_a_file_and_the_same_one_if_they_share_the_view(folder):
    own = plan_of(folder, Distort(image_size=20, flip=0.0))
    for views in loader_of("dali", folder, Distort(image_size=20, flip=0.0)).epoch(own):
        assert all(not torch.equal(a, b) for a, b in zip(*views.image_VBCHW, strict=True))
    shared = plan_of(folder, Distort(image_size=20), V=1)
    for views in loader_of("dali", folder, Distort(image_size=20), V=1).epoch(shared):
        assert views.image_VBCHW.shape[0] == 1


def test_files_too_are_turned_recoloured_and_cut_out(folder):
    """Turning and colour start from the bytes of the plain view."""
    plain, distort = (
        Distort(image_size=20, **more) for more in ({}, {"rotation": 90.0, "colour": COLOUR, "cutout": 6})
    )
    plan = plan_of(folder, distort)
    epochs = (
        loader_of("dali", folder, plain).epoch(plan_of(folder, plain)),
        loader_of("dali", folder, distort).epoch(plan),
    )
    for s, (before, after) in enumerate(zip(*epochs, strict=True)):
        draws = plan.step(s)
        # The flip was already in the plain view, and a flipped picture turns as any other.
        turned = draws._replace(index_B=torch.arange(len(draws.index_B)), flip_VB=torch.zeros_like(draws.flip_VB))
        for v in range(2):
            image = pixels(before)[v].astype(np.uint8)
            seen = Dataset("seen", image, folder.labels[: len(image)], folder.classes, (0.0,) * 3, (1.0,) * 3)
            np.testing.assert_allclose(pixels(after)[v], oracle.views(seen, 0, turned)[v], rtol=0, atol=0.05)
        assert np.array_equal(after.hole_VBHW.numpy(), oracle.holes(draws, 20, 20))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_files_come_alike_with_any_prefetch_after_an_epoch_left_early(prefetch, folder):
    distort = Distort(image_size=20)
    plan, used = plan_of(folder, distort), loader_of("dali", folder, distort, prefetch=prefetch)
    next(left := used.epoch(plan_of(folder, distort, epoch=9)))
    left.close()
    assert same_epoch(used.epoch(plan), loader_of("dali", folder, distort).epoch(plan))
    assert same_epoch(used.epoch(plan, start=1), list(loader_of("dali", folder, distort).epoch(plan))[1:])


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-40], "head": content[:20], "empty": b"", "text": b"hello"}[how])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("how", ["truncated", "head", "empty", "text", "gone"])
def test_a_file_that_does_not_decode_is_named(suffix, how, tmp_path):
    paths = [tmp_path / f"{i}{suffix}" for i in range(N)]
    for path in paths:
        picture(30, 40).save(path)
    damage(paths[17], how)
    broken, distort = files_dataset(paths), Distort(image_size=20)
    plan = plan_of(broken, distort, shuffle=False)
    used = loader_of("dali", broken, distort, prefetch=3)
    seen = []
    with pytest.raises(DataError, match=rf"17{suffix} does not decode .*repair or remove it"):
        seen.extend(views.index_B for views in used.epoch(plan))
    assert len(seen) == 2  # the batches before it were good
    healthy = plan_of(broken, distort, shuffle=False, num_images=16)
    assert len(list(used.epoch(healthy))) == 2


# On a GPU


ON_GPU = pytest.mark.parametrize(
    ("name", "mix", "second"),
    [*product(DISTORTIONS, ["cutnmix"], [None]), ("cutout", "mixup", "image"), ("crop flip", "cutout", "class")],
)


@pytest.mark.gpu
@ON_GPU
def test_resident_and_mix_on_a_gpu_are_those_on_the_cpu(name, mix, second, dataset):
    distort, tolerance = DISTORTIONS[name]
    made: dict[str, list[Batch]] = {}
    for device in ("cpu", "cuda"):
        plan = plan_of(dataset, distort, mix=Mix(name=mix), second=second).to(device)
        mixer = mixer_of(dataset).to(device)
        epoch = loader_of("resident", dataset, distort, device=device).epoch(plan)
        made[device] = [mixer(views, plan.step(s)) for s, views in enumerate(epoch)]
    for ours, theirs in zip(made["cuda"], made["cpu"], strict=True):
        for image, expected in ((ours.image_VBCHW, theirs.image_VBCHW), (ours.second_VBCHW, theirs.second_VBCHW)):
            assert (image is None) == (expected is None)
            if image is not None:
                torch.testing.assert_close(image.cpu(), expected, rtol=0, atol=tolerance / 255 / 0.2 + 2e-6)
        torch.testing.assert_close(ours.target_LBK.cpu(), theirs.target_LBK)
        assert ours.epoch.is_cuda and ours.epoch.item() == theirs.epoch.item()


@pytest.mark.gpu
@ON_GPU
def test_dali_on_a_gpu_is_dali_on_the_cpu(name, mix, second, dataset):
    distort, tolerance = DISTORTIONS[name]
    plan = plan_of(dataset, distort, mix=Mix(name=mix), second=second)
    on_gpu = loader_of("dali", dataset, distort, device="cuda", batch_size=plan.batch_size).epoch(plan.to("cuda"))
    on_cpu = loader_of("dali", dataset, distort, batch_size=plan.batch_size).epoch(plan)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert all(field is None or field.is_cuda for field in ours)
        np.testing.assert_allclose(pixels(ours), pixels(theirs), rtol=0, atol=tolerance)
        assert torch.equal(ours.label_B.cpu(), theirs.label_B)


@pytest.mark.gpu
def test_files_on_a_gpu_are_those_on_the_cpu(folder):
    distort = Distort(image_size=20)
    plan = plan_of(folder, distort)
    on_gpu = loader_of("dali", folder, distort, device="cuda").epoch(plan.to("cuda"))
    for ours, theirs in zip(on_gpu, loader_of("dali", folder, distort).epoch(plan), strict=True):
        error = np.abs(pixels(ours) - pixels(theirs))  # nvJPEG and libjpeg-turbo round differently
        assert error.mean() < 1.5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@ON_GPU
def test_neither_resident_nor_mix_makes_the_host_wait(name, mix, second, dataset):
    distort, _ = DISTORTIONS[name]
    plan = plan_of(dataset, distort, mix=Mix(name=mix), second=second).to("cuda")
    loader = loader_of("resident", dataset, distort, device="cuda")
    mixer = mixer_of(dataset).to("cuda")
    mixer(loader.views(plan.step(0)), plan.step(0))  # what is copied to the device once
    try:
        torch.cuda.set_sync_debug_mode("error")
        for s in range(len(plan)):
            mixer(loader.views(plan.step(s)), plan.step(s))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("second", [None, "image"])
@pytest.mark.parametrize("name", ["crop flip", "everything"])
def test_resident_views_made_in_the_loop_of_a_compiled_mix_are_the_eager_ones(name, second, dataset):
    distort, tolerance = DISTORTIONS[name]
    plan = plan_of(dataset, distort, second=second)
    loader, eager, compiled = ResidentLoader(dataset, distort), mixer_of(dataset), mixer_of(dataset)
    compiled.compile(dynamic=False)
    for step, views in enumerate(loader.epoch(plan)):
        one, other = (mix(views, plan.step(step)) for mix in (eager, compiled))
        assert torch.equal(one.target_LBK, other.target_LBK) and torch.equal(one.label_B, other.label_B)
        for image, same in ((one.image_VBCHW, other.image_VBCHW), (one.second_VBCHW, other.second_VBCHW)):
            if image is not None:
                atol = 2e-6 + tolerance / (255 * min(dataset.std))
                torch.testing.assert_close(image, same, rtol=0, atol=atol)
