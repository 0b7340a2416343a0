"""Per-round metrics as JSON lines, and as TensorBoard event files where that package is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from fltoolkit.report.files import write_atomic
from fltoolkit.training.federation import Progressed

METRICS = "metrics.jsonl"


Spent = Mapping[str, Mapping[str, float | None]]
"""ε so far by unit and view, null where infinite."""


def entry(progressed: Progressed, epsilon: Spent = MappingProxyType({})) -> dict[str, Any]:
    """One round as plain data: the test result (null where it was not evaluated, and a loss that overflows),
    ε so far, local steps without an example, each client's examples and the L2 norm of its update before any
    defense, and who failed and why."""
    outcome, test = progressed.outcome, progressed.state.history[-1].test
    norms = outcome.norms.tolist()
    return {
        "round": outcome.number,
        "accuracy": None if test is None else test.accuracy,
        "ci95": None if test is None else list(test.ci95),
        "loss": None if test is None or not isfinite(test.loss) else test.loss,
        "seconds": progressed.seconds,
        "epsilon": {unit: dict(views) for unit, views in epsilon.items()},
        "empty_batches": outcome.empty_batches,
        "clients": [
            {"client": c, "examples": n, "update_norm": norm}
            for c, n, norm in zip(outcome.clients, outcome.num_examples, norms, strict=True)
        ],
        "failed": [{"client": f.client, "reason": f.reason} for f in outcome.failures],
    }


class RoundLog:
    """Appends a line a round to FOLDER/metrics.jsonl, and scalars to FOLDER/tensorboard.

    start: rounds already done; what an interrupted run wrote beyond them is dropped, so that after a
    resumption the file is what the uninterrupted run would have written, but for the seconds.
    """

    def __init__(self, folder: Path, start: int) -> None:
        path = folder / METRICS
        kept = _lines(path)[:start] if start else []
        write_atomic(path, lambda p: _write_text(p, "".join(kept)))
        self._lines: IO[str] = path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", start)

    def __call__(self, progressed: Progressed, epsilon: Spent = MappingProxyType({})) -> None:
        line = entry(progressed, epsilon)
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        if self._board is None:
            return
        for name in ("accuracy", "loss", "seconds"):
            if line[name] is not None:
                self._board.add_scalar(f"round/{name}", line[name], line["round"])
        for unit, views in epsilon.items():
            for view, value in views.items():
                if value is not None:
                    self._board.add_scalar(f"epsilon/{unit}_{view}", value, line["round"])
        norms = progressed.outcome.norms
        if len(norms):
            self._board.add_scalar("clients/mean_update_norm", float(norms.mean()), line["round"])
        self._board.add_scalar("clients/failed", len(line["failed"]), line["round"])

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; one that a killed run left half-written is not among them."""
    if not path.exists():
        return []
    return [s for s in path.read_text(encoding="utf-8").splitlines(keepends=True) if s.endswith("\n")]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _board(folder: Path, start: int) -> Any:
    """A TensorBoard writer that hides what an interrupted run wrote after round `start`, or None. A run from
    the start takes the place of what was there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if start == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
