"""Finding attacks and defenses by name: our own tables and third parties' entry points.

This is the one place where `fltoolkit` reaches `attacks` and `defenses`, by name and at run time.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from fltoolkit.attack import Attack
from fltoolkit.defense import Defense, DefenseStack
from fltoolkit.errors import InputError, unknown


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
    return _construct("attack", attack_class(name), options, overrides)


def make_defense(spec: str) -> Defense:
    """`"clip:norm=0.5"` -> the defense."""
    name, options = parse(spec)
    return _construct("defense", defense_class(name), options, {})


def make_stack(specs: Sequence[str | Defense], cohort: int | None = None) -> DefenseStack:
    """A checked list of defenses from strings or ready objects, in order."""
    return DefenseStack([make_defense(s) if isinstance(s, str) else s for s in specs], cohort)


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """`"name:key=value,key=value"` -> name and its options, still strings."""
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise InputError(f"{spec!r} must look like name:key=value,key=value, got {item!r}")
        options[key.strip()] = value.strip()
    return name.strip(), options


def describe(cls: type) -> str:
    """The first sentence of a class' docstring."""
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return text.removesuffix(".")


def options_of(cls: type) -> dict[str, Any]:
    """The command-line options of an attack or defense class and their defaults."""
    flags = {field: flag for flag, field in getattr(cls, "aliases", {}).items()}
    return {
        flags.get(f.name, f.name): None if f.default is MISSING else f.default for f in fields(cls) if f.init
    }


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


def _construct(kind: str, cls: type, options: dict[str, str], overrides: dict[str, Any]) -> Any:
    aliases, hints = getattr(cls, "aliases", {}), get_type_hints(cls)
    known = options_of(cls)
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            unknown(f"option of {kind} {cls.name}", key, known)  # type: ignore[attr-defined]
        field = aliases.get(key, key)
        values[field] = _convert(f"{cls.name}:{key}", text, hints[field])  # type: ignore[attr-defined]
    values |= {k: v for k, v in overrides.items() if v is not None and k in known}
    return cls(**values)


def _convert(name: str, text: str, hint: Any) -> Any:
    """Text -> bool, int, float or str as the field's annotation says."""
    kinds = [k for k in (bool, int, float, str) if k is hint or k in getattr(hint, "__args__", ())]
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is not bool:
            try:
                return kind(text)
            except ValueError:
                continue
    expected = " or ".join(k.__name__ for k in kinds)
    raise InputError(f"{name} must be of type {expected}, got {text!r}")
