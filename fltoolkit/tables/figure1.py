"""Figure 1 of McMahan et al. 2017: the loss of θ w + (1 − θ) w' for two models trained on different data.

Two 2NNs train on 600 MNIST examples each, drawn without overlap, for 240 updates of B = 50 (E = 20) at
η = 0.1; once from two different initialisations, once from a shared one. The loss is that of the full
training set at 50 mixing weights θ in [−0.2, 1.2]. Repeated over seeds, for an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fltoolkit import models
from fltoolkit.data import Dataset, load
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report import document, terminal
from fltoolkit.report.files import read_json, write_json
from fltoolkit.rng import stream, torch_stream
from fltoolkit.tables.cells import citation
from fltoolkit.training.evaluate import evaluate
from fltoolkit.training.task import Task
from fltoolkit.types import LocalSpec

NAME = "figure1"
SCHEMA = "fltoolkit.figure1/1"
EXAMPLES = 600
LOCAL = LocalSpec(epochs=20, batch=50, lr=0.1)
THETAS = np.linspace(-0.2, 1.2, 50)
REPEATS = 5
CASES = ("different initialisation", "shared initialisation")


def run(folder: Path, seed: int, device: str, show_only: bool) -> int:
    """Make FOLDER/figure1.json and figure1.png where they are missing, and say what they show."""
    path = folder / f"{NAME}.json"
    if not path.exists() and not show_only:
        write_json(path, compute(load("mnist"), seed, device))
    if not path.exists():
        print("not run")
        return 0
    result = read_json(path)
    draw(result, folder / f"{NAME}.png")
    print(render(result))
    print(f"figure: {folder / f'{NAME}.png'}")
    return 0


def compute(data: Dataset, seed: int, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Loss curves of both cases, `repeats` of each."""
    train = data.train.to(device)
    losses: dict[str, list[list[float]]] = {case: [] for case in CASES}
    bar = terminal.Bar("models averaged", ends=True)
    for repeat in range(repeats):
        order = stream(seed, NAME, repeat, "examples").permutation(len(train))
        parts = [train.take(torch.from_numpy(order[i * EXAMPLES :][:EXAMPLES])) for i in range(2)]
        for case in CASES:
            tasks = [_task(data, seed, repeat, i if case == CASES[0] else 0, device) for i in range(2)]
            ends = [
                _trained(t, p, seed, repeat, i) for i, (t, p) in enumerate(zip(tasks, parts, strict=True))
            ]
            mixes = [t * ends[0] + (1 - t) * ends[1] for t in THETAS.tolist()]
            losses[case].append([evaluate(tasks[0], m, train).loss for m in mixes])
            bar(len(losses[CASES[0]]) + len(losses[CASES[1]]), 2 * repeats, case)
    bar.close()
    return {
        "schema": SCHEMA,
        "thetas": THETAS.tolist(),
        "losses": losses,
        "seed": seed,
        "command": document.command_line(),
        "versions": document.versions(),
    }


def _task(data: Dataset, seed: int, repeat: int, start: int, device: str) -> Task:
    rng = torch_stream(seed, NAME, repeat, "model", start)
    model = models.build("2nn", data.input_shape, data.num_classes, rng).to(device)
    return Task(model, cross_entropy, LOCAL, DefenseStack([]), seed)


def _trained(task: Task, part: Any, seed: int, repeat: int, client: int) -> Tensor:
    start = task.layout.row(task.model)
    rng = stream(seed, NAME, repeat, "client", client)
    return start + task.engine_for(tuple(part.x.shape[1:]))(start, [part], LOCAL, [rng])[0]


def middle(result: dict[str, Any], case: str) -> list[float]:
    """Loss at θ nearest 1/2 minus the better parent's, one a repeat: below 0 where averaging helps."""
    thetas = np.array(result["thetas"])
    half, zero, one = (int(np.abs(thetas - t).argmin()) for t in (0.5, 0.0, 1.0))
    return [float(c[half] - min(c[zero], c[one])) for c in result["losses"][case]]


def render(result: dict[str, Any]) -> str:
    rows = []
    for case in CASES:
        values = middle(result, case)
        ci = mean_interval(values)["ci95"]
        rows.append((case, f"{np.mean(values):+.3f}{terminal.interval(ci, 3)}", str(len(values))))
    head = ("case", "loss of the average minus the better parent's", "repeats")
    lines = ["Figure 1: averaging two models trained on different data", "", terminal.table(head, rows)]
    return "\n".join([*lines, "", f"Paper: {citation()}"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss on the training set over the mixing weight, a thin line a repeat and their mean."""
    from fltoolkit.report.figures import ACCENT, GRID, INK, panels, save, tidy

    figure, axes = panels(len(CASES))
    for case, axis in zip(CASES, axes, strict=True):
        curves: Sequence[Sequence[float]] = result["losses"][case]
        for c in curves:
            axis.plot(result["thetas"], c, color=ACCENT, alpha=0.3, lw=0.9)
        axis.plot(result["thetas"], np.mean(curves, axis=0), color=ACCENT, lw=2)
        for parent in (0.0, 1.0):
            axis.axvline(parent, color=GRID, lw=1, zorder=0)
        axis.set_title(case, fontsize=10, color=INK)
        tidy(axis, "mixing weight θ", "loss on the training set")
    figure.suptitle("Averaging two models trained on different data", fontsize=11, color=INK)
    save(figure, path)
