"""Running a cell: every learning rate is a resumable training run, the cell's result one small JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil, inf, log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fltoolkit import models
from fltoolkit.data import Dataset, load
from fltoolkit.data.partition import partition
from fltoolkit.defense import DefenseStack
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document
from fltoolkit.report.files import read_json, write_json
from fltoolkit.rng import stream, torch_stream
from fltoolkit.tables.cells import Cell
from fltoolkit.tables.search import Run, improvements, rounds_to, search
from fltoolkit.training import federation as fed
from fltoolkit.training.clients import Dealt
from fltoolkit.training.round import Failure, NobodyError
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, LocalSpec

SCHEMA = "fltoolkit.table-cell/1"
SAVE_SECONDS = 30.0
PATIENCE = 500
"""A learning rate is given up after this many rounds without a better accuracy, if they are also half of all
its rounds: its network is dead, or it has come as far as it can."""

COLLAPSE = 25
"""Evaluations in a row no better than chance after which a learning rate that had done better is given up."""


@dataclass(frozen=True)
class Effort:
    """How much to spend on a cell.

    resolution: learning rates are 10^(i / resolution), i whole. start_lr: where the search begins. budget:
    rounds after which a learning rate counts as not reaching the target. most: learning rates a cell may
    try. probe: choose the learning rate by the accuracy after this many rounds instead of running each to
    the target, and the next best too where that rate diverges or stands still (None: run each).
    eval_every: rounds between evaluations. precision: of products, one of PRECISIONS.
    """

    resolution: int = 3
    start_lr: float = 0.1
    budget: int = 5000
    most: int = 9
    probe: int | None = None
    eval_every: int = 1
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"

    def lr(self, index: int) -> float:
        return float(10 ** (index / self.resolution))

    def index(self, lr: float) -> int:
        return round(log10(lr) * self.resolution)


Report = Callable[[str, int, int, str], None]
"""report(what, rounds done, rounds at most, text)."""


def run_cell(cell: Cell, effort: Effort, folder: Path, report: Report) -> dict[str, Any]:
    """Run `cell`, or go on where an interrupted run stopped; writes FOLDER/ID.json when it is done and
    returns what it holds, whatever its effort was. Finished learning rates are kept in FOLDER/ID.part.

    Raises InputError where the result there is of another setting or seed, the learning rates there are of
    another effort than `effort`, budget and probe aside, or the data does not fit the model or has no test
    part.
    """
    path = folder / f"{cell.id}.json"
    if path.exists():
        found = read_json(path)
        fed.check_same(path, {**found["cell"], "seed": found["effort"]["seed"]}, _setting(cell, effort))
        return found
    _task(cell, effort, effort.start_lr)
    _clients(cell, effort)
    shared = _from_twin(cell, effort, folder)
    if shared is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, shared)
        return shared
    parts = folder / f"{cell.id}.part"
    parts.mkdir(parents=True, exist_ok=True)

    def train(index: int, cap: float, kind: str = "run", target: float = cell.target) -> Run:
        return _kept(parts / f"{kind}{index:+d}.json", cell, effort, index, cap, target, report)

    start = effort.index(effort.start_lr)
    probes: list[Run] = []
    if effort.probe is None:
        runs, interior = search(train, start, effort.most)
    else:
        probes, _ = search(lambda i, _: train(i, float(effort.probe or 1), "probe", inf), start, effort.most)
        runs = _best_that_lasts(probes, lambda index: train(index, inf))
    best = min(runs, key=lambda r: r.order)
    if probes:
        interior = {best.index - 1, best.index + 1} <= {r.index for r in probes}
    result = {
        "schema": SCHEMA,
        "cell": cell.setting(),
        "paper_rounds": cell.paper_rounds,
        "rounds": best.rounds,
        "lr": best.lr,
        "interior": interior,
        "effort": asdict(effort),
        "runs": [asdict(r) for r in runs],
        "probes": [asdict(r) for r in probes],
        "engine": _task(cell, effort, best.lr).engine_for(_data(cell.data).input_shape).name,
        "note": _data(cell.data).note,
        "command": document.command_line(),
        "seconds": sum(r.seconds for r in (*runs, *probes)),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": document.versions(),
    }
    write_json(path, result)
    for leftover in parts.iterdir():
        leftover.unlink()
    parts.rmdir()
    return result


def _best_that_lasts(probes: Sequence[Run], train: Callable[[int], Run]) -> list[Run]:
    """The run of the rate that did best in its probe; where it diverges or stands still later, that of the
    next as well."""
    ranked = sorted(probes, key=lambda r: r.order)
    runs: list[Run] = []
    for probe in [r for r in ranked if r.ended != "diverged"] or ranked[:1]:
        runs.append(train(probe.index))
        if runs[-1].ended in ("target", "cap"):
            break
    return runs


def _from_twin(cell: Cell, effort: Effort, folder: Path) -> dict[str, Any] | None:
    """The result of another cell of the same effort, in this table or one beside it, that is the same run:
    with the same target, or a target that neither reaches."""
    for path in sorted(folder.parent.glob("*/*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            continue
        if Effort(**found["effort"]) != effort:
            continue
        differs = {k for k, v in cell.setting().items() if found["cell"].get(k) != v}
        lowest = min(cell.target, found["cell"]["target"])
        neither = all(r["best"] < lowest for r in found["runs"])
        if _same_run(cell, differs) or (differs == {"id", "target"} and neither):
            own = {"cell": cell.setting(), "paper_rounds": cell.paper_rounds}
            return {**found, **own, "shared_with": str(path.relative_to(folder.parent))}
    return None


def _same_run(cell: Cell, differs: set[str]) -> bool:
    """Whether a cell that differs from `cell` in these settings alone trains alike. One full gradient of all
    clients a round (C = 1, E = 1, B = ∞) is the same however equal numbers of examples are dealt out."""
    full = cell.C == 1 and cell.E == 1 and cell.B is None
    return differs == {"id"} or (full and differs == {"id", "partition"})


def _kept(
    path: Path, cell: Cell, effort: Effort, index: int, cap: float, target: float, report: Report
) -> Run:
    """The run in `path`, where it is what a new one would be, or a new one that is then kept there; raises
    InputError where the one in `path` is of another configuration."""
    config = _config(cell, effort, index)
    if path.exists():
        content = read_json(path)
        fed.check_same(path, content["config"], config)
        run = Run(**{**content["run"], "corners": tuple((n, a) for n, a in content["run"]["corners"])})
        most = _most(effort, cap)
        if run.ran == most or (run.ran < most and run.ended != "cap"):
            return run
    run = train_at(path.with_suffix(".pt"), cell, effort, index, cap, target, report)
    write_json(path, {"config": config, "run": asdict(run)})
    path.with_suffix(".pt").unlink(missing_ok=True)
    return run


def _config(cell: Cell, effort: Effort, index: int) -> dict[str, Any]:
    """What two runs must share to be one; cells of two tables may."""
    told = {"eval_every": effort.eval_every, "precision": effort.precision}
    return {**_setting(cell, effort), "lr": effort.lr(index), **told}


def _setting(cell: Cell, effort: Effort) -> dict[str, Any]:
    """What two results must share to be of one cell."""
    return {**{key: value for key, value in cell.setting().items() if key != "id"}, "seed": effort.seed}


def _most(effort: Effort, cap: float) -> int:
    """Rounds after which a run ends."""
    return int(min(effort.budget, cap if cap == inf else ceil(cap)))


def train_at(
    checkpoint: Path, cell: Cell, effort: Effort, index: int, cap: float, target: float, report: Report
) -> Run:
    """Train at one learning rate to the target, `cap`, the budget, divergence or a standstill."""
    lr, most = effort.lr(index), _most(effort, cap)
    task = _task(cell, effort, lr)
    clients, test = _clients(cell, effort)
    reachable = target if target <= 1 else None
    chance = _most_frequent(test.y)
    federation = fed.Federation(task, clients, test.to(effort.device), cell.C, effort.eval_every, reachable)
    config = _config(cell, effort, index)
    state = fed.State(task.layout.row(task.model).to(effort.device))
    if checkpoint.exists():
        kept = fed.resume(checkpoint, config)
        if kept.round <= most:
            state = replace(kept, params=kept.params.to(effort.device))
    saved = time.perf_counter()
    ended = "cap"
    try:
        for step in fed.federate(federation, state, most):
            state = step.state
            _only_diverged(step.outcome.failures)
            at, best = _best(state)
            report(
                f"{cell.id} lr {lr:.4g} seed {effort.seed}", state.round, most, f"best accuracy {best:.4f}"
            )
            if state.round - at >= max(PATIENCE, state.round / 2):
                ended = "stalled"
                break
            if _lost([e.accuracy for _, e in state.evaluated], chance):
                ended = "diverged"
                break
            if time.perf_counter() - saved > SAVE_SECONDS:
                fed.save(checkpoint, state, config)
                saved = time.perf_counter()
    except NobodyError as e:
        _only_diverged(e.failures)
        ended = "diverged"
    curve = [(n, e.accuracy) for n, e in state.evaluated]
    crossing = rounds_to(curve, target)
    corners = tuple(improvements(curve))
    return Run(
        index=index,
        lr=lr,
        rounds=crossing,
        ran=state.round,
        best=corners[-1][1] if corners else 0.0,
        ended="target" if crossing is not None else ended,
        corners=corners,
        seconds=state.seconds,
    )


def _only_diverged(failures: Sequence[Failure]) -> None:
    """Raises InputError for a client that failed otherwise: that says nothing of a learning rate."""
    for f in failures:
        if not f.diverged:
            raise InputError(f"client {f.client} {f.reason}")


def _best(state: fed.State) -> tuple[int, float]:
    """The round with the best accuracy so far, the first of equals, and that accuracy; (0, 0) before any."""
    best = max(state.evaluated, key=lambda e: e[1].accuracy, default=None)
    return (0, 0.0) if best is None else (best[0], best[1].accuracy)


def _most_frequent(labels: Tensor) -> float:
    """The share of the most frequent class among the labels; those below 0 stand for nothing to predict."""
    counts = labels[labels >= 0].bincount()
    return int(counts.max()) / int(counts.sum())


def _lost(accuracies: Sequence[float], chance: float) -> bool:
    """Whether a model that was twice as good as naming the most frequent class has been no better than that
    for COLLAPSE evaluations in a row: its units are dead or its weights beyond all measure."""
    return max(accuracies, default=0.0) > 2 * chance >= 2 * max(accuracies[-COLLAPSE:])


@cache
def _data(name: str) -> Dataset:
    return load(name)


@cache
def _clients(cell: Cell, effort: Effort) -> tuple[Dealt, Examples]:
    """The clients and the test set."""
    data = _data(cell.data)
    if data.test is None:
        raise InputError(f"data must have a test part, got {cell.data!r}, which has none")
    rng = stream(effort.seed, "partition", cell.partition)
    parts = partition(cell.partition, data.train.y.numpy(), cell.clients, rng, data.client_ids)
    return Dealt(data.train.to(effort.device), parts), data.test


def _task(cell: Cell, effort: Effort, lr: float) -> Task:
    data = _data(cell.data)
    rng = torch_stream(effort.seed, "model")
    model = models.build(cell.model, data.input_shape, data.num_classes, rng).to(torch.device(effort.device))
    models.check_fits(model, data.input_shape, data.num_classes, data.tokens, data.labels_each_token)
    local = LocalSpec(cell.E, cell.B, lr, buffer=cell.buffer, precision=effort.precision)
    return Task(model, cross_entropy, local, DefenseStack([]), effort.seed, stop_on_failure=False)
