"""Finding attacks and defenses by name: our own tables and third parties' entry points.

This is the one place where `fltoolkit` reaches `attacks` and `defenses`, by name and at run time.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from fltoolkit.attack import Attack
from fltoolkit.defense import Defense, DefenseStack
from fltoolkit.errors import InputError, unknown
from fltoolkit.specs import construct, options_of, parse


def attack_names() -> list[str]:
    return sorted(_table("attacks"))


def defense_names() -> list[str]:
    return sorted(_table("defenses"))


def attack_class(name: str) -> type[Attack]:
    """The class of the attack called `name`; raises InputError that lists the known ones."""
    return _resolve("attacks", name, Attack)


def defense_class(name: str) -> type[Defense]:
    """The class of the defense called `name`; raises InputError that lists the known ones."""
    return _resolve("defenses", name, Defense)


def make_attack(spec: str, **overrides: Any) -> Attack:
    """`"dlg"` or `"dlg:steps=100,restarts=2"` -> the attack; overrides that are None are left out."""
    name, options = parse(spec)
    return construct("attack", attack_class(name), options, overrides)


def make_defense(spec: str) -> Defense:
    """`"clip:norm=0.5"` -> the defense."""
    name, options = parse(spec)
    return construct("defense", defense_class(name), options)


def make_stack(specs: Sequence[str | Defense], cohort: int | None = None) -> DefenseStack:
    """A checked list of defenses from strings or ready objects, in order."""
    return DefenseStack([make_defense(s) if isinstance(s, str) else s for s in specs], cohort)


def spec_of(public: Mapping[str, Any]) -> str:
    """A defense's public parameters as one would write them on the command line, without what is as usual."""
    usual = options_of(defense_class(str(public["name"])))
    options = ",".join(f"{k}={v}" for k, v in public.items() if k != "name" and v != usual.get(k))
    return f"{public['name']}:{options}" if options else str(public["name"])


def describe(cls: type) -> str:
    """The first sentence of a class' docstring."""
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return text.removesuffix(".")


def _table(package: str) -> dict[str, str]:
    module = importlib.import_module(package)
    table = dict(getattr(module, package.upper()))
    for point in entry_points(group=f"fltoolkit.{package}"):
        table.setdefault(point.name, point.value)
    return table


def _resolve(package: str, name: str, base: type) -> Any:
    table = _table(package)
    if name not in table:
        unknown(package.removesuffix("s"), name, table)
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    if not issubclass(cls, base):
        raise InputError(f"{table[name]} must be a subclass of {base.__name__}")
    return cls
