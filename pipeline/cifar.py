"""CIFAR-10 and CIFAR-100, as torchvision reads them: checked first, and fetched where they are missing.

The files are unpickled only after their md5 proved right, because a pickle can run any code. A file that exists but is
wrong is named and left alone: nothing here overwrites what a user put there.
"""

import tarfile
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from cutnmix.pipeline.dataset import Dataset, Splits, below_root
from cutnmix.pipeline.shards import DataError

if TYPE_CHECKING:  # torchvision is imported where it is used: it takes seconds, and digits need none of it
    from torchvision.datasets import CIFAR10


def cifar10(root: Path | None, download: bool = True) -> Splits:
    """CIFAR-10: 50,000 + 10,000 images of 32x32, 10 classes."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, root, download, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(root: Path | None, download: bool = True) -> Splits:
    """CIFAR-100 with its fine labels: 50,000 + 10,000 images of 32x32, 100 classes."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, root, download, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@below_root()
def _cifar(
    name: str,
    source: "type[CIFAR10]",
    root: Path | None,
    download: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Splits:
    """Both halves as torchvision reads them, after a check that names the file at fault; torchvision's names none."""
    if root is None:
        raise DataError(f"data.root: {name} needs the folder that holds {source.base_folder}/, or is to hold it")
    place = root / source.base_folder
    md5s = dict(source.train_list + source.test_list) | {source.meta["filename"]: source.meta["md5"]}
    missing = [file for file in md5s if not (place / file).exists()]
    for file, md5 in md5s.items():
        if file not in missing:
            _verify(place / file, md5, source)
    if missing and not download and not (root / source.filename).exists():
        raise DataError(
            f"data.root: {place} lacks {', '.join(missing)}; "
            f"a training with data.download=true fetches it, or put {source.url} (md5 {source.tgz_md5}) into {root}"
        )
    if missing:
        _fetch(source, root, missing)

    def half(split: str) -> Dataset:
        data = source(root, train=split == "train")  # checks every md5 once more before it unpickles
        images, labels = np.ascontiguousarray(data.data), np.array(data.targets, dtype=np.int64)
        return Dataset(f"{name}/{split}", images, labels, tuple(data.classes), mean, std)

    return Splits(half("train"), half("test"))


def _verify(path: Path, md5: str, source: "type[CIFAR10]") -> None:
    from torchvision.datasets.utils import calculate_md5

    found = calculate_md5(path) if path.is_file() else "none, as it is no file"
    if found != md5:
        raise DataError(
            f"data.root: {path} is damaged: md5 {found}, expected {md5}; "
            f"remove it and run again, or replace it by the one of {source.url}"
        )


def _fetch(source: "type[CIFAR10]", root: Path, missing: list[str]) -> None:
    """Put the missing files under root, each whole or not at all, from the archive in root or else from its URL.

    Several processes may do this at once (the ranks of one run): the first works, the others wait and find it done.
    Not torchvision's download=True: that overwrites files, and leaves half a file when it is killed.
    """
    from torchvision.datasets.utils import download_url

    place, archive = root / source.base_folder, root / source.filename
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{source.filename}.lock"), TemporaryDirectory(prefix=".unpack-", dir=root) as scratch:
            missing = [file for file in missing if not (place / file).exists()]
            if not missing:
                return
            if archive.exists():
                _verify(archive, source.tgz_md5, source)
            else:
                download_url(source.url, scratch, source.filename, source.tgz_md5)
                archive = Path(scratch, source.filename)
            place.mkdir(exist_ok=True)
            with tarfile.open(archive) as tar:
                for member in tar:
                    parent, _, file = member.name.rpartition("/")
                    if parent == source.base_folder and file in missing and (content := tar.extractfile(member)):
                        whole = Path(scratch, file)
                        whole.write_bytes(content.read())
                        whole.replace(place / file)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: torchvision's for a wrong md5
        raise DataError(
            f"data.root: could not get {source.url} into {root} ({error}); "
            f"where there is no connection, put that file (md5 {source.tgz_md5}) into {root} by hand and run again"
        ) from error
