"""`NAME:key=value,key=value` on the command line -> frozen dataclasses whose fields are the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import isfinite
from typing import Any, get_type_hints

from fltoolkit.errors import InputError, require, unknown


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


def options_of(cls: type) -> dict[str, Any]:
    """The command-line options of an attack or defense class and their defaults."""
    flags = {field: flag for flag, field in getattr(cls, "aliases", {}).items()}
    return {
        flags.get(f.name, f.name): None if f.default is MISSING else f.default for f in fields(cls) if f.init
    }


def construct(
    kind: str, cls: type, options: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> Any:
    """A dataclass from options as text and overrides as values; overrides that are None are left out."""
    aliases, hints = getattr(cls, "aliases", {}), get_type_hints(cls)
    known = options_of(cls)
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            unknown(f"option of {kind} {cls.name}", key, known)  # type: ignore[attr-defined]
        field = aliases.get(key, key)
        values[field] = _convert(f"{cls.name}:{key}", text, hints[field])  # type: ignore[attr-defined]
    for key, value in (overrides or {}).items():
        if value is not None and key not in known:
            unknown(f"option of {kind} {cls.name}", key, known)  # type: ignore[attr-defined]
    values |= {k: v for k, v in (overrides or {}).items() if v is not None}
    for name, value in values.items():
        endless = isinstance(value, float) and not isfinite(value)
        require(not (kind == "attack" and endless), f"{cls.name}:{name}", "finite", value)  # type: ignore[attr-defined]
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
