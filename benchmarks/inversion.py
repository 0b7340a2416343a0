"""How strong the gradient-inversion attacks are: over models, batch sizes and local steps.

    python benchmarks/inversion.py                   # the cells that are missing, cheap ones first
    python benchmarks/inversion.py --show            # the table of those that are there
    python benchmarks/inversion.py --only 2nn-trained --redo
    python benchmarks/inversion.py --attack gradinversion --only n4

Every attack of a setting sees the same victims: an honest client's update at rate 0.1 on MNIST (2nn, cnn) or
CIFAR-10 (lenet, convnet, resnet18), as a curious server receives it, labels unknown. Victims are drawn from
the last 10,000 training images. "trained" models are the same for all victims and trained on the other
images, "untrained" ones are new for each; BatchNorm is frozen. A cell is one small file in
benchmarks/results/inversion/, written when it is done and then never run again. Intervals are over victims.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inversion_cells import ATTACKS, TARGETS, Cell, cells, dataset, trained
from inversion_figure import draw, read, render
from scipy import stats

from fltoolkit import registry
from fltoolkit.audit import Scene, run
from fltoolkit.errors import InputError, require
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import Bar
from fltoolkit.scoring import Scored

RESULTS = Path(__file__).parent / "results" / "inversion"
WEIGHTS = Path("runs") / "inversion"
SCHEMA = "fltoolkit.inversion-cell/1"
THRESHOLD_DB = 20.0

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Effort:
    """What a call may change of a cell's defaults; None keeps them."""

    iterations: int | None = None
    victims: int | None = None
    data: str | None = None
    device: str = "cpu"
    seed: int = 0


def run_cell(cell: Cell, effort: Effort, folder: Path, weights: Path, progress: Progress) -> dict[str, Any]:
    """Attack every victim of `cell` and write FOLDER/ID.json once all are done."""
    name = effort.data or cell.target.data
    begun, test_accuracy = time.process_time(), None
    model: Any = cell.model
    if cell.weights == "trained":
        model, test_accuracy = trained(cell.model, name, effort.seed, weights, progress, effort.device)
    data, _ = dataset(name)
    attack = cell.make(effort.iterations)
    scene = Scene(
        attack=attack,
        data=data,
        model=model,
        batch=cell.batch,
        victims=effort.victims or cell.victims,
        local=cell.recipe,
        frozen_norm=True,
        seed=effort.seed,
        device=effort.device,
        threshold_db=THRESHOLD_DB,
    )
    outcome = run(scene, progress)
    result = {
        "schema": SCHEMA,
        "cell": cell.setting(),
        "data": name,
        "test_accuracy": test_accuracy,
        **summary(outcome.report, outcome.victims),
        "iterations": {"most": getattr(attack, "steps", None), "mean": outcome.report["iterations"]},
        "seed": effort.seed,
        "device": effort.device,
        "threads": torch.get_num_threads(),
        "processor_seconds": time.process_time() - begun,
        "note": data.note,
        "command": command(cell, effort),
        "versions": document.versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{cell.id}.json", rounded(result))
    return result


def summary(report: dict[str, Any], victims: Sequence[Scored]) -> dict[str, Any]:
    """What is kept of an audit's report: means with intervals, and how often each thing was said."""
    metrics = {k: v for k, v in report["metrics"].items() if k != "success_rate"}
    metrics = {k: {"mean": v["mean"], "ci95": v["ci95"]} for k, v in metrics.items()}
    return {
        "attack_options": report["attack_options"],
        "victims": len(victims),
        "images": sum(len(s.truth) for s in victims),
        "metrics": metrics | {"success": success([s.psnr > THRESHOLD_DB for s in victims])},
        "seconds": report["seconds"],
        "notes": counted(report["notes"]),
        "adaptations": counted(report["adaptations"]),
        "diagnoses": counted([words for found in report["diagnoses"] for words in found]),
    }


def success(above: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The share of images above the threshold, `above [victims][N]`, with an interval over victims.

    Clopper and Pearson's interval at the effective number of images of Korn and Graubard 1998, Survey
    Methodology 24(2): what the spread of the victims' shares is worth in independent images. It lies between
    the number of victims and that of images; where all victims agree, it is the number of victims.
    """
    shares = np.array([float(a.float().mean()) for a in above])
    images, share = sum(len(a) for a in above), float(shares.mean())
    spread = float(shares.var(ddof=1)) / len(shares) if len(shares) > 1 else 0.0
    n = share * (1 - share) / spread if spread > 0 else len(shares)
    n = min(max(n, len(shares)), images)
    k = share * n
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if share > 0 else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if share < 1 else 1.0
    return {"value": share, "ci95": [low, high], "effective_images": float(n), "threshold_db": THRESHOLD_DB}


def counted(words: Sequence[str]) -> dict[str, int]:
    """How often each was said, numbers aside."""
    return dict(Counter(re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", w) for w in words if w).most_common(6))


def rounded(value: Any) -> Any:
    """Numbers to six digits, which is more than an interval is good for."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def command(cell: Cell, effort: Effort) -> str:
    """The command that runs this cell alone."""
    words = ["python benchmarks/inversion.py", f"--only {cell.id}", f"--seed {effort.seed}"]
    if cell.attack not in ATTACKS:
        words.append(f"--attack {cell.attack}")
    for flag in ("iterations", "victims", "data"):
        if getattr(effort, flag) is not None:
            words.append(f"--{flag} {getattr(effort, flag)}")
    return " ".join([*words, *([f"--device {effort.device}"] if effort.device != "cpu" else [])])


def run_missing(chosen: Sequence[Cell], effort: Effort, folder: Path, weights: Path, redo: bool) -> None:
    """Run the cells that have no file yet, in their order, with what is left told after each."""
    todo = [c for c in chosen if redo or not (folder / f"{c.id}.json").exists()]
    expected, spent = sum(c.cost for c in todo), 0.0
    left = expected
    for i, cell in enumerate(todo, 1):
        begun, bar = time.perf_counter(), Bar(f"[{i}/{len(todo)}] {cell.id}", every=20.0)
        found = run_cell(cell, effort, folder, weights, bar)
        bar.close()
        spent, left = spent + time.perf_counter() - begun, left - cell.cost
        pace = spent / max(1e-9, expected - left)
        psnr = found["metrics"]["psnr_db"]["mean"]
        clock = f"{spent / 60:.1f} min spent, {pace * left / 60:.1f} min left"
        print(f"[{i}/{len(todo)}] {cell.id}  {psnr:.1f} dB, {clock}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cells whose id holds this text")
    parser.add_argument("--attack", action="append", help=f"attack, may be repeated (default: {ATTACKS})")
    parser.add_argument("--iterations", type=int, help="iterations of a search (default: by model)")
    parser.add_argument("--victims", type=int, help="victims a cell (default: by model and batch)")
    parser.add_argument("--data", help="attack on this data set instead of the model's own")
    parser.add_argument("--device", default="cpu", help="where searches run (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all streams (default: 0)")
    parser.add_argument("--redo", action="store_true", help="run cells again that are done")
    parser.add_argument("--show", action="store_true", help="run nothing, print the table of what is done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the cells' files")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the trained models")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        for flag in ("iterations", "victims"):
            value = getattr(options, flag)
            require(value is None or value >= 1, flag, ">= 1", value)
        attacks = tuple(options.attack or ATTACKS)
        for attack in attacks:
            registry.make_attack(attack)
        every = cells(attacks)
        chosen = [c for c in every if options.only in c.id]
        require(bool(chosen), "only", f"part of a cell's id such as {every[0].id}", options.only)
        if not options.show:
            effort = Effort(options.iterations, options.victims, options.data, options.device, options.seed)
            run_missing(chosen, effort, options.out, options.weights, options.redo)
    except InputError as e:
        raise SystemExit(f"error: {e}") from e
    results = read(options.out)
    print(render(results, [m for m in TARGETS if any(c.model == m for c in chosen)]))
    if results and not options.show:
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
