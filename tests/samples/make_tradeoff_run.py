"""Make tradeoff_run.json: numbers of a trade-off run as they might be, not measured. Run it from the root."""

from __future__ import annotations

import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fltoolkit.metrics.interval import mean_interval, rate_interval
from fltoolkit.report.document import versions
from fltoolkit.threat import THREATS
from fltoolkit.tradeoff.grid import grid_of

QUESTION = {
    "seeds": [0, 1, 2],
    "federation": {
        "data": "digits",
        "model": "2nn",
        "clients": 1437,
        "epochs": 1,
        "batch": "inf",
        "lr": 0.3,
        "rounds": 60,
    },
    "leakage": {
        "attacks": ["idlg:adapt=true", "inverting:steps=300,restarts=2", "gradinversion:steps=300"],
        "threats": ["server", "aggregate"],
        "rounds": ["start", "middle", "end"],
        "victims": 8,
    },
    "defense": [
        {"name": "clip", "stack": ["clip:norm={}"], "values": [1, 0.3]},
        {"name": "top-k", "stack": ["topk:fraction={}"], "values": [0.1, 0.03, 0.01]},
        {
            "name": "local noise",
            "stack": ["clip:norm=0.3", "gaussian:noise_multiplier={},placement=client"],
            "values": [0.1, 0.5, 1],
        },
        {
            "name": "central DP",
            "stack": ["clip:norm=0.3", "gaussian:noise_multiplier={},placement=server"],
            "values": [0.5, 1, 2],
        },
    ],
}
# defense -> for each strength: accuracy, leak of the server's and the aggregate's view, their ε
NUMBERS = {
    "none": [(0.931, 39.6, 15.6, None, None)],
    "clip": [(0.925, 38.9, 15.2, None, None), (0.902, 37.2, 14.8, None, None)],
    "top-k": [
        (0.921, 31.4, 14.9, None, None),
        (0.886, 24.7, 14.1, None, None),
        (0.803, 17.9, 13.2, None, None),
    ],
    "local noise": [
        (0.897, 23.8, 13.9, 412.0, 38.5),
        (0.842, 15.1, 12.6, 31.2, 7.4),
        (0.741, 11.9, 11.4, 11.6, 2.9),
    ],
    "central DP": [
        (0.899, 37.3, 13.4, None, 9.8),
        (0.887, 37.1, 12.2, None, 3.1),
        (0.848, 37.4, 11.1, None, 1.2),
    ],
}
FLOOR = 13.1
BYTES = {"top-k": [5290, 1590, 530]}


def main() -> None:
    rng = np.random.default_rng(7)
    grid = grid_of(QUESTION)
    curves = [(c.name, s, stack) for c in grid.curves for s, stack in enumerate(c.stacks)]
    points = [point(rng, *place, t) for place in curves for t in grid.threats]
    content = {
        "schema": "fltoolkit.tradeoff/1",
        "command": "python -m fltoolkit tradeoff question.toml --out runs/tradeoff",
        "versions": versions(),
        "seconds": 702.4,
        "note": "digits: 8 × 8 images of handwritten digits, in the place of MNIST.",
        "grid": grid.plain(),
        "threats": [{"name": t, "about": THREATS[t].about} for t in grid.threats],
        "points": [p | {"pareto": front(p, points)} for p in points],
        "failed": [],
        "pictures": pictures(rng, points),
    }
    text = json.dumps(rounded(content), ensure_ascii=False, separators=(",", ":"))
    Path("tests/samples/tradeoff_run.json").write_text(text + "\n", encoding="utf-8")


def point(rng, name, strength, stack, threat):
    accuracy, *rest = NUMBERS[name][strength]
    leak, epsilon = (rest[0], rest[2]) if threat == "server" else (rest[1], rest[3])
    n = 24
    victims = np.minimum(leak + (2.2 if threat == "server" else 0.8) * rng.standard_normal(n), 40)
    leaked = mean_interval(victims.tolist(), 1 - 0.05 / 9)
    gains = mean_interval((victims - FLOOR).tolist())
    labels = mean_interval(np.clip(leak / 40 + 0.1 * rng.standard_normal(n), 0, 1).tolist())
    tried = {"attack": "inverting:steps=300,restarts=2", "round": 1, "n": n, "refused": None}
    tried |= {"psnr_db": short(mean_interval(victims.tolist())), "gain_db": short(gains)}
    refusal = "must be told running statistics, got a model without BatchNorm"
    refusal = {"attack": "gradinversion:steps=300", "round": None, "n": 0, "refused": refusal}
    views = {"client": {"message": rest[2], "aggregate": rest[3]}}
    view = {"server": "message", "aggregate": "aggregate"}[threat]
    return {
        "defense": name,
        "strength": strength,
        "label": " + ".join(stack) or "none",
        "stack": list(stack),
        "threat": threat,
        "accuracy": mean_interval(
            [accuracy + d for d in np.random.default_rng(len(name)).normal(0, 0.004, 3)]
        ),
        "bytes": {"up": float(BYTES.get(name, [26440] * 3)[strength]), "down": 26440.0},
        "seconds": short(mean_interval([0.048 + 0.004 * len(stack) + d for d in (0, 0.002, 0.003)])),
        "epsilon_views": views,
        "epsilon": {"value": epsilon, "view": view, "delta": 1e-5, "unit": "client"},
        "attacks": [refusal, tried | {"label_accuracy": short(labels)}],
        "strongest": {"attack": "inverting:steps=300,restarts=2", "round": 1},
        "leak_db": short(leaked) | {"n": n},
        "trivial_db": short(mean_interval([FLOOR] * n)),
        "gain_db": short(gains),
        "ssim": short(mean_interval(np.clip(victims / 42, 0, 1).tolist())),
        "label_accuracy": short(labels),
        "success_rate": rate_interval(int((victims > 30).sum()), n) | {"threshold_db": 30.0},
    }


def short(found):
    return {k: found[k] for k in ("mean", "ci95")}


def front(p, points):
    def beats(q):
        a, leak = q["accuracy"]["mean"] - p["accuracy"]["mean"], p["leak_db"]["mean"] - q["leak_db"]["mean"]
        return a >= 0 and leak >= 0 and a + leak > 0

    return not any(beats(q) for q in points if q["threat"] == p["threat"])


def pictures(rng, points):
    truth = load_digits().images[[0, 11, 22, 33, 44, 54]] / 16
    victims = [{"seed": 0, "round": 1, "victim": i, "png": png(x)} for i, x in enumerate(truth)]
    recovered = []
    for p in points:
        images = []
        for x in truth:
            found = x + 10 ** (-p["leak_db"]["mean"] / 20) * rng.standard_normal(x.shape)
            found = np.clip(found, 0, 1)
            psnr = min(-10 * np.log10(((found - x) ** 2).mean()), 60)
            images.append({"png": png(found), "psnr_db": psnr})
        place = {k: p[k] for k in ("defense", "strength", "threat")}
        recovered.append(place | p["strongest"] | {"images": images})
    return {"victims": victims, "recovered": recovered}


def png(x):
    room = BytesIO()
    Image.fromarray((255 * x).round().astype(np.uint8)).save(room, "PNG", optimize=True)
    return b64encode(room.getvalue()).decode()


def rounded(value):
    """Five digits are enough, so that the file stays small."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
