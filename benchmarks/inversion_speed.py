"""What gradient inversion costs: by search, by iteration, to the same quality, and beside breaching.

    python benchmarks/inversion_speed.py                 # all cases; beside breaching where that is installed
    python benchmarks/inversion_speed.py --case lenet --victims 10 --json

lenet: single photographs through a sigmoid LeNet, by iDLG and `natural`, plain and compiled. stopping: what
it saves to stop on a plateau. convnet: a ConvNet of width 64 (--model), by iteration in float32 and bf16, and
how soon a better schedule reaches what breaching's settings end with. fedavg: four images through four steps.
Evaluations are timed in turn, searches one after the other; BatchNorm is frozen, labels are given where
breaching needs them. Ours in float32 takes slopes by a difference where its search allows that; bf16 goes by
double backward. The floor is one forward and backward pass of the network. Ratios count, and only of runs on
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from inversion_rival import FEDAVG, STEP, images, theirs, told
from rivals import inversion_breaching as breaching

from fltoolkit import registry
from fltoolkit.audit import Scene, Stage
from fltoolkit.data import Dataset, load
from fltoolkit.errors import InputError, require
from fltoolkit.inversion.distance import cosine
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import total_variation
from fltoolkit.metrics.interval import mean_interval, rate_interval
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import table
from fltoolkit.rng import torch_stream
from fltoolkit.scoring import score
from fltoolkit.types import Examples, LocalSpec, Observation, Reconstruction

BETTER = "inverting:lr=0.3,decay=cosine"
RESULT = Path(__file__).parent / "results" / "inversion_speed.json"
IDLG = "idlg:restarts=1,steps=400,spectrum=0.5,start_std=0.02"
PLAIN = "idlg:restarts=1,steps=2000"
NATURAL = "natural:restarts=1,steps=250"
GOOD_DB = 30.0
SHOWN = 3
COLUMNS = ("s a victim", "PSNR in dB", "above 30 dB", "evaluations", "first ones")

Victims = Sequence[tuple[Observation, Examples]]


def quality(found: Sequence[Reconstruction], victims: Victims, data: Dataset) -> list[float]:
    """PSNR of each victim in dB."""
    average = data.train.x.mean(0)
    pairs = zip(found, victims, strict=True)
    scored = [score(f, t, average, data.input_range, data.num_classes) for f, (_, t) in pairs]
    return [float(s.psnr.mean()) for s in scored]


def summary(psnr: Sequence[float], seconds: float, **more: Any) -> dict[str, Any]:
    above = rate_interval(sum(p > GOOD_DB for p in psnr), len(psnr))
    return {"psnr_db": mean_interval(list(psnr)), "above_30_db": above, "seconds_a_victim": seconds, **more}


def search(spec: str, victims: Victims, data: Dataset, seed: int, **options: Any) -> dict[str, Any]:
    """One attack on all victims in one stack, timed; a program's making is counted apart."""
    attack = registry.make_attack(spec, **options)
    seen = [o for o, _ in victims]
    begun = time.perf_counter()
    found = attack.many(seen, [torch_stream(seed, "victim", v, "attack", "speed") for v in range(len(seen))])
    whole = (time.perf_counter() - begun) / len(seen)
    return summary(
        quality(found, victims, data),
        sum(f.seconds for f in found) / len(found),
        seconds_with_compilation=whole,
        evaluations=mean(f.evaluations for f in found),
        note=found[0].note,
        attack=spec,
    )


def rival(kind: str, victims: Victims, data: Dataset, iterations: int, seed: int) -> dict[str, Any]:
    """breaching on the same victims, one after the other."""
    found = [theirs(o, data, iterations, seed, v, kind) for v, (o, _) in enumerate(victims)]
    return summary(
        quality(found, victims, data),
        mean(f.seconds for f in found),
        evaluations=mean(f.iterations for f in found),
        attack=f"breaching {kind}",
    )


def lenet(options: argparse.Namespace) -> dict[str, Any]:
    """Photographs: seconds a victim, and how many come back."""
    data = load("photos")
    victims = seen_by("idlg", data, "lenet", options)
    sides = {"plain search": search(PLAIN, victims, data, options.seed)}
    sides["iDLG, spectrum"] = search(IDLG, victims, data, options.seed)
    sides["iDLG, compiled, cold"] = search(IDLG, victims, data, options.seed, compile=True)
    sides["iDLG, compiled, warm"] = search(IDLG, victims, data, options.seed, compile=True)
    sides["natural"] = search(NATURAL, victims, data, options.seed)
    sides["natural, compiled, cold"] = search(NATURAL, victims, data, options.seed, compile=True)
    sides["natural, compiled, warm"] = search(NATURAL, victims, data, options.seed, compile=True)
    if breaching.available():
        sides["breaching"] = rival("idlg", victims, data, 2000, options.seed)
    each = per_evaluation(victims, Objective(), options.repeats, compiled=True)
    return {"victims": len(victims), "sides": sides, "milliseconds": each}


def stopping(options: argparse.Namespace) -> dict[str, Any]:
    """The same searches with and without stopping on a plateau of the matching loss."""
    data, sides = load("photos"), {}
    victims = seen_by("idlg", data, "lenet", options)
    for name, spec in {"idlg": "idlg:restarts=4", "inverting": "inverting:steps=2400"}.items():
        for words, patience in (("stops", 200), ("does not", 0)):
            sides[f"{name} {words}"] = search(spec, victims, data, options.seed, patience=patience)
    saved = {
        name: 1 - sides[f"{name} stops"]["seconds_a_victim"] / sides[f"{name} does not"]["seconds_a_victim"]
        for name in ("idlg", "inverting")
    }
    return {"victims": len(victims), "sides": sides, "time_saved": saved}


def convnet(options: argparse.Namespace) -> dict[str, Any]:
    """A network bound by arithmetic: cost of an iteration, and time to what breaching ends with."""
    data = images(options.data)
    victims = in_order(data, options.model, options)
    objective = Objective(cosine, ((1e-2, total_variation),), rough=True)
    each = per_evaluation(victims, objective, options.repeats)
    few = options.iterations * 2 // 5
    sides = {
        "ours": search(BETTER, victims, data, options.seed, steps=options.iterations),
        "ours, bf16": search(BETTER, victims, data, options.seed, steps=options.iterations, precision="bf16"),
        "ours, 2/5 of it": search(BETTER, victims, data, options.seed, steps=few),
        "ours, 2/5, bf16": search(BETTER, victims, data, options.seed, steps=few, precision="bf16"),
        "ours, features": search("features", victims, data, options.seed, steps=options.iterations),
    }
    if breaching.available():
        sides["breaching"] = rival("invertinggradients", victims, data, options.iterations, options.seed)
        each["breaching"] = [1e3 * sides["breaching"]["seconds_a_victim"] / options.iterations]
    return {"victims": len(victims), "model": options.model, "sides": sides, "milliseconds": each}


def fedavg(options: argparse.Namespace) -> dict[str, Any]:
    """Four images through an epoch of four local steps; only breaching is told the labels and their order."""
    data = images(options.data)
    victims = in_order(data, options.model, options, 4, FEDAVG)
    blind = [(replace(o, labels=None), t) for o, t in victims]
    sides = {"ours": search("features", blind, data, options.seed, steps=options.iterations)}
    if breaching.available():
        sides["breaching"] = rival("invertinggradients", victims, data, options.iterations, options.seed)
    return {"victims": len(victims), "model": options.model, "sides": sides}


def seen_by(attack: str, data: Dataset, model: str, options: argparse.Namespace) -> Victims:
    """What the server sees of single images, labels unknown."""
    stage = Stage(Scene(attack=attack, data=data, model=model, local=STEP, seed=options.seed))
    found = [told(stage, v) for v in range(options.victims)]
    return [(replace(o, labels=None), t) for o, t in found]


def in_order(
    data: Dataset, model: str, options: argparse.Namespace, batch: int = 1, local: LocalSpec = STEP
) -> Victims:
    """The same of the data's first images, `batch` to each victim, labels known."""
    found = []
    for v in range(options.victims):
        own = replace(data, train=data.train.take(torch.arange(v * batch, (v + 1) * batch)))
        scene = Scene(
            data=own, model=model, batch=batch, local=local, frozen_norm=True, seed=options.seed + v
        )
        found.append(told(Stage(scene), 0))
    return found


def per_evaluation(
    victims: Victims, objective: Objective, repeats: int, compiled: bool = False
) -> dict[str, Any]:
    """Milliseconds a victim for one evaluation by each way, `repeats` times in turn, and for the floor."""
    seen = [o for o, _ in victims]
    first, owner = seen[0], torch.arange(len(seen))
    alone = one_by_one_is_faster(first)
    ways = {"ours": replace(objective, one_by_one=alone)}
    if objective.rough:
        ways["ours, double backward"] = replace(ways["ours"], rough=False)
    ways["ours, bf16"] = replace(ways["ours"], precision="bf16")
    if compiled:
        ways["ours, compiled"] = replace(ways["ours"], compile=True)
    labels = torch.stack([t.y for _, t in victims])
    x = torch.stack([t.x for _, t in victims]).flatten(1)
    work: dict[str, Callable[[], Any]] = {"floor": lambda: [forward_backward(o, t) for o, t in victims]}
    for name, way in ways.items():
        problem = GradientMatching(seen, owner, labels, way)
        work[name] = lambda problem=problem: problem(0.5 * x + 0.2, owner)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, job in work.items():
            begun = time.perf_counter()
            job()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begun) / len(seen))
    return times


def forward_backward(o: Observation, data: Examples) -> None:
    loss = o.loss(o.model(data.x), data.y).mean()
    torch.autograd.grad(loss, [p for p in o.model.parameters() if p.requires_grad])


CASES = {"lenet": lenet, "stopping": stopping, "convnet": convnet, "fedavg": fedavg}


def named(case: str, model: str) -> str:
    """Cases on a chosen model are kept by it: convnet, convnet16, fedavg, ..."""
    return model if case == "convnet" else case


def render(found: dict[str, Any]) -> str:
    """A table a case, with evaluation costs over the floor."""
    blocks = []
    for name, case in found.items():
        rows = []
        for side, s in case["sides"].items():
            low, high = s["psnr_db"]["ci95"] or [s["psnr_db"]["mean"]] * 2
            spread = f" ±{(high - low) / 2:.1f}" if len(s["psnr_db"]["values"]) > SHOWN else ""
            psnr = f"{s['psnr_db']['mean']:.1f}{spread}"
            above = f"{s['above_30_db']['value']:.0%}"
            images = ", ".join(f"{v:.1f}" for v in s["psnr_db"]["values"][:SHOWN])
            rows.append(
                (side, f"{s['seconds_a_victim']:.2f}", psnr, above, f"{s['evaluations']:.0f}", images)
            )
        header = (f"{name}, {case['victims']} victims", *COLUMNS)
        lines = [table(header, rows)]
        costs = {k: median(v) for k, v in case.get("milliseconds", {}).items()}
        if costs:
            each = ", ".join(f"{k} {v:.2f} ({v / costs['floor']:.1f}x)" for k, v in costs.items())
            lines.append(f"ms an evaluation and victim (over the floor): {each}")
        saved = case.get("time_saved", {})
        lines += [f"time saved by stopping, {k}: {v:.0%}" for k, v in saved.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated (default: all)")
    parser.add_argument("--victims", type=int, default=10, help="victims a case (default: 10)")
    parser.add_argument("--iterations", type=int, default=500, help="of convnet's searches (default: 500)")
    parser.add_argument("--model", default="convnet", help="of the case convnet (default: convnet)")
    parser.add_argument(
        "--data", default="photos", help="photos or cifar10, of the case convnet (default: photos)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="of each timed evaluation (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads of all sides (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all streams (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, default=RESULT, help="file that keeps the newest of each case")
    options = parser.parse_args(argv)
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    try:
        for flag in ("victims", "iterations", "repeats", "threads"):
            require(getattr(options, flag) >= 1, flag, ">= 1", getattr(options, flag))
        torch.set_num_threads(options.threads)
        for name in options.case or CASES:
            result = CASES[name](options)
            told_by = {"threads": options.threads, "seed": options.seed, "command": document.command_line()}
            kept[named(name, options.model)] = result | told_by | {"versions": document.versions()}
            write_json(options.out, kept)
    except InputError as e:
        raise SystemExit(f"error: {e}") from e
    print(json.dumps(kept) if options.json else render(kept))


if __name__ == "__main__":
    main()
