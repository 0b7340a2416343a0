"""What training in bfloat16 does to the rounds of the FedAvg paper's tables, and to their time.

    python benchmarks/fedavg_precision.py --out benchmarks/results/fedavg_precision.json

Cells of the tables that were run in float32 are trained again with `precision="bf16"`: same seed, learning
rate, initial model, clients and order of examples. Beside the rounds of both to the target stand the times of
ten clients' local training, E = 1, and of an evaluation on the test set, in turns in one process. A
cell that was run again is kept in the result; a killed one goes on from its checkpoint beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fltoolkit import models
from fltoolkit.data import load
from fltoolkit.data.dataset import Dataset
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document, terminal
from fltoolkit.report.figures import ACCENT, INK, panels, save, tidy
from fltoolkit.report.files import write_json
from fltoolkit.rng import torch_stream
from fltoolkit.tables import cells
from fltoolkit.tables.run import Effort, train_at
from fltoolkit.training.engines import choose
from fltoolkit.training.evaluate import evaluate
from fltoolkit.training.task import Task
from fltoolkit.types import PRECISIONS, Examples, LocalSpec

TABLES = Path(__file__).parent / "results" / "tables"
CELLS = (
    ("table2-mnist", "cnn-E1-B50-iid"),
    ("table2-mnist", "cnn-E5-B50-iid"),
    ("table1-cnn", "cnn-C0.0-Binf-iid"),
)
COHORT = 10
WORKS = (("cnn", "mnist-centred", 600, (10, 50, None)), ("charlstm", "shakespeare", 74, (10, None)))
"""Models, data, examples a client and batches of the works that are timed."""


def again(table: str, name: str, folder: Path, known: Path = TABLES) -> dict[str, Any]:
    """The cell `name` of a table, trained in bfloat16 at the rate of the result in `known`, beside it."""
    result = json.loads((known / table / f"{name}.json").read_text(encoding="utf-8"))
    (cell,) = [c for c in cells.table(table).cells if c.id == name]
    effort = replace(Effort(**result["effort"]), precision="bf16")
    bar = terminal.Bar(f"{name} in bfloat16", every=10.0, ends=True)
    run = train_at(
        folder / f"{name}.pt",
        *(cell, effort, effort.index(result["lr"]), inf, cell.target),
        lambda what, done, of, text: bar(done, of, text),
    )
    (before,) = [r for r in result["runs"] if r["lr"] == result["lr"]]
    return {
        "table": table,
        "lr": result["lr"],
        "target": cell.target,
        "rounds": {"float32": result["rounds"], "bf16": run.rounds},
        "corners": {"float32": before["corners"], "bf16": asdict(run)["corners"]},
    }


def times(
    name: str, data: Dataset, examples: int, batches: Sequence[int | None], turns: int
) -> list[dict[str, Any]]:
    """The least seconds of each of a model's works in each precision, in turns."""
    assert data.test is not None
    model = models.build(name, data.input_shape, data.num_classes, torch_stream(0, "model"))
    held = data.train.x[: COHORT * examples].split(examples)
    cohort = [Examples(x, y) for x, y in zip(held, data.train.y.split(examples), strict=False)]
    engine, found = choose(model, cross_entropy, data.input_shape), []
    for batch in batches:
        local = LocalSpec(1, batch, 0.1)
        seconds = _in_turns(lambda now: _train(engine, model, cohort, now), local, turns)
        found.append({"work": f"{name}, ten clients, E = 1, B = {batch or '∞'}", **seconds})
    seconds = _in_turns(lambda now: evaluate(_task(model, now), _row(model), data.test), local, turns)
    return [*found, {"work": f"{name}, evaluation", **seconds}]


def _in_turns(work: Any, local: LocalSpec, turns: int) -> dict[str, float]:
    least = dict.fromkeys(PRECISIONS, inf)
    for _ in range(turns):
        for precision in PRECISIONS:
            begun = time.perf_counter()
            work(replace(local, precision=precision))
            least[precision] = min(least[precision], time.perf_counter() - begun)
    return {**least, "ratio": least["float32"] / least["bf16"]}


def _task(model: torch.nn.Module, local: LocalSpec) -> Task:
    return Task(model, cross_entropy, local, DefenseStack([]), 0)


def _row(model: torch.nn.Module) -> torch.Tensor:
    return _task(model, LocalSpec()).layout.row(model)


def _train(engine: Any, model: torch.nn.Module, cohort: list[Examples], local: LocalSpec) -> None:
    engine(_row(model), cohort, local, [np.random.default_rng(k) for k in range(len(cohort))])


def render(result: dict[str, Any]) -> str:
    """Both tables."""

    def shown(n: float | None) -> str:
        return "—" if n is None else f"{n:.0f}"

    rounds = [(n, *(shown(c["rounds"][p]) for p in PRECISIONS)) for n, c in result["cells"].items()]
    seconds = [
        (t["work"], *(f"{t[k]:.2f}" for k in PRECISIONS), f"{t['ratio']:.1f}") for t in result["times"]
    ]
    return "\n\n".join(
        [
            terminal.table(("rounds to 99 %", *PRECISIONS), rounds),
            terminal.table(("seconds", *PRECISIONS, "ratio"), seconds),
        ]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Best test error so far over rounds, both logarithmic, a panel a cell."""
    figure, axes = panels(len(result["cells"]))
    for axis, (name, cell) in zip(axes, result["cells"].items(), strict=True):
        for (precision, corners), color in zip(cell["corners"].items(), (INK, ACCENT), strict=True):
            rounds, accuracy = zip(*corners, strict=True)
            error = [100 * (1 - a) for a in accuracy]
            axis.step(rounds, error, where="post", color=color, lw=1.3, label=precision)
        axis.axhline(100 * (1 - cell["target"]), color=INK, ls=":", lw=1.0)
        axis.set(xscale="log", yscale="log")
        axis.set_title(name, fontsize=10, color=INK)
        tidy(axis, "rounds", "test error, %")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def _write(out: Path, result: dict[str, Any]) -> None:
    told = {"command": document.command_line(), "versions": document.versions()}
    write_json(out, result | {"about": str(__doc__).splitlines()[0], "seed": 0} | told)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fedavg_precision.json"), help="the result")
    parser.add_argument("--turns", type=int, default=5, help="turns of each work that is timed (default: 5)")
    o = parser.parse_args()
    if o.turns < 1:
        parser.error(f"--turns must be >= 1, got {o.turns}")
    out: Path = o.out
    out.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": {}}
    if "times" not in result:
        result["times"] = [
            row for name, data, *work in WORKS for row in times(name, load(data), *work, o.turns)
        ]
        result["threads"] = torch.get_num_threads()
        _write(out, result)
    for table, name in CELLS:
        if name not in result["cells"]:
            result["cells"][name] = again(table, name, out.parent)
            _write(out, result)
            (out.parent / f"{name}.pt").unlink(missing_ok=True)
    print(render(result))
    draw(result, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
