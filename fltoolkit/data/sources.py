"""The data sets there are: embedded in libraries, downloaded once with a checksum, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fltoolkit.data.cifar import load_cifar10
from fltoolkit.data.dataset import Dataset, centred
from fltoolkit.data.femnist import load_femnist
from fltoolkit.data.folder import load_folder
from fltoolkit.data.idx import FASHION_MNIST, MNIST, load_idx
from fltoolkit.data.own import load_tensors, load_torch
from fltoolkit.data.photos import CROPS, photos
from fltoolkit.data.shakespeare import load_characters, load_words
from fltoolkit.errors import InputError, unknown
from fltoolkit.rng import stream
from fltoolkit.types import Examples

DIGITS_TEST = 360


@dataclass(frozen=True)
class Source:
    """load: from what follows the colon in `name:argument`. about: one line for people. argument: what
    to call that in a message, empty where nothing follows."""

    load: Callable[[str], Dataset]
    about: str
    argument: str = ""


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
    "mnist-centred": Source(
        lambda _: centred(load_idx(MNIST)),
        "MNIST with pixels in [-0.5, 0.5], with which the FedAvg paper's numbers come out",
    ),
    "fashion-mnist": Source(
        lambda _: load_idx(FASHION_MNIST),
        "Fashion-MNIST, 60,000 + 10,000 garments, 28x28x1 (Xiao et al. 2017)",
    ),
    "shakespeare": Source(
        load_characters, "lines of Shakespeare's 1,247 roles, next character of 258, clients are roles"
    ),
    "shakespeare-words": Source(
        load_words, "the same roles, ten words at a time, next word of 10,000, clients are roles"
    ),
    "folder": Source(
        load_folder, "your own images: folder:PATH, resized to 32x32x3, subfolders are classes", "PATH"
    ),
    "cifar10": Source(
        load_cifar10, "CIFAR-10, 50,000 + 10,000 photographs, 32x32x3, 10 classes (Krizhevsky 2009)"
    ),
    "femnist": Source(
        load_femnist, "handwritten characters, 28x28x1, 62 classes, clients are writers (Caldas et al. 2018)"
    ),
    "tensors": Source(
        load_tensors, "your own arrays: tensors:PATH.npz or .pt with x, y and, at will, client", "PATH"
    ),
    "torch": Source(
        load_torch, "your own PyTorch data sets: torch:module:function returns them", "module:function"
    ),
}


def load(spec: str) -> Dataset:
    """The data set called `name` or `name:argument`; InputError lists the known names."""
    name, _, argument = spec.partition(":")
    if name not in DATASETS:
        unknown("data set", name, DATASETS)
    source = DATASETS[name]
    if bool(source.argument) != bool(argument):
        wanted = f"{name}:{source.argument}" if source.argument else name
        raise InputError(f"data must be {wanted!r}, got {spec!r}")
    return source.load(argument)
