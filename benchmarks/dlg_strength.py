"""DLG and iDLG on real photographs: how many come back, and what that costs beside the plain method.

    python benchmarks/dlg_strength.py --victims 32 --seed 0

The plain method is the papers' own: one start from N(0, 1), `torch.optim.LBFGS` with learning rate 1,
history 100 and 20 inner iterations, at most 2,000 evaluations by double backward, one victim after the
other. Both run on the same victims, in alternating blocks, in one process. A finished block is kept under
runs/, so a run that was stopped goes on where it was; the result lies in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from fltoolkit import registry
from fltoolkit.audit import Scene, Stage
from fltoolkit.inversion.matching import GradientMatching
from fltoolkit.metrics.image import psnr
from fltoolkit.metrics.interval import mean_interval, rate_interval
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.rng import torch_stream
from fltoolkit.types import Observation

RESULT = Path(__file__).parent / "results" / "dlg_strength.json"
BLOCK = 16
EVALUATIONS = 2000


class Plain:
    """The matching loss of one victim by double backward, as the public implementations compute it."""

    def __init__(self, o: Observation, labels: torch.Tensor | None) -> None:
        self.o, self.labels, self.evaluations = o, labels, 0
        self.weights = {n: p.requires_grad_() for n, p in o.layout.unflatten(o.params.clone()).items()}
        self.target = o.layout.unflatten(o.gradient)

    def __call__(self, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        self.evaluations += 1
        y = self.labels if logits is None else logits.softmax(-1)
        loss = nn.functional.cross_entropy(functional_call(self.o.model, self.weights, (x,)), y)
        grads = torch.autograd.grad(loss, list(self.weights.values()), create_graph=True)
        return sum((g - t).square().sum() for g, t in zip(grads, self.target.values(), strict=True))

    def minimise(self, rng: torch.Generator) -> torch.Tensor:
        x = torch.randn(1, *self.o.input_shape, generator=rng).requires_grad_()
        logits = None
        if self.labels is None:
            logits = torch.randn(1, self.o.num_classes, generator=rng).requires_grad_()
        variables = [v for v in (x, logits) if v is not None]
        optimiser = torch.optim.LBFGS(variables, lr=1, history_size=100, max_iter=20)

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            distance = self(x, logits)
            gradients = torch.autograd.grad(distance, variables)
            for v, g in zip(variables, gradients, strict=True):
                v.grad = g
            return distance

        while self.evaluations < EVALUATIONS:
            before = self.evaluations
            if not torch.isfinite(optimiser.step(closure)) or self.evaluations - before < 2:
                break
        return x.detach()


def run_block(name: str, method: str, stage: Stage, victims: range, seed: int) -> dict:
    observations, truths = [], []
    for v in victims:
        transcript, public = stage.round(v)
        observations.append(stage.threat.observe(transcript, 0, public))
        truths.append(transcript.truth[0])
    rngs = [torch_stream(seed, "victim", v, "attack", name) for v in victims]
    attack = registry.make_attack(name)
    begun = time.perf_counter()
    if method == "ours":
        found = attack.many(observations, rngs)
        x, labels = [f.x for f in found], [int(f.y[0]) for f in found]
        evaluations = [f.evaluations for f in found]
    else:
        inferred = [attack.infer_labels(o) for o in observations]
        problems = [Plain(o, y) for o, y in zip(observations, inferred, strict=True)]
        x = [p.minimise(r) for p, r in zip(problems, rngs, strict=True)]
        labels = [None if y is None else int(y[0]) for y in inferred]
        evaluations = [p.evaluations for p in problems]
    seconds = (time.perf_counter() - begun) / len(observations)
    db = [float(psnr(a.nan_to_num(0).clamp(0, 1), t.x, 1.0)) for a, t in zip(x, truths, strict=True)]
    right = [None if y is None else y == int(t.y[0]) for y, t in zip(labels, truths, strict=True)]
    return {"psnr_db": db, "labels_right": right, "evaluations": evaluations, "seconds_per_image": seconds}


def evaluation_cost(stage: Stage, together: int = 16, repeats: int = 30) -> dict:
    """Milliseconds of one matching-loss gradient a victim: plain, and with `together` victims in a stack;
    the two are timed in turn, and the median of the ratios is reported."""
    seen = [stage.threat.observe(*_first(stage.round(v))) for v in range(together)]
    stacked = GradientMatching(seen, torch.arange(together), None)
    z, rows = torch.randn(together, stacked.variables), torch.arange(together)
    plain = Plain(seen[0], None)
    x = z[:1, : stacked.inputs].reshape(1, *seen[0].input_shape).clone().requires_grad_()
    logits = z[:1, stacked.inputs :].clone().requires_grad_()

    def clock(work) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    pairs = []
    for _ in range(repeats + 3):
        alone = clock(lambda: [torch.autograd.grad(plain(x, logits), (x, logits)) for _ in range(together)])
        pairs.append((alone / together, clock(lambda: stacked(z, rows)) / together))
    pairs = pairs[3:]
    ratios = sorted(stack / alone for alone, stack in pairs)
    low, middle, high = np.quantile(ratios, [0.025, 0.5, 0.975])
    return {
        "plain_ms": 1e3 * float(np.median([p[0] for p in pairs])),
        "stacked_ms": 1e3 * float(np.median([p[1] for p in pairs])),
        "ratio": {"median": float(middle), "central95": [float(low), float(high)], "repeats": repeats},
        "victims_together": together,
    }


def _first(played: tuple) -> tuple:
    transcript, public = played
    return transcript, 0, public


def summarise(blocks: list[dict]) -> dict:
    db = [v for b in blocks for v in b["psnr_db"]]
    right = [v for b in blocks for v in b["labels_right"] if v is not None]
    cost = [b["seconds_per_image"] for b in blocks]
    return {
        "psnr_db": mean_interval(db) | {"median": float(np.median(db))},
        "above_30_db": rate_interval(sum(v > 30 for v in db), len(db)),
        "labels_right": rate_interval(sum(right), len(right)) if right else None,
        "evaluations": float(np.mean([v for b in blocks for v in b["evaluations"]])),
        "seconds_per_image": float(np.mean(cost)),
        "seconds_per_image_by_block": cost,
    }


def draw(path: Path, document_: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fltoolkit.report.files import write_atomic

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {"ours": "#c2410c", "plain": "#64748b"}
    for (name, method), s in ((k.split("/"), v) for k, v in document_["cells"].items()):
        values = np.sort(s["psnr_db"]["values"])
        style = "-" if name == "dlg" else "--"
        axes[0].step(values, 1 - np.arange(len(values)) / len(values), style, color=colours[method],
                     label=f"{name}, {method}", where="pre")  # fmt: skip
    axes[0].axvline(30, color="#d1d5db", zorder=0)
    axes[0].set(xlabel="PSNR in dB", ylabel="share of images at least this good")
    axes[0].legend(frameon=False, fontsize=8)
    names = list(document_["cells"])
    seconds = [document_["cells"][n]["seconds_per_image"] for n in names]
    axes[1].barh(names, seconds, color=[colours[n.split("/")[1]] for n in names])
    axes[1].set(xlabel="seconds an image, all restarts")
    axes[1].invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda p: figure.savefig(p, dpi=150))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victims", type=int, default=32, help="real images (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all streams (default: 0)")
    options = parser.parse_args()
    stage = Stage(Scene(attack="dlg", victims=options.victims, seed=options.seed))
    folder = Path("runs") / f"dlg-strength-{options.victims}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    blocks: dict[str, list[dict]] = {f"{n}/{m}": [] for n in ("dlg", "idlg") for m in ("ours", "plain")}
    for start in range(0, options.victims, BLOCK):
        victims = range(start, min(start + BLOCK, options.victims))
        for cell, done in blocks.items():
            kept = folder / f"{cell.replace('/', '-')}-{start}.json"
            if not kept.exists():
                write_json(kept, run_block(*cell.split("/"), stage, victims, options.seed))
            done.append(json.loads(kept.read_text()))
            print(
                cell,
                start,
                np.round(done[-1]["psnr_db"], 1),
                f"{done[-1]['seconds_per_image']:.2f} s",
                flush=True,
            )
    cells = {cell: summarise(done) for cell, done in blocks.items()}
    result = {
        "command": f"python benchmarks/dlg_strength.py --victims {options.victims} --seed {options.seed}",
        "seed": options.seed,
        "victims": options.victims,
        "threads": torch.get_num_threads(),
        "cells": cells,
        "time_ratio_ours_to_plain": {
            n: cells[f"{n}/ours"]["seconds_per_image"] / cells[f"{n}/plain"]["seconds_per_image"]
            for n in ("dlg", "idlg")
        },
        "evaluation": evaluation_cost(stage),
        "versions": document.versions(),
    }
    write_json(RESULT, result)
    draw(RESULT.with_suffix(".png"), result)
    print(json.dumps({k: result[k] for k in ("time_ratio_ours_to_plain", "evaluation")}, indent=2))


if __name__ == "__main__":
    main()
