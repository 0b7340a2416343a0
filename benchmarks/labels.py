"""How many of a batch's labels each strategy reads off one update, before any search.

    python benchmarks/labels.py --victims 20 --seed 0 --data mnist

A victim is a network of its own (two hidden layers of 64 units) and a batch drawn uniformly at random from
the training set, so labels repeat. Half of the networks are untrained, half are trained until they classify
60 % of 1,000 examples; the client takes one step or five of size 0.1 on the whole batch. All strategies see
the same observations; "+ public" adds 200 other labelled examples. "uniform" is the best guess without
looking: every class equally often. The result lies in benchmarks/results/labels.json and labels.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fltoolkit.data import load
from fltoolkit.inversion.labels import DEFAULT, STRATEGIES
from fltoolkit.loss import cross_entropy
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.metrics.label import label_accuracy
from fltoolkit.report import document
from fltoolkit.report.figures import INK, panels, save, tidy
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import Bar, table
from fltoolkit.rng import torch_stream
from fltoolkit.types import Examples, Layout, LocalSpec, Observation

RESULT = Path(__file__).parent / "results" / "labels.json"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}
STEPS = (1, 5)
RATE = 0.1
TRAINED = {"untrained": 0.0, "trained": 0.6}
HIDDEN, PUBLIC, CHECKED, MOST_STEPS = 64, 200, 1000, 5000
WITH_PUBLIC = ("llg+", "counts")
METHODS = ("uniform", *STRATEGIES, *(f"{name} + public" for name in WITH_PUBLIC))


def network(activation: type[nn.Module], data: Examples, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(prod(data.x.shape[1:]), HIDDEN),
            activation(),
            nn.Linear(HIDDEN, HIDDEN),
            activation(),
            nn.Linear(HIDDEN, classes),
        )


def train(model: nn.Module, data: Examples, accuracy: float, rng: torch.Generator) -> None:
    """Momentum SGD until `accuracy` on the first examples is reached."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(MOST_STEPS if accuracy else 0):
        if step % 5 == 0 and _accuracy(model, data.take(slice(CHECKED))) >= accuracy:
            return
        batch = data.take(torch.randint(len(data), (64,), generator=rng))
        optimiser.zero_grad()
        cross_entropy(model(batch.x), batch.y).mean().backward()
        optimiser.step()


@torch.no_grad()
def _accuracy(model: nn.Module, data: Examples) -> float:
    return float((model(data.x).argmax(1) == data.y).float().mean())


def observe(model: nn.Module, batch: Examples, steps: int, classes: int, bounds: Any) -> Observation:
    """What a server sees of `steps` local steps on the whole batch."""
    layout, client = Layout.of(model), deepcopy(model)
    optimiser = torch.optim.SGD(client.parameters(), lr=RATE)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(client(batch.x), batch.y).mean().backward()
        optimiser.step()
    params = layout.row(model)
    return Observation(
        model=model,
        loss=cross_entropy,
        layout=layout,
        params=params,
        update=layout.row(client) - params,
        clients=1,
        num_examples=len(batch),
        input_shape=tuple(batch.x.shape[1:]),
        input_range=bounds,
        num_classes=classes,
        local=LocalSpec(epochs=steps, lr=RATE),
    )


def guess(method: str, seen: Observation, public: Examples) -> Tensor:
    if method == "uniform":
        return torch.arange(seen.num_examples) % seen.num_classes
    name, _, known = method.partition(" + ")
    return STRATEGIES[name](replace(seen, auxiliary=public) if known else seen)


def measure(options: argparse.Namespace, progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """One row a cell: training, activation, steps, batch size, method; its accuracy over victims."""
    data = load(options.data)
    found: dict[tuple[Any, ...], list[float]] = {}
    cells = [(t, a, v) for t in TRAINED for a in ACTIVATIONS for v in range(options.victims)]
    for done, (training, activation, v) in enumerate(cells, 1):
        rng = torch_stream(options.seed, "labels", training, activation, "victim", v)
        init = int(torch.randint(2**31, (1,), generator=rng))
        model = network(ACTIVATIONS[activation], data.train, data.num_classes, init)
        train(model, data.train, TRAINED[training], rng)
        for steps in STEPS:
            for size in SIZES:
                drawn = torch.randint(len(data.train), (size + PUBLIC,), generator=rng)
                batch, public = data.train.take(drawn[:size]), data.train.take(drawn[size:])
                seen = observe(model, batch, steps, data.num_classes, data.input_range)
                for method in METHODS:
                    right = label_accuracy(guess(method, seen, public), batch.y, data.num_classes)
                    found.setdefault((training, activation, steps, size, method), []).append(right)
        progress(done, len(cells), f"{training} {activation}")
    keys = ("training", "activation", "steps", "batch", "method")
    return [dict(zip(keys, k, strict=True)) | {"accuracy": mean_interval(v)} for k, v in found.items()]


def pooled(rows: list[dict[str, Any]], **where: Any) -> dict[str, Any]:
    """The mean accuracy with its interval over the victims of all rows that match."""
    chosen = [r for r in rows if all(r[k] == v for k, v in where.items())]
    return mean_interval([value for r in chosen for value in r["accuracy"]["values"]])


def overall(rows: list[dict[str, Any]], number: int) -> dict[str, dict[str, Any]]:
    """Each method's accuracy over all cells. A victim is the unit: its cells are averaged first."""
    result = {}
    for method in METHODS:
        values = [r["accuracy"]["values"] for r in rows if r["method"] == method]
        per_group = len(STEPS) * len(SIZES)
        groups = [values[i : i + per_group] for i in range(0, len(values), per_group)]
        result[method] = mean_interval([sum(c[v] for c in g) / len(g) for g in groups for v in range(number)])
    return result


def render(rows: list[dict[str, Any]], training: str, steps: int) -> str:
    """Label accuracy in percent with its 95 % interval, activations pooled."""
    lines = []
    for method in METHODS:
        found = [pooled(rows, training=training, steps=steps, batch=n, method=method) for n in SIZES]
        lines.append((method, *(_percent(f) for f in found)))
    return table((f"{training}, {steps} step{'s'[: steps - 1]}", *(f"N = {n}" for n in SIZES)), lines)


def _percent(found: dict[str, Any]) -> str:
    low, high = found["ci95"] or [found["mean"]] * 2
    return f"{100 * found['mean']:.1f} ±{50 * (high - low):.1f}"


STYLE = {
    "uniform": ("#9ca3af", ":"),
    "sign": ("#64748b", "-"),
    "gradinversion": ("#a78bfa", "-"),
    "llg": ("#0d9488", "-"),
    "llg+": ("#2563eb", "-"),
    "ilrg": ("#ca8a04", "-"),
    "counts": ("#c2410c", "-"),
    "llg+ + public": ("#2563eb", "--"),
    "counts + public": ("#c2410c", "--"),
}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy against batch size: a panel for each of training and steps, activations pooled."""
    figure, axes = panels(len(TRAINED) * len(STEPS))
    for axis, (training, steps) in zip(axes, ((t, s) for t in TRAINED for s in STEPS), strict=True):
        for method in METHODS:
            found = [pooled(rows, training=training, steps=steps, batch=n, method=method) for n in SIZES]
            colour, line = STYLE[method]
            strong = 2.2 if method.startswith(DEFAULT) else 1.3
            axis.plot(SIZES, [f["mean"] for f in found], line, color=colour, lw=strong, label=method)
            low, high = zip(*(f["ci95"] or [f["mean"]] * 2 for f in found), strict=True)
            axis.fill_between(SIZES, low, high, color=colour, alpha=0.12, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(n) for n in SIZES])
        axis.minorticks_off()
        axis.set_ylim(0, 1.03)
        tidy(axis, "batch size", "label accuracy")
        axis.set_title(f"{training}, {steps} local step{'s'[: steps - 1]}", fontsize=10, color=INK)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    figure.set_figwidth(10.6)
    save(figure, path)


def _without_values(result: Any) -> Any:
    """The same without each victim's value, which would be most of the file; how many there were stays."""
    if isinstance(result, list):
        return [_without_values(r) for r in result]
    if not isinstance(result, dict):
        return result
    kept = {k: _without_values(v) for k, v in result.items() if k != "values"}
    return kept | ({"n": len(result["values"])} if "values" in result else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victims", type=int, default=20, help="networks a cell (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all streams (default: 0)")
    parser.add_argument("--data", default="mnist", help="data set (default: mnist)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bar, begun = Bar("victims", every=15.0), time.perf_counter()
    rows = measure(options, bar)
    bar.close()
    best = overall(rows, options.victims)
    command = f"python benchmarks/labels.py --victims {options.victims} --seed {options.seed}"
    result = {
        "command": f"{command} --data {options.data}",
        "seed": options.seed,
        "victims": options.victims,
        "data": options.data,
        "default": DEFAULT,
        "seconds": time.perf_counter() - begun,
        "overall": best,
        "cells": rows,
        "versions": document.versions(),
    }
    write_json(RESULT, _without_values(result))
    draw(RESULT.with_suffix(".png"), rows)
    print("\n\n".join(render(rows, t, s) for t in TRAINED for s in STEPS))
    print("\n" + json.dumps({m: round(f["mean"], 4) for m, f in best.items()}, indent=2))


if __name__ == "__main__":
    main()
