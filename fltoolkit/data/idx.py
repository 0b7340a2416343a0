"""MNIST and its drop-ins: four IDX files, from a local folder, the cache, or a checksummed download."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fltoolkit.data.dataset import Dataset
from fltoolkit.data.files import cached, local
from fltoolkit.errors import InputError
from fltoolkit.types import Examples

UINT8 = 8
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class IdxSource:
    """A data set of four IDX files: its folder name, where to download it and the MD5 of each file."""

    name: str
    url: str
    md5: Mapping[str, str]


MNIST = IdxSource(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        FILES[0]: "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        FILES[1]: "d53e105ee54ea40749a09fcbcd1e9432",
        FILES[2]: "9fb629c4189551a2d022fa330f9573f3",
        FILES[3]: "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
FASHION_MNIST = IdxSource(
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        FILES[0]: "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        FILES[1]: "25c81989df183df01b3e8a0aad5dffbe",
        FILES[2]: "bef4ecab320f06d8554ea6380940ec79",
        FILES[3]: "bb300cfdad3c16e7a12a480ee83cd310",
    },
)


def load_idx(source: IdxSource) -> Dataset:
    """From $FLTOOLKIT_DATA/NAME, else the user's cache, else a download into that cache."""
    arrays = [read_idx(_locate(source, f)) for f in FILES]
    sets = []
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels):
            raise InputError(f"{source.name} must have a label an image, got {len(images)} and {len(labels)}")
        x = torch.from_numpy(images.astype(np.float32) / 255)[:, None]
        sets.append(Examples(x, torch.from_numpy(labels.astype(np.int64))))
    return Dataset(source.name, sets[0], sets[1], 10)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file, gzipped or not; InputError names the file where it is not one."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"IDX file must be readable, got {str(path)!r}: {e}") from e
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UINT8:
        raise InputError(
            f"IDX file must begin with 0, 0, {UINT8} (bytes), got {content[:3]!r} in {str(path)!r}"
        )
    dims = content[3]
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims]) if len(content) >= 4 + 4 * dims else ()
    data = np.frombuffer(content, np.uint8, offset=min(len(content), 4 + 4 * dims))
    if len(shape) != dims or data.size != int(np.prod(shape)):
        raise InputError(
            f"IDX file must hold {shape} values as its header says, got {data.size} in {str(path)!r}"
        )
    return data.reshape(shape)


def _locate(source: IdxSource, file: str) -> Path:
    found = local(source.name, f"{file}.gz", file)
    return found or cached(source.name, source.url, f"{file}.gz", source.md5[file])
