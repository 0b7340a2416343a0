"""Whether two sets of victims show the same leak.

A metric has changed where the two-sided test of Mann and Whitney 1947 (exact where there are no ties) rejects
that old and new values come from one distribution, at the level alpha over the number of metrics that a check
looks at (Bonferroni), and the means differ by more than the metric's tolerance. Values of unchanged code
under another seed come from one distribution, so a check alarms with a chance of at most alpha. It alarms in
both directions: an attack that has silently become weaker would hide leaks. Where there are so few victims
that it could not alarm whatever they show, that fails too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from scipy.stats import mannwhitneyu

from fltoolkit.errors import InputError
from fltoolkit.metrics.interval import mean_interval
from fltoolkit.regression.baseline import Entry
from fltoolkit.regression.measure import METRICS

SAME, MORE, LESS, LIMIT, MISSING = "same", "leaks more", "leaks less", "above the limit", "no baseline"
FEW = "too few victims"
"""Not even values that are all larger than before would be told from them at the level."""


@dataclass(frozen=True)
class Verdict:
    """One metric of one entry. old, new: means; interval: of the new one. p: of the test. verdict: one of
    the words above; only "same" passes."""

    entry: str
    metric: str
    old: float | None
    new: float
    interval: tuple[float, float] | None
    p: float
    verdict: str

    @property
    def passes(self) -> bool:
        return self.verdict == SAME


def judge(
    name: str, entry: Entry | None, measured: Mapping[str, Sequence[float]], level: float, limit: float | None
) -> list[Verdict]:
    """The verdict on each metric of an entry. level: of one test. limit: of the mean PSNR in dB, exceeded
    where the interval of the new mean lies above it. Raises InputError where a metric is in the baseline
    only."""
    old = {} if entry is None else entry.measured
    for metric in old:
        if metric not in measured:
            raise InputError(f"{name}: {metric} is in the baseline and can no longer be measured: update it")
    verdicts = []
    for metric, values in measured.items():
        found = mean_interval(list(values))
        interval = None if found["ci95"] is None else (found["ci95"][0], found["ci95"][1])
        before = old.get(metric)
        p, verdict = (1.0, MISSING) if before is None else compare(metric, before, values, level)
        if entry is None and limit is not None:
            verdict = SAME
        if metric == "psnr_db" and limit is not None and (interval[0] if interval else found["mean"]) > limit:
            verdict = LIMIT
        mean = None if before is None else float(np.mean(before))
        verdicts.append(Verdict(name, metric, mean, found["mean"], interval, p, verdict))
    return verdicts


def compare(metric: str, old: Sequence[float], new: Sequence[float], level: float) -> tuple[float, str]:
    """p, and what it says at this level."""
    m = METRICS[metric]
    if 2 / comb(len(old) + len(new), len(new)) >= level:
        return 1.0, FEW
    values = (*old, *new)
    method = "exact" if len(set(values)) == len(values) else "asymptotic"
    constant = len(set(values)) == 1
    p = 1.0 if constant else float(mannwhitneyu(old, new, alternative="two-sided", method=method).pvalue)
    before, after = float(np.mean(old)), float(np.mean(new))
    if p >= level or m.negligible(before, after):
        return p, SAME
    return p, MORE if (after - before) * m.more > 0 else LESS


def level_of(alpha: float, entries: Mapping[str, Entry]) -> float:
    """The level of one test, such that all of a baseline's together alarm with a chance of at most alpha."""
    return alpha / max(1, sum(max(1, len(e.measured)) for e in entries.values()))
