"""How the cost of federated averaging grows with the cohort, with idle clients, and with C and E.

    python benchmarks/fedavg_scale.py --out benchmarks/results/fedavg_scale.json

Memory: a round of the FedAvg CNN with cohorts of 100 and of all 1,000 clients over the same data, 60
examples a client, B=10, E=1; how far the peak of a fresh process is above its start, data included. Idle
clients: rounds of the 2NN with 100 clients sampled from 10^3 to 10^6 registered ones, whose data are cut
from a shared pool when they are asked for. Linearity: rounds of the 2NN over C and E, K=100, 600 examples a
client, B=10; the cells share a process and come in random order. Images and labels are random: time and
memory do not depend on what they show. The measurements take turns, each in a process of its own, so that a
slow minute of the machine meets all of them.

Memory is VmHWM of /proc/self/status, so it needs Linux. The ru_maxrss of getrusage is no measure of a process
alone: where the parent that started it had a higher peak, it is the parent's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals.common import start
from rivals.work import wait_until_quiet
from scale_figure import draw, show

from fltoolkit.algorithms.fedavg import fedavg, select_clients
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import Bar
from fltoolkit.rng import stream, torch_stream
from fltoolkit.training.clients import Dealt
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, LocalSpec

BATCH, LR, THREADS, LIMIT_MIB = 10, 0.1, 2, 4096
STATUS = Path("/proc/self/status")
Found = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """cohorts: K of the memory rounds, the last being all clients. registered: how many clients there are
    where `sampled` train. fractions, epochs: C and E of the cells with `clients` clients of `per_client`
    examples; elsewhere a client has `few`. rounds: timed, after one that is not, with idle clients.
    client_epochs: what a cell is timed over at least, in several rounds if need be."""

    cohorts: tuple[int, ...] = (100, 1000)
    registered: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6)
    sampled: int = 100
    few: int = 60
    rounds: int = 5
    fractions: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    epochs: tuple[int, ...] = (1, 2, 4)
    clients: int = 100
    per_client: int = 600
    client_epochs: int = 40

    def cells(self) -> dict[str, tuple[float, int, int]]:
        """Name -> C, E and client-epochs a round, by growing work."""
        every = [(c, e, max(round(c * self.clients), 1) * e) for c in self.fractions for e in self.epochs]
        return {f"C={c:g} E={e}": (c, e, n) for c, e, n in sorted(every, key=lambda cell: cell[2])}


class Windows(Sequence[np.ndarray]):
    """The places of client k's `size` examples in a pool of `total`: from k · size on, and around its end.
    Made when asked for; `made` counts how often."""

    def __init__(self, clients: int, size: int, total: int) -> None:
        self.clients, self.size, self.total, self.made = clients, size, total, 0

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, k: Any) -> Any:
        if not 0 <= k < self.clients:
            raise IndexError(k)
        self.made += 1
        return (k * self.size + np.arange(self.size)) % self.total


class Run:
    """A federation of `clients` clients with `size` random images each, out of a pool of `total`."""

    def __init__(self, model: str, clients: int, size: int, total: int, seed: int) -> None:
        rng = torch_stream(seed, "benchmark", "pool")
        x, y = torch.rand(total, 1, 28, 28, generator=rng), torch.randint(10, (total,), generator=rng)
        self.windows, self.model, self.seed = Windows(clients, size, total), start(model), seed
        self.clients = Dealt(Examples(x, y), self.windows)

    def rounds(self, fraction: float, epochs: int, count: int) -> Iterator[float]:
        """Seconds of each of `count` rounds from the model's start, as a federation runs them: choosing the
        cohort, its training, the server's step."""
        task = Task(self.model, cross_entropy, LocalSpec(epochs, BATCH, LR), DefenseStack([]), self.seed)
        params, numbers = task.layout.row(self.model), range(1, count + 1)
        begun = time.perf_counter()
        for _ in fedavg(task, params, self.clients, fraction, numbers, lambda _: False):
            yield time.perf_counter() - begun
            begun = time.perf_counter()


def memory_mib(entry: str) -> float:
    """This process's memory now, VmRSS, or its peak so far, VmHWM."""
    (line,) = (s for s in STATUS.read_text(encoding="ascii").splitlines() if s.startswith(f"{entry}:"))
    return int(line.split()[1]) / 1024


def cohort_round(s: Sizes, cohort: int, seed: int) -> Found:
    """Memory and time of one round of the CNN."""
    begin, everyone = memory_mib("VmRSS"), s.cohorts[-1]
    run = Run("cnn", everyone, s.few, everyone * s.few, seed)
    loaded = memory_mib("VmHWM") - begin
    (seconds,) = run.rounds(cohort / everyone, 1, 1)
    grown = memory_mib("VmHWM") - begin
    return {"growth_mib": grown, "data_mib": loaded, "seconds": seconds, "clients_made": run.windows.made}


def idle_rounds(s: Sizes, registered: int, seed: int) -> Found:
    """Memory and median time of rounds of the 2NN, and of choosing their cohorts alone."""
    begin, fraction = memory_mib("VmRSS"), s.sampled / registered
    run = Run("2nn", registered, s.few, s.sampled * s.few, seed)
    seconds, choosing = list(run.rounds(fraction, 1, 1 + s.rounds)), []
    grown = memory_mib("VmHWM") - begin
    for number in range(1, 2 + s.rounds):
        begun = time.perf_counter()
        select_clients(registered, fraction, seed, number)
        choosing.append(time.perf_counter() - begun)
    made = run.windows.made / len(seconds)
    found = {"seconds": float(np.median(seconds[1:])), "select_seconds": float(np.median(choosing[1:]))}
    return {**found, "growth_mib": grown, "clients_made": made}


def cell_rounds(s: Sizes, turn: int, seed: int) -> Found:
    """Seconds a round of the 2NN in every cell."""
    run, cells = Run("2nn", s.clients, s.per_client, s.clients * s.per_client, seed), s.cells()
    list(run.rounds(min(s.fractions), 1, 1))
    found = {}
    for name in stream(seed, "benchmark", "order", turn).permutation(list(cells)):
        c, e, work = cells[name]
        found[str(name)] = float(np.mean(list(run.rounds(c, e, -(-s.client_epochs // work)))))
    return found


def isolated(work: Callable[[Sizes, int, int], Found], s: Sizes, argument: int, seed: int) -> Found:
    """What `work` returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (THREADS,)) as pool:
        return pool.submit(work, s, argument, seed).result()


def spread(turns: Sequence[float]) -> dict[str, Any]:
    return {"median": float(np.median(turns)), "min": min(turns), "max": max(turns), "turns": list(turns)}


def growth(found: Sequence[Sequence[Found]], name: str) -> dict[str, Any]:
    """The last size's number over the first size's, taken within a turn."""
    return spread([last[name] / first[name] for first, last in zip(found[0], found[-1], strict=True)])


def measure(s: Sizes, turns: int, seed: int) -> dict[str, Any]:
    """All parts: every number's median, least and most over the turns; ratios; the line through the cells."""
    parts: list[tuple[str, Callable[[Sizes, int, int], Found], int]] = [
        *((f"cohort of {k}", cohort_round, k) for k in s.cohorts),
        *((f"{n} registered", idle_rounds, n) for n in s.registered),
    ]
    found: dict[str, list[Found]] = {name: [] for name in (*(p[0] for p in parts), "cells")}
    busy, bar = [], Bar("measured", every=0.0, ends=True)
    for turn in range(turns):
        busy.append(wait_until_quiet(patience=10.0))
        for i, (name, work, argument) in enumerate((*parts, ("cells", cell_rounds, turn)), 1):
            found[name].append(isolated(work, s, argument, seed))
            bar(turn * len(found) + i, turns * len(found), name)
    bar.close()
    cohorts = [found[f"cohort of {k}"] for k in s.cohorts]
    idle = [found[f"{n} registered"] for n in s.registered]
    idle_ratios = {k: growth(idle, k) for k in ("seconds", "select_seconds", "growth_mib")}
    return {
        "busy_before_turn": [None if np.isnan(b) else b for b in busy],
        "measured": {name: {k: spread([t[k] for t in f]) for k in f[0]} for name, f in found.items()},
        "memory": {
            "one_update_mib": sum(p.numel() for p in start("cnn").parameters()) * 4 / 2**20,
            "limit_mib": LIMIT_MIB,
            "under_limit": max(f["growth_mib"] for c in cohorts for f in c) < LIMIT_MIB,
            "largest_to_smallest": growth(cohorts, "growth_mib"),
        },
        "idle": {"most_to_fewest": idle_ratios},
        "linear": line(s, found["cells"]),
    }


def line(s: Sizes, turns: Sequence[Found]) -> dict[str, Any]:
    """Least squares of seconds = fixed + each · client-epochs through the medians, and the time of a
    client-epoch in the largest cell over that in the smallest, within a turn."""
    work = {name: n for name, (_, _, n) in s.cells().items()}
    x, y = np.array(list(work.values())), np.array([np.median([t[name] for t in turns]) for name in work])
    each, fixed = np.polyfit(x, y, 1)
    first, *_, last = work
    return {
        "client_epochs": work,
        "seconds_fixed": float(fixed),
        "seconds_each": float(each),
        "r_squared": float(1 - ((y - fixed - each * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        "largest_to_smallest": spread([t[last] / work[last] / (t[first] / work[first]) for t in turns]),
    }


def report(s: Sizes, turns: int, seed: int) -> dict[str, Any]:
    """Everything measured, and what it was measured on."""
    task = {"turns": turns, "batch": BATCH, "lr": LR, "data": "random 28x28 images"}
    return {
        "command": document.command_line(),
        "seed": seed,
        "task": {**asdict(s), **task},
        "machine": {"cores": os.cpu_count(), "threads": THREADS},
        "versions": document.versions(),
        **measure(s, turns, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="repeats of every measurement (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and cohorts (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON file to write, a figure beside it (default: none)")
    chosen = parser.parse_args()
    if not STATUS.exists():
        raise SystemExit(f"{STATUS} must be there to read memory from, as on Linux")
    if chosen.turns < 1 or chosen.seed < 0:
        raise SystemExit(f"turns must be >= 1 and seed >= 0, got {chosen.turns} and {chosen.seed}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    result = report(Sizes(), chosen.turns, chosen.seed)
    show(result)
    if chosen.out:
        write_json(chosen.out, result)
        draw(chosen.out.with_suffix(".png"), result)


if __name__ == "__main__":
    main()
