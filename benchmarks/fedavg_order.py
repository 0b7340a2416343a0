"""How much federated averaging on non-IID clients hangs on how well a client mixes its own examples.

    python benchmarks/fedavg_order.py --out benchmarks/results/fedavg_order.json

McMahan et al. 2017 cut a client's data into batches without saying whether they are shuffled before. The
cell of their Table 1 with the 2NN, C = 0.1, E = 1 and B = 10 is run with several orders in which a client
visits its 600 examples: shuffled anew in each round, as everywhere else in the toolkit; drawn from a shuffle
buffer that holds only some of them at a time, as input pipelines do; and as they lie, sorted by label where
clients hold two shards each. IID clients, whose examples lie in random order, are the control. Rounds to 97 %
test accuracy. A finished run is kept in the result, and the next start goes on behind it.

    python benchmarks/fedavg_order.py --tables

prints the cells of the paper's tables that were also run through a buffer of 100, by `python -m fltoolkit
table NAME --buffer 100 --out benchmarks/results/tables/NAME-buffer-100`, beside the same ones shuffled.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fltoolkit import models
from fltoolkit.algorithms.fedavg import select_clients
from fltoolkit.data import load
from fltoolkit.data.dataset import Dataset
from fltoolkit.data.partition import partition
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document, terminal
from fltoolkit.report.figures import ACCENT, INK, panels, save, tidy
from fltoolkit.report.files import write_json
from fltoolkit.rng import stream, torch_stream
from fltoolkit.tables import cells, show
from fltoolkit.tables.search import rounds_to
from fltoolkit.tables.seeds import Estimate
from fltoolkit.training.clients import Dealt
from fltoolkit.training.engines import choose
from fltoolkit.training.evaluate import evaluate
from fltoolkit.training.task import Task
from fltoolkit.types import LocalSpec

CLIENTS, FRACTION, TARGET, BUDGET = 100, 0.1, 0.97, 4000
LOCAL = LocalSpec(epochs=1, batch=10, lr=0.1)
TICKS = (500, 1000, 2000)
BUFFERED = "-buffer-100"
"""What the names of the folders end with that keep tables run through a buffer."""
PAPER = {"iid": 87, "shards": 664}
ORDERS: dict[str, int | None] = {
    "shuffled": None,
    "buffer of 300": 300,
    "buffer of 100": 100,
    "as they lie": 1,
}
"""Name -> examples that the shuffle buffer holds; None: all of them."""


@dataclass(frozen=True)
class Setting:
    """One training. clients: how the data are dealt out; order: of ORDERS."""

    clients: str
    order: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.clients}, {self.order}, seed {self.seed}"


def rounds(setting: Setting, data: Dataset, budget: int, target: float) -> tuple[float | None, float]:
    """Rounds to the target, None where the budget ends before, and the best accuracy."""
    seed = setting.seed
    assert data.test is not None
    parts = partition(setting.clients, data.train.y.numpy(), CLIENTS, stream(seed, "partition"))
    clients, test = Dealt(data.train, parts), data.test
    model = models.build("2nn", data.input_shape, data.num_classes, torch_stream(seed, "model"))
    local = replace(LOCAL, buffer=ORDERS[setting.order])
    task = Task(model, cross_entropy, local, DefenseStack([]), seed)
    engine, params = choose(model, cross_entropy, data.input_shape), task.layout.row(model)
    curve: list[tuple[int, float]] = []
    for number in range(1, budget + 1):
        cohort = select_clients(CLIENTS, FRACTION, seed, number)
        rngs = [stream(seed, "order", number, k) for k in cohort]
        params = params + engine(params, [clients[k] for k in cohort], local, rngs).mean(0)
        curve.append((number, evaluate(task, params, test).accuracy))
        if curve[-1][1] >= target:
            break
    return rounds_to(curve, target), max(a for _, a in curve)


def settings(seeds: int) -> list[Setting]:
    both = [("shards", order) for order in ORDERS] + [("iid", order) for order in ("shuffled", "as they lie")]
    return [Setting(clients, order, seed) for clients, order in both for seed in range(seeds)]


def summary(runs: dict[str, dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """A row a partition and order of which all seeds were run."""
    rows: dict[tuple[str, str], list[Setting]] = {}
    for s in settings(seeds):
        rows.setdefault((s.clients, s.order), []).append(s)
    return [
        {"clients": clients, "order": order, "paper": PAPER[clients], **_estimated(runs, found)}
        for (clients, order), found in rows.items()
        if all(s.name in runs for s in found)
    ]


def _estimated(runs: dict[str, dict[str, Any]], found: list[Setting]) -> dict[str, Any]:
    each = [runs[s.name] for s in found]
    e = Estimate.of(each)
    return {
        "rounds": [r["rounds"] for r in each],
        "mean": e.mean,
        "ci95": e.ci95,
        "reached": e.reached,
        "seeds": e.seeds,
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The summary as a table."""
    lines = []
    for r in rows:
        ends = "" if r["ci95"] is None else f" [{r['ci95'][0]:.0f}, {r['ci95'][1]:.0f}]"
        more = ">" if r["reached"] < r["seeds"] else ""
        mean = "—" if r["mean"] is None else f"{more}{r['mean']:.0f}{ends}"
        lines.append((r["clients"], r["order"], mean, f"{r['reached']} of {r['seeds']}", str(r["paper"])))
    return terminal.table(("clients", "order", "rounds", "reached", "paper"), lines)


def tables(results: Path) -> str:
    """Every cell of the paper's tables that was run through a buffer of 100, beside the same one shuffled."""
    lines = []
    for name in cells.names():
        table = cells.table(name)
        shuffled, buffered = (show.read_results(table, results / f"{name}{end}") for end in ("", BUFFERED))
        for cell in (c for c in table.cells if c.id in buffered):
            ours = [show.ours(cell, found) for found in (shuffled, buffered)]
            lines.append((cell.id, *ours, str(cell.paper_rounds)))
    return terminal.table(("cell", "shuffled", "buffer of 100", "paper"), lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Rounds (logarithmic) by order on the non-IID clients, each seed a dot, beside the paper's number."""
    figure, (axis,) = panels(1)
    shown = [r for r in rows if r["clients"] == "shards"]
    for i, r in enumerate(shown):
        reached = [n for n in r["rounds"] if n is not None]
        axis.plot([i] * len(reached), reached, "o", color=ACCENT, ms=5, alpha=0.7)
        if r["mean"] is not None:
            axis.plot([i - 0.2, i + 0.2], [r["mean"]] * 2, color=INK, lw=1.6)
    axis.axhline(PAPER["shards"], color=INK, ls=":", lw=1.2, label="McMahan et al. 2017")
    axis.set_yscale("log")
    axis.set_yticks(TICKS, [f"{n:,}" for n in TICKS])
    axis.minorticks_off()
    axis.set_xticks(range(len(shown)), [r["order"] for r in shown])
    axis.set_title("2NN, non-IID, C = 0.1, E = 1, B = 10", fontsize=10, color=INK)
    tidy(axis, "order of a client's examples", "rounds to 97 %")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


@cache
def mnist() -> Dataset:
    return load("mnist-centred")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings an order")
    parser.add_argument("--out", type=Path, default=Path("runs/fedavg_order.json"), help="the result")
    parser.add_argument("--tables", action="store_true", help="print the tables' cells, train nothing")
    options = parser.parse_args()
    if options.tables:
        print(tables(Path(__file__).parent / "results" / "tables"))
        return
    if options.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {options.seeds}")
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": {}}
    for setting in settings(options.seeds):
        if setting.name not in result["runs"]:
            reached, best = rounds(setting, mnist(), BUDGET, TARGET)
            print(
                f"{setting.name}: {'not reached' if reached is None else f'{reached:.0f} rounds'}", flush=True
            )
            result["runs"][setting.name] = {"rounds": reached, "best": best}
            write_json(
                out, {**_head(), "runs": result["runs"], "rows": summary(result["runs"], options.seeds)}
            )
    rows = summary(result["runs"], options.seeds)
    print(render(rows))
    draw(rows, out.with_suffix(".png"))


def _head() -> dict[str, Any]:
    cell = {"data": "mnist-centred", "model": "2nn", "clients": CLIENTS, "C": FRACTION, "E": LOCAL.epochs}
    return {
        "task": {**cell, "B": LOCAL.batch, "lr": LOCAL.lr, "target": TARGET, "budget": BUDGET},
        "command": document.command_line(),
        "versions": document.versions(),
    }


if __name__ == "__main__":
    main()
