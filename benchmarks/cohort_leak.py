"""How much the sum of a cohort leaks: what comes back of each client's image when n clients are added up.

    python benchmarks/cohort_leak.py --out benchmarks/results/cohort_leak.json

A secure sum shows the server Σ n_k Δ_k and nothing else. Each of n clients takes one step on one image; every
attack in `ATTACKS` searches all n images together and the stronger one, by mean PSNR, counts. An image is
scored against the reconstruction it is matched with; the best image of a cohort is what its unluckiest client
loses. Cells are (model, n), each is kept as soon as it is done, and a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fltoolkit.audit import Scene, run
from fltoolkit.metrics.interval import mean_interval, rate_interval
from fltoolkit.report import document
from fltoolkit.report.figures import INK, panels, save, tidy
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import Bar, table

HERE = Path(__file__).parent / "results" / "cohort_leak.json"
COHORTS = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("mlp", "2nn", "lenet")
ATTACKS = ("idlg:restarts=2,steps=1500", "inverting:restarts=2,steps=2000")
VICTIMS = 5
THRESHOLD = 20.0
MOST_DB = 40.0
"""An image counts at most as much: nobody sees a difference beyond, and a mean is not ruled by exact
copies."""


@dataclass(frozen=True)
class Cell:
    model: str
    clients: int

    def scene(self, attack: str, seed: int) -> Scene:
        return Scene(
            attack=attack,
            data="digits",
            model=self.model,
            clients=self.clients,
            victims=VICTIMS,
            defenses=(f"secagg:clients={self.clients}",),
            seed=seed,
            threshold_db=THRESHOLD,
        )


def measure(cell: Cell, seed: int) -> dict[str, Any]:
    """Both attacks on the same cohorts."""
    found = {}
    for attack in ATTACKS:
        bar = Bar(f"{cell.model} n={cell.clients} {attack.partition(':')[0]}")
        done = run(cell.scene(attack, seed), bar)
        bar.close()
        found[attack] = {
            "psnr_db": [[round(float(p), 3) for p in v.psnr] for v in done.victims],
            "gain_db": [[round(float(g), 3) for g in v.gain] for v in done.victims],
            "labels": [v.labels for v in done.victims],
            "seconds": done.report["seconds"],
        }
    return {"model": cell.model, "clients": cell.clients, "attacks": found}


def summary(cell: dict[str, Any]) -> dict[str, Any]:
    """The stronger attack of a cell: mean over cohorts of the mean and of the best image, with t intervals,
    and the share of all images above the threshold, with its exact interval."""
    name, best = max(
        cell["attacks"].items(),
        key=lambda item: np.mean([np.minimum(v, MOST_DB) for v in item[1]["psnr_db"]]),
    )
    cohorts = [np.minimum(v, MOST_DB) for v in best["psnr_db"]]
    floors = [np.subtract(p, g) for p, g in zip(best["psnr_db"], best["gain_db"], strict=True)]
    images = [p for cohort in best["psnr_db"] for p in cohort]
    return {
        "attack": name.partition(":")[0],
        "mean": mean_interval([float(v.mean()) for v in cohorts]),
        "best": mean_interval([float(v.max()) for v in cohorts]),
        "gain": mean_interval([float((v - f).mean()) for v, f in zip(cohorts, floors, strict=True)]),
        "success": rate_interval(sum(p > THRESHOLD for p in images), len(images)),
        "labels": float(np.mean(best["labels"])),
    }


def show(result: dict[str, Any]) -> str:
    rows = []
    for cell in result["cells"]:
        s = summary(cell)
        rows.append(
            (
                cell["model"],
                str(cell["clients"]),
                s["attack"],
                _with(s["mean"]),
                _with(s["best"]),
                _with(s["gain"]),
                f"{s['success']['value']:.0%} [{s['success']['ci95'][0]:.0%}, {s['success']['ci95'][1]:.0%}]",
                f"{s['labels']:.0%}",
            )
        )
    header = ("model", "n", "attack", "PSNR, dB", "best image", "gain, dB", f"> {THRESHOLD:g} dB", "labels")
    words = (
        f"{VICTIMS} cohorts a cell; 95 % intervals over cohorts, of the rate over images; "
        f"an image counts at most {MOST_DB:g} dB."
    )
    return f"{table(header, rows)}\n{words}"


def _with(found: dict[str, Any]) -> str:
    half = "" if found["ci95"] is None else f" ±{found['mean'] - found['ci95'][0]:.1f}"
    return f"{found['mean']:.1f}{half}"


def draw(path: Path, result: dict[str, Any]) -> None:
    """PSNR over n, a panel a model: the mean image and the best one of a cohort, and no gain at all."""
    models = list(dict.fromkeys(c["model"] for c in result["cells"]))
    figure, axes = panels(len(models))
    for at, model in zip(axes, models, strict=True):
        cells = [c for c in result["cells"] if c["model"] == model]
        n = [c["clients"] for c in cells]
        rows = [summary(c) for c in cells]
        for key, label, colour in (("best", "best image of a cohort", "C3"), ("mean", "mean image", "C0")):
            means = [r[key]["mean"] for r in rows]
            low = [r[key]["ci95"][0] if r[key]["ci95"] else r[key]["mean"] for r in rows]
            high = [r[key]["ci95"][1] if r[key]["ci95"] else r[key]["mean"] for r in rows]
            at.plot(n, means, "o-", ms=4, color=colour, label=label)
            at.fill_between(n, low, high, color=colour, alpha=0.15, lw=0)
        floor = [r["mean"]["mean"] - r["gain"]["mean"] for r in rows]
        at.plot(n, floor, "--", color=INK, lw=1, label="best guess without the sum")
        at.set_xscale("log", base=2)
        at.set_xticks(n, [str(k) for k in n])
        at.set_title(model, fontsize=11, color=INK)
        tidy(at, "clients in the sum, n", "PSNR, dB")
    axes[0].legend(fontsize=8)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--cohorts", nargs="+", type=int, default=COHORTS, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="run nothing: print and draw what there is")
    parser.add_argument("--out", default=str(HERE), metavar="FILE")
    o = parser.parse_args(argv)
    path = Path(o.out)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": []}
    have = {(c["model"], c["clients"]) for c in result["cells"]}
    for model in o.models:
        for n in o.cohorts:
            if (model, n) not in have and not o.show:
                result["cells"].append(measure(Cell(model, n), o.seed))
                result["cells"].sort(key=lambda c: (MODELS.index(c["model"]), c["clients"]))
                result |= {
                    "command": document.command_line(),
                    "seed": o.seed,
                    "versions": document.versions(),
                }
                write_json(path, result)
    if not result["cells"]:
        print("nothing has been run", file=sys.stderr)
        return 1
    print(show(result))
    draw(path.with_suffix(".png"), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
