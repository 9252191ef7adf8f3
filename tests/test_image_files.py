"""Image files, alone and in tar shards: the same pixels from both, odd ones told apart, bad ones named or left out."""

import io
import itertools
import json
import os
import struct
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cutnmix.benchmarks.reproduce import estimate
from cutnmix.benchmarks.reproduce.grid import Cell, Planned, images_per_class, load_grid
from cutnmix.pipeline.ahead import ahead
from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.dataset import DataError, Dataset
from cutnmix.pipeline.datasets import load_splits
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.loader import default_threads
from cutnmix.pipeline.plan import Plan
from cutnmix.pipeline.shards import Members, cache_folder, find_shards, read_members
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.export import export
from cutnmix.trainer.keys import ConfigError, Data
from cutnmix.trainer.run import train as train_run

dali = pytest.importorskip("cutnmix.pipeline.dali", reason="DALI runs on Linux", exc_type=ImportError)
check = pytest.importorskip("cutnmix.pipeline.check", reason="DALI runs on Linux", exc_type=ImportError)

SIZE, BATCH = 24, 4
DISTORT = Distort(image_size=SIZE)
CLASSES = ("ant", "bee", "cat")
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)])
SIZES = [(40, 60), (61, 37), (24, 24), (100, 30), (13, 17)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves and some noise, as a photograph has them."""
    y, x, c = np.mgrid[:height, :width, :3]
    waves = 127 + 100 * np.sin(x / (4 + c) + y / (6 + c) + c + seed)
    noisy = waves + np.random.default_rng(seed).normal(0, 4, waves.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **({"quality": 95} | options))
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """The same images twice: as files in class folders, and as three shards of them, in the folder's order."""
    root = tmp_path_factory.mktemp("images")
    for half, count in {"train": 14, "val": 6}.items():
        samples = []
        for i in sorted(range(count), key=lambda i: (i % 3, i)):
            content = encoded(picture(*SIZES[i % len(SIZES)], seed=i))
            path = root / "folder" / half / CLASSES[i % 3] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            samples.append((f"{half}/{i:02}", content, i % 3))
        for n, first in enumerate(range(0, count, 5)):
            members = {}
            for key, content, label in samples[first : first + 5]:
                members |= {f"{key}.jpg": content, f"{key}.cls": f"{label}\n".encode(), f"{key}.json": b"{}"}
            write_tar(root / "webdataset" / half / f"{n:04}.tar", members)
    (root / "webdataset" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return {"folder": root / "folder", "webdataset": root / "webdataset"}


def alone(*paths: Path) -> Dataset:
    """These files as a data set of one class."""
    return Dataset("folder/train", paths, np.zeros(len(paths), dtype=np.int64), ("a",), (0.5,) * 3, (0.2,) * 3)


def plan_of(dataset: Dataset, distort: Distort = DISTORT, V: int = 2, **changes) -> Plan:
    arguments = dict(
        seed=5, epoch=1, num_images=len(dataset), size=(distort.image_size,) * 2, batch_size=BATCH, distort=distort,
        mix=Mix(name="cutnmix"), num_views=V, num_peers=2, files=True, label_N=dataset.labels,
    )  # fmt: skip
    return make_plan(**(arguments | changes))


def loader_of(dataset: Dataset, distort: Distort = DISTORT, V: int = 2, **changes):
    return dali.DaliLoader(dataset, distort, **({"num_views": V, "batch_size": 2 * BATCH} | changes))


def equal(one: Views, other: Views) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same_epoch(one, other) -> bool:
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


def evaluated(dataset: Dataset, size: int = SIZE) -> np.ndarray:
    """(B, H, W, C): all images of a data set as they are evaluated."""
    distort = Distort(image_size=size).evaluation()
    plan = plan_of(dataset, distort, V=1, mix=Mix(), shuffle=False, batch_size=len(dataset))
    (views,) = loader_of(dataset, distort, V=1, batch_size=len(dataset)).epoch(plan)
    return views.image_VBCHW[0].permute(0, 2, 3, 1).numpy().astype(int)


# Tar shards


def test_a_scale_counts_the_images_of_the_shards_that_a_run_names(roots):
    root = roots["webdataset"]
    assert images_per_class(Data(name="webdataset", root=root)) == 4  # of 14 in three classes
    assert images_per_class(Data(name="webdataset", root=root, train="val/*.tar")) == 2  # of 6


def test_shards_are_the_folder(roots):
    """The same images in the same order: every field but the name, and every byte."""
    for files, members in zip(*(load_splits(name, root) for name, root in roots.items()), strict=True):
        assert np.array_equal(files.labels, members.labels) and members.labels.dtype == np.int64
        assert files.classes == members.classes == CLASSES
        assert (files.mean, files.std) == (members.mean, members.std)
        assert files.digest() == members.digest()
        assert isinstance(members.images, Members) and len(members.images) == len(members) and not members.in_memory
        assert [files.encoded(i) for i in range(len(files))] == [members.encoded(i) for i in range(len(members))]
        for i in range(len(files)):
            assert members.where(i).endswith(f".tar: {members.name.split('/')[1]}/{files.files[i].stem}.jpg")


@pytest.mark.parametrize("second", [None, "image", "class"])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("distort", [DISTORT, DISTORT.model_copy(update={"rotation": 30.0, "colour": Colour(hue=20)})])
def test_shards_give_the_pixels_of_the_folder(second, start, distort, roots):
    files, members = (load_splits(name, root).train for name, root in roots.items())
    plan = plan_of(files, distort, second=second)
    assert same_epoch(loader_of(members, distort).epoch(plan, start), loader_of(files, distort).epoch(plan, start))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_shards_come_alike_after_an_epoch_left_early_and_from_any_step(prefetch, roots):
    train = load_splits("webdataset", roots["webdataset"]).train
    plan, used = plan_of(train), loader_of(train, prefetch=prefetch)
    next(left := used.epoch(plan_of(train, epoch=9)))
    left.close()
    whole = list(loader_of(train).epoch(plan))
    for start in (0, 1, 3, 4):
        assert same_epoch(used.epoch(plan, start), iter(whole[start:]))


def test_shards_subset(roots):
    keys = {"classes": ["cat", "ant"], "images_per_class": 2}
    files, members = (load_splits(name, root, **keys) for name, root in roots.items())
    for a, b in zip(files, members, strict=True):
        assert a.classes == b.classes == ("cat", "ant") and a.labels.tolist() == b.labels.tolist()
        assert [a.encoded(i) for i in range(len(a))] == [b.encoded(i) for i in range(len(b))]


def test_shards_without_names_of_classes_have_numbers(roots, tmp_path):
    (tmp_path / "shards").mkdir()
    for half in ("train", "val"):
        (tmp_path / "shards" / half).symlink_to(roots["webdataset"] / half)
    assert load_splits("webdataset", tmp_path / "shards").train.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.tar", ["a-00.tar", "a-01.tar", "a-02.tar", "b-7.tar"]),
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("{a-{01,02},b-{7..7}}.tar", ["a-01.tar", "a-02.tar", "b-7.tar"]),
        ("b-?.tar", ["b-7.tar"]),
        ("{a,b}-*.tar", ["a-00.tar", "a-01.tar", "a-02.tar", "b-7.tar"]),
        ("{a-00,a-*}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),  # what fits twice is there once
    ],
)
def test_patterns_of_shards(pattern, names, tmp_path):
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b-7.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path, pattern, "data.train")] == names
    assert find_shards(Path("/"), str(tmp_path / pattern), "data.train") == tuple(tmp_path / name for name in names)


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "a-0.tar").touch()
    with pytest.raises(DataError, match=rf"data\.train: 2 of 3 shards are missing: {tmp_path}/a-1.tar, .*a-2.tar"):
        find_shards(tmp_path, "a-{0..2}.tar", "data.train")
    with pytest.raises(DataError, match=rf"data\.val: no file fits {tmp_path}/val/\*\.tar"):
        find_shards(tmp_path, "val/*.tar", "data.val")
    with pytest.raises(DataError, match=r"data\.train: a-\{2\.\.0\}\.tar names no file, as its range runs downwards"):
        find_shards(tmp_path, "a-{2..0}.tar", "data.train")


def test_only_the_pattern_has_wildcards_not_the_folder(tmp_path):
    root = tmp_path / "run[1]"
    shard = write_tar(root / "train" / "0.tar", {"a.jpg": JPEG, "a.cls": b"0"})
    assert find_shards(root, "train/*.tar", "data.train") == (shard,)
    assert find_shards(root, f"{tmp_path}/run?1?/train/*.tar", "data.train") == (shard,)


JPEG = encoded(picture(20, 20))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": JPEG, "b.jpg": JPEG, "b.cls": b"0"}, r"sample a lacks a\.cls"),
        ({"x/a.cls": b"1"}, r"sample x/a lacks an image \(jpg, jpeg, png\)"),
        ({"a.jpg": JPEG, "a.png": JPEG, "a.cls": b"0"}, r"sample a is there twice \(a\.png\)"),
        ({"a.jpg": JPEG, "a.cls": b"dog"}, r"a\.cls must hold a class as a number from 0, not b'dog'"),
        ({"a.jpg": JPEG, "a.cls": b"-1"}, r"a\.cls must hold a class"),
        ({"notes.txt": b"none"}, "holds no samples"),
    ],
)
def test_a_wrong_shard_is_named(members, message, tmp_path):
    shard = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=f"{shard}.*{message}"):
        read_members((shard,))


@pytest.mark.parametrize("damage", ["truncated", "compressed", "text", "empty"])
def test_a_damaged_shard_is_named(damage, tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.cls": b"0", "b.jpg": 9 * JPEG, "b.cls": b"0"})
    content = shard.read_bytes()
    made = {"truncated": content[: len(content) // 2], "compressed": zlib.compress(content), "text": 999 * b"hello"}
    shard.write_bytes(made.get(damage, b""))
    with pytest.raises(DataError, match=f"{shard} is damaged, or no plain tar .*must not be compressed"):
        read_members((shard,))


def test_classes_of_shards_are_checked(tmp_path):
    for half in ("train", "val"):
        write_tar(tmp_path / half / "0.tar", {"a.jpg": JPEG, "a.cls": b"0", "b.jpg": JPEG, "b.cls": b"2"})
    with pytest.raises(
        DataError, match=r"no images in the train shards .* are of class 1, and .*: b\.jpg is of class 2"
    ):
        load_splits("webdataset", tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"train/0\.tar: b\.jpg is of class 2, and .*classes\.txt names 2 classes"):
        load_splits("webdataset", tmp_path)


def test_one_stray_number_does_not_fill_the_memory(tmp_path):
    for half in ("train", "val"):
        write_tar(tmp_path / half / "0.tar", {"a.jpg": JPEG, "a.cls": b"0", "b.jpg": JPEG, "b.cls": b"999999999"})
    with pytest.raises(DataError, match=r"are of class 1, and .*train/0\.tar: b\.jpg is of class 999999999"):
        load_splits("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"ant\n\nbee\n", "line 2 is empty"), ("\u00e4nt\nbee\n".encode("latin-1"), "cannot be read as UTF-8")],
)
def test_names_of_classes_are_read_as_they_stand(content, said, roots, tmp_path):
    (tmp_path / "shards").symlink_to(roots["webdataset"])
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path}/classes\.txt.*{said}"):
        load_splits("webdataset", tmp_path, train="shards/train/*.tar", val="shards/val/*.tar")


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(kind, roots, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(DataError, match=r"/proc/none/cutnmix/\w+ cannot be written to .*: set XDG_CACHE_HOME"):
        check.without_corrupt(load_splits(kind, roots[kind]).train)


def test_a_changed_shard_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.cls": b"0"})
    first, _ = read_members((shard,))
    monkeypatch.setattr("cutnmix.pipeline.shards._read_index", None)  # not to be called
    again, labels = read_members((shard,))
    assert labels.tolist() == [0] and again.offset_N.tolist() == first.offset_N.tolist()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    facts = shard.stat()
    write_tar(shard, {"b.jpg": JPEG, "b.cls": b"1"})
    assert shard.stat().st_size == facts.st_size
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert read_members((shard,))[1].tolist() == [1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip"])
def test_a_broken_index_is_made_again(content, tmp_path):
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": JPEG, "a.cls": b"0"})
    read_members((shard,))
    (index,) = cache_folder("shards").glob("*.npz")
    index.write_bytes(content)
    members, _ = read_members((shard,))
    assert members.read(0) == JPEG
    assert not list(index.parent.glob("*.partial"))


# Second views of the same image


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
@pytest.mark.parametrize("second", ["image", "class"])
def test_a_second_view_of_the_same_image_is_not_read_again(kind, second, roots, monkeypatch):
    train = load_splits(kind, roots[kind]).train
    read: list[int] = []
    real = Dataset.encoded
    monkeypatch.setattr(Dataset, "encoded", lambda self, i: read.append(i) or real(self, i))
    plan = plan_of(train, second=second)
    steps = list(loader_of(train).epoch(plan))
    assert [len(views.index_B) for views in steps] == [8, 8, 8, 4]
    assert sorted(read) == sorted(plan.index_N.tolist() if second == "class" else range(len(train)))


@pytest.mark.parametrize("distort", [DISTORT, DISTORT.model_copy(update={"rotation": 30.0, "colour": Colour(hue=20)})])
def test_a_second_view_of_the_same_image_has_the_pixels_that_reading_twice_gives(distort, roots, monkeypatch):
    train = load_splits("folder", roots["folder"]).train
    plan = plan_of(train, distort, second="image")
    once = list(loader_of(train, distort).epoch(plan))
    monkeypatch.setattr(dali, "_pairs", lambda plan: False)
    assert same_epoch(iter(once), loader_of(train, distort).epoch(plan))


def test_a_loader_takes_plans_with_and_without_second_views_in_turn(roots):
    train = load_splits("folder", roots["folder"]).train
    used = loader_of(train)
    for second in ("image", None, "class", "image"):
        plan = plan_of(train, second=second)
        assert same_epoch(used.epoch(plan), loader_of(train).epoch(plan))


# Pictures of all kinds


def png16(rgb: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.tobytes() for row in rgb.astype(">u2") * 257)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def kinds() -> dict[str, bytes]:
    """Images that decode, each by what is odd about it; suffixes do not bind what is in a file."""
    plain, turned = picture(45, 60), Image.Exif()
    turned[0x0112] = 6
    translucent = plain.convert("RGBA")
    translucent.putalpha(Image.linear_gradient("L").resize(plain.size))
    frames = {"save_all": True, "append_images": [plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]}
    made = {
        "jpeg": encoded(plain),
        "no_subsampling": encoded(plain, subsampling=0),
        "progressive": encoded(plain, progressive=True),
        "grey": encoded(plain.convert("L")),
        "cmyk": encoded(plain.convert("CMYK")),
        "turned_by_exif": encoded(plain, exif=turned),
        "trailing_bytes": encoded(plain) + bytes(99),
        "one_pixel": encoded(Image.new("RGB", (1, 1), (9, 99, 199))),
        "wide": encoded(plain.resize((3000, 2))),
        "tall": encoded(plain.resize((1, 3000))),
    }
    formats = {"png": (plain, {}), "grey_png": (plain.convert("L"), {}), "grey_alpha": (plain.convert("LA"), {}),
        "alpha": (translucent, {}), "palette": (plain.quantize(64), {}), "black_and_white": (plain.convert("1"), {}),
        "palette_alpha": (plain.quantize(64), {"transparency": 3}), "animated_png": (plain, frames)}  # fmt: skip
    made |= {name: encoded(image, "PNG", **options) for name, (image, options) in formats.items()}
    made |= {f"{format}_inside": encoded(plain, format) for format in ("BMP", "TIFF")}
    made |= {f"{name}_inside": encoded(plain, "WEBP", lossless=True, **more) for name, more in
        (("WEBP", {}), ("animated_WEBP", frames))}  # fmt: skip
    return made | {"16_bit": png16(np.asarray(plain))}


@pytest.mark.parametrize("name", sorted(kinds()))
def test_every_kind_is_what_pillow_reads(name, tmp_path):
    """As torchvision's loaders have it: convert("RGB") of the first frame, alpha dropped, EXIF orientation ignored."""
    path = tmp_path / "image.jpg"
    path.write_bytes(kinds()[name])
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    side = max(1, int(min(width, height) * 224 / 256 + 0.5))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    centre = image.crop((left, top, left + side, top + side))
    expected = np.asarray(centre.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(evaluated(alone(path))[0] - expected).max() <= 1


def test_16_bits_of_grey_are_scaled_to_8(tmp_path):
    """Where Pillow's convert("RGB") cuts them off, so that all but the darkest 1/256 is white."""
    grey = np.asarray(picture(45, 60).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "flat.png")
    deep, flat = evaluated(alone(tmp_path / "deep.png", tmp_path / "flat.png"))
    assert np.abs(deep - flat).max() <= 1


def test_evaluation_is_the_standard_resize_and_centre_crop(tmp_path):
    """256 / 224 of the crop for the shorter side, then its middle: where both steps meet whole pixels, to rounding."""
    for i, size in enumerate([(512, 512), (512, 768), (1024, 512), (256, 256)]):
        picture(*size, seed=i).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    for path, made in zip(paths, evaluated(alone(*paths), 224), strict=True):
        image = Image.open(path)
        width, height = image.size
        scaled = image.resize(
            (width * 256 // min(image.size), height * 256 // min(image.size)), Image.Resampling.BILINEAR
        )
        left, top = (scaled.size[0] - 224) // 2, (scaled.size[1] - 224) // 2
        expected = np.asarray(scaled.crop((left, top, left + 224, top + 224)), dtype=int)
        error = np.abs(made - expected)
        # We cut before we scale, so that the filter ends at the edge; the standard scales all of the image first.
        assert error[1:-1, 1:-1].max() <= 2 and error.max() <= 12, path


# Bad images


BAD = {
    "empty": (b"", "it is empty"),
    "text": (b"<html>sign in</html>", "it is no image"),
    "truncated": (JPEG[:-60], "truncated"),
    "half": (JPEG[: len(JPEG) // 2], "Truncated"),
    "marker": (JPEG[:-2], "truncated"),
    "png": (encoded(picture(20, 20), "PNG")[:-200], "Error: "),
    "gif": (encoded(picture(20, 20), "GIF"), "no decoder for this GIF"),
}


def spoilt(kind: str, root: Path, bad: dict[int, bytes]) -> Path:
    """9 training images in the folder's order, those at `bad` spoilt, and 3 good test images."""
    for half, count in {"train": 9, "val": 3}.items():
        members = {}
        for i in range(count):
            k = i * 3 // count
            content = encoded(Image.fromarray(np.full((30, 40, 3), COLOURS[k], np.uint8)))
            content = bad.get(i, content) if half == "train" else content
            members |= {f"{i}.jpg": content, f"{i}.cls": str(k).encode()}
            if kind == "folder":
                path = root / half / CLASSES[k] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        if kind == "webdataset":
            write_tar(root / half / "0.tar", members)
    return root


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
@pytest.mark.parametrize("how", sorted(BAD))
def test_a_bad_image_is_named_when_its_turn_comes(kind, how, tmp_path):
    content, reason = BAD[how]
    train = load_splits(kind, spoilt(kind, tmp_path, {5: content})).train
    name = {"folder": f"{tmp_path}/train/bee/5.jpg", "webdataset": f"{tmp_path}/train/0.tar: 5.jpg"}[kind]
    used, seen = loader_of(train, prefetch=3), []
    with pytest.raises(DataError, match=rf"^{name} does not decode \(.*{reason}.*data\.corrupt=skip$"):
        seen.extend(used.epoch(plan_of(train, shuffle=False)))
    assert len(seen) == 1  # the batch before it was good
    good = train.keep(np.arange(9) < 4)
    assert same_epoch(used.epoch(plan_of(good)), loader_of(good).epoch(plan_of(good)))  # and the loader lives on


@pytest.mark.parametrize("how", ["empty", "truncated"])
def test_a_bad_image_that_only_an_epoch_left_early_read_ahead_harms_no_other(how, tmp_path):
    train = load_splits("folder", spoilt("folder", tmp_path, {5: BAD[how][0]})).train
    used, good = loader_of(train, prefetch=3), train.keep(np.arange(9) < 4)
    for _ in range(2):
        next(left := used.epoch(plan_of(train, shuffle=False)))
        left.close()
        assert same_epoch(used.epoch(plan_of(good)), loader_of(good).epoch(plan_of(good)))


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_bad_images_are_left_out_and_counted(kind, tmp_path):
    bad = dict(zip((0, 2, 4, 8), (BAD[how][0] for how in ("truncated", "empty", "text", "gif")), strict=True))
    train, test = load_splits(kind, spoilt(kind, tmp_path, bad))
    left = check.without_corrupt(train)
    assert left.left_out == tuple(train.where(i) for i in bad)
    assert left.labels.tolist() == [0, 1, 1, 2, 2]
    assert [left.encoded(i) for i in range(5)] == [train.encoded(i) for i in (1, 3, 5, 6, 7)]
    assert check.without_corrupt(test).left_out == ()
    for views in loader_of(left).epoch(plan_of(left)):
        seen = views.image_VBCHW.float().mean((0, 3, 4))
        assert (seen - torch.from_numpy(COLOURS)[views.label_B]).abs().max() < 4


def test_only_what_is_new_is_tried_again(tmp_path, monkeypatch):
    train = load_splits("folder", spoilt("folder", tmp_path, {5: b""})).train
    tried: list[int] = []
    real = check.undecodable
    monkeypatch.setattr(check, "undecodable", lambda dataset, indices: tried.extend(indices) or real(dataset, indices))
    assert len(check.without_corrupt(train).left_out) == 1 and tried == list(range(9))
    assert len(check.without_corrupt(train).left_out) == 1 and tried == list(range(9))
    train.files[5].write_bytes(JPEG)
    train.files[7].unlink()
    for count in (1, 2):  # a file that is not there is looked for every time
        assert check.without_corrupt(train).left_out == (str(train.files[7]),)
        assert tried[9:] == [5, *count * [7]]


def test_a_class_of_which_no_image_decodes_is_refused(tmp_path):
    train = load_splits("folder", spoilt("folder", tmp_path, dict.fromkeys((3, 4, 5), b""))).train
    with pytest.raises(DataError, match=r"folder/train: no image of class 'bee' decodes: .*/bee/3\.jpg"):
        check.without_corrupt(train)


def test_a_class_may_have_no_unused_image(tmp_path):
    root = spoilt("folder", tmp_path, {})
    for path in sorted((root / "train" / "ant").iterdir())[2:]:
        path.unlink()
    unused = load_splits("folder", root, images_per_class=2, test="unused").test
    assert "ant" in unused.classes and 0 not in unused.labels
    assert len(check.without_corrupt(unused)) == len(unused) == 2


# Threads


@pytest.mark.parametrize("depth", [1, 3])
def test_work_ahead_comes_in_order_and_is_no_further_ahead_than_told(depth):
    started: list[int] = []
    for used, made in enumerate(ahead(lambda i: started.append(i) or 10 * i, range(20), depth)):
        assert made == 10 * used
        assert len(started) <= used + depth + 1
    assert sorted(started) == list(range(20))


def test_work_ahead_fails_when_its_turn_comes():
    made = ahead(lambda i: 1 // (3 - i), range(9), depth=4)
    assert [next(made) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_work_ahead_that_is_left_early_stops():
    started: list[int] = []
    made = ahead(started.append, range(1000), depth=2)
    next(made)
    made.close()
    assert len(started) <= 3
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_a_gpu_gets_the_cores_of_its_process(roots, monkeypatch):
    """Whatever number of threads torch has: torchrun sets that to 1."""
    files, arrays = load_splits("folder", roots["folder"]).train, load_splits("digits").train
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    assert [default_threads(data, "cuda:1") for data in (files, arrays)] == [16, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [default_threads(data, "cuda:1") for data in (files, arrays)] == [3, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert [default_threads(data, device) for data in (files, arrays) for device in ("cuda", "cpu")] == [1] * 4


# Runs


KEYS = ["distort.image_size=32", "peers.network=resnet20", "batch_size=4", "epochs=1", "distort.pad=4", "seed=1"]


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_run_says_what_it_left_out(kind, tmp_path):
    spoilt(kind, tmp_path, dict.fromkeys((0, 1, 3, 4, 6), b""))
    keys = [f"data={kind}", f"data.root={tmp_path}", "data.corrupt=skip"]
    parts = build(load_config("quickstart", [*KEYS, *keys]))
    (note,) = [note for note in parts.notes if "left out" in note]
    assert note.startswith(f"{kind}/train: left out 5 of 9 images, which do not decode: {tmp_path}/train/")
    assert note.endswith(" and 2 more") and len(parts.splits.train) == 4 and len(parts.plan(0)) == 1
    parts.close()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data=digits", "data.corrupt=skip"], "data.corrupt .*would do nothing under data.name: digits"),
        (["data=folder", "data.train=a.tar"], "data.train .*would do nothing under data.name: folder"),
        (["data=webdataset", "distort.pad=2"], "distort.pad .*would do nothing under data.name: webdataset"),
        (["data=folder", "data.corrupt=ignore"], "data.corrupt .*'refuse' or 'skip'"),
    ],
)
def test_keys_without_effect_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", keys)


def test_runs_on_a_folder_and_on_its_shards_end_with_the_same_weights(roots, tmp_path):
    weights = []
    for kind, root in roots.items():
        keys = [f"data={kind}", f"data.root={root}", f"runs={tmp_path}", f"name={kind}", "compile=none"]
        train_run(load_config("quickstart", [*KEYS, *keys]))
        weights.append((tmp_path / kind / "peers" / "peer0.safetensors").read_bytes()[-4096:])
    assert weights[0] == weights[1]


def test_shards_named_by_patterns_are_found_by_a_plan_and_an_export_too(roots, tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    for path in roots["webdataset"].rglob("*.*"):
        name = path.name if path.parent == roots["webdataset"] else f"{path.parent.name}-{path.name}"
        (root / name).symlink_to(path)
    keys = ["data=webdataset", f"data.root={root}", "data.train=train-*.tar", "data.val=val-*.tar"]
    config = load_config("quickstart", [*KEYS, *keys, f"runs={tmp_path}", "name=run", "compile=none"])
    assert estimate.sizes(config)[:3] == (14, 6, 3)
    planned = Planned(Cell("webdataset", "resnet20", load_grid("s1").rows[0]), config.seed, config)
    assert estimate.absent_data([planned], download=False) == {}
    train_run(config)
    (tmp_path / "run" / "peers" / "peer0.safetensors").unlink()  # as of a run that still trains
    path, _ = export(tmp_path / "run", "safetensors", "0")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == [*CLASSES]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_memory_is_flat_over_epochs(kind, tmp_path):
    """240 images of ~300 px, 20 epochs after 5 to warm up: 4,800 decodes of ~270 KB, of which nothing may stay."""
    for half, count in {"train": 240, "val": 2}.items():
        members = {}
        for i in range(count):
            content = encoded(picture(280 + i % 7, 320 - i % 11, seed=i % 5))
            members |= {f"{i:04}.jpg": content, f"{i:04}.cls": str(i % 2).encode()}
            path = tmp_path / "folder" / half / CLASSES[i % 2] / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        write_tar(tmp_path / "webdataset" / half / "0.tar", members)
    train = load_splits(kind, tmp_path / kind).train
    distort = Distort(image_size=64)
    used = loader_of(train, distort, batch_size=16)
    resident = []
    for epoch in range(25):
        for views in used.epoch(plan_of(train, distort, epoch=epoch, batch_size=16)):
            assert views.image_VBCHW.shape[1] == 16
        status = Path("/proc/self/status").read_text()
        resident.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)  # MiB
    print(kind, [round(mib) for mib in itertools.islice(resident, 0, None, 4)])
    assert max(resident[-5:]) - max(resident[5:10]) < 30
