"""The data sets there are: embedded in libraries, downloaded once with a checksum, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fltoolkit.data.dataset import Dataset
from fltoolkit.data.folder import load_folder
from fltoolkit.data.idx import FASHION_MNIST, MNIST, load_idx
from fltoolkit.data.photos import CROPS, photos
from fltoolkit.errors import InputError, unknown
from fltoolkit.rng import stream
from fltoolkit.types import Examples

DIGITS_TEST = 360


@dataclass(frozen=True)
class Source:
    """load: from what follows the colon in `name:argument`. about: one line for people."""

    load: Callable[[str], Dataset]
    about: str
    takes_argument: bool = False


def _digits(_: str) -> Dataset:
    """1,797 scikit-learn digits, 8x8 grey, split 1,437 / 360 by a fixed shuffle."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images / 16.0).float()[:, None]
    y = torch.from_numpy(raw.target).long()
    order = torch.from_numpy(stream(0, "data", "digits").permutation(len(x)))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return Dataset("digits", Examples(x[train], y[train]), Examples(x[test], y[test]), 10)


def _photos(_: str) -> Dataset:
    """Photographs carry no class, so each crop is a class of its own: crop i has label i."""
    return Dataset("photos", Examples(photos(), torch.arange(CROPS)), None, CROPS)


DATASETS: dict[str, Source] = {
    "photos": Source(_photos, f"{CROPS} crops of scikit-image's photographs, 32x32x3, one class each"),
    "digits": Source(_digits, "1,797 handwritten digits of scikit-learn, 8x8x1, 10 classes"),
    "mnist": Source(lambda _: load_idx(MNIST), "MNIST, 60,000 + 10,000 digits, 28x28x1 (LeCun et al. 1998)"),
    "fashion-mnist": Source(
        lambda _: load_idx(FASHION_MNIST),
        "Fashion-MNIST, 60,000 + 10,000 garments, 28x28x1 (Xiao et al. 2017)",
    ),
    "folder": Source(
        load_folder, "your own images: folder:PATH, resized to 32x32x3, subfolders are classes", True
    ),
}


def load(spec: str) -> Dataset:
    """The data set called `name` or `name:argument`; InputError lists the known names."""
    name, _, argument = spec.partition(":")
    if name not in DATASETS:
        unknown("data set", name, DATASETS)
    source = DATASETS[name]
    if source.takes_argument != bool(argument):
        wanted = f"{name}:PATH" if source.takes_argument else name
        raise InputError(f"data must be {wanted!r}, got {spec!r}")
    return source.load(argument)
