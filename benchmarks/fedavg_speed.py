"""The time of a FedAvg round, beside other simulators of federated learning on the same machine.

    python benchmarks/fedavg_speed.py --model 2nn --rounds 3 --out benchmarks/results/fedavg_speed_2nn.json

K=100 clients, C=0.1, E=1, B=10, SGD with learning rate 0.1, evaluation off, on two threads. A client has 600
MNIST images, random ones where MNIST is not found; for the character LSTM, 74 random lines of 80 characters.
Each simulator lives in a process of its own and they take turns, a block of rounds each, so that a slow
minute of the machine meets all of them; ratios are taken within a turn. Before a block the benchmark waits
for a quiet machine, two minutes at most, and notes how busy it was; no turn is left out. One round that does
not count comes before each block, since the memory of a process that waits grows cold. The training losses
after the first round and at the end show that all did the same work. A simulator that cannot be imported is
left out, and the reason is printed.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals import Client, Cohorts
from rivals.common import EXAMPLES, TASKS, deal, row_of, same_work, start, training_loss, versions
from rivals.isolated import Isolated, RivalError
from rivals.work import peak_flops, round_flops, wait_until_quiet

from fltoolkit.errors import InputError
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.rng import stream

CLIENTS, COHORT = 100, 10
BATCH, LR, EPOCHS, THREADS = 10, 0.1, 1, 2
IMAGES = ("ours", "plain", "pfl", "pfl-2", "fedjax", "flower")
RIVALS = {"2nn": IMAGES, "cnn": IMAGES, "lstm": ("ours", "plain", "lean", "lean-nn")}
OTHER_MODEL = frozenset({"lean-nn"})
PACKAGES = ("fltoolkit", "torch", "numpy", "pfl", "fedjax", "jax", "dm-haiku", "flwr", "ray")


@dataclass(frozen=True)
class Times:
    """Of each turn: seconds a round of each rival; the operations a second that two kernels reach at best;
    the share of the processors' time that others used just before each rival's block."""

    seconds: dict[str, list[float]]
    peaks: list[dict[str, float]]
    busy: dict[str, list[float]]


def cohorts_of(seed: int, first: int, count: int) -> Cohorts:
    """The cohorts of rounds `first` to `first + count - 1`."""
    draws = (stream(seed, "benchmark", "cohort", first + n) for n in range(count))
    return [rng.choice(CLIENTS, COHORT, replace=False).tolist() for rng in draws]


def build(names: list[str], task: str, clients: list[Client], skipped: dict[str, str]) -> dict[str, Isolated]:
    """The rivals that can run, after one round each; why the others cannot goes to `skipped`."""
    rivals = {}
    for name in names:
        rival = Isolated(name, (task, clients, BATCH, LR, EPOCHS), THREADS)
        try:
            rival.ready().rounds(cohorts_of(0, 0, 1))
            rivals[name] = rival
            print(f"{name:8} {rival.version}", flush=True)
        except RivalError as e:
            skipped[name] = e.reason
            print(f"{name:8} left out: {e.reason}", flush=True)
            rival.close()
    return rivals


def measure(rivals: dict[str, Isolated], rounds: int, turns: int) -> Times:
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    busy: dict[str, list[float]] = {name: [] for name in rivals}
    peaks = []
    for turn in range(turns):
        wait_until_quiet()
        peaks.append(peak_flops())
        cohorts = cohorts_of(0, 1 + turn * rounds, rounds)
        for name, rival in rivals.items():
            busy[name].append(wait_until_quiet())
            rival.rounds(cohorts_of(0, 0, 1))
            seconds[name].append(rival.rounds(cohorts) / rounds)
        shown = "  ".join(f"{name} {1e3 * s[-1]:.0f}" for name, s in seconds.items())
        print(f"turn {turn + 1}/{turns}, ms a round: {shown}", flush=True)
    return Times(seconds, peaks, busy)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def losses(rivals: dict[str, Isolated], task: str, clients: list[Client]) -> dict[str, float]:
    """Each rival's training loss now."""
    return {name: training_loss(task, r.row(), clients) for name, r in rivals.items()}


def judge(before: float, first: dict[str, float], last: dict[str, float]) -> dict[str, Any]:
    """Whether each rival's training loss fell as the plain loop's, in the first round and in all; null for
    a rival that trains another model."""
    base = "plain" if "plain" in first else "ours"
    done = {
        n: None if n in OTHER_MODEL else all(same_work(before, a[n], a[base]) for a in (first, last))
        for n in first
    }
    return {"before": before, "after_first_round": first, "after_all": last, "same_work": done}


def flops(task: str) -> float:
    shape = TASKS[task][1]
    one = torch.zeros(1, *shape, dtype=torch.int64 if task == "lstm" else torch.float32)
    return round_flops(start(task), one, COHORT, EXAMPLES[task], EPOCHS)


def report(rivals: dict[str, Isolated], times: Times, task: str) -> dict[str, Any]:
    seconds = times.seconds
    peaks = {kernel: [p[kernel] / 1e9 for p in times.peaks] for kernel in times.peaks[0]}
    work, peak = flops(task) / 1e9, max(max(p) for p in peaks.values())
    ratios = {n: [r / o for r, o in zip(s, seconds["ours"], strict=True)] for n, s in seconds.items()}
    busy = {n: [None if math.isnan(v) else v for v in b] for n, b in times.busy.items()}
    return {
        "rivals": {name: r.version for name, r in rivals.items()},
        "seconds_per_round": {n: {**spread(s), "turns": s} for n, s in seconds.items()},
        "ratio_to_ours": {n: {**spread(r), "turns": r} for n, r in ratios.items()},
        "busy_before": busy,
        "gflop_per_round": work,
        "peak_gflops": {"best": peak} | {kernel: {**spread(p), "turns": p} for kernel, p in peaks.items()},
        "floor_seconds": work / peak,
        "ratio_to_floor": {n: float(np.median(s)) * peak / work for n, s in seconds.items()},
    }


def show(result: dict[str, Any]) -> None:
    gflop, peak = result["gflop_per_round"], result["peak_gflops"]["best"]
    print(
        f"\n{gflop:.1f} GFLOP a round; peak {peak:.0f} GFLOP/s; floor {1e3 * result['floor_seconds']:.0f} ms"
    )
    print("rival     ms a round (min-max)        rival / ours (min-max)   / floor   training loss")
    for name, t in result["seconds_per_round"].items():
        q, loss = result["ratio_to_ours"][name], result["training_loss"]
        times = f"{1e3 * t['median']:8.1f} ({1e3 * t['min']:.1f}-{1e3 * t['max']:.1f})"
        ratio = f"{q['median']:6.2f} ({q['min']:.2f}-{q['max']:.2f})"
        note = {True: "", False: "  NOT THE SAME WORK", None: "  (another model)"}[loss["same_work"][name]]
        floor = result["ratio_to_floor"][name]
        print(f"{name:8} {times:28} {ratio:24} {floor:8.1f} {loss['after_all'][name]:10.4f}{note}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=list(TASKS), default="2nn", help="what is trained (default: 2nn)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each rival in a turn (default: 3)")
    parser.add_argument("--turns", type=int, default=5, help="turns of all rivals (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and partition (default: 0)")
    parser.add_argument("--rivals", help="comma-separated names (default: all of the model's)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    names = chosen.rivals.split(",") if chosen.rivals else list(RIVALS[chosen.model])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    torch.set_num_threads(THREADS)
    skipped: dict[str, str] = {}
    try:
        start(chosen.model)
    except InputError as e:
        raise SystemExit(f"model {chosen.model!r} cannot be built: {e}") from e
    clients, source = deal(chosen.model, CLIENTS, EXAMPLES[chosen.model], chosen.seed)
    rivals = build(["ours", *(n for n in names if n != "ours")], chosen.model, clients, skipped)
    try:
        if "ours" not in rivals:
            raise SystemExit("ours must run, for the ratios to have a base")
        first = losses(rivals, chosen.model, clients)
        times = measure(rivals, chosen.rounds, chosen.turns)
        before = training_loss(chosen.model, row_of(start(chosen.model)), clients)
        result = {
            "command": document.command_line(),
            "seed": chosen.seed,
            "task": {
                "model": chosen.model, "data": source, "clients": CLIENTS,
                "examples_per_client": EXAMPLES[chosen.model],
                "clients_per_round": COHORT, "batch": BATCH, "epochs": EPOCHS, "lr": LR,
                "rounds_per_turn": chosen.rounds, "turns": chosen.turns, "rounds_before_turn": 1,
            },
            "machine": {"cores": os.cpu_count(), "threads": THREADS},
            "versions": versions(PACKAGES),
            **report(rivals, times, chosen.model),
            "training_loss": judge(before, first, losses(rivals, chosen.model, clients)),
            "left_out": skipped,
        }  # fmt: skip
    finally:
        for rival in rivals.values():
            rival.close()
    show(result)
    if chosen.out:
        write_json(chosen.out, result)


if __name__ == "__main__":
    main()
