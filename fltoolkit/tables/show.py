"""Printing a table with the paper's numbers beside ours, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fltoolkit.report import terminal
from fltoolkit.report.files import read_json
from fltoolkit.tables.cells import Cell, Table, citation
from fltoolkit.tables.seeds import Estimate, read_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, dict[str, Any]]
"""Cell id -> what its JSON file holds, and the runs of its other seeds under "seeds"."""

NOT_RUN = "not run"
DASH = "—"
NEAR = 1.5


def read_results(table: Table, folder: Path) -> Results:
    found = {}
    for cell in table.cells:
        path = folder / f"{cell.id}.json"
        if path.exists():
            result = read_json(path)
            found[cell.id] = {**result, "seeds": read_seeds(folder, cell.id, result)}
    return found


def estimate(result: Mapping[str, Any]) -> Estimate:
    """Rounds to the target over all seeds that were run."""
    return Estimate.of([_best(result), *result["seeds"]])


def _best(result: Mapping[str, Any]) -> dict[str, Any]:
    """The run that `result` is of."""
    return min(result["runs"], key=lambda r: (r["rounds"] or inf, -r["best"]))


def render(table: Table, results: Results) -> str:
    """Every cell as `ours (speed-up) | paper (speed-up)`, then how many are near, and what to know."""
    by_place = {(c.row, c.column): c for c in table.cells}
    known = {c.id: c for c in table.cells}
    rows = []
    for row in table.rows:
        cells = [by_place.get((row, column)) for column in table.columns]
        rows.append((row, *("" if c is None else _entry(c, known, results) for c in cells)))
    header = ("ours | paper", *table.columns)
    lines = [table.title, "", terminal.table(header, rows), "", table.note]
    lines += [_nearness(table, results), *_remarks(table, results), f"Paper: {citation()}"]
    return "\n".join(lines)


def _entry(cell: Cell, known: Mapping[str, Cell], results: Results) -> str:
    base = known[cell.baseline]
    left, paper = ours(cell, results), DASH if cell.paper_rounds is None else str(cell.paper_rounds)
    if cell.id == base.id:
        return f"{left} | {paper}"
    if cell.id in results and base.id in results:
        left += _ours_faster(estimate(results[base.id]), estimate(results[cell.id]))
    return f"{left} | {paper}{_speedup(base.paper_rounds, cell.paper_rounds)}"


def _ours_faster(base: Estimate, found: Estimate) -> str:
    """The speed-up, a bound where one of the two is, nothing where both are."""
    if base.bound and found.bound:
        return ""
    return _speedup(base.mean, found.mean, "<" if found.bound else ">" if base.bound else "")


def ours(cell: Cell, results: Results) -> str:
    """What was measured of a cell, as the tables print it."""
    if cell.id not in results:
        return NOT_RUN
    found = estimate(results[cell.id])
    text = DASH if found.mean is None else f"{'>' if found.bound else ''}{found.mean:.0f}"
    if found.ci95 is not None:
        text += f" [{found.ci95[0]:.0f}, {found.ci95[1]:.0f}]"
    return text if results[cell.id]["interior"] else text + "*"


def _speedup(base: float | None, rounds: float | None, bound: str = "") -> str:
    return "" if base is None or rounds is None else f" ({bound}{base / rounds:.1f}×)"


def _nearness(table: Table, results: Results) -> str:
    """How many cells are within a factor of the paper's, and how many of those for which the paper has a
    number. Undecided cells count for neither."""
    ran = [c for c in table.cells if c.id in results]
    told = [c for c in ran if not _undecided(c, results[c.id])]
    near = [c for c in told if _is_near(c, estimate(results[c.id]).mean)]
    text = f"{len(ran)} of {len(table.cells)} cells run"
    if len(told) < len(ran):
        text += f", {len(ran) - len(told)} undecided"
    if told or not ran:
        text += f"; {_part(near, told)} within {NEAR}x of the paper's rounds"
    counted = [c for c in told if c.paper_rounds is not None]
    if len(counted) < len(told):
        text += f", {_part(near, counted)} of the {len(counted)} for which it has a number"
    return text + "."


def _part(some: Sequence[Cell], all_: Sequence[Cell]) -> str:
    return f"{len(some)} ({len(some) / len(all_):.0%})" if all_ else "0"


def _is_near(cell: Cell, ours: float | None) -> bool:
    if ours is None or cell.paper_rounds is None:
        return False
    return 1 / NEAR <= ours / cell.paper_rounds <= NEAR


def _undecided(cell: Cell, result: Mapping[str, Any]) -> bool:
    """Whether the target was not reached, by a seed at least, and what was run does not tell how it compares
    with the paper. Two dashes do not, as the paper's budget is not known."""
    found, paper = estimate(result), cell.paper_rounds
    if found.mean is not None:
        return found.bound and (paper is None or found.mean <= NEAR * paper)
    return paper is None or bool(result["effort"]["budget"] < NEAR * paper)


def _remarks(table: Table, results: Results) -> list[str]:
    lines = []
    if any(not r["interior"] for r in results.values()):
        lines.append("* the best learning rate found lies at the edge of those tried.")
    if any(r["probes"] for r in results.values()):
        lines.append("Some cells ran at one learning rate only, chosen by a short probe recorded with them.")
    lines += _elsewhere(table, results)
    short = [i for i, r in results.items() if any(_is_short(s) for s in (r, *r["seeds"]))]
    if short:
        lines.append(f"Products of numbers in bfloat16, of a seed at least: {', '.join(short)}.")
    if any(r["seeds"] for r in results.values()):
        lines.append("[low, high]: the geometric mean over several seeds stands before its 95 % interval.")
    if any(c.id in results and _undecided(c, results[c.id]) for c in table.cells):
        lines.append(
            f"Undecided: a budget or a seed ended before the target and before {NEAR}x of the paper's rounds."
        )
    lines += [
        _remark(c, results[c.id]) for c in table.cells if c.id in results and _remarkable(c, results[c.id])
    ]
    lines += sorted({r["note"] for r in results.values() if r["note"]})
    return lines


def _elsewhere(table: Table, results: Results) -> list[str]:
    """What was trained on other data than the table's, or shuffled otherwise."""
    named: dict[str, list[str]] = {}
    for cell in table.cells:
        told = results[cell.id]["cell"] if cell.id in results else cell.setting()
        if told["data"] != cell.data:
            named.setdefault(f"Trained on {told['data']}, not {cell.data}", []).append(cell.id)
        if told.get("buffer") != cell.buffer:
            buffer = told.get("buffer") or "all examples"
            named.setdefault(f"Shuffled through a buffer of {buffer}", []).append(cell.id)
    return [f"{what}: {', '.join(ids)}." for what, ids in named.items()]


def _is_short(run: Mapping[str, Any]) -> bool:
    return run["effort"].get("precision") == "bf16"


def _remarkable(cell: Cell, result: Mapping[str, Any]) -> bool:
    found = estimate(result)
    return not _is_near(cell, found.mean) or found.bound


def _remark(cell: Cell, result: Mapping[str, Any]) -> str:
    found, budget = estimate(result), result["effort"]["budget"]
    more = "more than " if found.bound else ""
    if found.mean is None:
        best = max(r["best"] for r in result["runs"])
        got = f"not reached in {budget} rounds, {best:.1%} at best"
    else:
        got = f"{more}{found.mean:.0f} rounds"
    if found.seeds > 1:
        got += f" ({found.reached} of {found.seeds} seeds reached it)"
    return f"{cell.id}: {got}, paper {cell.paper_rounds or 'not reached'}."


def draw(table: Table, results: Results, path: Path) -> None:
    """Best-so-far test accuracy over rounds (logarithmic), one panel a column, one line a cell run and thin
    ones for its other seeds."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    from fltoolkit.report.figures import GRID, INK, panels, save, tidy

    figure, axes = panels(len(table.columns))
    low, high = _window(table, results)
    shade = colormaps["viridis"]
    for column, axis in zip(table.columns, axes, strict=True):
        cells = [c for c in table.cells if c.column == column]
        if not any(c.id in results for c in cells):
            axis.text(0.5, 0.5, NOT_RUN, transform=axis.transAxes, ha="center", color=INK)
        for i, cell in enumerate(cells):
            if cell.id not in results:
                continue
            best = _best(results[cell.id])
            colour = shade(i / max(1, len(cells) - 1) * 0.9)
            _curve(axis, best, cell.target, color=colour, lw=1.6, ms=4, label=cell.row)
            for again in results[cell.id]["seeds"]:
                _curve(axis, again, cell.target, color=colour, lw=0.6, ms=2)
        axis.axhline(cells[0].target, color=GRID, lw=1.2, zorder=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.set_ylim(low, high)
        axis.set_title(column, fontsize=10, color=INK)
        tidy(axis, "communication rounds", "best test accuracy so far")
    handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(table.title, fontsize=11, color=INK)
    save(figure, path)


def _window(table: Table, results: Results) -> tuple[float, float]:
    """Accuracies to show: 0.15 below the lowest target, or as low as the end of the worst curve asks."""
    targets = [c.target for c in table.cells]
    ends = [_best(results[c.id])["best"] - 0.05 for c in table.cells if c.id in results]
    return max(0.0, min([min(targets) - 0.15, *ends])), min(1.0, max(targets) + 0.02)


def _curve(
    axis: Axes, run: Mapping[str, Any], target: float, color: Any, lw: float, ms: float, **more: Any
) -> None:
    """The best-so-far curve of one training, with a dot where it crosses the target; nothing where it
    diverged before it was evaluated."""
    if not run["corners"]:
        return
    rounds, accuracy = zip(*run["corners"], strict=True)
    axis.plot(
        (*rounds, run["ran"]),
        (*accuracy, accuracy[-1]),
        color=color,
        lw=lw,
        drawstyle="steps-post",
        **more,
    )
    if run["rounds"] is not None:
        axis.plot(run["rounds"], target, "o", color=color, ms=ms)
