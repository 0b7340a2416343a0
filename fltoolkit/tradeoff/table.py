"""The tidy table of a grid: a row for every victim of every attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fltoolkit.report.files import write_atomic
from fltoolkit.tradeoff.grid import Grid

Row = dict[str, Any]

COLUMNS = (
    "defense",
    "strength",
    "stack",
    "threat",
    "seed",
    "accuracy",
    "test_examples",
    "epsilon_message",
    "epsilon_aggregate",
    "epsilon_exposed",
    "epsilon_unit",
    "delta",
    "bytes_up",
    "bytes_down",
    "seconds_a_round",
    "attack",
    "round",
    "victim",
    "images",
    "psnr_db",
    "gain_db",
    "ssim",
    "label_accuracy",
    "recovered",
    "adaptation",
    "note",
    "refused",
)
"""An ε that is missing is ∞. A row of a refused attack, or of a failed training, has no victim."""


def rows_of(grid: Grid, found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """All rows, in the order of the grid."""
    return [dict.fromkeys(COLUMNS) | row for row in _rows(grid, found)]


def _rows(grid: Grid, found: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    from fltoolkit.tradeoff.result import label, threat_of
    from fltoolkit.tradeoff.running import attacks_on, training_of

    for curve in grid.curves:
        for strength, stack in enumerate(curve.stacks):
            for seed in grid.seeds:
                training = training_of(grid, stack, seed)
                place = {"defense": curve.name, "strength": strength, "stack": label(stack), "seed": seed}
                trained = found[training.id]
                if "failed" in trained:
                    yield place | {"refused": trained["failed"]}
                    continue
                place |= _trained(trained, grid.delta)
                for job in attacks_on(grid, training):
                    head = place | {"threat": threat_of(job), "attack": job.attack}
                    yield from (head | row for row in _attacked(found[job.id]))


def _trained(trained: Mapping[str, Any], delta: float) -> Row:
    unit = next((u for u in ("client", "example") if u in trained["epsilon"]), "client")
    epsilons = trained["epsilon"].get(unit, {})
    return {
        "accuracy": trained["accuracy"]["value"],
        "test_examples": trained["accuracy"]["n"],
        **{f"epsilon_{view}": epsilons.get(view) for view in ("message", "aggregate", "exposed")},
        "epsilon_unit": unit,
        "delta": delta,
        "bytes_up": trained["bytes"]["up"],
        "bytes_down": trained["bytes"]["down"],
        "seconds_a_round": trained["seconds"],
    }


def _attacked(found: Mapping[str, Any]) -> Iterator[Row]:
    if "refused" in found:
        yield {"refused": found["refused"]}
        return
    for seen in found["rounds"]:
        for v, victim in enumerate(seen["victims"]):
            yield {"round": seen["round"], "victim": v, **victim}


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """table.parquet and table.csv."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = pa.Table.from_pylist(list(rows), schema=_schema())
    write_atomic(folder / "table.parquet", lambda p: parquet.write_table(table, p))
    write_atomic(folder / "table.csv", lambda p: csv.write_csv(table, p))


def _schema() -> Any:
    import pyarrow as pa

    whole = ("strength", "seed", "test_examples", "round", "victim", "images")
    texts = ("defense", "stack", "threat", "attack", "epsilon_unit", "adaptation", "note", "refused")
    kinds = dict.fromkeys(whole, pa.int64()) | dict.fromkeys(texts, pa.string()) | {"recovered": pa.bool_()}
    return pa.schema([(name, kinds.get(name, pa.float64())) for name in COLUMNS])
