"""Long searches that outlive their process: what a stack has come to is written down now and then.

Inside `keeping(folder)` every search stores the stack that descends, and what ended ones came to, one file
each. A search begun again inside `keeping` of the same folder goes on from there and gives the same numbers
to the last bit, as nothing is drawn at random once a stack has started. That does not hold for a model that
itself draws at random in each pass, such as one with dropout in training mode.

The name of a file is a fingerprint of all that the search depends on, so that another question starts anew.
Work before a search, such as inferring labels, is done again, and attacks that do not `search` start anew.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from fltoolkit import __version__
from fltoolkit.report.files import write_atomic

SUFFIX = ".kept"

_where: ContextVar[tuple[Path, float] | None] = ContextVar("where searches are kept", default=None)


class Resumable(Protocol):
    """Work that can be written down; its state holds tensors, numbers and text in dicts and lists."""

    device: torch.device

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Nowhere:
    """Outside `keeping`: nothing is written."""

    def resume(self, work: Resumable) -> None:
        """Nothing to go on from."""

    def save(self, work: Resumable, ended: bool = False) -> None:
        """Nothing to do."""


class File(Nowhere):
    """One piece of work in one file, written whole or not at all, at most every `every` seconds."""

    def __init__(self, path: Path, every: float) -> None:
        self.path, self.every, self.last = path, every, time.monotonic()

    def resume(self, work: Resumable) -> None:
        """Go on from the file if there is one; an unreadable one is left aside with a warning."""
        if not self.path.exists():
            return
        try:
            with ZipFile(self.path) as archive:
                if archive.testzip() is not None:  # checksums, which PyTorch does not compare
                    raise BadZipFile
            state = torch.load(self.path, map_location=work.device, weights_only=True)
        except (BadZipFile, OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError):
            warnings.warn(f"cannot read {str(self.path)!r}: this search starts anew", stacklevel=2)
            return
        work.restore(state)

    def save(self, work: Resumable, ended: bool = False) -> None:
        """Write the work down when it is time, or where it has ended."""
        if ended or time.monotonic() - self.last >= self.every:
            write_atomic(self.path, lambda p: torch.save(work.state(), p))
            self.last = time.monotonic()


@contextmanager
def keeping(folder: Path, every: float = 20.0) -> Iterator[None]:
    """Searches inside are kept in `folder`, made if need be, and go on from what is kept there.

    every: seconds between two writes, and so about what a killed process loses at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for half_written in folder.glob(f".*{SUFFIX}"):
        half_written.unlink()
    token = _where.set((folder, every))
    try:
        yield
    finally:
        _where.reset(token)


def forget(folder: Path) -> None:
    """Remove what `keeping` left in `folder`, and the folder if nothing else is in it."""
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink()
    with suppress(OSError):
        folder.rmdir()


def place(*question: object) -> Nowhere:
    """Where to keep the work that `question` determines."""
    where = _where.get()
    if where is None:
        return Nowhere()
    folder, every = where
    return File(folder / f"{fingerprint(*question)}{SUFFIX}", every)


def fingerprint(*values: object) -> str:
    """SHA-256 of the values and of the versions that compute with them, the same in every process.

    Dataclasses count by class and fields, models by structure, mode and numbers, functions by name.
    """
    digest = sha256()
    for part in _bytes((__version__, torch.__version__, values)):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def _bytes(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, nn.Module):
        yield repr(value).encode()
        numbers = (*value.named_parameters(), *value.named_buffers())
        yield from _bytes(([m.training for m in value.modules()], numbers))
    elif is_dataclass(value) and not isinstance(value, type):
        yield _name(type(value))
        for f in fields(value):
            yield f.name.encode()
            yield from _bytes(getattr(value, f.name))
    elif isinstance(value, Mapping):
        yield from _bytes(tuple(value.items()))
    elif isinstance(value, tuple | list):
        yield str(len(value)).encode()
        for v in value:
            yield from _bytes(v)
    elif hasattr(value, "__qualname__"):
        yield _name(value)
    else:
        yield repr(value).encode()


def _name(value: Any) -> bytes:
    return f"{value.__module__}.{value.__qualname__}".encode()
