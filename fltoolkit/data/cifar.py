"""CIFAR-10 in its published order: Krizhevsky 2009, "Learning multiple layers of features from tiny images".

From the published batches where they are at hand, else from a JPEG copy of them, else from a download.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fltoolkit.data.dataset import Dataset
from fltoolkit.data.files import cached, local, read_npz
from fltoolkit.errors import InputError, require
from fltoolkit.types import Examples

URL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE, MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
JPEGS, LABELS = "cifar10-jpeg.zip", "labels.npz"
CLASSES, SHAPE = 10, (3, 32, 32)
LOSSY = (
    "CIFAR-10: the images are a lossy JPEG re-encoding of the published ones "
    "(mean error about 5.8 of 255, as measured on 5,506 images)."
)
Part = tuple[np.ndarray, np.ndarray]
"""Images `[N, 3, 32, 32]` uint8 and labels `[N]`."""


def load_cifar10(_: str) -> Dataset:
    """x float32 `[N, 3, 32, 32]` in [0, 1], y int64 in 0..9; 50,000 for training and 10,000 for testing.

    Looks in $FLTOOLKIT_DATA/cifar10 for the folder cifar-10-batches-py, for cifar-10-python.tar.gz, and for
    cifar10-jpeg.zip with labels.npz beside it, whose Dataset says in `note` that it is lossy; then in the
    user's cache, which a download fills. Raises InputError, naming the file, where one is not what it should
    be or the download fails.
    """
    if folder := local("cifar10", FOLDER):
        return _published(_read_folder(folder), folder)
    if archive := local("cifar10", ARCHIVE):
        return _published(_read_tar(archive), archive)
    if jpegs := local("cifar10", JPEGS):
        return _lossy(jpegs)
    archive = cached("cifar10", URL, ARCHIVE, MD5)
    return _published(_read_tar(archive), archive)


def _dataset(train: Part, test: Part, note: str = "") -> Dataset:
    sets = [
        Examples(torch.from_numpy(x).float().div_(255), torch.from_numpy(y.astype(np.int64)))
        for x, y in (train, test)
    ]
    return Dataset("cifar10", sets[0], sets[1], CLASSES, note=note)


def _published(contents: Mapping[str, bytes], source: Path) -> Dataset:
    parts = [read_batch(contents[name], f"{source}: {name}") for name in BATCHES]
    x, y = (np.concatenate(side) for side in zip(*parts[:-1], strict=True))
    return _dataset((x, y), parts[-1])


def _read_folder(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in BATCHES}
    except OSError as e:
        raise InputError(f"CIFAR-10 batch must be readable, got {e.filename!r}: {e.strerror}") from e


def _read_tar(path: Path) -> dict[str, bytes]:
    """The batches by name, in one pass over the archive and without unpacking it to disk."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder == FOLDER and name in BATCHES and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except Exception as e:  # OSError, TarError, EOFError, zlib.error, ... by where the archive is broken
        raise InputError(f"CIFAR-10 archive must be a readable .tar.gz, got {str(path)!r}: {e}") from e
    missing = [name for name in BATCHES if name not in found]
    if missing:
        raise InputError(f"CIFAR-10 archive must hold {FOLDER}/{missing[0]}, got {str(path)!r} without")
    return found


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays out of a pickle and refuses every other class or function that it names."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return self.ALLOWED[module, name]


def read_batch(content: bytes, source: str) -> Part:
    """One pickled batch: a dict of data uint8 `[n, 3072]` and labels, a list of n numbers in 0..9.

    Nothing in the pickle is executed but what rebuilds NumPy arrays. Raises InputError, naming `source`.
    """
    expected = f"a pickled dict of data [n, 3072] uint8 and n labels in 0..{CLASSES - 1}"
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        x, y = np.asarray(batch["data"]), np.asarray(batch["labels"])
    except Exception as e:  # a foreign pickle raises whatever it likes
        raise InputError(f"CIFAR-10 batch must be {expected}, got {source!r}: {type(e).__name__}: {e}") from e
    good = x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == np.prod(SHAPE) and len(x) > 0
    good = good and y.shape == (len(x),) and np.isin(y, np.arange(CLASSES)).all()
    if not good:
        raise InputError(
            f"CIFAR-10 batch must be {expected}, "
            f"got data {x.shape} {x.dtype} and labels {y.shape} {y.dtype} in {source!r}"
        )
    return x.reshape(-1, *SHAPE), y


def _lossy(path: Path) -> Dataset:
    """SPLIT/CLASS/NNNN.jpg in a zip archive, NNNN counting within a class in the published order, which the
    published labels therefore restore."""
    known = read_npz(path.with_name(LABELS), "train", "test", "classes")
    classes = known["classes"].astype(str)
    require(classes.shape == (CLASSES,), f"classes in {LABELS}", f"{CLASSES} names", classes.tolist())
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as e:
        raise InputError(f"CIFAR-10 images must be in a zip archive, got {str(path)!r}: {e}") from e
    with archive:
        train, test = (_read_jpegs(archive, split, known[split], classes) for split in ("train", "test"))
    return _dataset(train, test, LOSSY)


def _read_jpegs(archive: zipfile.ZipFile, split: str, y: np.ndarray, classes: np.ndarray) -> Part:
    """One image after the other: at 32x32, threads cost more in waiting for each other than they gain."""
    if y.ndim != 1 or not len(y) or not np.isin(y, np.arange(CLASSES)).all():
        raise InputError(f"{split} in {LABELS} must be labels [N] in 0..{CLASSES - 1}, got others")
    rank = np.empty(len(y), np.int64)
    for c in range(CLASSES):
        rank[y == c] = np.arange((y == c).sum())
    x = np.empty((len(y), 32, 32, 3), np.uint8)
    for i, (c, r) in enumerate(zip(y, rank, strict=True)):
        x[i] = _decode(archive, f"{split}/{classes[c]}/{r:04d}.jpg")
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y


def _decode(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(archive.read(member)), formats=("JPEG",)) as image:
            if (image.mode, image.size) != ("RGB", (32, 32)):
                raise ValueError(f"{image.mode} of {image.size}")
            return np.asarray(image)
    except Exception as e:  # KeyError, BadZipFile, zlib.error, OSError, ... by where it is broken
        raise InputError(
            f"CIFAR-10 image must be a readable JPEG, RGB of (32, 32), got {member!r} "
            f"in {archive.filename!r}: {e}"
        ) from e
