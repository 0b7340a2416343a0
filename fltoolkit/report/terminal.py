"""Progress and tables on the terminal. Progress goes to stderr, so that stdout stays the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from fltoolkit.scoring import Scored

SHOWN_ROWS = 20


class Bar:
    """Progress on stderr: one line that redraws on a terminal, a line every few seconds elsewhere.

    start: how much was done before; with `ends`, the time left is estimated from the pace since then.
    """

    def __init__(self, label: str, every: float = 2.0, start: int = 0, ends: bool = False) -> None:
        self.label, self.every, self.start, self.ends = label, every, start, ends
        self.begun = self.last = time.monotonic()
        self.live = sys.stderr.isatty()
        self.pending = ""

    def __call__(self, done: int, of: int, text: str) -> None:
        now = time.monotonic()
        spent = now - self.begun
        left = ""
        if self.ends and self.start < done < of:
            left = f", {_clock(spent / (done - self.start) * (of - done))} left"
        self.pending = f"{self.label} {done}/{of}  {text}  {_clock(spent)}{left}"
        if now - self.last < (0.2 if self.live else self.every) and done != of:
            return
        self.last = now
        self._draw()

    def close(self) -> None:
        """Show where it ended."""
        if self.pending:
            self._draw()
        if self.live:
            sys.stderr.write("\n")

    def _draw(self) -> None:
        sys.stderr.write(f"\r\x1b[K{self.pending}" if self.live else f"{self.pending}\n")
        sys.stderr.flush()
        self.pending = ""


def _clock(seconds: float) -> str:
    """Seconds for people: 41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the rest to the right."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def audit_table(victims: Sequence[Scored]) -> str:
    """One row an image: labels, PSNR, gain, SSIM, MSE; its victim's iterations and seconds."""
    header = (
        "victim",
        "true label",
        "recovered",
        "PSNR dB",
        "gain dB",
        "SSIM",
        "MSE",
        "iterations",
        "seconds",
    )
    rows = []
    for v, s in enumerate(victims):
        for i in range(len(s.truth)):
            numbers = (f"{s.psnr[i]:.2f}", f"{s.gain[i]:+.2f}", f"{s.ssim[i]:.4f}", f"{s.mse[i]:.2e}")
            cost = (str(s.found.iterations), f"{s.found.seconds:.1f}") if i == 0 else ("", "")
            name = f"{v}" if len(s.truth) == 1 else f"{v}.{i}"
            rows.append((name, str(int(s.truth.y[i])), str(int(s.y[i])), *numbers, *cost))
    shown = table(header, rows[:SHOWN_ROWS])
    more = len(rows) - SHOWN_ROWS
    return shown if more <= 0 else f"{shown}\n... and {more} more images in report.json"


def interval(ci: Sequence[float] | None, digits: int = 2) -> str:
    """` [low, high]`, or nothing where there is none."""
    return "" if ci is None else f" [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"
