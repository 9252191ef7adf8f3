"""CIFAR: what is read is what lies there; what is wrong is named, left alone and never unpickled."""

import hashlib
import io
import pickle
import shutil
import socket
import tarfile
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from test_datasets import same
from torchvision.datasets import CIFAR10

from cutnmix.pipeline import cifar
from cutnmix.pipeline.dataset import DataError
from cutnmix.pipeline.datasets import DATASETS, load_splits

FILES = ["data_batch_1", "data_batch_2", "test_batch", "batches.meta"]
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
