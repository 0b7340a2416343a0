"""What differential privacy costs in accuracy, at the level of examples and of clients.

    python benchmarks/dp_accuracy.py digits
    python benchmarks/dp_accuracy.py mnist

DP-SGD: one client holds all training data and steps over Poisson batches (Abadi et al. 2016,
arXiv:1607.00133); on MNIST the tanh network of Papernot et al. 2021, arXiv:2007.14191. DP-FedAvg: a Poisson
cohort of K = 100 clients, flat clipping, central noise (McMahan et al. 2018, arXiv:1710.06963). How many
clients DP-FedAvg would need is said by that paper's rule: with K' clients and the same C, the same ε has
noise on the mean that is K / K' as large, so rows with K' > 100 train on the same 100 clients with that
noise and quote the ε of K'.

Every cell is one `python -m fltoolkit train`, its command is in the result, and a result that is there is
not run again; --only picks some. Accuracies are means over seeds with a t interval; the hyperparameters in
`SETTINGS` were chosen on these data beforehand, which no ε here accounts for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fltoolkit.accounting import gaussian_sigma
from fltoolkit.cli import main as fltoolkit
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report import document
from fltoolkit.report.files import write_atomic, write_json
from fltoolkit.report.terminal import table

EPSILONS = (0.5, 1.0, 2.0, 2.93, 4.0, 8.0, inf)
SEEDS = (0, 1, 2)
DELTA = 1e-5
POPULATIONS = (100, 1_000, 10_000, 1_000_000)
HERE = Path(__file__).parent / "results" / "dp_accuracy"


@dataclass(frozen=True)
class Setting:
    """Flags of `train` for one method on one data set. rounds: T. fraction: C of DP-FedAvg. clip: C of the
    clip. lr: flags of the step size; lr_small: the same where ε is at most 1 and there is most noise."""

    flags: str
    rounds: int
    clip: float
    fraction: float = 1.0
    lr: str = ""
    lr_small: str = ""

    def flags_at(self, epsilon: float) -> list[str]:
        return f"{self.flags} {self.lr_small if epsilon <= 1 else self.lr}".split()


SETTINGS = {
    ("digits", "dp-sgd"): Setting(
        "--data digits --model softmax --clients 1 --fraction 1 --epochs 1 --batch 256 --lr 2", 30, 0.5
    ),
    ("mnist", "dp-sgd"): Setting(
        "--data mnist --model tanhcnn --clients 1 --fraction 1 --epochs 1 --batch 2048",
        40,
        0.1,
        lr="--lr 32 --lr-decay 0.98",
        lr_small="--lr 12",
    ),
    ("digits", "dp-fedavg"): Setting(
        "--data digits --model softmax --clients 100 --epochs 1 --batch inf --lr 2", 30, 0.5, 0.5
    ),
    ("mnist", "dp-fedavg"): Setting(
        "--data mnist --model 2nn --clients 100 --epochs 1 --batch 10 --lr 0.1", 30, 1.0
    ),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    data: str
    method: str
    epsilon: float
    seed: int
    population: int = 100

    @property
    def name(self) -> str:
        of = f"-K{self.population}" if self.method == "dp-fedavg" else ""
        return f"{self.data}-{self.method}{of}-eps{self.epsilon:g}-seed{self.seed}"

    @property
    def flags(self) -> list[str]:
        """The arguments of `train`, without --out and --json."""
        s = SETTINGS[self.data, self.method]
        common = ["train", *s.flags_at(self.epsilon), "--rounds", str(s.rounds), "--seed", str(self.seed)]
        common += ["--eval-every", "5", "--checkpoint-every", "1000", "--delta", f"{DELTA:g}"]
        if self.method == "dp-sgd":
            common += ["--defense", f"clip:norm={s.clip:g},level=example"]
            if self.epsilon == inf:
                return common
            noise = "gaussian:noise_multiplier=1,level=example"
            return [*common, "--defense", noise, "--epsilon", f"{self.epsilon:g}"]
        common += ["--sampling", "poisson", "--fraction", f"{s.fraction:g}"]
        common += ["--defense", f"clip:norm={s.clip:g}"]
        if self.epsilon == inf:
            return common
        sigma = self.noise_multiplier * 100 / self.population
        return [*common, "--defense", f"gaussian:noise_multiplier={sigma:.6g}"]

    @property
    def noise_multiplier(self) -> float:
        """σ of DP-FedAvg at K' clients: what ε asks for, whatever K' is."""
        s = SETTINGS[self.data, self.method]
        return gaussian_sigma(self.epsilon, s.fraction, s.rounds, DELTA)


def cells(data: str) -> list[Cell]:
    found = [Cell(data, "dp-sgd", e, seed) for seed in SEEDS for e in EPSILONS]
    return found + [
        Cell(data, "dp-fedavg", e, seed, population)
        for seed in SEEDS
        for population in POPULATIONS
        for e in EPSILONS
        if e < inf or population == 100
    ]


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train one cell and keep what matters of its report."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = fltoolkit([*cell.flags, "--json", "--out", str(folder)])
    if code != 0:
        raise SystemExit(f"{cell.name} ended with code {code}")
    report = json.loads(out.getvalue())
    noise = [d["noise_multiplier"] for d in report["defenses"] if d["name"] == "gaussian"]
    return {
        "cell": cell.name,
        "data": cell.data,
        "method": cell.method,
        "epsilon": document.finite(cell.epsilon),
        "population": cell.population if cell.method == "dp-fedavg" else None,
        "seed": cell.seed,
        "accuracy": report["accuracy"][-1]["value"],
        "test_examples": report["test_examples"],
        "rounds": report["rounds"],
        "reported": report["epsilon"],
        "noise_multiplier": noise[0] if noise else 0.0,
        "command": "python -m fltoolkit " + shlex.join(cell.flags),
        "versions": report["versions"],
    }


def gathered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy with a 95 % t interval over seeds, by method, population and ε."""
    groups: dict[tuple[str, int, float], list[float]] = {}
    for r in results:
        e = inf if r["epsilon"] is None else r["epsilon"]
        groups.setdefault((r["method"], r["population"] or 0, e), []).append(r["accuracy"])
    rows = []
    for (method, population, e), values in sorted(groups.items()):
        found = mean_interval(values)
        rows.append(found | {"method": method, "population": population or None, "epsilon": e})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The table of a data set: accuracy in percent with its interval, a line a method, a column an ε."""
    lines: dict[tuple[str, int], list[str]] = {}
    for r in rows:
        line = lines.setdefault((r["method"], r["population"] or 0), ["not run"] * len(EPSILONS))
        if r["population"] not in (None, POPULATIONS[0]):
            line[-1] = ""  # without noise, how many clients there are makes no difference
        half = "" if r["ci95"] is None else f" ±{100 * (r['mean'] - r['ci95'][0]):.1f}"
        line[EPSILONS.index(r["epsilon"])] = f"{100 * r['mean']:.1f}{half}"
    names = [method if not k else f"{method} K={k:,}" for method, k in lines]
    header = ("test accuracy, %", *("∞" if e == inf else f"ε = {e:g}" for e in EPSILONS))
    seeds = max(len(r["values"]) for r in rows)
    body = table(header, [(name, *line) for name, line in zip(names, lines.values(), strict=True)])
    return f"{body}\n± is the 95 % interval over {seeds} seeds."


def draw(path: Path, rows: list[dict[str, Any]], data: str) -> None:
    """Accuracy over ε, one line a method and population; the dashed lines are without noise."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    names = sorted(
        {(r["method"], r["population"]) for r in rows}, key=lambda k: (k[0] != "dp-sgd", k[1] or 0)
    )
    for colour, (method, population) in enumerate(names):
        mine = [r for r in rows if (r["method"], r["population"]) == (method, population)]
        label = "DP-SGD (examples)" if population is None else f"DP-FedAvg (clients), K = {population:,}"
        finite = [r for r in mine if r["epsilon"] < inf]
        error = [0.0 if r["ci95"] is None else r["mean"] - r["ci95"][0] for r in finite]
        axes.errorbar(
            [r["epsilon"] for r in finite],
            [100 * r["mean"] for r in finite],
            yerr=100 * np.array(error),
            fmt="o-",
            ms=4,
            capsize=3,
            color=f"C{colour}",
            label=label,
        )
        for r in mine:
            if r["epsilon"] == inf:
                axes.axhline(100 * r["mean"], color=f"C{colour}", ls="--", lw=1)
    ticks = [e for e in EPSILONS if e < inf]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{e:g}" for e in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"ε at δ = {DELTA:g}")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Accuracy under differential privacy on {data}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_atomic(path, lambda p: figure.savefig(p, dpi=150, format="png"))
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", choices=("digits", "mnist"))
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    parser.add_argument("--show", action="store_true", help="run nothing: print what has been run")
    parser.add_argument("--out", default=str(HERE), metavar="DIR", help="folder of the results")
    o = parser.parse_args(argv)
    path = Path(o.out) / f"{o.data}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {r["cell"] for r in results}
    for cell in cells(o.data):
        if cell.name not in done and o.only in cell.name and not o.show:
            print(cell.name, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                results.append(run(cell, Path(folder)))
            write_json(path, results)
    if not results:
        print("nothing has been run", file=sys.stderr)
        return 1
    rows = gathered(results)
    print(show(rows))
    draw(path.with_suffix(".png"), rows, o.data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
