"""Files of data sets: in the folder $FLTOOLKIT_DATA, or downloaded once into the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fltoolkit.errors import InputError


def local(name: str, *files: str) -> Path | None:
    """The first of `files` that is in $FLTOOLKIT_DATA/NAME, None where none is or the variable is not set."""
    root = os.environ.get("FLTOOLKIT_DATA")
    paths = [Path(root) / name / file for file in files] if root else []
    return next((path for path in paths if path.exists()), None)


def cached(name: str, url: str, file: str, md5: str) -> Path:
    """`url` + `file` in the user's cache, downloaded first where it is not there; InputError where that fails
    or gives other content."""
    import pooch

    try:
        found = pooch.retrieve(url + file, f"md5:{md5}", fname=file, path=pooch.os_cache("fltoolkit") / name)
    except Exception as e:
        raise InputError(
            f"data {name!r} must be at hand or downloadable; {url}{file} gave: {e}. "
            f"Set FLTOOLKIT_DATA to a folder that holds {name}/{file}"
        ) from e
    return Path(found)


def read_npz(path: Path, *required: str) -> dict[str, np.ndarray]:
    """The arrays in an .npz file; InputError if unreadable, if it holds pickles or lacks one `required`."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
    except Exception as e:  # OSError, ValueError, BadZipFile, zlib.error, ... by where the file is broken
        raise InputError(f"data file must be a readable .npz without pickles, got {str(path)!r}: {e}") from e
    missing = [key for key in required if key not in arrays]
    if missing:
        raise InputError(f"data file {str(path)!r} must hold {', '.join(missing)}, got {', '.join(arrays)}")
    return arrays
