"""A cell's learning rate run again with other seeds, which shows how far its rounds are luck.

A seed draws the initial model, the partition, the cohorts and the order of examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, inf, log
from pathlib import Path
from typing import Any

import torch

from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report import document
from fltoolkit.report.files import read_json, write_json
from fltoolkit.tables.cells import Cell
from fltoolkit.tables.run import Effort, Report, train_at

SCHEMA = "fltoolkit.table-seed/1"


@dataclass(frozen=True)
class Estimate:
    """Rounds to the target over `seeds` runs, of which `reached` reached it.

    mean: the geometric mean, in which a seed that did not reach the target counts with the rounds it ran, or
    with the most that another needed where it ended sooner, so that the mean is a lower bound then; None
    where not even half reached it. ci95: of it, by Student's t on the logarithms; None where it is a bound,
    or there is only one seed.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    reached: int
    seeds: int

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]]) -> Estimate:
        """From each seed's run, with "rounds" to the target, None where it was not reached in "ran"."""
        reached = [r["rounds"] for r in runs if r["rounds"] is not None]
        if 2 * len(reached) < len(runs) or not reached:
            return cls(None, None, len(reached), len(runs))
        if len(runs) == 1:
            return cls(reached[0], None, 1, 1)
        least = [max(r["ran"], *reached) for r in runs if r["rounds"] is None]
        found = mean_interval([log(n) for n in (*reached, *least)])
        ends = None if least else found["ci95"]
        return cls(exp(found["mean"]), ends and (exp(ends[0]), exp(ends[1])), len(reached), len(runs))

    @property
    def bound(self) -> bool:
        """Whether the mean is a lower bound."""
        return self.mean is not None and self.reached < self.seeds


def run_seed(
    cell: Cell, result: Mapping[str, Any], seed: int, told: Effort, folder: Path, report: Report
) -> None:
    """Train `cell` at the learning rate of `result` with another seed, on the device and in the precision of
    `told`, or go on where that stopped; writes FOLDER/seeds/ID+SEED.json."""
    stem = _stem(folder, cell.id, result)
    path = stem.with_name(f"{stem.name}+{seed}.json")
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    known = Effort(**result["effort"])
    effort = replace(known, seed=seed, device=told.device, precision=told.precision)
    checkpoint = path.with_suffix(".pt")
    run = train_at(checkpoint, cell, effort, effort.index(result["lr"]), inf, cell.target, report)
    content = {
        "schema": SCHEMA,
        "cell": cell.setting(),
        "effort": asdict(effort),
        "run": asdict(run),
        "command": document.command_line(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": document.versions(),
    }
    write_json(path, content)
    checkpoint.unlink(missing_ok=True)


def read_seeds(folder: Path, cell_id: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of the cell's other seeds, by seed."""
    stem = _stem(folder, cell_id, result)
    found = [read_json(p) for p in stem.parent.glob(f"{stem.name}+*.json")]
    return [f["run"] | {"effort": f["effort"]} for f in sorted(found, key=lambda f: int(f["effort"]["seed"]))]


def _stem(folder: Path, cell_id: str, result: Mapping[str, Any]) -> Path:
    """Where the seeds of a cell lie, less the seed: with the cell that it shares its run with, if any, and if
    that has the same target. Neither may have reached its own, but another seed can."""
    home = folder / f"{cell_id}.json"
    if "shared_with" in result:
        twin = folder.parent / result["shared_with"]
        if twin.exists() and read_json(twin)["cell"]["target"] == result["cell"]["target"]:
            home = twin
    return home.parent / "seeds" / home.stem
