"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fltoolkit.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then move it there in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; raises InputError where that cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"result must be a readable JSON object, got {str(path)!r}: {e}") from e


def output_folder(out: str | None, prefix: str) -> Path:
    """The folder `out`, or runs/<prefix>-<time>; made now, so that a bad path stops before work starts."""
    folder = Path(out) if out else Path("runs") / f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"out must be a folder that can be written, got {str(folder)!r}: {e}") from e
    if not os.access(folder, os.W_OK):
        raise InputError(f"out must be a folder that can be written, got {str(folder)!r}")
    return folder
