"""What the paper printed, cell by cell. The numbers lie in paper.json with their citation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from fltoolkit.errors import InputError, unknown


@dataclass(frozen=True)
class Cell:
    """One number of a table. paper_rounds None: the paper prints a dash (target not reached). baseline: the
    cell that speed-ups are relative to. u: expected local updates a client and round, as printed.
    buffer: examples in a client's shuffle buffer, see `LocalSpec`."""

    id: str
    row: str
    column: str
    baseline: str
    data: str
    model: str
    partition: str
    clients: int
    C: float
    E: int
    B: int | None
    target: float
    paper_rounds: int | None
    u: float | None = None
    buffer: int | None = None

    def setting(self) -> dict[str, Any]:
        """What a run of this cell depends on, as plain data."""
        skip = ("row", "column", "baseline", "paper_rounds", "u")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}


@dataclass(frozen=True)
class Table:
    """name as on the command line; cells in reading order."""

    name: str
    title: str
    note: str
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(c.row for c in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(c.column for c in self.cells))

    def only(self, patterns: Sequence[str]) -> tuple[Cell, ...]:
        """The cells whose id contains any of `patterns`; all where there is none."""
        chosen = tuple(c for c in self.cells if not patterns or any(p in c.id for p in patterns))
        if not chosen:
            known = ", ".join(c.id for c in self.cells)
            raise InputError(f"cells must match one of {known}; got {', '.join(patterns)}")
        return chosen


@cache
def _document() -> dict[str, Any]:
    text = files("fltoolkit.tables").joinpath("paper.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def citation() -> str:
    return str(_document()["citation"])


def names() -> list[str]:
    return list(_document()["tables"])


def table(name: str) -> Table:
    """The table called `name`; InputError lists the known ones."""
    tables = _document()["tables"]
    if name not in tables:
        unknown("table", name, [*tables, "figure1"])
    t = tables[name]
    return Table(name, t["title"], t["note"], tuple(Cell(**c) for c in t["cells"]))
