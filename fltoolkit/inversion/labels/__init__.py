"""Which labels a batch has, read off the observed update before any search.

A strategy takes an observation and returns the labels `[num_examples]`, int64 in increasing order: a
multiset, since a gradient does not tell in which order a batch was. All rest on one fact. With softmax p
and one-hot y, the gradient of cross-entropy by the logits of example n is p_n − y_n, so the last layer's
bias gradient times N is Σ_n p_n minus the number of examples of each class. Strategies differ in how they
come by Σ_n p_n.

An update of several local steps is read as one gradient, the mean over steps (`Observation.gradient`). That
mean is taken along a path, and the strategies that need p or embeddings take them along the same path.
Where the scale of the update is unknown, see `layer.scale_is_known`: "sign", "gradinversion" and "llg" do not
need it, the others estimate it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fltoolkit.errors import unknown
from fltoolkit.inversion.labels import counts, ilrg, llg, sign
from fltoolkit.inversion.labels.layer import logit_gradient
from fltoolkit.types import Observation

__all__ = ["DEFAULT", "STRATEGIES", "Strategy", "hypotheses", "infer", "logit_gradient"]

Strategy = Callable[[Observation], Tensor]

STRATEGIES: dict[str, Strategy] = {
    "sign": sign.sign,
    "gradinversion": sign.gradinversion,
    "llg": llg.llg,
    "llg+": llg.llg_plus,
    "ilrg": ilrg.ilrg,
    "counts": counts.counts,
}
DEFAULT = "counts"
"""The one that recovered most labels in benchmarks/labels.py."""


def infer(name: str, observation: Observation) -> Tensor:
    """The labels `[num_examples]` by the strategy called `name`; "auto" stands for DEFAULT."""
    chosen = DEFAULT if name == "auto" else name
    if chosen not in STRATEGIES:
        unknown("label strategy", name, [*STRATEGIES, "auto"])
    return STRATEGIES[chosen](observation)


def hypotheses(name: str, observation: Observation, most: int) -> Tensor:
    """The labels of `infer` and, where the strategy knows what else they may be, others, the most plausible
    first, `[m, num_examples]` with m at most `most`."""
    if name in ("auto", "counts"):
        return counts.plausible(observation, most)
    return infer(name, observation)[None]
