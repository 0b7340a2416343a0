"""`report`: the page of a finished trade-off run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fltoolkit.options import flag


@dataclass(frozen=True)
class ReportOptions:
    """The flags of `python -m fltoolkit report RUN`."""

    out: str | None = flag(None, "the HTML file (default: RUN/report.html)", "FILE")


def run_report(run: str, o: ReportOptions) -> int:
    """Write one HTML file about the run in the folder `run`, or in that run.json, and print its path.

    InputError where there is no such run, where it is not JSON or of another schema, or where the file
    cannot be written.
    """
    from fltoolkit.errors import InputError
    from fltoolkit.report.files import write_atomic
    from fltoolkit.report.page import page

    source = Path(run) / "run.json" if Path(run).is_dir() else Path(run)
    text = page(read_run(source))
    path = Path(o.out) if o.out is not None else source.parent / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda p: _put(p, text))
    except OSError as e:
        raise InputError(f"out must be a file that can be written, got {str(path)!r}: {e}") from e
    print(path)
    return 0


def read_run(source: Path) -> dict[str, Any]:
    """What a run.json holds."""
    from fltoolkit.errors import InputError
    from fltoolkit.report.page.page import SCHEMA

    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(
            f"run must be a folder with a run.json, or that file, got {str(source)!r}: {e}"
        ) from e
    except ValueError as e:
        raise InputError(f"run must be JSON, got {str(source)!r}: {e}") from e
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise InputError(f"run must have the schema {SCHEMA!r}, got {schema!r} in {str(source)!r}")
    for key in ("grid", "threats", "points", "failed"):
        if key not in found:
            raise InputError(f"run must hold {key!r}, got none in {str(source)!r}")
    return dict(found)


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
