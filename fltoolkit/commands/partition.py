"""`partition`: what each client of a federation would hold, counted and drawn before anything is trained."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fltoolkit.options import flag

if TYPE_CHECKING:
    from fltoolkit.data.partition import Parts

SCHEMA = "fltoolkit.partition/1"


@dataclass(frozen=True)
class PartitionOptions:
    """The flags of `python -m fltoolkit partition`; those that `train` has too mean the same."""

    data: str = flag("digits", "data set: digits, mnist, ...", "NAME")
    partition: str = flag(
        "iid", "how examples are dealt to clients, e.g. iid, shards, dirichlet:alpha=0.5", "NAME[:key=value]"
    )
    clients: int | None = flag(
        None, "clients K of the federation (default: 100, or those that the data comes from)", "K", int
    )
    seed: int = flag(0, "seed of all random streams, >= 0", "N")
    out: str | None = flag(None, "folder for figure and numbers (default: runs/partition-TIME)", "DIR")
    json: bool = flag(False, "print the numbers as one JSON object on stdout and nothing else there")


@dataclass(frozen=True)
class Holdings:
    """What K clients hold of `examples` examples in all.

    sizes `[K]`: examples a client. counts `[K, classes]`: of each class; whole `[classes]`: the same of all
    the data, dealt or not. Both are None where an example has a line of tokens for a label. note: what must
    be said beside numbers of this data.
    """

    sizes: np.ndarray
    counts: np.ndarray | None
    whole: np.ndarray | None
    examples: int
    note: str = ""

    @property
    def classes(self) -> np.ndarray | None:
        """Classes of which a client has an example, `[K]`."""
        return None if self.counts is None else (self.counts > 0).sum(1)

    @property
    def distance(self) -> np.ndarray | None:
        """Total variation ½ Σ_c |n_kc / n_k − N_c / N| `[K]`, 0 to 1, between the class shares of a client
        and those of all the data."""
        if self.counts is None or self.whole is None:
            return None
        share = self.counts / self.sizes[:, None]
        return np.abs(share - self.whole / self.whole.sum()).sum(1) / 2


def count(parts: Parts, y: np.ndarray, num_classes: int) -> Holdings:
    """Count the `parts` of a data set with labels y `[N]` in 0..num_classes - 1, or tokens `[N, T]`."""
    sizes = np.array([len(p) for p in parts])
    if y.ndim != 1:
        return Holdings(sizes, None, None, len(y))
    counts = np.stack([np.bincount(y[p], minlength=num_classes) for p in parts])
    return Holdings(sizes, counts, np.bincount(y, minlength=num_classes), len(y))


def run_partition(o: PartitionOptions) -> int:
    """Deal, print a table, write partition.png and partition.json. InputError where the flags are
    impossible; then nothing is written."""
    from fltoolkit.report.files import output_folder, write_json
    from fltoolkit.report.partition_figure import partition_figure

    held = _deal(o)
    folder = output_folder(o.out, "partition")
    report = _report(o, held)
    write_json(folder / "partition.json", report)
    title = f"{o.data} dealt to {_clients(held)} by {o.partition}, seed {o.seed}"
    partition_figure(folder / "partition.png", held.sizes, held.counts, title)
    print(_summary(held, folder), file=sys.stderr if o.json else sys.stdout)
    if o.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def _deal(o: PartitionOptions) -> Holdings:
    """The clients that `train` would have under the same flags."""
    from fltoolkit.data import load
    from fltoolkit.data.partition import partition
    from fltoolkit.errors import require
    from fltoolkit.rng import stream

    require(o.seed >= 0, "seed", ">= 0", o.seed)
    data = load(o.data)
    y = data.train.y.numpy()
    parts = partition(o.partition, y, o.clients, stream(o.seed, "partition"), data.client_ids)
    return replace(count(parts, y, data.num_classes), note=data.note)


def _report(o: PartitionOptions, held: Holdings) -> dict[str, Any]:
    from fltoolkit.report import document

    return {
        "schema": SCHEMA,
        "command": document.command_line(),
        "options": {k: v for k, v in asdict(o).items() if k not in ("out", "json")},
        "seed": o.seed,
        "note": held.note,
        "clients": len(held.sizes),
        "examples": held.examples,
        "dealt": int(held.sizes.sum()),
        "sizes": held.sizes.tolist(),
        "counts": _plain(held.counts),
        "whole": _plain(held.whole),
        "distance": _plain(held.distance),
        "mean_distance": None if held.distance is None else float(held.distance.mean()),
        "versions": document.versions(),
    }


def _plain(values: np.ndarray | None) -> Any:
    return None if values is None else values.tolist()


def _summary(held: Holdings, folder: Path) -> str:
    from fltoolkit.report.terminal import table

    rows = [_row("examples", held.sizes)]
    if held.classes is not None and held.distance is not None:
        rows += [_row("classes", held.classes), _row("distance", held.distance)]
        meaning = "distance: total variation between the class shares of a client and of all the data, 0 to 1"
    else:
        meaning = "labels are lines of tokens, so there are no classes to count"
    return "\n".join(
        [
            f"{_clients(held)}, {held.sizes.sum():,} of {held.examples:,} examples dealt",
            table(("a client's", "min", "median", "max", "mean"), rows),
            meaning,
            *([f"note: {held.note}"] if held.note else []),
            f"files: {folder / 'partition.json'}, {folder / 'partition.png'}",
        ]
    )


def _clients(held: Holdings) -> str:
    return "1 client" if len(held.sizes) == 1 else f"{len(held.sizes):,} clients"


def _row(name: str, values: np.ndarray) -> tuple[str, ...]:
    """min, median, max and mean: of whole numbers to a tenth, of others to a thousandth."""
    numbers = (values.min(), np.median(values), values.max(), values.mean())
    if values.dtype.kind == "f":
        return (name, *(f"{v:.3f}" for v in numbers))
    return (name, *(f"{v:,.1f}".removesuffix(".0") for v in numbers))
