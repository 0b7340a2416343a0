"""`tradeoff`: a grid of defenses, attacks and threat models over one federation."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from fltoolkit.options import flag


@dataclass(frozen=True)
class TradeoffOptions:
    """The flags of `python -m fltoolkit tradeoff GRID`."""

    engine: str = flag("processes", "where cells run: processes, or ray (the extra [distributed])", "NAME")
    workers: int = flag(2, "processes at once; with ray and no address, workers of a cluster made here", "N")
    address: str | None = flag(None, "with ray: a running cluster's address, or auto", "ADDRESS")
    show: bool = flag(False, "run nothing: print what a finished run found")
    out: str | None = flag(
        None,
        "folder of cells and result; what is there is not run again (default: runs/tradeoff-TIME)",
        "DIR",
    )
    json: bool = flag(False, "print run.json on stdout and nothing else there")


def run_tradeoff(grid: str, o: TradeoffOptions) -> int:
    """Run what is missing, write the table and the picture, print the points."""
    from fltoolkit.errors import InputError, require
    from fltoolkit.report import terminal
    from fltoolkit.report.files import output_folder
    from fltoolkit.tradeoff import read, run
    from fltoolkit.tradeoff.engines import ENGINES
    from fltoolkit.tradeoff.result import HEAD, lines

    require(o.engine in ENGINES, "engine", f"one of {ENGINES}", o.engine)
    require(o.workers >= 1, "workers", ">= 1", o.workers)
    require(o.address is None or o.engine == "ray", "address", "left out without --engine ray", o.address)
    question = read(grid)
    folder = output_folder(o.out, "tradeoff")
    if o.show:
        path = folder / "run.json"
        if not path.exists():
            raise InputError(f"out must be the folder of a finished run with --show, got {str(folder)!r}")
        content = json.loads(path.read_text(encoding="utf-8"))
    else:
        bar = terminal.Bar("cell", ends=True)
        content = run(question, folder, o.workers, o.engine, o.address, bar)
        bar.close()
    if o.json:
        print(json.dumps(content, allow_nan=False))
    shown = sys.stderr if o.json else sys.stdout
    print(terminal.table(HEAD, list(lines(content))), file=shown)
    for f in content["failed"]:
        print(f"not trained: {f['label']}: {f['reason']}", file=shown)
    files = ", ".join(str(folder / n) for n in ("run.json", "table.csv", "table.parquet", "tradeoff.png"))
    print(f"* on the Pareto front of its threat model\nfiles: {files}", file=shown)
    print(f"the page: python -m fltoolkit report {folder}", file=shown)
    return 0
