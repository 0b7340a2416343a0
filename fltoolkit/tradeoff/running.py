"""Running a grid: the jobs that are still to be done, in an order that their needs allow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fltoolkit import registry
from fltoolkit.report.files import write_atomic
from fltoolkit.tradeoff.engines import Engine, engine
from fltoolkit.tradeoff.grid import Grid, Stack
from fltoolkit.tradeoff.jobs import Attacking, Files, Job, Training
from fltoolkit.tradeoff.result import assembled, write

CELLS = "cells"
PICTURES = 6
Report = Callable[[int, int, str], None]
"""report(done, of, text)."""


def run(
    grid: Grid,
    folder: Path,
    workers: int = 1,
    engine_name: str = "processes",
    address: str | None = None,
    report: Report = lambda done, of, text: None,
) -> dict[str, Any]:
    """Run what is missing of `grid` in `folder`, and return what its run.json then holds.

    Every cell is kept in folder/cells as soon as it is done; a run that was killed goes on from there.
    workers: processes at once. engine_name, address: see `engines`. Raises InputError before any work
    where the grid is impossible.
    """
    grid.check()
    cells = folder / CELLS
    cells.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs_of(grid))
    missing = [j for j in jobs if not _is_done(j, cells)]
    if missing:
        place = engine(engine_name, workers, cells, address)
        try:
            _work_off(missing, len(jobs), place, cells, report)
        finally:
            place.close()
    found = {j.id: json.loads((cells / f"{j.id}.json").read_text(encoding="utf-8")) for j in jobs}
    content = assembled(grid, found)
    write(folder, content)
    return content


def jobs_of(grid: Grid) -> Iterator[Job]:
    """Every job of the grid, what is needed before what needs it."""
    for curve in grid.curves:
        for stack in curve.stacks:
            for seed in grid.seeds:
                training = training_of(grid, stack, seed)
                yield training
                yield from attacks_on(grid, training)


def training_of(grid: Grid, stack: Stack, seed: int) -> Training:
    recipe = replace(grid.recipe, seed=seed, eval_every=grid.rounds)
    return Training(recipe, stack, grid.rounds, grid.attacked, grid.delta)


def attacks_on(grid: Grid, training: Training) -> Iterator[Attacking]:
    """Attacks that look on, under every threat model; those that bring their own adversary, which is after
    one message of a secure sum, only where there is such a sum."""
    hidden = registry.make_stack(training.stack).hides_messages
    for attack in grid.attacks:
        own = registry.make_attack(attack).threat() is not None
        threats: tuple[str | None, ...] = grid.threats if not own else (None,) if hidden else ()
        for threat in threats:
            pictures = PICTURES if training.recipe.seed == grid.seeds[0] else 0
            yield Attacking(training, attack, threat, grid.victims, grid.threshold_db, pictures)


def _is_done(job: Job, cells: Path) -> bool:
    return (cells / f"{job.id}.json").exists()


def _work_off(missing: list[Job], of: int, place: Engine, cells: Path, report: Report) -> None:
    waiting, running, done = list(missing), 0, of - len(missing)
    while waiting or running:
        while running < place.slots and (job := _next(waiting, cells)) is not None:
            place.submit(job, _given(job, cells))
            running += 1
        for job, files in place.done():
            _keep(files, cells)
            running, done = running - 1, done + 1
            report(done, of, " + ".join(_stack(job)) or "no defense")


def _next(waiting: list[Job], cells: Path) -> Job | None:
    """Take the first job whose needs are met."""
    for i, job in enumerate(waiting):
        if job.needs is None or _is_done(job.needs, cells):
            return waiting.pop(i)
    return None


def _given(job: Job, cells: Path) -> Files:
    if job.needs is None:
        return {}
    path = cells / f"{job.needs.id}.pt"
    return {path.name: path.read_bytes()} if path.exists() else {}


def _keep(files: Files, cells: Path) -> None:
    """Write a job's files; the one that says that it is done comes last."""
    for name in sorted(files, key=lambda n: n.endswith(".json")):
        content = files[name]

        def put(path: Path, content: bytes = content) -> None:
            path.write_bytes(content)

        write_atomic(cells / name, put)


def _stack(job: Job) -> Stack:
    return job.stack if isinstance(job, Training) else job.training.stack
