"""`table`: run, resume and print the tables of the FedAvg paper beside its own numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fltoolkit.options import flag

if TYPE_CHECKING:
    from fltoolkit.tables.cells import Cell
    from fltoolkit.tables.run import Effort

TABLES = "table1-2nn, table1-cnn, table2-mnist, table2-shakespeare, table3 or figure1"


@dataclass(frozen=True)
class TableOptions:
    """The flags of `python -m fltoolkit table NAME`."""

    cell: tuple[str, ...] = flag((), "run only cells whose id contains this, repeatable", "TEXT")
    show: bool = flag(False, "run nothing: print what has been run")
    data: str | None = flag(None, "train on this data set instead of the table's", "NAME")
    buffer: int | None = flag(
        None, "examples in a client's shuffle buffer instead of the table's, 0 for all it has", "N", int
    )
    start_lr: float = flag(0.1, "learning rate where the search begins", "LR")
    resolution: int = flag(3, "learning rates are 10^(i/R), i whole; the paper has 3 and 6", "R")
    most: int = flag(9, "learning rates that a cell may try", "N")
    budget: int = flag(5000, "rounds after which a learning rate has not reached the target", "N")
    probe: int | None = flag(
        None, "choose the learning rate by accuracy after N rounds, then run that one only", "N", int
    )
    eval_every: int = flag(1, "rounds between two evaluations on the test set", "N")
    seed: int = flag(0, "seed of all random streams, >= 0", "N")
    seeds: int = flag(1, "runs of a cell at its learning rate, each with the next seed: gives intervals", "N")
    precision: str = flag("float32", "of products: float32, or bf16 where that is faster", "NAME")
    device: str = flag("cpu", "where to compute: cpu, cuda, ...", "NAME")
    out: str | None = flag(None, "folder of the results (default: runs/tables/NAME)", "DIR")


def run_table(name: str, o: TableOptions) -> int:
    """Run what is missing, print the table, draw its figure. InputError where the flags are impossible."""
    from fltoolkit.report.files import output_folder
    from fltoolkit.report.terminal import Bar
    from fltoolkit.tables import figure1, show
    from fltoolkit.tables.cells import table
    from fltoolkit.tables.run import run_cell
    from fltoolkit.tables.seeds import run_seed

    effort = _effort(o)
    chosen = None if name == figure1.NAME else table(name)
    cells = _only_its_own(o) if chosen is None else chosen.only(o.cell)
    folder = Path(o.out or Path("runs") / "tables" / name)
    folder = folder if o.show else output_folder(str(folder), "table")
    if chosen is None:
        return figure1.run(folder, o.seed, o.device, o.show)
    for cell in () if o.show else cells:
        bars: dict[str, Bar] = {}

        def report(what: str, done: int, of: int, text: str, bars: dict[str, Bar] = bars) -> None:
            bar = bars.setdefault(what, Bar(what, every=10.0, start=done - 1, ends=True))
            bar(done, of, text)

        wanted = cell if o.data is None else replace(cell, data=o.data)
        wanted = wanted if o.buffer is None else replace(wanted, buffer=o.buffer or None)
        result = run_cell(wanted, effort, folder, report)
        for seed in range(o.seed + 1, o.seed + o.seeds):
            run_seed(wanted, result, seed, effort, folder, report)
    results = show.read_results(chosen, folder)
    print(show.render(chosen, results))
    if results:
        picture = folder / f"{name}.png"
        show.draw(chosen, results, picture)
        print(f"figure: {picture}")
    return 0


def _only_its_own(o: TableOptions) -> tuple[Cell, ...]:
    """No cells; InputError for a flag that says nothing to Figure 1."""
    from fltoolkit.errors import InputError

    for f in fields(o):
        if f.name not in ("show", "seed", "device", "out") and getattr(o, f.name) != f.default:
            raise InputError(f"{f.name} must be left out for figure1, got {getattr(o, f.name)!r}")
    return ()


def _effort(o: TableOptions) -> Effort:
    from fltoolkit.checks import check_device, check_precision
    from fltoolkit.errors import require
    from fltoolkit.tables.run import Effort

    require(1e-9 <= o.start_lr <= 1e9, "start_lr", "between 1e-9 and 1e9", o.start_lr)
    for name in ("resolution", "budget", "eval_every", "seeds"):
        require(getattr(o, name) >= 1, name, ">= 1", getattr(o, name))
    require(o.most >= 3, "most", ">= 3, to have a learning rate on each side of the best", o.most)
    require(o.probe is None or o.probe >= 1, "probe", ">= 1", o.probe)
    require(o.buffer is None or o.buffer >= 0, "buffer", ">= 0", o.buffer)
    require(o.seed >= 0, "seed", ">= 0", o.seed)
    check_precision(o.precision)
    check_device(o.device)
    return Effort(**{f.name: getattr(o, f.name) for f in fields(Effort)})
