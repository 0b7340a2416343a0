"""Command lines from dataclasses: each field is a flag, its metadata the help text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def flag(default: Any, text: str, metavar: str | None = None, kind: Any = None) -> Any:
    """A field that is a flag. kind: how to read the text (default: the default's type); a tuple as
    default makes the flag repeatable, a bool makes it a switch."""
    meta = {"help": text, "metavar": metavar, "kind": kind}
    return field(default=default, metadata=meta)


def add_options(
    parser: argparse.ArgumentParser, cls: type, known: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Add every field of the dataclass `cls` to `parser`.

    known: what a flag without a default of its own falls back to, for the help text.
    """
    for f in fields(cls):
        name, default, meta = "--" + f.name.replace("_", "-"), f.default, f.metadata
        assert default is not MISSING, f"{cls.__name__}.{f.name} needs a default"
        if isinstance(default, bool):
            parser.add_argument(name, action="store_true", help=meta["help"])
        elif isinstance(default, tuple):
            parser.add_argument(
                name,
                action="append",
                default=[],
                metavar=meta["metavar"],
                help=f"{meta['help']} (default: none)",
            )
        else:
            fallback = known.get(f.name) if default is None else default
            shown = "" if fallback is None else f" (default: {fallback})"
            kind = meta["kind"] or (str if default is None else type(default))
            parser.add_argument(
                name, type=kind, default=default, metavar=meta["metavar"], help=meta["help"] + shown
            )


def read_options(cls: type[T], parsed: argparse.Namespace) -> T:
    """The dataclass from parsed arguments."""
    values = {f.name: getattr(parsed, f.name) for f in fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def count_or_infinity(text: str) -> int | None:
    """A batch size: a whole number, or `inf` for all of a client's data."""
    return None if text == "inf" else int(text)


count_or_infinity.__name__ = "whole number or inf"
