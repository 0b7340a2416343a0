"""The picture of a grid: accuracy over leakage, a panel a threat model, ε as colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fltoolkit.report.figures import GRID, INK, save, tidy
from fltoolkit.tradeoff.pictures import decoded

MARKERS = "osD^vP*XhdH<>p8"


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Every defense a marker and a thin line through its strengths; hollow where there is no ε."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threats = [t["name"] for t in content["threats"]]
    if not threats:  # nothing was trained, nothing attacked
        return
    panels = len(threats)
    figure, axes = plt.subplots(
        1,
        panels,
        figsize=(4.6 * panels + 2.2, 4.6),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    names = list(dict.fromkeys(p["defense"] for p in content["points"]))
    colour = _colours(content["points"])
    for axis, threat in zip(axes[0], threats, strict=True):
        points = [p for p in content["points"] if p["threat"] == threat and p["leak_db"] is not None]
        for name, marker in zip(names, _markers(len(names)), strict=True):
            _curve(axis, [p for p in points if p["defense"] == name], name, marker, colour)
        front = sorted((p["leak_db"]["mean"], 100 * p["accuracy"]["mean"]) for p in points if p["pareto"])
        axis.plot(*zip(*front, strict=True), color=INK, lw=0.8, ls="--", zorder=1) if front else None
        axis.set_title(f"{threat} view", fontsize=11, color=INK)
        tidy(axis, "leak: PSNR of the strongest attack, dB", "test accuracy, %" if axis is axes[0][0] else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    if colour is not None:
        figure.colorbar(colour, ax=axes[0][-1], label="ε of this view (hollow: none)", shrink=0.8)
    save(figure, path)


def draw_epsilon(path: Path, content: Mapping[str, Any]) -> None:
    """Accuracy, and below it the leak, over the ε of each threat model's view: a column a threat model, a
    line a defense; dotted: no defense, whose ε is ∞."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threats = [t["name"] for t in content["threats"]]
    names = list(dict.fromkeys(p["defense"] for p in content["points"] if p["epsilon"]["value"] is not None))
    size = (4.6 * len(threats) + 1.6, 6.4)
    figure, axes = plt.subplots(
        2, len(threats), figsize=size, sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for column, threat in enumerate(threats):
        points = [p for p in content["points"] if p["threat"] == threat and p["leak_db"] is not None]
        for axis, key, scale in ((axes[0][column], "accuracy", 100), (axes[1][column], "leak_db", 1)):
            _over_epsilon(axis, points, key, scale, names)
        axes[0][column].set_title(f"{threat} view", fontsize=11, color=INK)
        tidy(axes[0][column], "", "test accuracy, %" if column == 0 else "")
        tidy(axes[1][column], "ε of this view (log)", "leak, dB" if column == 0 else "")
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9, frameon=False)
    save(figure, path)


def draw_pictures(path: Path, content: Mapping[str, Any], threat: str) -> None:
    """The private images, and below them what came back of them at each point of `threat`, with PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {(p["defense"], p["strength"]): p["label"] for p in content["points"]}
    entries = [e for e in content["pictures"]["recovered"] if e["threat"] == threat]
    private = [
        {"png": i.get("truth", v["png"])}
        for i, v in zip(entries[0]["images"], content["pictures"]["victims"], strict=False)
    ]
    rows = [("private", private)] + [(labels[e["defense"], e["strength"]], e["images"]) for e in entries]
    columns = max(len(images) for _, images in rows)
    size = (1.05 * columns + 4.4, 1.2 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, layout="constrained", squeeze=False)
    for line, (label, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label.replace(" + ", "\n+ "), rotation=0, ha="right", va="center", fontsize=7)
        for axis, image in zip(line, images, strict=False):
            shown = decoded(image["png"])
            axis.imshow(shown, cmap="gray" if shown.ndim == 2 else None, vmin=0, vmax=255)
            axis.set_xlabel(f"{image['psnr_db']:.0f} dB" if "psnr_db" in image else "", fontsize=8)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    save(figure, path)


def _over_epsilon(
    axis: Any, points: Sequence[Mapping[str, Any]], key: str, scale: float, names: Sequence[str]
) -> None:
    """A line for each of the defenses `names` that has an ε here, and one for no defense."""
    for i, name in enumerate(names):
        mine = [p for p in points if p["defense"] == name and p["epsilon"]["value"] is not None]
        mine.sort(key=lambda p: p["epsilon"]["value"])
        if not mine:
            continue
        x = [p["epsilon"]["value"] for p in mine]
        y = [scale * p[key]["mean"] for p in mine]
        ends = [p[key]["ci95"] or [p[key]["mean"]] * 2 for p in mine]
        error = [[abs(v - scale * e[side]) for v, e in zip(y, ends, strict=True)] for side in (0, 1)]
        unit = mine[0]["epsilon"]["unit"]
        style = {"marker": MARKERS[i], "color": f"C{i}", "lw": 1.3, "ms": 6, "elinewidth": 0.7, "capsize": 2}
        axis.errorbar(x, y, error, label=f"{name} (ε per {unit})", **style)
    for p in points:
        if not p["stack"]:
            axis.axhline(scale * p[key]["mean"], color=INK, lw=1, ls=":", label="no defense (ε = ∞)")
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.xaxis.set_major_formatter("{x:g}")


def _curve(axis: Any, points: Sequence[Mapping[str, Any]], name: str, marker: str, colour: Any) -> None:
    if not points:
        axis.plot([], [], marker=marker, ls="", color=INK, mfc="none", label=name)
        return
    x = [p["leak_db"]["mean"] for p in points]
    y = [100 * p["accuracy"]["mean"] for p in points]
    axis.plot(x, y, color=GRID, lw=1, zorder=1)
    for i, p in enumerate(points):
        _bars(axis, p)
        e = p["epsilon"]["value"]
        filled = {} if e is None or colour is None else {"mfc": colour.to_rgba(max(e, 1e-3))}
        style = {"mfc": "white"} | filled
        axis.plot(x[i], y[i], marker, color=INK, ms=7, mew=0.9, label=name if i == 0 else None, **style)


def _bars(axis: Any, point: Mapping[str, Any]) -> None:
    x, y = point["leak_db"]["mean"], 100 * point["accuracy"]["mean"]
    if (ci := point["leak_db"]["ci95"]) is not None:
        axis.plot(ci, [y, y], color=INK, lw=0.5, alpha=0.5)
    if (ci := point["accuracy"]["ci95"]) is not None:
        axis.plot([x, x], [100 * v for v in ci], color=INK, lw=0.5, alpha=0.5)


def _colours(points: Sequence[Mapping[str, Any]]) -> Any:
    """A scale over the finite ε, or None where there are none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    finite = [max(p["epsilon"]["value"], 1e-3) for p in points if p["epsilon"]["value"] is not None]
    if not finite:
        return None
    return ScalarMappable(LogNorm(min(finite), max(max(finite), 1.01 * min(finite))), "viridis_r")


def _markers(count: int) -> list[str]:
    return [MARKERS[i % len(MARKERS)] for i in range(count)]
