"""Data sets: what is read is what lies there, and what is wrong is named."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from cutnmix.pipeline.dataset import DataError, Dataset, Splits
from cutnmix.pipeline.datasets import DATASETS, load_splits

DIGITS = pytest.mark.parametrize(("name", "side"), [("digits", 32), ("digits16", 16)])


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
