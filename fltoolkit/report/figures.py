"""The pictures: what was recovered beside what was private, and accuracy over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fltoolkit.report.files import write_atomic
from fltoolkit.scoring import Scored
from fltoolkit.training.evaluate import Evaluation

SHOWN_IMAGES = 6
INK, ACCENT, GRID = "#1f2937", "#c2410c", "#d1d5db"

Bounds = tuple[float, float]
"""What is black and what is white."""


def reconstruction_figure(path: Path, victims: Sequence[Scored], title: str, bounds: Bounds) -> None:
    """Original, reconstruction and the best guess without the update of the first images, and the matching
    loss over iterations of their victims."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = [(v, i) for v, s in enumerate(victims) for i in range(len(s.truth))][:SHOWN_IMAGES]
    height = 1.75 * len(pairs) + 1.0
    figure = plt.figure(figsize=(9.6, max(height, 3.2)), layout="constrained")
    grid = figure.add_gridspec(len(pairs), 5, width_ratios=[1, 1, 1, 0.12, 2.2])
    for row, (v, i) in enumerate(pairs):
        s = victims[v]
        labels = (
            f"label {int(s.truth.y[i])}",
            f"label {int(s.y[i])}, {s.psnr[i]:.1f} dB\nmatching loss {s.found.loss:.1e}",
            f"{s.psnr[i] - s.gain[i]:.1f} dB",
        )
        heads = ("original", "reconstruction", "best guess\nwithout the update")
        for column, image in enumerate((s.truth.x[i], s.x[i], s.trivial[i])):
            axis = figure.add_subplot(grid[row, column])
            show_image(axis, image, bounds)
            axis.set_xlabel(labels[column], fontsize=9, color=INK)
            if row == 0:
                axis.set_title(heads[column], fontsize=10, color=INK)
    axis = figure.add_subplot(grid[: min(2, len(pairs)), 4])
    for v in dict.fromkeys(v for v, _ in pairs):
        trace = victims[v].found.trace.clamp_min(1e-20).numpy()
        axis.semilogy(np.arange(len(trace)), trace, color=ACCENT, alpha=0.75, linewidth=1.4)
    tidy(axis, "iteration", "matching loss")
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    save(figure, path)


def accuracy_figure(path: Path, evaluated: Sequence[tuple[int, Evaluation]], title: str) -> None:
    """Test accuracy over rounds with its 95 % interval, from (round, evaluation) pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    rounds = [number for number, _ in evaluated]
    low, high = ([e.ci95[end] for _, e in evaluated] for end in (0, 1))
    axis.fill_between(rounds, low, high, color=ACCENT, alpha=0.18, lw=0)
    marker = "o" if len(rounds) < 2 else None
    axis.plot(rounds, [e.accuracy for _, e in evaluated], color=ACCENT, linewidth=1.8, marker=marker)
    axis.set_ylim(0, 1.02)
    tidy(axis, "round", "test accuracy (95 % interval)")
    axis.set_title(title, fontsize=11, color=INK, parse_math=False)
    save(figure, path)


def show_image(axis: Any, image: Tensor, bounds: Bounds) -> None:
    """An image `[C, H, W]`, from black at the lower bound to white, or full colour, at the upper one."""
    low, high = bounds
    pixels = ((image - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).numpy()
    grey = pixels.shape[2] == 1
    axis.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with `count` axes side by side, two a row where there are more than two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(count, 2) if count != 3 else 3
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows + 0.6), layout="constrained", squeeze=False
    )
    return figure, list(axes.flat)[:count]


def tidy(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.grid(True, color=GRID, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    write_atomic(path, lambda p: figure.savefig(p, dpi=150, format=path.suffix.removeprefix(".")))
    plt.close(figure)
