"""Leak beside cost: what every defense takes from accuracy, and what the strongest attack still finds.

    python benchmarks/defense_tradeoff.py

One federation on digits (tanh CNN, K = 20, C = 0.5, E = 2, B = 16, 20 rounds), each defense at three
strengths. Cost: test accuracy over seeds, less that without defense. Leak: 10 victims, one image each
(mixtures: four) in a gradient of a model that was just started, seen by a curious server (central noise
and secure sums: by who sees the aggregate of 10 clients); of the attacks in `ATTACKS`, which all know the
defense, the one with the best mean PSNR is quoted, a victim counting at most 40 dB: beyond that an image is
no better known, and exact copies would drown the others. Quoting the best of several means flatters the
attacker a little, by less than the interval. A cell that is in the result is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fltoolkit.cli import main as fltoolkit
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.report.figures import INK
from fltoolkit.report.files import write_atomic, write_json
from fltoolkit.report.terminal import Bar, interval, table

SEEDS = (0, 1, 2)
VICTIMS = 10
MOST_DB = 40.0
ATTACKS = ("idlg:adapt=true,steps=400", "inverting:steps=600,restarts=4", "features:steps=300")
TRAIN = (
    "train --data digits --model tanhcnn --clients 20 --fraction 0.5 --epochs 2 --batch 16 --lr 0.3 "
    "--rounds 20 --eval-every 20 --checkpoint-every 20"
)
AUDIT = f"--data digits --model tanhcnn --batch 1 --victims {VICTIMS}"
HERE = Path(__file__).parent / "results" / "defense_tradeoff.json"


@dataclass(frozen=True)
class Curve:
    """A defense at growing strengths, each a list of specifications. flags: of the audit, where it is not
    the curious server's view of one client. train, training: where training wants another specification, and
    further flags."""

    name: str
    strengths: tuple[tuple[str, ...], ...]
    flags: str = ""
    train: tuple[tuple[str, ...], ...] = ()
    training: str = ""


def each(spec: str, values: Sequence[object], *before: str) -> tuple[tuple[str, ...], ...]:
    return tuple((*before, spec.format(v)) for v in values)


CLIP = "clip:norm=1"
ALL = " --clients 10 --threat aggregate"
FOUR = " --batch 4"
EQUAL = "--equal-weights"
CURVES = (
    Curve("none", ((),)),
    Curve("none, 4 images", ((),), FOUR),
    Curve("clip", each("clip:norm={}", (1, 0.3, 0.1))),
    Curve("clip-layers", each("clip-layers:norm={}", (1, 0.3, 0.1))),
    Curve("soft-clip", each("soft-clip:norm={}", (1, 0.3, 0.1))),
    Curve("normalise", each("normalise:norm={}", (1, 0.3, 0.1))),
    Curve("adaptive-clip", each("adaptive-clip:norm=0.3,quantile={}", (0.9, 0.5, 0.1))),
    Curve(
        "client noise",
        each("gaussian:placement=client,noise_multiplier={}", (0.001, 0.005, 0.03), CLIP),
    ),
    Curve("central noise", each("gaussian:noise_multiplier={}", (0.1, 0.5, 1), CLIP), ALL),
    Curve("DP-SGD", each("gaussian:level=example,noise_multiplier={}", (0.01, 0.1, 1), "clip:level=example")),
    Curve(
        "correlated noise",
        each("correlated:rounds=20,noise_multiplier={}", (0.02, 0.1, 0.2), CLIP),
        ALL,
    ),
    Curve(
        "discrete Gaussian",
        each("discrete-gaussian:noise_multiplier={}", (0.1, 0.5, 1), CLIP),
        ALL,
        training=EQUAL,
    ),
    Curve("Skellam", each("skellam:noise_multiplier={}", (0.1, 0.5, 1), CLIP), ALL, training=EQUAL),
    Curve("topk", each("topk:fraction={}", (0.1, 0.01, 0.001))),
    Curve("randk", each("randk:fraction={}", (0.1, 0.01, 0.001))),
    Curve("prune", each("prune:ratio={}", (0.9, 0.99, 0.999))),
    Curve("sign", each("sign:scale=none,error_feedback=false,step={}", (0.001, 0.003, 0.01))),
    Curve("quantise", each("quantise:levels={}", (16, 4, 1))),
    Curve("subspace", each("subspace:fraction={}", (0.5, 0.1, 0.01))),
    Curve("soteria", each("soteria:ratio={}", (0.4, 0.8, 0.95))),
    Curve("precode", each("precode:beta={}", (0.001, 0.01, 0.1))),
    Curve("mixup", each("mixup:alpha={}", (0.2, 1, 10)), FOUR),
    Curve("instahide", each("instahide:k={}", (2, 3, 4)), FOUR),
    Curve(
        "secagg",
        tuple((f"secagg:clients={k}",) for k in (2, 4, 10)),
        train=(("secagg:clients=10",),) * 3,
    ),
)

SAME_SUM = {"lightsecagg", "mpc"}
"""Defenses that show the server just what `secagg` does, another way: they have its curve."""

FAMILIES = {
    "clipping": ("none", "clip", "clip-layers", "soft-clip", "normalise", "adaptive-clip"),
    "noise (but for the first two: aggregate of 10)": (
        "none",
        "client noise",
        "DP-SGD",
        "central noise",
        "correlated noise",
        "discrete Gaussian",
        "Skellam",
    ),
    "masking": ("none", "topk", "randk", "prune", "sign", "quantise", "subspace"),
    "representation, inputs, sums": (
        "none",
        "soteria",
        "precode",
        "secagg",
        "none, 4 images",
        "mixup",
        "instahide",
    ),
}
COLOURS = (INK, *(f"C{i}" for i in range(9)))


def call(flags: Sequence[str]) -> dict[str, Any]:
    """A command of the toolkit -> its report."""
    out = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = fltoolkit([*flags, "--json", "--out", folder])
        except SystemExit as e:
            raise RuntimeError(err.getvalue().strip().splitlines()[-1]) from e
    if code != 0:
        raise RuntimeError(err.getvalue().strip().splitlines()[-1])
    return dict(json.loads(out.getvalue()))


def defended(specs: Sequence[str]) -> list[str]:
    return [word for s in specs for word in ("--defense", s)]


def measure(curve: Curve, place: int) -> dict[str, Any]:
    """Accuracy and leak of one strength."""
    specs = curve.strengths[place]
    flags = [*TRAIN.split(), *curve.training.split(), *defended(curve.train[place] if curve.train else specs)]
    runs = [call([*flags, "--seed", str(s)]) for s in SEEDS]
    accuracy = mean_interval([r["accuracy"][-1]["value"] for r in runs])
    scene = [*AUDIT.split(), *curve.flags.split(), *defended(specs)]
    attacks = {}
    for attack in ATTACKS:
        try:
            report = call(["audit", "--attack", attack, *scene])
        except RuntimeError as e:
            attacks[attack] = {"refused": str(e)}
            continue
        attacks[attack] = {
            "psnr_db": report["metrics"]["psnr_db"],
            "gain_db": report["metrics"]["psnr_gain_db"],
            "success_rate": report["metrics"]["success_rate"],
            "adaptation": report["adaptations"][0],
            "epsilon": report["epsilon"],
        }
    best = strongest(attacks)
    return {
        "curve": curve.name,
        "strength": place,
        "defenses": list(specs),
        "accuracy": accuracy,
        "epsilon": runs[0]["epsilon"],
        "attacks": attacks,
        "commands": [
            "python -m fltoolkit " + shlex.join([*flags, "--seed", "S"]) + f"  # S in {SEEDS}",
            f"python -m fltoolkit audit --attack {best} " + shlex.join(scene),
        ],
        "versions": runs[0]["versions"],
    }


def leak(found: dict[str, Any]) -> dict[str, Any]:
    """The mean PSNR of an attack's victims and its interval, each counting at most MOST_DB."""
    return mean_interval([min(v, MOST_DB) for v in found["psnr_db"]["values"]])


def strongest(attacks: dict[str, Any]) -> str:
    """Of those that were not refused, the one that the most leaks to."""
    return max((a for a in attacks if "psnr_db" in attacks[a]), key=lambda a: leak(attacks[a])["mean"])


def show(results: Sequence[dict[str, Any]]) -> str:
    """One row a strength."""
    base = next((r["accuracy"]["mean"] for r in results if r["curve"] == "none"), float("nan"))
    rows = []
    for r in results:
        a, name = r["accuracy"], strongest(r["attacks"])
        best, db = r["attacks"][name], leak(r["attacks"][name])
        percent = None if a["ci95"] is None else [100 * v for v in a["ci95"]]
        rate = best["success_rate"]
        rows.append(
            (
                " + ".join(r["defenses"]) or r["curve"],
                f"{100 * a['mean']:.1f}{interval(percent, 1)}",
                f"{100 * (base - a['mean']):+.1f}",
                f"{db['mean']:.1f}{interval(db['ci95'], 1)}",
                f"{rate['value']:.0%}{interval(rate['ci95'])}",
                name.partition(":")[0],
            )
        )
    head = ("defense", "accuracy %", "loss", "PSNR dB", "above 30 dB", "strongest attack")
    return table(head, rows)


def draw(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Accuracy lost over what leaks, a curve a defense, a panel a family."""
    base = next(r["accuracy"]["mean"] for r in results if r["curve"] == "none")
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for axes, (family, names) in zip(grid.flat, FAMILIES.items(), strict=True):
        for name, marker, colour in zip(names, "osD^vP*X", COLOURS, strict=False):
            mine = [r for r in results if r["curve"] == name]
            leaks = [leak(r["attacks"][strongest(r["attacks"])]) for r in mine]
            x = [100 * (base - r["accuracy"]["mean"]) for r in mine]
            y = [d["mean"] for d in leaks]
            error = [0.0 if d["ci95"] is None else d["mean"] - d["ci95"][0] for d in leaks]
            style = {"marker": marker, "color": INK if name.startswith("none") else colour}
            axes.errorbar(x, y, error, label=name, ms=6, lw=1.3, elinewidth=0.6, capsize=2, **style)
        axes.axhline(30, color="0.6", lw=0.8, ls=":")
        axes.set_title(family, fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right")
    figure.supxlabel("accuracy lost, percentage points (right: costs more)")
    figure.supylabel(
        f"PSNR of the strongest adaptive attack, dB, at most {MOST_DB:g} a victim (up: leaks more)"
    )
    figure.suptitle(
        f"Leak beside cost on digits: {VICTIMS} victims, {len(SEEDS)} seeds; recovered above the dots"
    )
    write_atomic(path, lambda p: figure.savefig(p, dpi=150, format="png"))
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="run only curves whose name contains this")
    parser.add_argument("--show", action="store_true", help="run nothing: print what has been run")
    parser.add_argument(
        "--out", default=str(HERE), metavar="FILE", help="the result; a figure goes beside it"
    )
    o = parser.parse_args(argv)
    path = Path(o.out)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    todo = [(c, i) for c in CURVES for i in range(len(c.strengths)) if o.only in c.name and not o.show]
    bar = Bar("cell", ends=True)
    for n, (curve, i) in enumerate(todo, 1):
        if not any((r["curve"], r["strength"]) == (curve.name, i) for r in results):
            results.append(measure(curve, i))
            order = {c.name: k for k, c in enumerate(CURVES)}
            results.sort(key=lambda r: (order[r["curve"]], r["strength"]))
            write_json(path, results)
        bar(n, len(todo), curve.name)
    bar.close()
    if not results:
        print("nothing has been run", file=sys.stderr)
        return 1
    print(show(results))
    draw(path.with_suffix(".png"), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
