"""FEMNIST, handwritten characters whose writers are the clients: Caldas et al. 2018, "LEAF: a benchmark for
federated settings", arXiv:1812.01097, from EMNIST (Cohen et al. 2017, arXiv:1702.05373)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch

from fltoolkit.data.dataset import Dataset
from fltoolkit.data.files import local, read_npz
from fltoolkit.errors import InputError
from fltoolkit.types import Examples

FILE = "femnist_sample.npz"
CLASSES = 62
NOTE = (
    "FEMNIST: a sample of {writers} writers of LEAF's; {twins} test images also occur in the training part "
    "of the same writer, as in LEAF."
)
Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Images `[N, 28, 28]` uint8, classes `[N]` and writers `[N]`."""


def load_femnist(_: str) -> Dataset:
    """x float32 `[N, 1, 28, 28]` in [0, 1], ink 0 on paper 1 as in LEAF; y int64 in 0..61 for 0-9, A-Z, a-z;
    `clients`: the writer of each training image. The writers of test images are the same ones.

    From $FLTOOLKIT_DATA/femnist/femnist_sample.npz with uint8 x_train and x_test `[N, 28, 28]`, y_train,
    y_test, writer_train, writer_test `[N]` and the names `writers [K]`. There is no download: InputError
    says so where the file is not there, and names what is wrong with it where it is.
    """
    path = local("femnist", FILE)
    if path is None:
        raise InputError(
            f"data 'femnist' must be at hand, there is no download: set FLTOOLKIT_DATA to a folder that "
            f"holds femnist/{FILE}, got {os.environ.get('FLTOOLKIT_DATA', '')!r}"
        )
    keys = [f"{key}_{part}" for part in ("train", "test") for key in ("x", "y", "writer")]
    arrays = read_npz(path, *keys, "writers")
    train, test = (_part(arrays, part, str(path)) for part in ("train", "test"))
    count = len(arrays["writers"])
    if not np.array_equal(np.unique(train[2]), np.arange(count)):
        raise InputError(
            f"each of the {count} writers must have training images, got others in {str(path)!r}"
        )
    return Dataset(
        "femnist",
        _examples(train),
        _examples(test),
        CLASSES,
        clients=torch.from_numpy(train[2].astype(np.int64)),
        note=NOTE.format(writers=count, twins=_twins(train, test)),
    )


def _part(arrays: Mapping[str, np.ndarray], part: str, path: str) -> Part:
    x, y, writer = (arrays[f"{key}_{part}"] for key in ("x", "y", "writer"))
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28) or not len(x):
        raise InputError(f"x_{part} must be [N, 28, 28] uint8, got {x.shape} {x.dtype} in {path!r}")
    for key, values, below in (("y", y, CLASSES), ("writer", writer, len(arrays["writers"]))):
        if values.shape != (len(x),) or not np.isin(values, np.arange(below)).all():
            raise InputError(
                f"{key}_{part} must be {len(x)} numbers in 0..{below - 1}, "
                f"got {values.shape} {values.dtype} in {path!r}"
            )
    return x, y, writer


def _examples(part: Part) -> Examples:
    x, y, _ = part
    return Examples(torch.from_numpy(x).float().div_(255)[:, None], torch.from_numpy(y.astype(np.int64)))


def _twins(train: Part, test: Part) -> int:
    """How many test images the same writer's training part holds too, pixel by pixel."""
    seen = {(int(w), image.tobytes()) for image, w in zip(train[0], train[2], strict=True)}
    return sum((int(w), image.tobytes()) in seen for image, w in zip(test[0], test[2], strict=True))
