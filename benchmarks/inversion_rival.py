"""Inverting Gradients here and in breaching, its authors' framework, side by side on the same victims.

    python benchmarks/inversion_rival.py                     # the cases that are missing
    python benchmarks/inversion_rival.py --only convnet16-n1 --victims 3 --iterations 500

It needs an environment with breaching; see benchmarks/rivals/inversion_breaching.py. Both get the same
untrained weights with BatchNorm frozen, the same update and the true labels, in the order of the client's
steps where there are several; both may use the same number of evaluations of the matching loss. Ours is the
attack in ATTACKS that suits the model, breaching's is "invertinggradients" with the paper's settings.
breaching searches images that are normalised by the data's mean and deviation, as it is used to. A third run,
"equal time", is ours with as many iterations as fit into the time that breaching took. Victim by victim the
two take turns at going first.
"fedavg" is one epoch of four steps on four images at rate 0.01. Kept victims under runs/ let a stopped run go
on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from inversion_cells import dataset
from rivals import inversion_breaching as breaching

from fltoolkit import registry
from fltoolkit.audit import Scene, Stage
from fltoolkit.data import Dataset
from fltoolkit.data.photos import three_photographs
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import Bar, table
from fltoolkit.rng import stream, torch_stream
from fltoolkit.scoring import score
from fltoolkit.types import Examples, LocalSpec, Observation, Reconstruction

RESULT = Path(__file__).parent / "results" / "inversion_rival.json"
KEPT = Path("runs") / "inversion-rival"
SMOOTH = "natural:restarts=1,orders=1"
ATTACKS = {"lenet": SMOOTH, "convnet16": "features", "convnet": "features"}
BACKTRACKS = 0.04
"""Part of an L-BFGS search's evaluations that its line search may take on top of one an iteration."""
SIDES = ("ours", "breaching", "ours, equal time")
STEP, FEDAVG = LocalSpec(1, None, 0.01), LocalSpec(1, 1, 0.01)


@dataclass(frozen=True)
class Case:
    """A model, a batch and what the client does with it; iterations and victims by default."""

    model: str
    batch: int
    local: LocalSpec
    iterations: int
    victims: int

    @property
    def name(self) -> str:
        return f"{self.model}-n{self.batch}" + ("-fedavg" if self.local == FEDAVG else "")


CASES = [
    Case(model, batch, local, iterations, victims if batch == 1 else max(2, victims // 2))
    for model, iterations, victims in (("lenet", 300, 6), ("convnet16", 500, 3), ("convnet", 500, 3))
    for batch, local in ((1, STEP), (4, STEP), (4, FEDAVG))
]


def images(name: str) -> Dataset:
    """Victims' images: "photos" are crops of three photographs, each a class of its own modulo ten."""
    if name == "cifar10":
        return dataset(name)[0]
    if name != "photos":
        unknown("data", name, ["cifar10", "photos"])
    x = three_photographs(40)
    return Dataset("photographs", Examples(x, torch.arange(40) % 10), None, 10)


def told(stage: Stage, victim: int) -> tuple[Observation, Examples]:
    """What the server sees of a victim, with the labels in the order of its steps, and the private batch."""
    transcript, public = stage.round(victim)
    seen, truth = stage.threat.observe(transcript, 0, public), transcript.truth[0]
    rng = stream(stage.scene.seed, "round", seen.round, "client", 0, "batches")
    return replace(seen, labels=truth.y[torch.from_numpy(rng.permutation(len(truth)))]), truth


def ours(spec: str, seen: Observation, evaluations: int, seed: int, victim: int) -> Reconstruction:
    """The attack `spec` with at most about `evaluations`, which stand as its iterations."""
    spare = int(BACKTRACKS * evaluations) if spec == SMOOTH else 0
    attack = registry.make_attack(spec, steps=max(1, evaluations - spare))
    begun = time.perf_counter()
    found = attack(seen, torch_stream(seed, "victim", victim, "attack", attack.name))
    return replace(found, seconds=time.perf_counter() - begun, iterations=found.evaluations)


def theirs(
    seen: Observation,
    data: Dataset,
    iterations: int,
    seed: int,
    victim: int,
    kind: str = "invertinggradients",
) -> Reconstruction:
    """breaching's attack `kind`, told the labels where the adversary knows them."""
    mean = tuple(data.train.x.mean((0, 2, 3)).tolist())
    std = tuple(data.train.x.std((0, 2, 3)).tolist())
    several = seen.local_steps > 1
    row = seen.update if several else seen.gradient
    found = breaching.reconstruct(
        breaching.Denormalised(seen.model, mean, std).to(row.device),
        list(seen.layout.unflatten(row).values()),
        seen.labels,
        seen.input_shape,
        seen.num_classes,
        kind,
        iterations,
        seed * 1000 + victim,
        mean,
        std,
        local=seen.local if several else None,
        batch=seen.num_examples,
    )
    y = found.y if seen.labels is None else seen.labels
    return Reconstruction(found.x, y, 0.0, iterations=found.iterations, seconds=found.seconds)


def compare(
    case: Case, data: Dataset, iterations: int, seed: int, victim: int, device: str
) -> dict[str, Any]:
    """One victim by all sides: PSNR of each image, iterations made, seconds."""
    scene = Scene(
        attack="inverting", data=data, model=case.model, batch=case.batch, local=case.local, frozen_norm=True,
        seed=seed, device=device,
    )  # fmt: skip
    seen, truth = told(Stage(scene), victim)
    work = {
        "ours": lambda: ours(ATTACKS[case.model], seen, iterations, seed, victim),
        "breaching": lambda: theirs(seen, data, iterations, seed, victim),
    }
    turns = list(work) if victim % 2 == 0 else list(work)[::-1]
    found = {side: work[side]() for side in turns}
    each = found["ours"].seconds / max(1, found["ours"].iterations)
    affordable = max(1, int(found["breaching"].seconds / each))
    found["ours, equal time"] = ours(ATTACKS[case.model], seen, affordable, seed, victim)
    result = {}
    for side in SIDES:
        f = found[side]
        scored = score(f, truth, data.train.x.mean(0), data.input_range, data.num_classes)
        counts = {"iterations": f.iterations, "seconds": f.seconds}
        result[side] = {"psnr_db": scored.psnr.tolist(), "ssim": scored.ssim.tolist(), **counts}
    return result


def summarise(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each side's PSNR, then ours minus breaching's victim by victim, with intervals over victims."""

    def mean(found: dict[str, Any], key: str = "psnr_db") -> float:
        return sum(found[key]) / len(found[key])

    sides = {
        side: {
            "psnr_db": mean_interval([mean(d[side]) for d in done]),
            "psnr_db_by_image": [d[side]["psnr_db"] for d in done],
            "ssim": mean_interval([mean(d[side], "ssim") for d in done]),
            "iterations": [d[side]["iterations"] for d in done],
            "seconds": [d[side]["seconds"] for d in done],
        }
        for side in SIDES
    }
    rival = [mean(d["breaching"]) for d in done]
    differences = {
        side: mean_interval([mean(d[side]) - r for d, r in zip(done, rival, strict=True)])
        for side in ("ours", "ours, equal time")
    }
    ratio = [d["ours"]["seconds"] / d["breaching"]["seconds"] for d in done]
    return {"sides": sides, "minus_breaching_db": differences, "seconds_ours_to_breaching": ratio}


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All victims of a case; each is kept as soon as it is done."""
    data = images(options.data)
    iterations, victims = options.iterations or case.iterations, options.victims or case.victims
    KEPT.mkdir(parents=True, exist_ok=True)
    bar, done = Bar(case.name, every=5.0, ends=True), []
    for v in range(victims):
        kept = KEPT / f"{case.name}-{options.data}-{iterations}-{options.seed}-{v}.json"
        if options.redo or not kept.exists():
            write_json(kept, compare(case, data, iterations, options.seed, v, options.device))
        done.append(json.loads(kept.read_text(encoding="utf-8")))
        last = ", ".join(f"{s} {sum(done[-1][s]['psnr_db']) / case.batch:.1f} dB" for s in SIDES)
        bar(v + 1, victims, last)
    bar.close()
    flags = f"--victims {victims} --iterations {iterations} --data {options.data} --seed {options.seed}"
    flags += "" if options.device == "cpu" else f" --device {options.device}"
    return {
        "model": case.model,
        "batch": case.batch,
        "attack": ATTACKS[case.model],
        "local": asdict(case.local),
        "data": data.name,
        "note": data.note,
        "victims": victims,
        "iterations": iterations,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "device": options.device,
        **summarise(done),
        "command": f"python benchmarks/inversion_rival.py --only {case.name} {flags}",
        "versions": document.versions() | {"breaching": version("breaching")},
    }


def render(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for case in CASES:
        if case.name not in found:
            rows.append((case.name, *["not run"] * 6))
            continue
        r = found[case.name]
        psnr = (_interval(r["sides"][s]["psnr_db"]) for s in SIDES)
        gap = (_interval(r["minus_breaching_db"][s]) for s in ("ours", "ours, equal time"))
        ratio = r["seconds_ours_to_breaching"]
        rows.append((case.name, *psnr, *gap, f"{sum(ratio) / len(ratio):.2f}"))
    return table(("PSNR in dB", *SIDES, "difference", "at equal time", "time ratio"), rows)


def _interval(found: dict[str, Any]) -> str:
    low, high = found["ci95"] or [found["mean"]] * 2
    return f"{found['mean']:.1f} ±{(high - low) / 2:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    parser.add_argument("--victims", type=int, help="victims a case (default: by case)")
    parser.add_argument("--iterations", type=int, help="iterations of either side (default: by case)")
    parser.add_argument("--data", default="cifar10", help="cifar10 or photos (default: cifar10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all streams (default: 0)")
    parser.add_argument("--device", default="cpu", help="where both sides run (default: cpu)")
    parser.add_argument("--redo", action="store_true", help="run cases again that are done")
    parser.add_argument("--show", action="store_true", help="run nothing, print the table of what is done")
    options = parser.parse_args()
    found = json.loads(RESULT.read_text(encoding="utf-8"))["cases"] if RESULT.exists() else {}
    try:
        require(options.show or breaching.available(), "environment", "one with breaching", "none")
        for case in CASES:
            missing = options.redo or case.name not in found
            if options.only in case.name and missing and not options.show:
                found[case.name] = run_case(case, options)
                write_json(RESULT, {"about": __doc__.splitlines()[0], "cases": found})
    except InputError as e:
        raise SystemExit(f"error: {e}") from e
    print(render(found))


if __name__ == "__main__":
    main()
