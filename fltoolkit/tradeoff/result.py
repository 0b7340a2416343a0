"""What a finished grid says: a point for each defense, strength and threat model, and a tidy table behind it.

The leak of a point is the mean PSNR of the strongest attack that its adversary can run, in the round where it
finds most; a victim counts at least as the best guess without its update, and at most `MOST_DB`. Each of the
m pairs of attack and round has a mean over victims with an interval at level 1 − 0.05 / m (Bonferroni), so
that with 95 % confidence all m hold together; then the largest true mean lies between the largest lower end
and the largest upper end, which is the interval given. Victims of one seed share a model; the interval takes
them as independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fltoolkit import registry
from fltoolkit.metrics.interval import LEVEL, mean_interval, rate_interval
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.threat import THREATS
from fltoolkit.tradeoff.grid import NONE, Grid, Stack
from fltoolkit.tradeoff.jobs import Attacking
from fltoolkit.tradeoff.pictures import Found, pictured, side_by_side
from fltoolkit.tradeoff.table import rows_of, write_table

SCHEMA = "fltoolkit.tradeoff/1"
MOST_DB = 40.0
"""A victim counts at most as much: nobody sees a difference beyond, and exact copies would drown others."""


def assembled(grid: Grid, found: Found) -> dict[str, Any]:
    """The content of run.json, the tidy table under "rows"."""
    from fltoolkit.tradeoff.running import attacks_on, training_of

    points: list[dict[str, Any]] = []
    failed, pictures = [], []
    for curve in grid.curves:
        for strength, stack in enumerate(curve.stacks):
            trainings = [training_of(grid, stack, seed) for seed in grid.seeds]
            reasons = [found[t.id]["failed"] for t in trainings if "failed" in found[t.id]]
            place = {"defense": curve.name, "strength": strength, "label": label(stack), "stack": list(stack)}
            if reasons:
                failed.append(place | {"reason": reasons[0]})
                continue
            jobs = [list(attacks_on(grid, t)) for t in trainings]
            shared = _shared([found[t.id] for t in trainings])
            for threat, attacks in _by_threat(jobs).items():
                points.append(place | _point(threat, attacks, found, grid, shared))
                pictures += [
                    {"defense": curve.name, "strength": strength, "threat": threat} | seen
                    for seen in pictured(attacks, found)
                ]
    mark_front(points)
    return {
        "schema": SCHEMA,
        "command": document.command_line(),
        "versions": document.versions(),
        "seconds": sum(f["took"] for f in found.values()),
        "note": "",
        "grid": grid.plain(),
        "threats": [{"name": t, "about": about(t)} for t in dict.fromkeys(p["threat"] for p in points)],
        "points": points,
        "failed": failed,
        "pictures": side_by_side(pictures),
        "rows": rows_of(grid, found),
    }


def write(folder: Path, content: dict[str, Any]) -> None:
    """run.json, table.csv, table.parquet and the picture."""
    from fltoolkit.tradeoff.figure import draw

    rows = content.pop("rows")
    write_table(folder, rows)
    write_json(folder / "run.json", content)
    draw(folder / "tradeoff.png", content)


def label(stack: Stack) -> str:
    return " + ".join(stack) or NONE


def about(threat: str) -> str:
    """One line about a threat model, an attack's own ones included."""
    if threat in THREATS:
        return THREATS[threat].about
    own = (registry.attack_class(name)().threat() for name in registry.attack_names())
    return next((t.about for t in own if t is not None and t.name == threat), "")


def threat_of(job: Attacking) -> str:
    own = registry.make_attack(job.attack).threat()
    return job.threat if job.threat is not None else "" if own is None else own.name


def _by_threat(jobs: Sequence[Sequence[Attacking]]) -> dict[str, dict[str, list[Attacking]]]:
    """Jobs of all seeds by threat model and attack."""
    found: dict[str, dict[str, list[Attacking]]] = {}
    for of_seed in jobs:
        for job in of_seed:
            found.setdefault(threat_of(job), {}).setdefault(job.attack, []).append(job)
    return found


def _shared(trained: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all threat models of a stack have in common."""
    seconds = mean_interval([t["seconds"] for t in trained])
    return {
        "accuracy": _share([t["accuracy"]["value"] for t in trained]),
        "bytes": {w: sum(t["bytes"][w] for t in trained) / len(trained) for w in ("up", "down")},
        "seconds": {k: seconds[k] for k in ("mean", "ci95")},
        "all_epsilon": largest_epsilon([t["epsilon"] for t in trained]),
    }


def largest_epsilon(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By unit and view the largest of all seeds, which differ where clients are asked more or less often."""
    values: dict[str, dict[str, list[float | None]]] = {}
    for of_seed in found:
        for unit, views in of_seed.items():
            for view, value in views.items():
                values.setdefault(unit, {}).setdefault(view, []).append(value)
    return {
        unit: {
            view: None if len(v) < len(found) or None in v else max(e for e in v if e is not None)
            for view, v in views.items()
        }
        for unit, views in values.items()
    }


def _point(
    threat: str, attacks: Mapping[str, Sequence[Attacking]], found: Found, grid: Grid, shared: dict[str, Any]
) -> dict[str, Any]:
    """The point of one threat model."""
    pairs: dict[Pair, list[dict[str, Any]]] = {}
    tried = []
    for attack, jobs in attacks.items():
        refused = next((found[j.id]["refused"] for j in jobs if "refused" in found[j.id]), None)
        if refused is not None:
            tried.append({"attack": attack, "round": None, "n": 0, "refused": refused})
            continue
        for of_job in jobs:
            for seen in found[of_job.id]["rounds"]:
                pairs.setdefault((attack, seen["round"]), []).extend(seen["victims"])
    tried += [_tried(key, victims) for key, victims in pairs.items()]
    best, leak = strongest(pairs)
    point = {k: v for k, v in shared.items() if k != "all_epsilon"} | {
        "threat": threat,
        "epsilon_views": shared["all_epsilon"],
        "epsilon": seen_epsilon(threat, shared["all_epsilon"], grid.delta),
        "attacks": tried,
        "strongest": None if best is None else {"attack": best[0], "round": best[1]},
    }
    if best is None:
        return point | {"leak_db": None}
    victims = pairs[best]
    rate = rate_interval(sum(v["recovered"] for v in victims), len(victims))
    return point | {
        "leak_db": leak,
        "trivial_db": _brief([v["psnr_db"] - v["gain_db"] for v in victims]),
        **{name: _brief([v[name] for v in victims]) for name in ("gain_db", "ssim")},
        "label_accuracy": _share([v["label_accuracy"] for v in victims]),
        "success_rate": rate | {"threshold_db": grid.threshold_db},
    }


Pair = tuple[str, int]
"""An attack and a round."""


def strongest(pairs: Mapping[Pair, Sequence[Mapping[str, Any]]]) -> tuple[Pair | None, dict[str, Any] | None]:
    """The pair that finds most, and the leak, from the victims of every pair; None where there are none."""
    if not pairs:
        return None, None
    means = {key: _leak(victims, len(pairs)) for key, victims in pairs.items()}
    best = max(means, key=lambda k: means[k]["mean"])
    ends = [m["ci95"] for m in means.values()]
    together = None if None in ends else [max(e[0] for e in ends), min(max(e[1] for e in ends), MOST_DB)]
    return best, {"mean": means[best]["mean"], "ci95": together, "n": len(pairs[best])}


def _leak(victims: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, Any]:
    """The leak of one pair of attack and round. What anybody can guess without the update is no leak, so
    that a worse image counts as that guess."""
    values = [min(max(v["psnr_db"], v["psnr_db"] - v["gain_db"]), MOST_DB) for v in victims]
    return mean_interval(values, 1 - (1 - LEVEL) / pairs)


def _tried(key: tuple[str, int], victims: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {name: _brief([v[name] for v in victims]) for name in ("psnr_db", "gain_db", "label_accuracy")}
    return {"attack": key[0], "round": key[1], "n": len(victims), **means, "refused": None}


def _brief(values: Sequence[float]) -> dict[str, Any]:
    found = mean_interval(values)
    return {"mean": found["mean"], "ci95": found["ci95"]}


def _share(values: Sequence[float]) -> dict[str, Any]:
    """The mean of shares, whose interval ends where shares do."""
    found = mean_interval(values)
    ends = found["ci95"]
    return found | {"ci95": ends and [max(ends[0], 0.0), min(ends[1], 1.0)]}


def seen_epsilon(threat: str, epsilons: Mapping[str, Any], delta: float) -> dict[str, Any]:
    """ε of what an adversary sees, of clients where that is finite, else of single examples: of the
    aggregate, of messages as the server gets them, or, where the server departs from the protocol, of a
    message that lost what hides it."""
    view = {"aggregate": "aggregate", "server": "message"}.get(threat, "exposed")
    for unit in ("client", "example"):
        value = epsilons.get(unit, {}).get(view)
        if value is not None:
            return {"value": value, "view": view, "delta": delta, "unit": unit}
    return {"value": None, "view": view, "delta": delta, "unit": "client"}


def mark_front(points: Sequence[dict[str, Any]]) -> None:
    """Set `pareto` where no point of the same threat model leaks as little at as much accuracy and is better
    in one of the two."""
    for p in points:
        rivals = [q for q in points if q["threat"] == p["threat"] and q["leak_db"] is not None]
        p["pareto"] = p["leak_db"] is not None and not any(_beats(q, p) for q in rivals)


def _beats(q: Mapping[str, Any], p: Mapping[str, Any]) -> bool:
    accuracy = q["accuracy"]["mean"] - p["accuracy"]["mean"]
    leak = p["leak_db"]["mean"] - q["leak_db"]["mean"]
    return bool(accuracy >= 0 and leak >= 0 and (accuracy > 0 or leak > 0))


def lines(content: Mapping[str, Any], threat: str | None = None) -> Iterator[tuple[str, ...]]:
    """The points as rows for the terminal, those of one threat model or all."""
    from fltoolkit.report.terminal import interval

    for p in content["points"]:
        if threat not in (None, p["threat"]):
            continue
        a, leak, e = p["accuracy"], p["leak_db"], p["epsilon"]["value"]
        percent = None if a["ci95"] is None else [100 * v for v in a["ci95"]]
        yield (
            f"{p['label']}",
            p["threat"],
            f"{100 * a['mean']:.1f}{interval(percent, 1)}",
            "—" if leak is None else f"{leak['mean']:.1f}{interval(leak['ci95'], 1)}",
            "∞" if e is None else f"{e:.2f}" + ("/example" if p["epsilon"]["unit"] == "example" else ""),
            f"{p['bytes']['up'] / 1e3:.3g}",
            f"{p['seconds']['mean']:.3f}",
            "—" if p["strongest"] is None else p["strongest"]["attack"].partition(":")[0],
            "*" if p["pareto"] else "",
        )


HEAD = ("defense", "threat", "accuracy %", "PSNR dB", "ε", "kB up", "s/round", "strongest", "front")
