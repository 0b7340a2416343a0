"""The inversion benchmark as a table on the terminal and as a figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from inversion_cells import BATCHES, LOCALS, TARGETS, WEIGHTS

from fltoolkit.report import terminal
from fltoolkit.report.figures import INK, save, tidy

Results = Mapping[str, dict[str, Any]]
"""Cell id -> what its JSON file holds."""
Key = tuple[str, str, int, str]

NOT_RUN = "not run"
COLOURS = {"untrained": "#0f766e", "trained": "#c2410c"}
STYLES = {"1step": ("-", "o"), "5steps": ("--", "s"), "epoch": (":", "^")}
LINES = [(weights, local) for weights in WEIGHTS for local in LOCALS]
FLOOR = (0, (6, 3))
COLUMNS = 3
SHIFT = 0.07
"""Lines of a panel stand this far apart, in powers of two of the batch size, so that intervals are seen."""
LEGEND = (
    "Each entry: mean PSNR in dB with its 95 % interval, (gain over the best trivial guess in dB, share of\n"
    "images above 20 dB), labels right, and the attack: of those run, the one with most images above 20 dB."
)


def read(folder: Path) -> Results:
    """Every finished cell in `folder`."""
    found = (json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json")))
    return {r["cell"]["id"]: r for r in found}


def strongest(results: Results) -> dict[Key, dict[str, Any]]:
    """The result of the attack that did best, for every (model, weights, batch, local): by the share of
    images above 20 dB, then by mean PSNR, which a few exact images dominate."""
    best: dict[Key, dict[str, Any]] = {}
    for r in results.values():
        c = r["cell"]
        key = (c["model"], c["weights"], c["batch"], c["local"])
        if key not in best or _strength(r) > _strength(best[key]):
            best[key] = r
    return best


def render(results: Results, chosen: Iterable[str] = tuple(TARGETS)) -> str:
    """A line for every model, training and recipe of local steps, a column for every batch size."""
    best, rows = strongest(results), []
    for model in chosen:
        target = TARGETS[model]
        for weights in WEIGHTS:
            for local in target.locals:
                name = f"{model}, {weights}, {LOCALS[local]}"
                entries = (_entry(best, (model, weights, n, local)) for n in BATCHES)
                rows.append((name, *entries))
    header = ("victims' model and updates", *(f"N = {n}" for n in BATCHES))
    return "\n".join([terminal.table(header, rows), "", LEGEND, *_remarks(results)])


def _entry(best: Mapping[Key, dict[str, Any]], key: Key) -> str:
    model, _, batch, local = key
    if batch not in TARGETS[model].batches or (local == "epoch" and batch < 4):
        return ""
    if key not in best:
        return NOT_RUN
    r = best[key]
    m = r["metrics"]
    low, high = m["psnr_db"]["ci95"] or [_psnr(r)] * 2
    gain, share, labels = m["psnr_gain_db"]["mean"], m["success"]["value"], m["label_accuracy"]["mean"]
    attack = r["cell"]["attack"].partition(":")[0]
    return f"{_psnr(r):.1f} ±{(high - low) / 2:.1f} ({gain:+.1f}, {share:.0%}) {labels:.0%} {attack}"


def _remarks(results: Results) -> list[str]:
    """What models learned, what is missing, and what must be said of the data."""
    learned = {r["cell"]["model"]: r["test_accuracy"] for r in results.values() if r["test_accuracy"]}
    words = ", ".join(f"{m} {a:.0%}" for m, a in sorted(learned.items()))
    lines = [f"Test accuracy of the trained models: {words}."] if words else []
    if results:
        fewest = min(int(r["images"]) for r in results.values())
        lines.append(f"{len(results)} cells were run, each on at least {fewest} images.")
    return lines + sorted({r["note"] for r in results.values() if r["note"]})


def _strength(result: Mapping[str, Any]) -> tuple[float, float]:
    return float(result["metrics"]["success"]["value"]), _psnr(result)


def _psnr(result: Mapping[str, Any]) -> float:
    return float(result["metrics"]["psnr_db"]["mean"])


def draw(results: Results, path: Path) -> None:
    """PSNR of the strongest attack against batch size, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best = strongest(results)
    rows = -(-(len(TARGETS) + 1) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(3.7 * COLUMNS, 3.3 * rows + 0.4), layout="constrained", sharey=True
    )
    *panels, last = axes.flat
    for model, axis in zip(TARGETS, panels, strict=True):
        tidy(axis, "images in the batch, N", "PSNR in dB, 95 % interval")
        _panel(axis, model, {k: r for k, r in best.items() if k[0] == model})
    last.axis("off")
    last.legend(handles=_handles(), loc="center", frameon=False, fontsize=10, labelspacing=0.9)
    notes = sorted({r["note"] for r in results.values() if r["note"]})
    last.text(0.5, 0, "\n".join(fill(n, 52) for n in notes), ha="center", va="bottom", fontsize=7, color=INK)
    figure.suptitle("Images reconstructed from one update, by the strongest attack", fontsize=11, color=INK)
    save(figure, path)


def _panel(axis: Any, model: str, best: Mapping[Key, dict[str, Any]]) -> None:
    """The lines of one model, whose results `best` holds."""
    for i, (weights, local) in enumerate(LINES):
        found = [(n, best[model, weights, n, local]) for n in BATCHES if (model, weights, n, local) in best]
        shift = 2 ** (SHIFT * (i - (len(LINES) - 1) / 2))
        style, marker = STYLES[local]
        x, y = [n * shift for n, _ in found], [_psnr(r) for _, r in found]
        bounds = [r["metrics"]["psnr_db"]["ci95"] or [_psnr(r)] * 2 for _, r in found]
        error = [[v - low for v, (low, _) in zip(y, bounds, strict=True)]]
        error.append([high - v for v, (_, high) in zip(y, bounds, strict=True)])
        look = {"color": COLOURS[weights], "ms": 5, "lw": 1.6, "elinewidth": 1.0, "capsize": 2}
        if found:
            axis.errorbar(x, y, error, fmt=marker, ls=style, **look)
    if best:
        floors = [_psnr(r) - r["metrics"]["psnr_gain_db"]["mean"] for r in best.values()]
        axis.axhline(sum(floors) / len(floors), color=INK, ls=FLOOR, lw=1, zorder=0)
    else:
        axis.text(0.5, 0.5, NOT_RUN, transform=axis.transAxes, ha="center", color=INK)
    axis.set_xscale("log", base=2)
    axis.set_xlim(BATCHES[0] / 1.4, BATCHES[-1] * 1.4)
    axis.set_xticks(BATCHES, [str(n) for n in BATCHES])
    axis.minorticks_off()
    axis.set_title(f"{model} on {TARGETS[model].data}", fontsize=10, color=INK)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    found = [Line2D([], [], color=c, lw=3, label=w) for w, c in COLOURS.items()]
    for local, (style, marker) in STYLES.items():
        found.append(Line2D([], [], color=INK, ls=style, marker=marker, ms=5, label=LOCALS[local]))
    return [*found, Line2D([], [], color=INK, ls=FLOOR, lw=1, label="best trivial guess")]
