"""Data sets: what is read is what lies there, and what is wrong is named, left alone and never unpickled."""

import hashlib
import io
import os
import pickle
import shutil
import socket
import tarfile
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from cutnmix.pipeline import cifar
from cutnmix.pipeline.dataset import DataError, Dataset, Splits
from cutnmix.pipeline.datasets import DATASETS, load_splits

FILES = ["data_batch_1", "data_batch_2", "test_batch", "batches.meta"]
DIGITS = pytest.mark.parametrize(("name", "side"), [("digits", 32), ("digits16", 16)])
ONE_DOWNLOAD = 2  # requests: torchvision asks once for redirections and once for the content


class Server(ThreadingHTTPServer):
    """A web server for one folder on a free local port, which remembers what was asked for."""

    def __init__(self, folder: Path):
        self.got = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(handler):
                self.got.append(handler.path)
                with suppress(ConnectionError):  # torchvision's look for redirections hangs up before the content
                    super().do_GET()

            def log_message(handler, *_):
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(folder) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(5)


@pytest.fixture
def small(tmp_path, server, monkeypatch):
    """CIFAR-10 of 20 + 20 + 10 images behind `server`, its md5s and URL told to torchvision: (files, archive)."""
    rng = np.random.default_rng(0)
    files = {"batches.meta": pickle.dumps({"label_names": [f"class{k}" for k in range(10)]})}
    for name, num in zip(FILES, (20, 20, 10), strict=False):
        labels = [int(label) for label in rng.permutation(num) % 10]
        files[name] = pickle.dumps({"data": rng.integers(256, size=(num, 3072), dtype=np.uint8), "labels": labels})
    archive = tmp_path / "served" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5s[name]] for name in FILES[:2]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5s["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5s["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    return files, archive


@pytest.fixture
def root(tmp_path, small):
    """A folder that holds the files of `small`, unpacked."""
    place = tmp_path / "root" / CIFAR10.base_folder
    place.mkdir(parents=True)
    for name, content in small[0].items():
        (place / name).write_bytes(content)
    return place.parent


@pytest.fixture
def tree(tmp_path):
    """Classes ant, bee, cat with 3, 2, 4 images to train on and one each to test on."""
    for half, nums in {"train": (3, 2, 4), "val": (1, 1, 1)}.items():
        for name, num in zip(("bee", "ant", "cat"), nums, strict=True):
            place = tmp_path / "tree" / half / name
            place.mkdir(parents=True)
            for i, suffix in zip(range(num), (".jpg", ".PNG", ".JPEG", ".png"), strict=False):
                Image.new("RGB", (12, 9), (50 * i, 9, 9)).save(place / f"{i}{suffix}")
    return tmp_path / "tree"


def same(a, b) -> bool:
    """Whether two data sets are equal in every field."""
    images = np.array_equal(a.images, b.images) if a.in_memory else a.images == b.images
    facts = [(d.name, d.classes, d.mean, d.std) for d in (a, b)]
    return images and np.array_equal(a.labels, b.labels) and facts[0] == facts[1]


def evil(marker: Path) -> bytes:
    """A pickle that makes the folder `marker` when it is loaded."""

    class Evil:
        def __reduce__(self):
            return Path.mkdir, (marker,)

    return pickle.dumps(Evil())


# CIFAR in small: reading


def test_pixels_and_labels_are_those_of_the_files(root, small):
    train, test = load_splits("cifar10", root)
    batches = [pickle.loads(small[0][name]) for name in FILES[:3]]
    planes = np.concatenate([batch["data"] for batch in batches[:2]])
    assert train.images.shape == (40, 32, 32, 3) and train.images.dtype == np.uint8 and train.in_memory
    for n, h, w, c in [(0, 0, 0, 0), (7, 3, 30, 1), (39, 31, 31, 2), (20, 5, 0, 2)]:
        assert train.images[n, h, w, c] == planes[n, c * 1024 + h * 32 + w]
    assert train.labels.tolist() == batches[0]["labels"] + batches[1]["labels"] and train.labels.dtype == np.int64
    assert test.labels.tolist() == batches[2]["labels"] and len(test) == 10 and len(train) == 40
    assert train.classes == test.classes == tuple(f"class{k}" for k in range(10))
    assert (train.name, test.name) == ("cifar10/train", "cifar10/test")


def test_arrays_suit_torch(root):
    for data in load_splits("cifar10", root):
        assert data.images.flags.c_contiguous
        torch.from_numpy(data.images)  # would warn, here fail, if the array were read-only
        torch.from_numpy(data.labels)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_pixels_are_normalised_as_in_the_lineage(name, mean, std, monkeypatch):
    """By the deviations of all training pixels, not by (0.2023, 0.1994, 0.2010), which much public code has."""
    told = []
    monkeypatch.setattr(cifar, "_cifar", lambda *given: told.append(given[-2:]))
    DATASETS[name](None, False)
    assert told == [(mean, std)]


# CIFAR in small: wrong files


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "code"])
def test_wrong_file_is_named_kept_and_not_unpickled(root, server, tmp_path, name, damage, download):
    path, marker = root / CIFAR10.base_folder / name, tmp_path / "executed"
    right = path.read_bytes()
    flipped = bytearray(right)
    flipped[len(flipped) // 2] ^= 1
    wrong = {"one bit": bytes(flipped), "truncated": right[:-1], "empty": b"", "code": evil(marker)}[damage]
    path.write_bytes(wrong)
    with pytest.raises(DataError) as caught:
        load_splits("cifar10", root, download=download)
    assert str(path) in str(caught.value) and hashlib.md5(right).hexdigest() in str(caught.value)
    assert path.read_bytes() == wrong and not server.got and not marker.exists()
    if damage == "code":  # the trap does work
        pickle.loads(wrong)
        assert marker.is_dir()


def test_folder_in_place_of_a_file_is_named(root):
    path = root / CIFAR10.base_folder / "test_batch"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="test_batch is damaged: md5 none, as it is no file"):
        load_splits("cifar10", root)


def test_wrong_file_is_named_before_a_missing_one_is_fetched(root, server):
    (root / CIFAR10.base_folder / "data_batch_1").unlink()
    (root / CIFAR10.base_folder / "test_batch").write_bytes(b"")
    with pytest.raises(DataError, match="test_batch is damaged"):
        load_splits("cifar10", root)
    assert not server.got


# CIFAR in small: missing files


@pytest.mark.parametrize("name", FILES)
def test_missing_file_without_download_is_named_with_the_way_to_get_it(root, server, name):
    (root / CIFAR10.base_folder / name).unlink()
    with pytest.raises(DataError) as caught:
        load_splits("cifar10", root, download=False)
    for part in ("data.root", f"{root / CIFAR10.base_folder} lacks {name};", CIFAR10.url, CIFAR10.tgz_md5):
        assert part in str(caught.value)
    assert not server.got


@pytest.mark.parametrize("name", FILES)
def test_only_the_missing_file_is_fetched(root, server, small, name):
    before = load_splits("cifar10", root)
    place = root / CIFAR10.base_folder
    (place / name).unlink()
    inodes = {path.name: path.stat().st_ino for path in place.iterdir()}
    after = load_splits("cifar10", root)
    assert len(server.got) == ONE_DOWNLOAD
    assert (place / name).read_bytes() == small[0][name]
    assert all((place / other).stat().st_ino == inode for other, inode in inodes.items())
    assert same(before.train, after.train) and same(before.test, after.test)


def test_download_into_nothing_by_three_at_once_happens_once(tmp_path, root, server):
    fresh = tmp_path / "not" / "there"
    with ThreadPoolExecutor(3) as pool:
        all_splits = list(pool.map(lambda _: load_splits("cifar10", str(fresh)), range(3)))
    expected = load_splits("cifar10", root)
    assert all(same(a, b) for splits in all_splits for a, b in zip(splits, expected, strict=True))
    assert len(server.got) == ONE_DOWNLOAD
    assert sorted(path.name for path in fresh.iterdir()) == [f".{CIFAR10.filename}.lock", CIFAR10.base_folder]


@pytest.mark.parametrize("download", [False, True])
def test_archive_put_there_by_hand_is_unpacked(tmp_path, root, server, small, download):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(small[1], fresh)
    assert same(load_splits("cifar10", fresh, download=download).train, load_splits("cifar10", root).train)
    assert not server.got and (fresh / CIFAR10.filename).exists()


def test_wrong_archive_put_there_by_hand_is_named_and_kept(tmp_path, server, small):
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(small[1].read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{archive} is damaged: .* expected {CIFAR10.tgz_md5}"):
        load_splits("cifar10", tmp_path)
    assert archive.read_bytes() == small[1].read_bytes()[:-1]
    assert not server.got and not (tmp_path / CIFAR10.base_folder).exists()


@pytest.fixture
def unheard():
    """A local port that refuses connections, because it is taken and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("trouble", ["no server", "not found", "wrong content"])
def test_failed_download_is_one_error_that_leaves_nothing(tmp_path, unheard, small, monkeypatch, trouble):
    if trouble == "no server":
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{unheard}/{CIFAR10.filename}")
    elif trouble == "not found":
        small[1].unlink()
    else:
        small[1].write_bytes(b"<html>sign in to the hotel's network</html>")
    fresh = tmp_path / "fresh"
    with pytest.raises(DataError) as caught:
        load_splits("cifar10", fresh)
    for part in ("data.root", CIFAR10.url, str(fresh), CIFAR10.tgz_md5):
        assert part in str(caught.value)
    cause = {"no server": urllib.error.URLError, "not found": urllib.error.HTTPError, "wrong content": RuntimeError}
    assert isinstance(caught.value.__cause__, cause[trouble])
    if trouble == "not found":
        caught.value.__cause__.close()  # it is also the open answer of the server
    assert [path.name for path in fresh.iterdir()] == [f".{CIFAR10.filename}.lock"]


def test_root_that_is_a_file_is_named(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"data.root: .*{tmp_path / 'file'}"):
        load_splits("cifar10", tmp_path / "file")


# The real CIFAR-100


@pytest.fixture(scope="module")
def cifar100(cifar_root):
    return load_splits("cifar100", cifar_root, download=False)


@pytest.mark.cifar
def test_real_cifar100(cifar100):
    train, test = cifar100
    assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [500] * 100 and np.bincount(test.labels).tolist() == [100] * 100
    assert (train.classes[0], train.classes[99], len(train.classes)) == ("apple", "worm", 100)
    assert train.classes[train.labels[0]] == "cattle"  # known from the data set's first image
    counts = np.stack([np.bincount(train.images[..., c].ravel(), minlength=256) for c in range(3)]) / (50_000 * 1024)
    values = np.arange(256) / 255
    mean = counts @ values
    np.testing.assert_allclose(train.mean, mean, atol=1e-4)
    np.testing.assert_allclose(train.std, np.sqrt(counts @ values**2 - mean**2), atol=1e-4)


@pytest.mark.cifar
def test_real_subset_s1(cifar100, cifar_root):
    train, test = load_splits("cifar100", cifar_root, classes=20, images_per_class=250, download=False)
    assert np.bincount(train.labels).tolist() == [250] * 20 and np.bincount(test.labels).tolist() == [100] * 20
    firsts = [np.flatnonzero(cifar100.train.labels == k)[:250] for k in range(20)]
    kept = np.sort(np.concatenate(firsts))
    assert np.array_equal(train.images, cifar100.train.images[kept])
    assert np.array_equal(train.labels, cifar100.train.labels[kept])
    assert train.images.flags.c_contiguous and train.classes == cifar100.train.classes[:20]


@pytest.mark.cifar
@pytest.mark.parametrize(
    ("name", "damage"), [("train", "code"), ("train", "truncated"), ("test", "one bit"), ("meta", "one bit")]
)
def test_real_wrong_file(tmp_path, cifar_root, name, damage):
    place, marker = tmp_path / "cifar-100-python", tmp_path / "executed"
    place.mkdir()
    for path in (cifar_root / "cifar-100-python").iterdir():
        if path.name == name and damage != "code":
            shutil.copyfile(path, place / name)
        elif path.name == name:
            (place / name).write_bytes(evil(marker))
        else:
            (place / path.name).symlink_to(path)
    with open(place / name, "r+b") as file:
        if damage == "truncated":
            file.truncate(1_000_000)
        elif damage == "one bit":
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match=f"{place / name} is damaged"):
        load_splits("cifar100", tmp_path, download=False)
    assert not marker.exists()


@pytest.mark.cifar
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_real_missing_file(tmp_path, cifar_root, name):
    (tmp_path / "cifar-100-python").mkdir()
    for path in (cifar_root / "cifar-100-python").iterdir():
        if path.name != name:
            (tmp_path / "cifar-100-python" / path.name).symlink_to(path)
    with pytest.raises(DataError, match=f"cifar-100-python lacks {name};.*cs.toronto.edu"):
        load_splits("cifar100", tmp_path, download=False)


# digits


@DIGITS
def test_digits_is_a_fixed_stratified_split_of_all(name, side):
    train, test = load_splits(name)
    assert (len(train), len(test)) == (1442, 355)
    assert np.bincount(test.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert np.bincount(train.labels).tolist() == [143, 146, 142, 147, 145, 146, 145, 144, 140, 144]
    everything = [image.tobytes() for data in (train, test) for image in data.images]
    assert len(set(everything)) == 1797  # so the halves are disjoint, and nothing is lost
    again = load_splits(name)
    assert same(train, again.train) and same(test, again.test)
    assert (train.name, test.name) == (f"{name}/train", f"{name}/test")


@DIGITS
def test_digits_images_are_scikit_learns_at_a_multiple_of_their_size(name, side):
    train, test = load_splits(name)
    raw = load_digits()
    members = np.flatnonzero(raw.target == 3)
    originals = np.rint(raw.images[np.delete(members, np.s_[4::5])] * (255 / 16))
    expected = F.interpolate(torch.from_numpy(originals)[:, None], size=(side, side), mode="bilinear")[:, 0]
    images = train.images[train.labels == 3]
    assert images.shape == (147, side, side, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert (images == images[..., :1]).all()
    assert (torch.from_numpy(images[..., 0]) - expected).abs().max() <= 1  # Pillow rounds after each axis
    assert train.images.max() == 255 and test.images.min() == 0
    assert train.classes == tuple("0123456789")


@DIGITS
def test_digits_mean_and_std_are_those_of_the_training_half(name, side):
    train, test = load_splits(name)
    np.testing.assert_allclose(train.mean, (train.images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(train.std, (train.images / 255).std(axis=(0, 1, 2)))
    subset = load_splits(name, classes=[1, 7], images_per_class=5)
    assert train.mean == test.mean == subset.train.mean and train.std == test.std == subset.test.std


# folder


def test_folder_lists_classes_and_files_in_order(tree):
    (tree / "train" / "bee" / "notes.txt").write_text("no image")
    (tree / "train" / "README").write_text("no class")
    train, test = load_splits("folder", tree)
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2] and train.labels.dtype == np.int64
    assert [path.name for path in train.images[2:5]] == ["0.jpg", "1.PNG", "2.JPEG"]
    assert list(train.images) == sorted(train.images) and not train.in_memory
    assert test.images == tuple(tree / "val" / name / "0.jpg" for name in test.classes)
    assert (train.name, test.name) == ("folder/train", "folder/val")


def test_folder_finds_images_below_a_class(tree):
    (tree / "train" / "ant" / "images").mkdir()
    (tree / "train" / "ant" / "0.jpg").rename(tree / "train" / "ant" / "images" / "0.jpg")
    assert tree / "train" / "ant" / "images" / "0.jpg" in load_splits("folder", tree).train.images


def test_folder_subset(tree):
    train, test = load_splits("folder", tree, classes=["cat", "ant"], images_per_class=2)
    assert train.classes == test.classes == ("cat", "ant")
    assert [str(path.relative_to(tree / "train")) for path in train.images] == [
        "ant/0.jpg",
        "ant/1.PNG",
        "cat/0.jpg",
        "cat/1.PNG",
    ]
    assert train.labels.tolist() == [1, 1, 0, 0] and test.labels.tolist() == [1, 0]


@pytest.mark.parametrize("gone", [".", "train", "val"])
def test_folder_without_one_of_its_folders(tree, gone):
    shutil.rmtree(tree / gone)
    with pytest.raises(DataError, match=f"data.root: there is no folder {tree / gone};"):
        load_splits("folder", tree)


@pytest.mark.parametrize("root", ["~nobody-of-this-name/birds", "b" * 300])
@pytest.mark.parametrize("name", ["folder", "webdataset", "cifar10"])
def test_a_place_that_cannot_be_is_named(name, root):
    with pytest.raises(DataError, match=f"data.root: .*{root}"):
        load_splits(name, root, download=False)


@pytest.mark.parametrize("half", ["train", "val"])
def test_folder_names_classes_without_images(tree, half):
    shutil.rmtree(tree / half / "ant")
    (tree / half / "ant").mkdir()
    (tree / half / "ant" / "picture.gif").write_bytes(b"")
    with pytest.raises(DataError, match=rf"without images \(.jpg, .jpeg, .png\): {tree / half / 'ant'}$"):
        load_splits("folder", tree)


def test_folder_class_in_one_half_only(tree):
    shutil.rmtree(tree / "val" / "ant")
    with pytest.raises(DataError, match=f"without images .*: {tree / 'val' / 'ant'}$"):
        load_splits("folder", tree)
    (tree / "val" / "wasp").mkdir()
    with pytest.raises(DataError, match=f"{tree / 'val'} has classes that {tree / 'train'} has not: wasp"):
        load_splits("folder", tree)


def test_folder_without_classes(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    with pytest.raises(DataError, match=f"data.root: {tree / 'train'} holds no class folders"):
        load_splits("folder", tree)


# Subsets


def test_subset_by_number_is_the_first_classes_in_order():
    full, part = load_splits("digits"), load_splits("digits", classes=4)
    for a, b in zip(full, part, strict=True):
        assert np.array_equal(b.images, a.images[a.labels < 4]) and np.array_equal(b.labels, a.labels[a.labels < 4])
        assert b.classes == ("0", "1", "2", "3") and b.labels.dtype == np.int64 and b.images.flags.c_contiguous


@pytest.mark.parametrize("classes", [["7", "0", "3"], [7, 0, 3], ("7", 0, "3")])
def test_subset_by_list_numbers_labels_in_the_order_given(classes):
    full, part = load_splits("digits"), load_splits("digits", classes=classes)
    for a, b in zip(full, part, strict=True):
        assert b.classes == ("7", "0", "3") and set(b.labels) == {0, 1, 2}
        kept = np.isin(a.labels, [7, 0, 3])
        assert np.array_equal(b.images, a.images[kept])
        assert np.array_equal(np.array([7, 0, 3])[b.labels], a.labels[kept])


def test_images_per_class_keeps_the_first_training_images_and_all_test_images():
    full, part = load_splits("digits"), load_splits("digits", images_per_class=5)
    firsts = np.sort(np.concatenate([np.flatnonzero(full.train.labels == k)[:5] for k in range(10)]))
    assert np.array_equal(part.train.images, full.train.images[firsts])
    assert np.array_equal(part.train.labels, full.train.labels[firsts])
    assert same(part.test, full.test)


def test_everything_selected_is_the_whole():
    full, part = load_splits("digits"), load_splits("digits", classes=10, images_per_class=None)
    assert same(full.train, part.train) and same(full.test, part.test)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": 1}, "data.classes: 1 is not within 2..10"),
        ({"classes": 11}, "data.classes: 11 is not within 2..10"),
        ({"classes": []}, r"data.classes: \[\] selects 0 class"),
        ({"classes": [3]}, r"data.classes: \[3\] selects 1 class"),
        ({"classes": "3"}, "data.classes: '3' selects 1 class"),
        ({"classes": [3, 10]}, "data.classes: index 10 is not within 0..9"),
        ({"classes": [3, -1]}, "data.classes: index -1 is not within 0..9"),
        ({"classes": [3, 4, 3]}, "data.classes: class 3 .* twice"),
        ({"classes": ["3", 3]}, "data.classes: class 3 .* twice"),
        ({"classes": ["1", "33"]}, "data.classes: there is no class '33'; the nearest is '3'"),
        ({"images_per_class": 0}, "data.images_per_class: 0 is not at least 1"),
        ({"images_per_class": 143}, "data.images_per_class: 143 asked, but class '2' of digits/train has 142"),
        ({"classes": ["1", "8"], "images_per_class": 141}, "141 asked, but class '8' of digits/train has 140"),
    ],
)
def test_wrong_selection_is_refused_by_its_key(keys, message):
    with pytest.raises(DataError, match=message):
        load_splits("digits", **keys)


def test_a_name_of_several_classes_selects_none_of_them(tree):
    """As "crane" and "maillot" of ImageNet's usual names."""
    splits = load_splits("folder", tree)
    alike = Splits(*(replace(split, classes=("crane", "bee", "crane")) for split in splits))
    with patch.dict(DATASETS, alike=lambda root, download: alike), pytest.raises(DataError) as refused:
        load_splits("alike", classes=["bee", "crane"])
    assert str(refused.value) == "data.classes: several classes are called 'crane': say which by index, 0, 2"


def absent(root, download):
    return Path("/proc/none/images.npy").read_bytes()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda root, download: 3, r"DATASETS\['mine'\] must return Splits of two Dataset, got 3$"),
        (lambda root, download: Splits(None, None), r"must return Splits of two Dataset, got Splits\(train=None"),  # pyright: ignore[reportArgumentType]
        (absent, r"mine cannot be read: .*No such file or directory: '/proc/none/images\.npy'$"),
    ],
)
def test_a_data_set_of_ones_own_that_is_none_is_told_of(made, told, monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", made)
    with pytest.raises(DataError, match=rf"^data\.name: .*{told}"):
        load_splits("mine")


def test_unknown_data_set_is_refused_with_the_nearest():
    with pytest.raises(DataError, match=r"data.name: 'cifar' is none of cifar10, .*; the nearest is 'cifar10'"):
        load_splits("cifar")


def test_unknown_test_images_are_refused():
    with pytest.raises(DataError, match="test: 'unusd' is none of test, unused"):
        load_splits("digits", images_per_class=9, test="unusd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, r"images must be uint8 .* not float32 \(4, 8, 8, 3\)"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, r"\(N, H, W, C\) .* not uint8 \(4, 8, 8\)"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8)}, r"not uint8 \(4, 8, 8, 1\) with 3 and 3"),
        ({"std": (0.2,)}, "with 3 and 1"),
        ({"labels": np.zeros(3, np.int64)}, r"labels must be int64 \(4,\), not int64 \(3,\)"),
        ({"labels": np.zeros(4)}, "labels must be .* not float64"),
        ({"labels": np.array([1, 2, 1, 2])}, r"labels must lie within 0\.\.1, for 2 classes, not 1\.\.2"),
        ({"labels": np.array([0, 1, -1, 0])}, r"labels must lie within 0\.\.1, for 2 classes, not -1\.\.1"),
        ({"classes": ()}, "for 0 classes, not 0..0"),
        ({"std": (0.2, 0.0, 0.2)}, r"std must be above 0 for every channel, not \(0.2, 0.0, 0.2\)"),
        ({"std": (0.2, 0.2, float("nan"))}, "std must be above 0"),
        ({"images": (Path("a.png"),) * 4, "mean": (0.5,)}, "files are read as RGB, with 3 numbers .* not 1 and 3"),
    ],
)
def test_a_data_set_made_by_hand_is_checked(change, said):
    fields = dict(
        name="mine", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4, np.int64), classes=("a", "b"),
        mean=(0.5,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    Dataset(**fields)
    with pytest.raises(DataError, match=f"mine: .*{said}"):
        Dataset(**(fields | change))


def test_a_data_set_may_have_no_images():
    digits = load_splits("digits").test
    assert len(digits.keep(np.zeros(len(digits), dtype=bool))) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": (0.4,) * 3}, "mean"),
        ({"std": (0.4,) * 3, "classes": tuple("abcdefghij")}, "classes, std"),
    ],
)
def test_halves_that_do_not_belong_together_are_refused(change, said, monkeypatch):
    train, test = load_splits("digits")
    monkeypatch.setitem(DATASETS, "mine", lambda root, download: Splits(train, replace(test, **change)))
    with pytest.raises(DataError, match=f"data.name: both halves of mine must have the same {said}$"):
        load_splits("mine")


def test_a_digest_is_of_images_labels_and_their_names_in_order():
    test = load_splits("digits").test
    other_pixel = test.array.copy()
    other_pixel[7, 3, 3, 0] ^= 1
    kept_N = np.arange(len(test)) != 5
    others = [
        replace(test, images=other_pixel),
        replace(test, images=test.array[::-1]),
        replace(test, labels=(test.labels + 1) % 10),
        replace(test, classes=tuple("abcdefghij")),
        replace(test, images=np.ascontiguousarray(test.array.reshape(-1, 16, 64, 3))),
        test.keep(kept_N),
        load_splits("digits").train,
    ]
    assert len({data.digest() for data in [test, *others]}) == 8
    assert replace(test, name="mine", mean=(0.0,) * 3).digest() == test.digest() == load_splits("digits").test.digest()


def test_a_digest_of_files_is_that_of_their_copies_elsewhere(tree, tmp_path):
    here = load_splits("folder", tree).test
    shutil.copytree(tree, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # with times of their own
    there = load_splits("folder", tmp_path / "elsewhere").test
    assert here.files != there.files and here.digest() == there.digest()
    with there.files[0].open("ab") as file:
        file.write(b"more")
    assert here.digest() != there.digest()
    there.files[0].unlink()
    with pytest.raises(DataError, match=f"{there.files[0]}: No such file"):
        there.digest()


def test_a_file_of_the_same_size_but_another_time_is_another_image(tree):
    train = load_splits("folder", tree).train
    before, facts = train.identities(), train.files[0].stat()
    os.utime(train.files[0], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert (train.identities() != before).tolist() == [True] + [False] * (len(train) - 1)


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"digits", "digits16"}))
def test_data_on_disk_needs_a_root(name):
    with pytest.raises(DataError, match=r"data.root"):
        load_splits(name)
