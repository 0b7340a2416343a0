"""Gradient inversion with a generative prior: GIAS and GIFD.

Jeon, Kim, Lee, Oh, Ok 2021, arXiv:2110.14962 (GIAS): with a generator G_w of such images, search the codes z
first, z* = argmin_z d(∇_θ L(G_w(z), y), g) + R(G_w(z)), then the parameters w of a generator of each image's
own with z* held, both by Adam under the cosine distance and total variation.

Fang, Chen, Wang, Wang, Xia 2023, arXiv:2308.04699 (GIFD): after z, search the features between the stages of
G from shallow to deep, each within an l1 ball around where the search before it ended, and keep the result
with the least matching loss.

Their generators are large networks trained elsewhere; here it is a small conditional variational autoencoder
(`fltoolkit/inversion/generator.py`) trained on the auxiliary data, once for all observations that share them.
Their code: rate 0.03 and 500 to 1,000 steps for z, 0.001 and thousands for w (GIAS), 0.1 and 1,000 steps a
layer with radii 2,000 + 500 (k − 1) (GIFD). Here radii are in units of how far public features lie from their
mean, and G takes the label too. Beyond the papers: under noise of known size the distance is a negative
log-likelihood (`fltoolkit/inversion/adaptation.py`), and what the autoencoder believes, N(0, I) of codes and
a Gaussian around G(z*) of images, joins it at its true weight in place of total variation, so that later
searches do not fit the noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.attack import Attack, Progress, grouped, silent
from fltoolkit.errors import require
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.checks import check_auxiliary, check_observation, check_searchable
from fltoolkit.inversion.diagnosis import diagnose
from fltoolkit.inversion.distance import Distance, Masked, Times, cosine
from fltoolkit.inversion.generative import SPACES, Prior, Search, Searched, Setting
from fltoolkit.inversion.generator import Training
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.labels_by_generator import refine
from fltoolkit.inversion.matching import Objective, one_by_one_is_faster
from fltoolkit.inversion.prior import Prior as Images
from fltoolkit.inversion.prior import total_variation
from fltoolkit.types import Observation, Reconstruction

LEAST_SIDE = 4
"""Images smaller than this have no features to search."""


@dataclass(frozen=True)
class Generative(Attack):
    """Search what a generator trained on public images makes, from its codes to its features and parameters.

    space: "latent", "parameters" (GIAS), "features" (GIFD), or "auto", which tries all and keeps the best
    match. steps: iterations of each search. restarts: random codes a victim starts from. lr, lr_parameters:
    Adam's rates for codes and parameters; for features lr is in units of their spread. radius: of the l1
    balls, in units of how far public features lie from their mean. tv, normal: weights of total variation and
    of ½ ‖z‖², where no noise sets them. training, latent, width: steps, code length and channels of the
    generator. labels: how labels are inferred where they are unknown; under noise, "auto" goes on to those
    whose likeliest images match best. adapt, simulate as in `inverting`.
    """

    name: ClassVar[str] = "generative"
    space: str = "auto"
    steps: int = 300
    restarts: int = 4
    lr: float = 0.1
    lr_parameters: float = 1e-3
    radius: float = 0.5
    tv: float = 1e-4
    normal: float = 1e-5
    training: int = 600
    latent: int = 32
    width: int = 16
    labels: str = "auto"
    adapt: bool = True
    simulate: bool = True

    def __post_init__(self) -> None:
        require(self.space in SPACES, "space", f"one of {tuple(SPACES)}", self.space)
        for option in ("steps", "restarts", "training", "latent", "width"):
            require(getattr(self, option) >= 1, option, ">= 1", getattr(self, option))
        for option in ("lr", "lr_parameters", "radius"):
            value = getattr(self, option)
            require(isfinite(value) and value > 0, option, "a finite number > 0", value)
        for option in ("tv", "normal"):
            require(getattr(self, option) >= 0, option, ">= 0", getattr(self, option))

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        for o in observations:
            check(o)
        check_searchable(observations[0])
        found: dict[int, Reconstruction] = {}
        for group in grouped(observations, same_public):
            members = [observations[i] for i in group]
            results = self._invert(members, [rngs[i] for i in group], progress)
            found |= zip(group, results, strict=True)
        return [found[i] for i in range(len(observations))]

    def objective(self, observation: Observation) -> tuple[Objective, str]:
        """What to minimise over images, and in words how it was adapted to the defenses."""
        fitted = adapt(observation, cosine, self.tv, self.adapt)
        words = fitted.words
        priors: tuple[tuple[float, Images], ...] = ((fitted.tv, total_variation),)
        if is_likelihood(fitted.distance):
            priors, words = (), (*words, "the generator's own prior in place of total variation")
        one_by_one = one_by_one_is_faster(observation)
        return Objective(fitted.distance, priors, self.simulate, one_by_one, rough=True), "; ".join(words)

    def _invert(
        self, members: list[Observation], rngs: list[torch.Generator], progress: Progress
    ) -> list[Reconstruction]:
        """Train one generator and search with it for every member."""
        begun, o = time.perf_counter(), members[0]
        assert o.auxiliary is not None
        how = Training(self.training, self.latent, self.width)
        seed = int(torch.randint(2**62, (), generator=rngs[0]))
        prior = Prior.learn(o.auxiliary.to(o.params.device), o, how, seed, progress)
        objective, setting = self._how(o)
        found: list[Reconstruction] = []
        size = prior.victims_at_once(o, self.restarts)
        for i in range(0, len(members), size):
            part = slice(i, i + size)
            labels, spent = self._labels(members[part], objective, prior)
            search = Search(members[part], labels, objective, setting, prior, progress)
            for s, m, y in zip(search(rngs[part], self.space), members[part], labels, strict=True):
                found.append(self._explained(s, m, y, spent))
        seconds = (time.perf_counter() - begun) / len(members)
        return [replace(f, seconds=seconds) for f in found]

    def _labels(self, members: list[Observation], objective: Objective, prior: Prior) -> tuple[Tensor, int]:
        """Labels `[V, N]`, known or inferred and, under noise, refined by the generator; and evaluations."""
        unknown = torch.tensor([m.labels is None for m in members])
        labels = torch.stack([infer(self.labels, m) if m.labels is None else m.labels for m in members])
        if self.labels == "auto" and is_likelihood(objective.distance) and unknown.any():
            fitted, spent = refine(members, labels, objective, prior.generator)
            return torch.where(unknown.to(labels.device)[:, None], fitted, labels), spent
        return labels, 0

    def _how(self, observation: Observation) -> tuple[Objective, Setting]:
        objective, _ = self.objective(observation)
        known = is_likelihood(objective.distance)
        setting = Setting(
            steps=self.steps,
            restarts=self.restarts,
            lr=self.lr,
            lr_parameters=self.lr_parameters,
            radius=self.radius,
            normal=1.0 if known else self.normal,
            near=1.0 if known else 0.0,
        )
        return objective, setting

    def _explained(self, searched: Searched, o: Observation, y: Tensor, spent: int) -> Reconstruction:
        objective, adaptation = self.objective(o)
        scale = float(objective.distance(torch.zeros_like(o.update)[None], o.gradient[None]))
        assert o.auxiliary is not None
        return Reconstruction(
            x=searched.x,
            y=y,
            loss=searched.loss,
            trace=searched.trace,
            restart_losses=searched.restart_losses,
            iterations=len(searched.trace) - 1,
            evaluations=searched.evaluations + spent,
            note=f"best match in space {searched.space}, of a generator trained for {self.training} steps on "
            f"{len(o.auxiliary)} auxiliary examples",
            adaptation=adaptation,
            diagnosis=diagnose(o, searched.loss, scale),
        )


def is_likelihood(distance: Distance) -> bool:
    """Whether a distance is a negative log-likelihood, on whose scale priors have weight 1."""
    return isinstance(distance.inner if isinstance(distance, Masked) else distance, Times)


def same_public(a: Observation, b: Observation) -> bool:
    """Whether one generator can serve both."""
    assert a.auxiliary is not None
    assert b.auxiliary is not None
    if (a.input_range, a.num_classes) != (b.input_range, b.num_classes):
        return False
    pairs = ((a.auxiliary.x, b.auxiliary.x), (a.auxiliary.y, b.auxiliary.y))
    return all(p is q or torch.equal(p, q) for p, q in pairs)


def check(observation: Observation) -> None:
    """Refuse, before any work, what this attack cannot do."""
    o, shape = observation, tuple(observation.input_shape)
    check_observation(o)
    fits = len(shape) == 3 and min(shape[1:]) >= LEAST_SIDE
    require(fits, "inputs", f"images [C, H, W] of at least {LEAST_SIDE}x{LEAST_SIDE}", shape)
    check_auxiliary(o, "generative", "train a generator on")


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("generative")
