"""The local recipe of a client that does not say it: E, B and η from one update.

Each plausible pair (E, B) is tried: a short search for inputs and for the length η u of the path at once,
whose local training, run through, ends in the observed update. The first that matches exactly wins, else the
best match, and of those that match about as well the one of fewest steps.

What one update tells, with u the number of local steps of a client:

- η u, from the length of the update: the last layer's residuals p − y have a known size.
- Whether u is 1: the gradient of one step has no bend. From there on the bend of a path of fixed length η u
  grows as (u − 1) / u, so that 2 steps differ from 1 more than 10 from 5, and many small steps are all alike.
- For small η u nothing but η u: the misfit of a wrong u falls as (η u)², and a single step of size η u
  matches exactly too.
- B, where the order of batches that the client drew is among the few that are tried. Where it is not, as with
  many examples, a recipe whose path has about the same bend comes out instead, often one without batches.

It rests on the label counts being right and on a smooth model. Momentum and weight decay are taken to be 0; a
defense that changes the length of the update changes η with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.func import vmap

from fltoolkit.attack import Progress, grouped
from fltoolkit.errors import require
from fltoolkit.inversion.checks import check_observation, check_searchable, stackable
from fltoolkit.inversion.client import State, Update, descent, eager_step, one_step
from fltoolkit.inversion.distance import relative
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.lbfgs import LBFGS
from fltoolkit.inversion.matching import GradientMatching, Objective, one_by_one_is_faster
from fltoolkit.types import LocalSpec, Observation, Reconstruction

EPOCHS = (1, 2, 5, 10)
BATCHES = (None, 1, 2, 4, 8, 10, 16, 32, 64)
MOST_STEPS = 20
"""Recipes of more steps are not tried: they are like one of fewer."""
EXACT = 1e-6
"""Relative squared distance up to which a match is exact, in single precision."""
AS_GOOD = 3.0
"""A match up to this many times the best is as good as it."""
FINALISTS = 3
UNBENT = -8.0
"""log η u of a path so short that it is straight."""


@dataclass(frozen=True)
class Candidate:
    """A recipe and the least ‖Δ(x) − Δ‖² / ‖Δ‖² that inputs x were found for."""

    local: LocalSpec
    loss: float


class RecipeMatching(GradientMatching):
    """‖Δ(x, η) − Δ‖² / ‖Δ‖² for guesses that hold N inputs and, as last variable, log η u.

    orders `[S, E N]`: in which order each row meets its inputs, epoch by epoch. η of `local` is not read.
    """

    def __init__(self, observation: Observation, labels: Tensor, orders: Tensor, local: LocalSpec) -> None:
        self.local, self.orders = local, orders
        owner = torch.zeros(len(orders), dtype=torch.long, device=orders.device)
        one_by_one = one_by_one_is_faster(observation) or not stackable(observation)
        objective = Objective(relative, one_by_one=one_by_one)
        super().__init__([replace(observation, local=None)], owner, labels[orders], objective)

    @property
    def variables(self) -> int:
        return super().variables + 1

    def decode(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = super().decode(z[:, :-1], rows)
        lines = torch.arange(len(z), device=z.device)[:, None]
        return x[lines, self.orders[rows]], y

    def start(self, bounds: tuple[float, float], rng: torch.Generator) -> Tensor:
        """Guesses `[S, n]`: normal inputs, and η u such that the update of a straight path has the right
        length."""
        low, high = bounds
        z = torch.randn(len(self.orders), self.variables, generator=rng).to(self.orders.device)
        z = 0.5 * (low + high) + 0.25 * (high - low) * z
        z[:, -1] = UNBENT
        for row in range(len(z)):
            at = torch.tensor([row], device=z.device)
            x, y = self.decode(z[at], at)
            params = self.params.clone()
            found = self._updates(z[at], params, torch.zeros_like(at), x, y)
            length = self.layout.flatten({n: f.detach() for n, f in found.items()}).norm()
            z[row, -1] = UNBENT + (self._target.norm() / length).clamp(1e-6, 1e6).log()
        return z

    def _client(self, o: Observation) -> Update:
        self.steps = self.local.steps(o.per_client)
        alone = self.objective.one_by_one
        gradient = (eager_step if alone else one_step)(o.model, o.loss)
        run = descent(gradient, self.local, o.clients, self.local.epochs)
        return cast(Update, run if alone else vmap(run))

    def _updates(self, z: Tensor, params: Tensor, owner: Tensor, x: Tensor, y: Tensor) -> State:
        return self._run(params, owner, x, y, z[:, -1].exp() / self.steps)


class Trial:
    """The search for one pair (E, B), in `restarts` orders, or from 2 starts where there are no batches."""

    def __init__(
        self, o: Observation, labels: Tensor, local: LocalSpec, restarts: int, rng: torch.Generator
    ) -> None:
        self.local = local
        orders = shuffles(o, local, restarts if local.batch else 2, rng).to(o.params.device)
        self.problem = RecipeMatching(o, labels, orders, local)
        self.lbfgs = LBFGS(self.problem, self.problem.start(o.input_range, rng), 30)

    @property
    def exact(self) -> bool:
        return float(self.lbfgs.loss.min()) <= EXACT

    def run(self, steps: int, keep: int) -> None:
        """At most `steps` iterations, after which the best `keep` rows stay."""
        for _ in range(steps):
            if self.exact or bool(self.lbfgs.stalled.all()):
                break
            self.lbfgs.step()
        self.lbfgs.keep(self.lbfgs.loss.argsort()[:keep])

    def result(self) -> Candidate:
        length = float(self.lbfgs.z[0, -1].exp())
        return Candidate(replace(self.local, lr=length / self.problem.steps), float(self.lbfgs.loss[0]))


def plausible(observation: Observation) -> list[LocalSpec]:
    """The pairs (E, B) to try, by number of steps; their η says nothing."""
    count = observation.per_client
    found = [LocalSpec(e, b) for b in BATCHES for e in EPOCHS if b is None or b < count]
    return sorted((c for c in found if c.steps(count) <= MOST_STEPS), key=lambda c: c.steps(count))


def shuffles(observation: Observation, local: LocalSpec, restarts: int, rng: torch.Generator) -> Tensor:
    """Orders `[restarts, E N]` in which clients may meet their examples, different as far as they can be; the
    order within a batch counts for nothing."""
    count = observation.per_client
    found = dict[tuple[int, ...], Tensor]()
    for _ in range(20 * restarts):
        order = torch.cat([_epoch(observation.clients, count, local, rng) for _ in range(local.epochs)])
        found.setdefault(tuple(order.tolist()), order)
        if len(found) == restarts:
            break
    rows = torch.stack(list(found.values()))
    return rows[torch.arange(restarts if local.batch is None else len(rows)) % len(rows)]


def _epoch(clients: int, count: int, local: LocalSpec, rng: torch.Generator) -> Tensor:
    parts = [torch.randperm(count, generator=rng).split(local.batch or count) for _ in range(clients)]
    return torch.cat([b.sort().values + c * count for c, batches in enumerate(parts) for b in batches])


def candidates(
    observation: Observation, rng: torch.Generator, restarts: int = 36, steps: int = 60
) -> list[Candidate]:
    """What was tried, the best first; it ends at an exact match.

    restarts: orders of batches tried for a pair (E, B). steps: iterations for all of them, then for the best
    eighth; the best pairs get five times as many on top.
    """
    require(restarts >= 1, "restarts", ">= 1", restarts)
    require(steps >= 1, "steps", ">= 1", steps)
    check_observation(observation)
    check_searchable(observation)
    labels = observation.labels if observation.labels is not None else infer("auto", observation)
    every = plausible(observation)
    trials: list[Trial] = []
    for family in ([c for c in every if c.batch is None], [c for c in every if c.batch is not None]):
        for local in family:
            trials.append(Trial(observation, labels, local, restarts, rng))
            trials[-1].run(steps, max(2, restarts // 8))
            trials[-1].run(steps, 2)
            if trials[-1].exact:
                return [trials[-1].result()]
        trials.sort(key=lambda t: t.result().loss)
        for trial in trials[:FINALISTS]:
            trial.run(5 * steps, 1)
            if trial.exact:
                return [trial.result()]
    return sorted((t.result() for t in trials), key=lambda c: c.loss)


def estimate(
    observation: Observation, rng: torch.Generator, restarts: int = 36, steps: int = 60
) -> LocalSpec:
    """E, B and η as far as the update tells; see the module for how far that is. Options as `candidates`."""
    tried = candidates(observation, rng, restarts, steps)
    count = observation.per_client
    good = [c.local for c in tried if c.loss <= AS_GOOD * tried[0].loss]
    return min(good, key=lambda local: local.steps(count))


Run = Callable[[Sequence[Observation], Sequence[torch.Generator], Progress], list[Reconstruction]]


def with_recipes(
    run: Run, observations: Sequence[Observation], rngs: Sequence[torch.Generator], progress: Progress
) -> list[Reconstruction]:
    """Run an attack once unknown recipes are estimated, on the observations of one recipe together."""
    pairs = zip(observations, rngs, strict=True)
    known = [o if o.local is not None else replace(o, local=estimate(o, rng)) for o, rng in pairs]
    found: dict[int, Reconstruction] = {}
    for at in grouped(known, lambda a, b: a.local == b.local):
        found |= zip(at, run([known[i] for i in at], [rngs[i] for i in at], progress), strict=True)
    for i, o in enumerate(observations):
        local = known[i].local
        if o.local is None and local is not None:
            words = f"local training estimated: E={local.epochs}, B={local.batch or 'inf'}, η={local.lr:.3g}"
            adaptation = "; ".join(w for w in (words, found[i].adaptation) if w)
            found[i] = replace(found[i], adaptation=adaptation)
    return [found[i] for i in range(len(observations))]
