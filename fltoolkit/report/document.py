"""The report of an audit as plain data. `schema.json` beside this file documents and checks every field."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from math import isinf
from pathlib import Path
from typing import Any

AUDIT_SCHEMA = "fltoolkit.audit/1"
TRAIN_SCHEMA = "fltoolkit.train/1"


def schema() -> dict[str, Any]:
    """The JSON schema of `report.json`."""
    text = files("fltoolkit.report").joinpath("schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def finite(value: float) -> float | None:
    """A number as JSON has it: null stands for infinity."""
    return None if isinf(value) else value


def command_line() -> str:
    """The command that made this report, as one would type it."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        program = f"python -m {spec.name.removesuffix('.__main__')}"
    else:
        script = Path(sys.argv[0])
        if script.is_absolute():
            script = (
                script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else Path(script.name)
            )
        program = f"python {script}"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fltoolkit", "torch", "numpy", "scipy", "opacus", "dp-accounting"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
