"""Real photographs to reconstruct: crops of the ones that scikit-image carries."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from fltoolkit.rng import stream

CROPS = 100
SIDE = 32
SOURCES = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle")
FACE = (slice(5, 165), slice(145, 305))
"""Rows and columns of the face in the astronaut's portrait (Eileen Collins; NASA, public domain)."""


@cache
def photos() -> Tensor:
    """`[100, 3, 32, 32]` in [0, 1]: image 0 is the astronaut's face, image i > 0 a random square crop of
    photograph i mod 5 with side 128 to 300, all resized with anti-aliasing."""
    rng = stream(0, "data", "photos")
    crops = [_resize(_photograph("astronaut")[FACE])]
    for i in range(1, CROPS):
        crops.append(_random_crop(_photograph(SOURCES[i % len(SOURCES)]), rng))
    return torch.stack(crops)


def three_photographs(count: int) -> Tensor:
    """`[count, 3, 32, 32]`: the same recipe over astronaut, chelsea and coffee with NumPy's
    `default_rng(0)`, on which other implementations of DLG have been timed."""
    rng = np.random.default_rng(0)
    return torch.stack([_random_crop(_photograph(SOURCES[i % 3]), rng) for i in range(count)])


def _photograph(name: str) -> np.ndarray:
    """An RGB photograph `[H, W, 3]`, uint8, from scikit-image's own files."""
    from skimage import data

    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return image[..., :3]


def _random_crop(image: np.ndarray, rng: np.random.Generator) -> Tensor:
    height, width = image.shape[:2]
    side = int(rng.integers(128, min(300, height, width) + 1))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    return _resize(image[top : top + side, left : left + side])


def _resize(image: np.ndarray) -> Tensor:
    from skimage.transform import resize

    small = resize(image, (SIDE, SIDE), anti_aliasing=True)
    return torch.from_numpy(small).float().permute(2, 0, 1).contiguous()
