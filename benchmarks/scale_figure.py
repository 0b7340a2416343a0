"""What `fedavg_scale` measured, as a table on the terminal and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fltoolkit.report.figures import ACCENT, GRID, INK, panels, save, tidy
from fltoolkit.report.terminal import table

SHADES = ("#fdba74", ACCENT, "#7c2d12", INK)
Spread = dict[str, Any]
"""median, min and max over the turns."""


def show(result: dict[str, Any]) -> None:
    """Print a row a measurement, and what they come to."""
    cells = result["measured"]["cells"]
    rows = [
        (name, _text(m["growth_mib"], ".0f"), _text(m["seconds"], ".3f"))
        for name, m in result["measured"].items()
        if name != "cells"
    ]
    rows += [(name, "", _text(cells[name], ".3f")) for name in result["linear"]["client_epochs"]]
    print(table(("median (min-max)", "MiB above start", "seconds a round"), rows))
    memory, linear = result["memory"], result["linear"]
    print(f"\nmemory {'under' if memory['under_limit'] else 'NOT UNDER'} {memory['limit_mib']} MiB")
    print(f"memory, largest cohort / smallest: {_text(memory['largest_to_smallest'], '.2f')}")
    for name, ratio in result["idle"]["most_to_fewest"].items():
        print(f"most clients registered / fewest, {name}: {_text(ratio, '.2f')}")
    fixed, each = linear["seconds_fixed"], linear["seconds_each"]
    print(f"seconds = {fixed:.3f} + {each:.5f} · client-epochs, R² {linear['r_squared']:.4f}")
    print(f"a client-epoch in the largest cell / smallest: {_text(linear['largest_to_smallest'], '.2f')}")


def _text(t: Spread, form: str) -> str:
    return f"{t['median']:{form}} ({t['min']:{form}}-{t['max']:{form}})"


def draw(path: Path, result: dict[str, Any]) -> None:
    """Memory over cohorts; time and memory over registered clients; time over client-epochs."""
    figure, axes = panels(3)
    for axis, part in zip(axes, (_memory, _idle, _linear), strict=True):
        part(axis, result)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.title.set(fontsize=10, color=INK)
    save(figure, path)


def _memory(axis: Any, result: dict[str, Any]) -> None:
    cohorts, memory = result["task"]["cohorts"], result["memory"]
    _points(
        axis, cohorts, [result["measured"][f"cohort of {k}"]["growth_mib"] for k in cohorts], "peak", ACCENT
    )
    every = [k * memory["one_update_mib"] for k in cohorts]
    axis.plot(cohorts, every, "--", color=INK, lw=1.2, label="all updates at once")
    axis.axhline(memory["limit_mib"], color="#64748b", ls=":", lw=1.5, label=f"{memory['limit_mib']:,} MiB")
    axis.set(xlim=(0, None), ylim=(0, 1.35 * max(*every, memory["limit_mib"])), xticks=cohorts)
    axis.set_title("memory of a round of the CNN")
    tidy(axis, "clients in the cohort", "MiB above start")


def _idle(axis: Any, result: dict[str, Any]) -> None:
    task, measured = result["task"], result["measured"]
    for name, label, colour in (("seconds", "time", ACCENT), ("growth_mib", "peak memory", INK)):
        spreads = [measured[f"{n} registered"][name] for n in task["registered"]]
        base = spreads[0]["median"]
        scaled = [{k: t[k] / base for k in ("median", "min", "max")} for t in spreads]
        _points(axis, task["registered"], scaled, label, colour)
    axis.set(xscale="log", title=f"rounds of {task['sampled']} clients of the 2NN, the others idle")
    axis.set_ylim(0, max(2.0, 1.2 * axis.get_ylim()[1]))
    tidy(axis, "registered clients", f"relative to {task['registered'][0]:,} registered")


def _linear(axis: Any, result: dict[str, Any]) -> None:
    linear, cells = result["linear"], result["measured"]["cells"]
    for e, shade in zip(result["task"]["epochs"], SHADES, strict=False):
        names = [n for n in linear["client_epochs"] if n.endswith(f" E={e}")]
        work = [linear["client_epochs"][n] for n in names]
        _points(axis, work, [cells[n] for n in names], f"E={e}", shade, "o")
    ends = np.array([0, max(linear["client_epochs"].values())])
    line = linear["seconds_fixed"] + linear["seconds_each"] * ends
    axis.plot(ends, line, color=GRID, lw=1.5, zorder=0, label="least squares")
    axis.set(title=f"a round of the 2NN, {result['task']['clients']} clients")
    tidy(axis, "client-epochs in the round", "seconds")


def _points(
    axis: Any, x: Sequence[float], spreads: Sequence[Spread], label: str, colour: str, style: str = "o-"
) -> None:
    """Medians, with bars from least to most."""
    middle = [t["median"] for t in spreads]
    bars = [[abs(t[end] - t["median"]) for t in spreads] for end in ("min", "max")]
    axis.errorbar(x, middle, bars, fmt=style, color=colour, label=label, capsize=3, ms=5, lw=1.5)
