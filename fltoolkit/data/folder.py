"""A user's own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fltoolkit.data.dataset import Dataset
from fltoolkit.errors import InputError
from fltoolkit.types import Examples

SIDE = 32
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def load_folder(path: str) -> Dataset:
    """Images of a folder, cut to their middle square and resized to 32x32 RGB.

    Subfolders are classes in alphabetical order; in a folder without subfolders each image is a class of
    its own. Raises InputError for a path that is not a readable folder of images.
    """
    root = Path(path).expanduser()
    try:
        folders = sorted(p for p in _seen(root) if p.is_dir() and _images(p))
        flat = _images(root)
    except OSError as e:
        raise InputError(f"data folder must be readable, got {path!r}: {e.strerror}") from e
    labelled = [(f, label) for label, folder in enumerate(folders) for f in _images(folder)]
    labelled = labelled or [(f, label) for label, f in enumerate(flat)]
    if not labelled:
        raise InputError(
            f"data folder must hold images ({', '.join(sorted(SUFFIXES))}), got none in {path!r}"
        )
    x = torch.stack([_read(f) for f, _ in labelled])
    y = torch.tensor([label for _, label in labelled])
    return Dataset(f"folder:{path}", Examples(x, y), None, int(y.max()) + 1)


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in _seen(folder) if p.suffix.lower() in SUFFIXES)


def _seen(folder: Path) -> list[Path]:
    """What is not hidden: systems leave previews of their own (`._name.png`, `.thumbnails`) beside images."""
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey divided by 257, where Pillow's own conversion would saturate at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))


def _read(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as image:
            rgb = _eight_bits(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise InputError(f"image must be readable, got {str(path)!r}: {e}") from e
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    small = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32) / 255
    return torch.from_numpy(small).permute(2, 0, 1).contiguous()
