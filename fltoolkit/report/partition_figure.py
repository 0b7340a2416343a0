"""What clients hold, as a picture: how many examples of which class, and how many in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fltoolkit.report.figures import ACCENT, GRID, INK, save, tidy

MOST_BUBBLES = 40
"""Clients, and classes, up to which an area can still be told from its neighbour's."""
MOST_BARS = 150
"""Clients up to which bars with gaps between them can still be told apart."""
SMALLEST_DOT = 1.5
"""The area in square points below which a count that is not 0 could not be seen."""
LARGEST_DOT = 28.0
"""The largest diameter in points, such that the key has room for it."""
BAR = "#64748b"
SHADES = ("#fde8cc", "#fdba74", "#ea580c", "#9a3412", "#431407")


def partition_figure(path: Path, sizes: np.ndarray, counts: np.ndarray | None, title: str) -> None:
    """Draw sizes `[K]` as bars, and below them counts `[K, classes]`: as areas where there are few clients
    and classes, else as colours. counts None: the bars alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    clients = len(sizes)
    width = float(np.clip(2.4 + 0.3 * clients, 6.4, 11.0))
    if counts is None:
        figure, bars = plt.subplots(figsize=(width, 3.0), layout="constrained")
        _bars(bars, sizes)
        bars.set_xlabel("client", color=INK)
    else:
        few = max(counts.shape) <= MOST_BUBBLES
        height = float(np.clip(1.9 + 0.3 * counts.shape[1], 3.6, 7.5))
        figure = plt.figure(figsize=(width, height), layout="constrained")
        grid = figure.add_gridspec(
            2, 2, height_ratios=[0.85, height - 1.9], width_ratios=[width, 1.4 if few else 0.22]
        )
        main = figure.add_subplot(grid[1, 0])
        bars = figure.add_subplot(grid[0, 0], sharex=main)
        key = figure.add_subplot(grid[1, 1])
        _bars(bars, sizes)
        bars.tick_params(labelbottom=False)
        _classes(main, counts)
        figure.align_ylabels((bars, main))
        (_bubbles if few else _heat)(figure, main, key, counts)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    save(figure, path)


def _bars(axis: Any, sizes: np.ndarray) -> None:
    """A bar a client, without gaps where there are many."""
    clients = len(sizes)
    if clients <= MOST_BARS:
        axis.bar(np.arange(clients), sizes, width=0.7, color=BAR, linewidth=0)
    else:
        axis.stairs(sizes, np.arange(clients + 1) - 0.5, fill=True, color=BAR)
    axis.set_ylim(0, 1.08 * sizes.max())
    axis.yaxis.set_major_locator(_whole(4))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(_whole(12))
    axis.set_xlim(-0.5, clients - 0.5)
    tidy(axis, "", "examples")
    axis.grid(False, axis="x")
    axis.set_axisbelow(True)


def _classes(axis: Any, counts: np.ndarray) -> None:
    axis.set_ylim(counts.shape[1] - 0.5, -0.5)
    axis.yaxis.set_major_locator(_whole(10))
    axis.xaxis.set_major_locator(_whole(12))
    axis.set_xlabel("client", color=INK)
    axis.set_ylabel("class", color=INK)


def _bubbles(figure: Any, axis: Any, key: Any, counts: np.ndarray) -> None:
    """Areas proportional to counts, but for a smallest dot; none is larger than its cell. `key` shows what
    some areas mean."""
    figure.draw_without_rendering()
    box = axis.get_window_extent()
    cell = min(box.width / counts.shape[0], box.height / counts.shape[1]) * 72 / figure.dpi
    area = min(0.92 * cell, LARGEST_DOT) ** 2 / counts.max()
    client, label = np.nonzero(counts)
    areas = np.maximum(area * counts[client, label], SMALLEST_DOT)
    axis.scatter(client, label, s=areas, color=ACCENT, linewidths=0)
    tidy(axis, "client", "class")
    axis.grid(True, color=GRID, linewidth=0.4)
    axis.set_axisbelow(True)
    shown = _round_numbers(int(counts.max()))
    handles = [key.scatter([], [], s=area * n, color=ACCENT, linewidths=0) for n in shown]
    key.axis("off")
    legend = key.legend(
        handles, [f"{n:,}" for n in shown], title="examples", loc="center", frameon=False,
        labelspacing=1.8, handletextpad=0.8, borderpad=0, fontsize=9, title_fontsize=9,
    )  # fmt: skip
    legend.set_in_layout(False)


def _heat(figure: Any, axis: Any, key: Any, counts: np.ndarray) -> None:
    """Colours by count, white where there are none; `key` becomes the colour bar."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import StrMethodFormatter

    shades = LinearSegmentedColormap.from_list("examples", SHADES)
    seen = np.ma.masked_equal(counts.T, 0)
    image = axis.imshow(seen, aspect="auto", cmap=shades, vmin=0, vmax=counts.max(), interpolation="nearest")
    axis.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, cax=key)
    bar.set_label("examples (white: none)", color=INK)
    bar.outline.set_visible(False)
    bar.locator, bar.formatter = _whole(6), StrMethodFormatter("{x:,.0f}")
    bar.update_ticks()


def _round_numbers(largest: int) -> list[int]:
    """About a tenth and half of the largest count, in one digit, and itself; without repeats."""
    below = (float(f"{share * largest:.0e}") for share in (0.1, 0.45))
    return sorted({largest, *(max(1, round(v)) for v in below)})


def _whole(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
