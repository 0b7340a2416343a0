"""Whether the initial weights explain why rounds to 99 % differ from the FedAvg paper's.

    python benchmarks/fedavg_init.py --out benchmarks/results/fedavg_init.json

McMahan et al. 2017 do not print how they draw the initial model. Their CNN has the layers of TensorFlow's
MNIST example of 2015, which draws weights from a normal distribution of standard deviation 0.1, cut off at
two of them, and sets biases to 0.1, those of the first layer to 0. The cell of their Table 2 with E = 1 and
B = 10 on IID clients is trained from such weights at several learning rates, for a stated number of rounds,
beside the table's own run from PyTorch's uniform ones. A killed run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fltoolkit import models
from fltoolkit.report import document, terminal
from fltoolkit.report.files import write_json
from fltoolkit.tables import cells, run

TABLES = Path(__file__).parent / "results" / "tables"
TABLE, CELL = "table2-mnist", "cnn-E1-B10-iid"
RATES = (-4, -3, -2)
"""Indices on the grid 10^(i/3): 0.046, 0.1 and 0.22."""
WIDTH, BIAS = 0.1, 0.1


@torch.no_grad()
def draw_as_in_2015(model: nn.Module, rng: torch.Generator) -> None:
    """Draw the weights of a model's linear layers and convolutions as TensorFlow's example does, in place."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=WIDTH, a=-2 * WIDTH, b=2 * WIDTH, generator=rng)
        assert layer.bias is not None
        layer.bias.fill_(0.0 if layer is layers[0] else BIAS)


@contextmanager
def drawn_as_in_2015() -> Iterator[None]:
    """Every model that is built inside has weights drawn so."""
    build = models.build

    def built(name: str, input_shape: tuple[int, ...], num_classes: int, rng: torch.Generator) -> nn.Module:
        model = build(name, input_shape, num_classes, rng)
        draw_as_in_2015(model, rng)
        return model

    models.build = built
    try:
        yield
    finally:
        models.build = build


def train(index: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The cell's run from such weights at one learning rate, for so many rounds at most."""
    (cell,) = [c for c in cells.table(TABLE).cells if c.id == CELL]
    effort = run.Effort(budget=rounds)
    bar = terminal.Bar(f"lr {effort.lr(index):.3g}", every=10.0, ends=True)
    checkpoint = folder / f"{CELL}{index:+d}.pt"
    with drawn_as_in_2015():
        found = run.train_at(
            checkpoint,
            *(cell, effort, index, inf, cell.target),
            lambda what, done, of, text: bar(done, of, text),
        )
    checkpoint.unlink(missing_ok=True)
    return asdict(found)


def render(result: dict[str, Any]) -> str:
    """A row a learning rate, and the table's own run last."""

    def row(weights: str, r: dict[str, Any]) -> tuple[str, ...]:
        reached = f"> {r['ran']}" if r["rounds"] is None else f"{r['rounds']:.0f}"
        if r["ended"] == "diverged":
            return (weights, f"{r['lr']:.3f}", "diverged", "")
        return (weights, f"{r['lr']:.3f}", reached, f"{r['best']:.4f}")

    rows = [row("normal, 0.1", r) for _, r in sorted(result["runs"].items(), key=lambda p: p[1]["index"])]
    (own,) = [r for r in result["own"]["runs"] if r["lr"] == result["own"]["lr"]]
    rows.append(row("uniform", own))
    paper = f"{result['own']['paper_rounds']} rounds in the paper"
    return terminal.table(("weights", "lr", "rounds to 99 %", "best"), rows) + "\n\n" + paper


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fedavg_init.json"), help="the result")
    parser.add_argument("--rounds", type=int, default=60, help="rounds at most (default: 60)")
    o = parser.parse_args()
    if o.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {o.rounds}")
    out: Path = o.out
    out.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": {}}
    own = json.loads((TABLES / TABLE / f"{CELL}.json").read_text(encoding="utf-8"))
    result["own"] = {k: own[k] for k in ("lr", "rounds", "paper_rounds", "runs")}
    for index in RATES:
        if str(index) not in result["runs"]:
            result["runs"][str(index)] = train(index, o.rounds, out.parent)
            result |= {"about": str(__doc__).splitlines()[0], "seed": 0, "cell": CELL}
            result |= {"command": document.command_line(), "versions": document.versions()}
            write_json(out, result)
    print(render(result))


if __name__ == "__main__":
    main()
