"""The two ways a run can be refused. Both print as one sentence and end a command with exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn


class InputError(ValueError):
    """A value from the user that cannot work; the message names it and says what was expected."""


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise `InputError("<name> must be <expected>, got <got>")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} must be {expected}, got {got!r}")


def unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raise an `InputError` that lists what is known and, where a spelling is near, suggests it."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
