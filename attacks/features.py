"""Feature inversion.

Search the inputs whose features, what enters the last layer, are those that the update tells of each class in
the batch: the last layer's gradient is unmixed by the labels (`fltoolkit/inversion/unmixing.py`). The idea of
inverting features that a gradient gives away is that of Kariyappa et al. 2022, arXiv:2209.05578, there found
by independent component analysis; the rest is no paper's. Features are far fewer numbers than a gradient,
which leaves more to what is believed of images: the search starts at gray and moves as natural images vary,
by L-BFGS in their spectrum, with little colour, little total variation, inside the range.

Deep networks of ReLUs make the match of whole gradients rough, that of features smooth and three times
cheaper. Local training is played again on what was found, in the order of labels that explains the update
best, and what it leaves unexplained corrects the features. Examples of one label are seen as their mean only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import permutations
from math import factorial
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.attack import Attack
from fltoolkit.errors import require
from fltoolkit.inversion.adaptation import keeps_length
from fltoolkit.inversion.checks import check_observation, check_searchable
from fltoolkit.inversion.client import local_steps, one_step
from fltoolkit.inversion.diagnosis import diagnose
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.labels.layer import layer_names
from fltoolkit.inversion.lbfgs import LBFGS
from fltoolkit.inversion.prior import Outside, Prior, total_variation
from fltoolkit.inversion.spectrum import Spectrum
from fltoolkit.inversion.unmixing import FeatureSearch, unmixing
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class Features(Attack):
    """Match the features of each class under a prior of natural images.

    steps: evaluations in all: of the objective, line searches included, and of local steps played again.
    turns: into how many parts the search falls, with local training played again before each. orders: of
    labels that are tried where a client took several steps, all of them where there are no more. history:
    L-BFGS pairs. spectrum, chroma: as in `Spectrum`. tv: weight of total variation.
    outside: of the mean squared distance from the input range. labels: how labels are inferred where they are
    unknown. adapt: take the defenses into account.
    """

    name: ClassVar[str] = "features"
    steps: int = 600
    turns: int = 3
    orders: int = 24
    history: int = 50
    spectrum: float = 1.5
    chroma: float = 0.3
    tv: float = 1.0
    outside: float = 1000.0
    labels: str = "auto"
    adapt: bool = True

    def __post_init__(self) -> None:
        for option in ("steps", "turns", "orders", "history"):
            require(getattr(self, option) >= 1, option, ">= 1", getattr(self, option))
        require(0 <= self.spectrum <= 2, "spectrum", "in 0..2", self.spectrum)
        require(0 < self.chroma <= 1, "chroma", "in (0, 1]", self.chroma)
        require(self.tv >= 0, "tv", ">= 0", self.tv)
        require(self.outside >= 0, "outside", ">= 0", self.outside)

    def __call__(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        o, begun = observation, time.perf_counter()
        check_observation(o)
        check_searchable(o)
        y = o.labels if o.labels is not None else infer(self.labels, o)
        replay = _Replay(o, y, self.orders, rng)
        blind = self.adapt and not keeps_length(o)
        gray = o.params.new_full((len(replay.seen), *o.input_shape), sum(o.input_range) / 2)
        goal = FeatureSearch(o, gray, self._priors(o))
        x, trace, spent = gray, list[Tensor](), 0
        most = max(self.turns, self.steps - replay.planned(self.turns + 1))
        for turn in range(self.turns):
            goal.wanted = goal.features(x).detach() + replay.unexplained(x, blind)[0]
            x, losses, used = self._descend(goal, x, most * (turn + 1) // self.turns - spent)
            trace, spent = trace + losses, spent + used
        left = replay.unexplained(x, blind)[1]
        return Reconstruction(
            x=x[replay.member],
            y=y,
            loss=float(left),
            trace=torch.stack(trace[:1] + trace),
            restart_losses=left[None],
            iterations=len(trace),
            evaluations=spent + replay.played,
            seconds=time.perf_counter() - begun,
            note="stopped at the last allowed evaluation" if spent >= most else "no descent left",
            adaptation="features known up to scale, for the defenses" if blind else "",
            diagnosis=diagnose(o, float(left), 1.0),
        )

    def _priors(self, o: Observation) -> list[tuple[float, Prior]]:
        low, high = o.input_range
        wide = high - low
        return [(self.tv / wide, total_variation), (self.outside / wide**2, Outside(low, high))]

    def _descend(self, goal: FeatureSearch, x: Tensor, most: int) -> tuple[Tensor, list[Tensor], int]:
        """The inputs `[S, *shape]` after at most so many evaluations (one iteration at least), the mean
        objective after each iteration, and the evaluations made."""
        z = x.flatten(1)
        metric = Spectrum(tuple(x.shape[1:]), z.shape[1], self.spectrum, self.chroma)
        search, losses = LBFGS(goal, z, self.history, metric), list[Tensor]()
        while not losses or search.evaluations < most * len(z):
            search.step()
            losses.append(search.loss.mean().cpu())
            if search.stalled.all():
                break
        return search.z.view_as(x), losses, -(-search.evaluations // len(z))


class _Replay:
    """What was seen of the features, and how well local training on guesses explains it.

    seen `[m, features]`: the mean features of each class in the labels y `[N]`; member `[N]`: the class of
    each example among those m.
    """

    def __init__(self, o: Observation, y: Tensor, orders: int, rng: torch.Generator) -> None:
        self.observation, self.y, self.played = o, y, 0
        self.member = y.unique(return_inverse=True)[1]
        self._weight, _ = layer_names(o)
        self._unmixing = unmixing(o, y)
        self.seen = self._unmixing @ o.layout.unflatten(o.gradient)[self._weight]
        self._steps = o.local_steps
        self._update = one_step(o.model, o.loss)
        if o.local is not None and self._steps > 1:
            self._update = local_steps(self._update, o.local, o.clients)
        self._orders = _orders(len(y), orders, rng) if self._steps > 1 else [torch.arange(len(y))]

    def planned(self, times: int) -> int:
        """Local steps that so many calls of `unexplained` play."""
        return self._steps * (len(self._orders) + times - 1)

    def unexplained(self, x: Tensor, blind: bool) -> tuple[Tensor, Tensor]:
        """The features `[m, features]` that the update has beyond that of the inputs x `[m, *shape]`, one a
        class, in the best order of the labels; and their squared size relative to all that was seen.

        blind: the update is known up to a factor, which is taken from x too."""
        found = []
        for order in self._orders:
            sent, seen = self._sent(x[self.member[order]], self.y[order]), self.seen
            if blind:
                seen = seen * (sent.square().sum() / (seen * sent).sum().clamp_min(1e-30))
            found.append(seen - sent)
        sizes = torch.stack([f.square().sum() for f in found])
        best = int(sizes.nan_to_num(torch.inf).argmin())
        self._orders = [self._orders[best]]
        return found[best], sizes[best] / self.seen.square().sum()

    def _sent(self, x: Tensor, y: Tensor) -> Tensor:
        """The features as they would be seen of a client with the data x, y in this order."""
        o = self.observation
        buffers = {n: b.clone() for n, b in o.model.named_buffers()}
        self.played += self._steps
        with torch.no_grad():
            update = self._update(o.layout.unflatten(o.params), buffers, x, y)
        return self._unmixing @ update[self._weight]


def _orders(count: int, most: int, rng: torch.Generator) -> list[Tensor]:
    """Orders `[count]`: all where there are no more than `most`, else random ones."""
    if count <= 12 and factorial(count) <= most:
        return [torch.tensor(p) for p in permutations(range(count))]
    return [torch.randperm(count, generator=rng) for _ in range(most)]


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("features")
