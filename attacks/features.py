"""Feature inversion.

Search the inputs whose features, what enters the last layer, are those that the update tells of each class in
the batch: the last layer's gradient is unmixed by the labels (`fltoolkit/inversion/unmixing.py`). The idea of
inverting features that a gradient gives away is that of Kariyappa et al. 2022, arXiv:2209.05578, there found
by independent component analysis; the rest is no paper's. Features are far fewer numbers than a gradient,
which leaves more to what is believed of images: the search starts near gray and moves as natural images vary,
by L-BFGS in their spectrum, with little colour, little total variation, inside the range. Several searches
from different starts agree on what the features decide; on the rest their mean is the better guess, and the
last search starts from it.

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
from fltoolkit.inversion.prior import Outside, Prior, colour_variation
from fltoolkit.inversion.spectrum import Spectrum
from fltoolkit.inversion.unmixing import FeatureSearch, unmixing
from fltoolkit.types import Observation, Reconstruction


@dataclass(frozen=True)
class Features(Attack):
    """Match the features of each class under a prior of natural images.

    steps: evaluations in all, an evaluation being a pass of the whole batch through the model and back: of
    the objective, line searches included, and of local training played again. turns: into how many parts the
    search falls, with local training played again before each. members: searches in each turn but the last.
    disturb: standard deviation of the natural noise on their starts, as a part of the input range. orders:
    of labels that are tried where a client took several steps, all of them where there are no more. history:
    L-BFGS pairs. spectrum, chroma: as in `Spectrum`. tv: weight of total variation in `colour_variation`.
    outside: of the mean squared distance from the input range. labels: how labels are inferred where they are
    unknown. adapt: take the defenses into account.
    """

    name: ClassVar[str] = "features"
    steps: int = 600
    turns: int = 2
    members: int = 4
    disturb: float = 0.1
    orders: int = 24
    history: int = 50
    spectrum: float = 1.7
    chroma: float = 0.3
    tv: float = 1.0
    outside: float = 1000.0
    labels: str = "auto"
    adapt: bool = True

    def __post_init__(self) -> None:
        for option in ("steps", "turns", "members", "orders", "history"):
            require(getattr(self, option) >= 1, option, ">= 1", getattr(self, option))
        require(self.disturb >= 0, "disturb", ">= 0", self.disturb)
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
            starts = x[None] if turn == self.turns - 1 else self._disturbed(x, o.input_range, rng)
            x, losses, used = self._descend(goal, starts, most * (turn + 1) // self.turns - spent)
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
        return [(self.tv / wide, colour_variation), (self.outside / wide**2, Outside(low, high))]

    def _disturbed(self, x: Tensor, within: tuple[float, float], rng: torch.Generator) -> Tensor:
        """`members` copies of x `[S, *shape]` with noise that varies as images do, `[members, S, *shape]`."""
        shape, n = tuple(x.shape[1:]), x[0].numel()
        white = torch.randn(self.members * len(x), n, generator=rng).to(x)
        noise = Spectrum(shape, n, self.spectrum / 2, self.chroma)(white)
        noise *= self.disturb * (within[1] - within[0]) / noise.std()
        return x + noise.view(self.members, *x.shape)

    def _descend(self, goal: FeatureSearch, starts: Tensor, most: int) -> tuple[Tensor, list[Tensor], int]:
        """The mean of the inputs `[S, *shape]` to which all starts `[members, S, *shape]` lead by at most so
        many evaluations (one iteration at least), the mean objective after each iteration, and the
        evaluations made, in batches of S."""
        z, inputs = starts.flatten(0, 1).flatten(1), starts.shape[1]
        metric = Spectrum(tuple(starts.shape[2:]), z.shape[1], self.spectrum, self.chroma)
        search, losses = LBFGS(goal, z, self.history, metric), list[Tensor]()
        while not losses or search.evaluations < most * inputs:
            search.step()
            losses.append(search.loss.mean().cpu())
            if search.stalled.all():
                break
        return search.z.view_as(starts).mean(0), losses, -(-search.evaluations // inputs)


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
        """How often so many calls of `unexplained` play local training."""
        return len(self._orders) + times - 1

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
        self.played += 1
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
