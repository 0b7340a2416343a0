"""Rounds to a target accuracy, and the search for the learning rate that needs fewest.

As in McMahan et al. 2017, section 3: the curve of test accuracy is made monotone by taking the best value
so far, and the crossing is interpolated linearly; the learning rate is optimised on a multiplicative grid
until the best lies in its interior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

Curve = Sequence[tuple[int, float]]
"""(round, test accuracy) pairs by increasing round."""


def improvements(curve: Curve) -> list[tuple[int, float]]:
    """The points of `curve` that are better than all before them: the monotone curve's corners."""
    kept: list[tuple[int, float]] = []
    for number, accuracy in curve:
        if not kept or accuracy > kept[-1][1]:
            kept.append((number, accuracy))
    return kept


def rounds_to(curve: Curve, target: float) -> float | None:
    """Where the best-so-far curve crosses `target`, linearly interpolated between two evaluations, or
    None where it never does. Round 0 is not evaluated: a target met at the first evaluation counts there."""
    best, before = -inf, 0
    for number, accuracy in curve:
        if accuracy >= target:
            if best == -inf:
                return float(number)
            return before + (number - before) * (target - best) / (accuracy - best)
        best, before = max(best, accuracy), number
    return None


@dataclass(frozen=True)
class Run:
    """One learning rate of a cell: lr = 10^(index / resolution).

    corners: the best-so-far curve where it rises. rounds: rounds to the target, or None. ended: "target",
    "cap" (more rounds than `ran` could not have been better, or were not in the budget), "diverged" (a value
    that is not finite, or a model that fell back to chance and stayed there) or "stalled". seconds: of all
    its rounds, those before an interruption too.
    """

    index: int
    lr: float
    rounds: float | None
    ran: int
    best: float
    ended: str
    corners: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def order(self) -> tuple[float, float]:
        """Smaller is better: rounds to the target first, then the best accuracy."""
        return (inf if self.rounds is None else self.rounds, -self.best)


def search(run: Callable[[int, float], Run], start: int, most: int) -> tuple[list[Run], bool]:
    """Run `start` and its neighbours on the grid, move to the best, until it has a worse one on each side.

    run(index, cap) trains at one learning rate for at most `cap` rounds (inf: the budget alone): what has
    not reached the target by the best number so far is worse. Returns all runs by index, and whether the
    best is in the interior; it is not where `most` runs were made before that.
    """
    done: dict[int, Run] = {}
    centre = start
    while True:
        for index in (centre, centre + 1, centre - 1):
            if index not in done and len(done) < most:
                cap = min((r.rounds for r in done.values() if r.rounds is not None), default=inf)
                done[index] = run(index, cap)
        best = min(done.values(), key=lambda r: r.order).index
        interior = best - 1 in done and best + 1 in done
        if interior or len(done) >= most:
            return [done[i] for i in sorted(done)], interior
        centre = best
