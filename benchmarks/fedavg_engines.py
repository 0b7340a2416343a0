"""The time of a cohort's local training by every engine, on a CPU or a GPU.

    python benchmarks/fedavg_engines.py --device cuda --out benchmarks/results/fedavg_engines_cuda.json

A case is one cohort of the FedAvg paper's tables on the paper's data. Every engine that can train the model
trains the same cohort from the same parameters in the same random order, in turns; the first turn, in which
programs are recorded and caches fill, is told apart. `difference` is the largest one between an engine's
rows and those of `looped`, over the largest entry of those. An engine whose first turn takes more than
--patience seconds is not asked again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fltoolkit import models
from fltoolkit.checks import check_device
from fltoolkit.data import load
from fltoolkit.data.partition import partition
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import table
from fltoolkit.rng import stream, torch_stream
from fltoolkit.training.clients import Dealt
from fltoolkit.training.engines import ENGINES, choose
from fltoolkit.types import Layout, LocalSpec


@dataclass(frozen=True)
class Case:
    """A model, how its data are dealt out to `clients`, how many of them train, and how."""

    model: str
    data: str
    partition: str
    clients: int
    cohort: int
    local: LocalSpec

    @property
    def name(self) -> str:
        b = self.local.batch or "inf"
        return f"{self.model}-K{self.cohort}-E{self.local.epochs}-B{b}"


CASES = [
    Case("2nn", "mnist-centred", "iid", 100, 10, LocalSpec(1, 10, 0.01)),
    Case("cnn", "mnist-centred", "iid", 100, 10, LocalSpec(1, 10, 0.01)),
    Case("cnn", "mnist-centred", "iid", 100, 10, LocalSpec(1, 50, 0.01)),
    Case("cnn", "mnist-centred", "iid", 100, 10, LocalSpec(1, None, 0.01)),
    Case("cnn", "mnist-centred", "iid", 100, 40, LocalSpec(1, 10, 0.01)),
    Case("charlstm", "shakespeare", "natural", 1247, 125, LocalSpec(1, 10, 0.5)),
]


class Bench:
    """One case on one device."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        data = load(case.data)
        rng = stream(seed, "partition", case.partition)
        parts = partition(case.partition, data.train.y.numpy(), case.clients, rng, data.client_ids)
        clients = Dealt(data.train.to(device), parts)
        chosen = stream(seed, "cohort").choice(case.clients, case.cohort, replace=False).tolist()
        start = torch_stream(seed, "model")
        self.model = models.build(case.model, data.input_shape, data.num_classes, start).to(device)
        self.case, self.shape, self.seed = case, data.input_shape, seed
        self.cohort = [clients[c] for c in chosen]
        self.params = Layout.of(self.model).row(self.model)

    def engines(self) -> list[str]:
        return [n for n, e in ENGINES.items() if e.refuses(self.model, cross_entropy, self.shape) is None]

    def time(self, name: str, turns: int, patience: float) -> tuple[Tensor, list[float]]:
        """The engine's rows `[K, D]` of the last turn, and the seconds of each."""
        engine = choose(self.model, cross_entropy, self.shape, name)
        seconds: list[float] = []
        rows = self.params
        while len(seconds) < turns and not (seconds and seconds[0] > patience):
            rngs = [stream(self.seed, "client", k) for k in range(len(self.cohort))]
            begun = time.perf_counter()
            rows = engine(self.params, self.cohort, self.case.local, rngs)
            float(rows.sum())
            seconds.append(time.perf_counter() - begun)
        return rows, seconds


def measure(case: Case, device: str, names: Sequence[str], turns: int, patience: float) -> dict[str, Any]:
    bench = Bench(case, device, 0)
    able = [n for n in bench.engines() if not names or n in names]
    rows, found = {}, {}
    for name in able:
        try:
            rows[name], seconds = bench.time(name, turns, patience)
            found[name] = {"first": seconds[0], "next": seconds[1:]}
        except RuntimeError as e:
            found[name] = {"failed": str(e).splitlines()[0]}
        print(f"{case.name:24} {name:10} {found[name]}", flush=True)
    base = rows.get("looped")
    for name, r in rows.items():
        if base is not None:
            found[name]["difference"] = float((r - base).abs().max() / base.abs().max())
    return {"case": asdict(case), "engines": found}


def render(cases: dict[str, Any]) -> str:
    rows = []
    for name, case in cases.items():
        for engine, f in case["engines"].items():
            if "failed" in f:
                rows.append((name, engine, "failed", f["failed"][:60], ""))
                continue
            again = f"{1e3 * min(f['next']):.1f}" if f["next"] else "-"
            rows.append((name, engine, f"{1e3 * f['first']:.1f}", again, f"{f.get('difference', 0):.1e}"))
    return table(("cohort", "engine", "first, ms", "then, ms", "difference"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    parser.add_argument("--engine", action="append", default=[], help="only this engine, may be repeated")
    parser.add_argument("--turns", type=int, default=4, help="turns of each engine (default: 4)")
    parser.add_argument("--patience", type=float, default=5.0, help="see above, in seconds (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    o = parser.parse_args()
    if o.turns < 1:
        raise SystemExit(f"error: turns must be >= 1, got {o.turns}")
    try:
        check_device(o.device)
        chosen = [c for c in CASES if o.only in c.name]
        cases = {c.name: measure(c, o.device, o.engine, o.turns, o.patience) for c in chosen}
    except InputError as e:
        raise SystemExit(f"error: {e}") from e
    print(render(cases))
    device = torch.cuda.get_device_name() if o.device.startswith("cuda") else "cpu"
    if o.out:
        write_json(
            o.out,
            {
                "about": str(__doc__).splitlines()[0],
                "device": device,
                "threads": torch.get_num_threads(),
                "cases": cases,
                "command": document.command_line(),
                "versions": document.versions(),
            },
        )


if __name__ == "__main__":
    main()
