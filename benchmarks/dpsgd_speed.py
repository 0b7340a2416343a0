"""What the clipped gradient sum of DP-SGD costs, beside Opacus, torch.func and a step without privacy.

    python benchmarks/dpsgd_speed.py --turns 5 --out benchmarks/results/dpsgd_speed.json

From a batch to Σ_i min(1, C / ‖g_i‖₂) g_i, C being about the median norm; noise and the step, the same for
all, are left out. non-private: the gradient of the mean loss. hooks, functorch, ew: Opacus by its
`grad_sample_mode`, whose optimizer then clips. ghost: its fast gradient clipping with ghost clipping. vmap:
rows by torch.func. All modes take turns in one process; a time is the median of a turn's calls after one that
does not count, and ratios are taken within a turn. Every sum is compared to ours. Before a turn the benchmark
waits for a quiet machine, 10 s at most, and notes how busy it was. A mode that cannot run is left out, with
the reason.

Memory is how far the peak of a fresh process, VmHWM, rises in three calls above what model, packages and data
take; ru_maxrss of getrusage would not do, since it is never below the peak of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from ctypes import CDLL
from math import isnan
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dpsgd_modes import BASE, MODES, OURS, Case, Step, ours, scene
from rivals.work import wait_until_quiet

from fltoolkit.errors import InputError, require
from fltoolkit.report import document
from fltoolkit.report.figures import ACCENT, INK, panels, save, tidy
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import table

MEMORY_CALLS = 3
NOISE = "Full backward hook is firing"
"""A warning of Opacus' hooks for layers that read the data."""

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_CNN: Any = {"at_least": (("hooks", 4.0), ("ghost", 1.0)), "memory_at_most": (("ghost", 1.3),)}
CASES = {
    "cnn-64": Case("cnn", 64, **_CNN),
    "cnn-256": Case("cnn", 256, **_CNN),
    "small-64": Case("small", 64, (("hooks", 1.4),)),
}


def reason(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def prepare(case: Case, seed: int) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """The modes that run; how far their sums are from ours, relatively; why the others do not run."""
    warnings.filterwarnings("ignore", NOISE)
    steps: dict[str, Step] = {}
    far: dict[str, float] = {}
    left_out: dict[str, str] = {}
    base = ours(scene(case, seed))()
    for name, make in MODES.items():
        try:
            step = make(scene(case, seed))
            found = step()
        except Exception as e:  # a rival may fail in any way
            left_out[name] = reason(e)
            continue
        steps[name] = step
        if name != BASE:
            far[name] = float((found - base).norm() / base.norm())
    return steps, far, left_out


def timed(step: Step, calls: int) -> float:
    """Median milliseconds of `calls` calls, after one that does not count."""
    step()
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begun))
    return median(times)


def growth_mib(mode: str, case: Case, seed: int, threads: int) -> float:
    """MiB by which this process's peak rises in a mode's calls."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", NOISE)
    step = MODES[mode](scene(case, seed))
    with suppress(OSError, AttributeError):
        CDLL(None).malloc_trim(0)  # pages that the allocator kept would take what a call adds unseen
    with suppress(OSError):
        RESET.write_text("5", encoding="ascii")  # the peak so far, of imports, is forgotten
    begin = status_mib("VmRSS")
    for _ in range(MEMORY_CALLS):
        step()
    return status_mib("VmHWM") - begin


def status_mib(entry: str) -> float:
    (line,) = (s for s in STATUS.read_text(encoding="ascii").splitlines() if s.startswith(f"{entry}:"))
    return int(line.split()[1]) / 1024


def isolated_growth(mode: str, case: Case, seed: int, threads: int) -> float | str:
    """`growth_mib` in a process of its own; a reason where that fails."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(growth_mib, mode, case, seed, threads).result()
    except Exception as e:  # see `prepare`
        return reason(e)


def spread(turns: Sequence[float]) -> dict[str, Any]:
    return {"median": median(turns), "min": min(turns), "max": max(turns), "turns": list(turns)}


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of every mode's time over ours, within each turn."""
    return {n: [t / o for t, o in zip(turns, times[OURS], strict=True)] for n, turns in times.items()}


def judged(case: Case, over: dict[str, list[float]], memory: dict[str, float | str]) -> list[dict[str, Any]]:
    """Each target, what was measured (None: the mode did not run), and whether that meets it."""
    found = []
    for mode, bound in case.at_least:
        value = median(over[mode]) if mode in over else None
        met = None if value is None else value >= bound
        found.append({"what": f"time {mode} / ours", "target": f">= {bound:g}", "value": value, "met": met})
    for mode, bound in case.memory_at_most:
        mine, theirs = memory.get(OURS), memory.get(mode)
        value = mine / theirs if isinstance(mine, float) and isinstance(theirs, float) else None
        met = None if value is None else value <= bound
        found.append({"what": f"memory ours / {mode}", "target": f"<= {bound:g}", "value": value, "met": met})
    return found


def measure(case: Case, turns: int, calls: int, seed: int, threads: int) -> dict[str, Any]:
    """One case: times, ratios, memory, agreement, targets."""
    steps, far, left_out = prepare(case, seed)
    times: dict[str, list[float]] = {name: [] for name in steps}
    busy = []
    for turn in range(turns):
        share = wait_until_quiet(patience=10.0)
        busy.append(None if isnan(share) else share)
        for name, step in steps.items():
            times[name].append(timed(step, calls))
        shown = "  ".join(f"{name} {t[-1]:.1f}" for name, t in times.items())
        print(
            f"{case.model}, B={case.batch}, turn {turn + 1}/{turns}, ms: {shown}", file=sys.stderr, flush=True
        )
    memory = {name: isolated_growth(name, case, seed, threads) for name in steps} if STATUS.exists() else {}
    over = ratios(times)
    return {
        "model": case.model,
        "batch": case.batch,
        "milliseconds": {n: spread(t) for n, t in times.items()},
        "ratio_to_ours": {n: spread(r) for n, r in over.items()},
        "memory_mib": memory,
        "distance_to_ours": far,
        "left_out": left_out,
        "busy_before_turn": busy,
        "targets": judged(case, over, memory),
    }


def render(result: dict[str, Any]) -> str:
    """A table a case, with what it was to reach."""
    blocks = []
    for case in result.values():
        rows = []
        for mode, t in case["milliseconds"].items():
            over, memory = case["ratio_to_ours"][mode], case["memory_mib"].get(mode, "not measured")
            held = f"{memory:.0f}" if isinstance(memory, float) else memory
            spans = f"{over['median']:.2f} ({over['min']:.2f}-{over['max']:.2f})"
            rows.append((mode, f"{t['median']:.1f} ({t['min']:.1f}-{t['max']:.1f})", spans, held))
        header = (f"{case['model']}, B={case['batch']}", "ms (min-max)", "mode / ours", "MiB above start")
        lines = [table(header, rows)]
        lines += [f"{mode} left out: {why}" for mode, why in case["left_out"].items()]
        for t in case["targets"]:
            value = "not measured" if t["value"] is None else f"{t['value']:.2f}"
            word = {True: "met", False: "NOT MET", None: "unknown"}[t["met"]]
            lines.append(f"{t['what']}: {value}, target {t['target']}: {word}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Milliseconds of every mode, a panel a case."""
    figure, axes = panels(len(result))
    for axis, case in zip(axes, result.values(), strict=True):
        modes = list(case["milliseconds"])[::-1]
        values = [case["milliseconds"][m]["median"] for m in modes]
        bars = axis.barh(modes, values, color=[ACCENT if m == OURS else INK for m in modes])
        axis.bar_label(bars, [f"{v:.0f}" if v >= 100 else f"{v:.1f}" for v in values], padding=3, fontsize=8)
        axis.set_xlim(0, 1.15 * max(values))
        axis.set_title(f"{case['model']}, B={case['batch']}", fontsize=10, color=INK)
        tidy(axis, "ms a clipped sum", "")
        axis.grid(visible=False, axis="y")
        axis.set_axisbelow(True)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated (default: all)")
    parser.add_argument("--turns", type=int, default=5, help="turns of all modes (default: 5)")
    parser.add_argument("--calls", type=int, default=5, help="timed calls of a mode in a turn (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads of all modes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of models and data (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--out", type=Path, help="JSON file that keeps the newest of each case, with a figure beside it"
    )
    options = parser.parse_args(argv)
    try:
        for flag in ("turns", "calls", "threads"):
            require(getattr(options, flag) >= 1, flag, ">= 1", getattr(options, flag))
    except InputError as e:
        raise SystemExit(f"error: {e}") from e
    torch.set_num_threads(options.threads)
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    told_by = {
        "command": document.command_line(),
        "seed": options.seed,
        "machine": {"cores": os.cpu_count(), "threads": options.threads},
        "versions": document.versions(),
    }
    for name in options.case or CASES:
        found = measure(CASES[name], options.turns, options.calls, options.seed, options.threads)
        kept[name] = found | told_by
        if options.out:
            write_json(options.out, kept)
            draw(options.out.with_suffix(".png"), kept)
    print(json.dumps(kept) if options.json else render(kept))


if __name__ == "__main__":
    main()
