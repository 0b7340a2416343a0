"""Numbers as people read them: a true minus sign, few digits, the interval in brackets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from markupsafe import Markup, escape

NOTHING = "—"
INFINITY = "∞"
_PARTS = re.compile(r"[^,:]*[,:]|[^,:]+")


def number(value: float | None, digits: int, signed: bool = False) -> str:
    """`value` with so many digits after the point, or a dash for None."""
    if value is None:
        return NOTHING
    text = f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")
    return text[1:] if text.strip("−+0.,") == "" and text[0] in "−+" else text


def interval(ci: Sequence[float] | None, digits: int, scale: float = 1.0, signed: bool = False) -> str:
    """`[low, high]`, or nothing where there is none."""
    if ci is None:
        return ""
    low, high = (number(scale * v, digits, signed) for v in ci)
    return f"[{low}, {high}]"


def with_interval(text: str, bounds: str) -> str:
    return f"{text} {bounds}".strip()


def epsilon(value: float | None) -> str:
    """ε with three significant digits; ∞ where nothing is guaranteed."""
    if value is None:
        return INFINITY
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def duration(value: float) -> str:
    """Whole seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


def breakable(text: str) -> Markup:
    """`text` as HTML that may be broken after a comma or a colon."""
    return Markup("").join(
        escape(part) + Markup("<wbr>") * (part[-1] in ",:") for part in _PARTS.findall(text)
    )


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def mean_of(point: Mapping[str, Any], name: str, key: str = "mean") -> float | None:
    """The value of a metric that a point may lack."""
    found = point.get(name)
    return None if found is None else found[key]


def ci_of(point: Mapping[str, Any], name: str) -> Sequence[float] | None:
    found = point.get(name)
    return None if found is None else found.get("ci95")


def power_of_ten(value: float) -> str:
    """A whole power of ten: as it is where it is short, else as 10 and its exponent."""
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    return "10" + str(round(log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
