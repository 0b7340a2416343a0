"""Pictures and tables that the notebooks show, and how a notebook finds the repository."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fltoolkit.audit import Result
from fltoolkit.errors import InputError, require
from fltoolkit.report.figures import ACCENT, GRID, INK, Bounds, show_image, tidy
from fltoolkit.report.terminal import interval, table
from fltoolkit.scoring import Scored
from fltoolkit.training.evaluate import Evaluation
from fltoolkit.training.federation import State, federate
from fltoolkit.training.recipe import Kitchen, Recipe

DPI = 90
SAVED_DPI = 150
"""What `fltoolkit.report.figures.save` writes."""
SHOWN_POINTS = 3000
COLOURS = (ACCENT, "#1d4ed8", "#15803d", "#7e22ce")


@dataclass(frozen=True)
class Picture:
    """A PNG image that Jupyter shows, and the same in words for where no image can be shown."""

    png: bytes
    text: str

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return self.text


def at_root(start: Path | None = None) -> None:
    """Go to the repository root, above `start` (None: the current folder), and make the benchmarks importable
    by their names, `import cohort_leak`. Raises InputError outside of a checkout."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        scripts = folder / "benchmarks"
        if (scripts / "results").is_dir():
            os.chdir(folder)
            if str(scripts) not in sys.path:
                sys.path.insert(0, str(scripts))
            return
    raise InputError(f"start must be a folder inside the toolkit's repository, got {str(here)!r}")


def made_by(results: Iterable[Mapping[str, Any]]) -> str:
    """The commands that made these committed results, each once, in order."""
    return "\n".join(dict.fromkeys(f"made by: {r['command']}" for r in results))


def drawn(draw: Callable[..., None], text: str, **arguments: Any) -> Picture:
    """What `draw(path=..., **arguments)` saves as a picture, at the resolution of a screen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path=path, **arguments)
        with Image.open(path) as image:
            size = [round(side * DPI / SAVED_DPI) for side in image.size]
            small = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return Picture(_png(small), text)


def compare(results: Mapping[str, Result]) -> str:
    """A line for each result: mean PSNR, gain, SSIM and the share of victims recovered, with their 95 %
    intervals where there are several victims; below, why a round that was given up was given up."""
    rows = [(name, *_metrics(result.report)) for name, result in results.items()]
    reports = [r.report for r in results.values()]
    db = reports[0]["metrics"]["success_rate"]["threshold_db"]
    header = ("", "attack", "victims", "PSNR, dB", "gain, dB", "SSIM", f"above {db:g} dB")
    stopped = [
        f"{name}: {note.removeprefix('stopped: ')}"
        for name, result in results.items()
        for note in dict.fromkeys(result.report["notes"])
        if note.startswith("stopped: ")
    ]
    return "\n".join([table(header, rows), *([""] if stopped else []), *stopped])


def _metrics(report: Mapping[str, Any]) -> tuple[str, ...]:
    m = report["metrics"]
    success = m["success_rate"]
    several = report["victims"] > 1
    rate = f"{success['value']:.0%}"
    if several:
        rate += f" [{success['ci95'][0]:.0%}, {success['ci95'][1]:.0%}]"
    attack = report["attack"] + (", adaptive" if report["attack_options"].get("adapt") else "")
    numbers = (
        f"{m[key]['mean']:{sign}.{digits}f}{interval(m[key]['ci95'], digits)}"
        for key, sign, digits in (("psnr_db", "", 1), ("psnr_gain_db", "+", 1), ("ssim", "", 3))
    )
    return (attack, str(report["victims"]), *numbers, rate)


def lineup(results: Mapping[str, Result], text: str, most: int = 8) -> Picture:
    """The private images, what each attack made of them, and the best guess without any update, with PSNR.

    The first `most` images; side by side for one image, one below the other for several. Raises InputError
    where the results are not about the same private images.
    """
    found = [(name, r) for name, r in results.items()]
    victims = found[0][1].victims
    if not all(_same_truth(victims, r.victims) for _, r in found):
        raise InputError(f"results must be of the same private images, got {', '.join(results)}")
    places = [(v, i) for v, s in enumerate(victims) for i in range(len(s.truth))][:most]
    strips = [("private", [(victims[v].truth.x[i], "") for v, i in places])]
    for name, r in found:
        strips.append((name, [(r.victims[v].x[i], f"{r.victims[v].psnr[i]:.1f} dB") for v, i in places]))
    floors = [victims[v].psnr[i] - victims[v].gain[i] for v, i in places]
    guesses = [victims[v].trivial[i] for v, i in places]
    best = [(g, f"{f:.1f} dB") for g, f in zip(guesses, floors, strict=True)]
    return _strips([*strips, ("best guess\nwithout update", best)], found[0][1].input_range, text)


def _same_truth(a: Sequence[Scored], b: Sequence[Scored]) -> bool:
    return len(a) == len(b) and all(torch.equal(s.truth.x, t.truth.x) for s, t in zip(a, b, strict=True))


def _strips(strips: Sequence[tuple[str, Sequence[tuple[Any, str]]]], bounds: Bounds, text: str) -> Picture:
    """One strip of captioned images for each name."""
    plt = _pyplot()
    one = len(strips[0][1]) == 1
    shape = (1, len(strips)) if one else (len(strips), len(strips[0][1]))
    size = (1.75 * shape[1], 2.3) if one else (1.25 * shape[1] + 1.3, 1.45 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for s, (name, images) in enumerate(strips):
        for i, (image, caption) in enumerate(images):
            axis = axes[0, s] if one else axes[s, i]
            show_image(axis, image, bounds)
            axis.set_xlabel(caption, fontsize=9, color=INK)
            if one:
                axis.set_title(name, fontsize=9, color=INK)
            elif i == 0:
                axis.set_ylabel(name, fontsize=9, color=INK, rotation=0, ha="right", va="center", labelpad=8)
    return _picture(figure, text)


def numbers(rows: Mapping[str, Any], text: str) -> Picture:
    """Rows of numbers `[D]` as a server finds them: each value over its coordinate, and how often each value
    occurs. At most 3,000 evenly spaced coordinates are drawn; the histogram counts all."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(9.2, 2.5 * len(rows)), layout="constrained", squeeze=False, width_ratios=(2, 1)
    )
    for (name, values), (left, right), colour in zip(rows.items(), axes, COLOURS, strict=False):
        v = np.asarray(values, float)
        at = np.linspace(0, len(v) - 1, min(len(v), SHOWN_POINTS)).astype(int)
        left.plot(at, v[at], ".", ms=1.8, color=colour)
        left.set_title(name, fontsize=10, color=INK, loc="left")
        tidy(left, "coordinate", "value")
        right.set_axisbelow(True)
        right.hist(v, bins=48, color=colour, alpha=0.85)
        tidy(right, "value", "how many")
    return _picture(figure, text)


def trained(recipe: Recipe, rounds: int) -> tuple[tuple[int, Evaluation], ...]:
    """Train the federation of `recipe` without defenses from a fresh model; its (round, evaluation) pairs."""
    require(rounds >= 1, "rounds", ">= 1", rounds)
    federation = Kitchen(recipe).federation(())
    start = State(federation.task.layout.row(federation.task.model))
    *_, last = federate(federation, start, rounds)
    return last.state.evaluated


def curves(
    runs: Mapping[str, Sequence[tuple[int, Evaluation]]], text: str, target: float | None = None
) -> Picture:
    """Test accuracy over rounds with its 95 % interval, a line a run, from (round, evaluation) pairs."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.0, 3.8), layout="constrained")
    for (name, evaluated), colour in zip(runs.items(), COLOURS, strict=False):
        rounds = [number for number, _ in evaluated]
        low, high = zip(*(e.ci95 for _, e in evaluated), strict=True)
        axis.fill_between(rounds, low, high, color=colour, alpha=0.14, lw=0)
        axis.plot(rounds, [e.accuracy for _, e in evaluated], "o-", ms=3, color=colour, label=name)
    if target is not None:
        axis.axhline(target, color=GRID, lw=1.4, zorder=0)
    axis.set_ylim(0, 1.02)
    tidy(axis, "communication round", "test accuracy (95 % interval)")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return _picture(figure, text)


def accuracies(runs: Mapping[str, Sequence[tuple[int, Evaluation]]], target: float) -> str:
    """A line for each run: the accuracy after its last round, and the first round at `target` or above."""
    rows = []
    for name, evaluated in runs.items():
        number, last = evaluated[-1]
        reached = [n for n, e in evaluated if e.accuracy >= target]
        first = str(reached[0]) if reached else "not reached"
        rows.append((name, str(number), f"{last.accuracy:.3f}{interval(last.ci95, 3)}", first))
    return table(("", "rounds", "test accuracy", f"first at {target:.0%}"), rows)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _picture(figure: Any, text: str) -> Picture:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    _pyplot().close(figure)
    with Image.open(buffer) as image:
        return Picture(_png(image.convert("RGB")), text)


def _png(image: Image.Image) -> bytes:
    """A small file: the 256 colours that serve best, which is enough for lines and for a few photographs."""
    buffer = BytesIO()
    image.quantize(256, Image.Quantize.MEDIANCUT).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
