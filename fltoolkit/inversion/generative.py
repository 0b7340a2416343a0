"""The sequence of searches through a generator: codes, then features stage by stage, then parameters.

Jeon et al. 2021, arXiv:2110.14962 (codes, then parameters) and Fang et al. 2023, arXiv:2308.04699 (codes,
then features from shallow to deep), for all victims × restarts as one stack. Every search starts at the end
of an earlier one and keeps its best, so none ends worse than it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fltoolkit.attack import Progress
from fltoolkit.inversion.adam import Adam, Schedule
from fltoolkit.inversion.generator import Autoencoder, Generator, Training, train
from fltoolkit.inversion.latent import (
    BallAdam,
    Codes,
    Descent,
    Near,
    Normal,
    Parameters,
    Space,
    Through,
    descend,
)
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.inversion.search import GROUP_FLOATS
from fltoolkit.types import Examples, Observation

SPACES: dict[str, tuple[str, ...]] = {
    "latent": (),
    "parameters": ("parameters",),
    "features": ("features",),
    "auto": ("features", "parameters"),
}
"""Which searches follow that of the codes."""

MEASURED = 512
"""Public images of which the features' spread is measured."""


@dataclass(frozen=True)
class Prior:
    """generator: trained on public images; variance: of a pixel around what it makes; spread: mean absolute
    deviation of public features from their mean, stage by stage."""

    generator: Generator
    variance: float
    spread: tuple[float, ...]

    @classmethod
    def learn(cls, public: Examples, o: Observation, how: Training, seed: int, progress: Progress) -> Prior:
        """Train a generator of images like those of `public`."""
        low, high = o.input_range

        def report(step: int, error: float) -> None:
            progress(step, how.steps, f"generator's squared error {error:.3g}")

        net, trace = train(public, o.num_classes, (low, high), how, seed, report)
        error = float(trace[-max(1, how.steps // 10) :].mean())
        return cls(net.generator, error * (high - low) ** 2, _spread(net, public))

    def victims_at_once(self, o: Observation, restarts: int) -> int:
        """Victims share a stack as long as what the optimisers keep holds at most GROUP_FLOATS numbers."""
        parameters = sum(p.numel() for p in self.generator.parameters())
        each = 8 * o.num_examples * parameters + 2 * (1 + restarts) * o.layout.size
        return max(1, int(GROUP_FLOATS / each))


def _spread(net: Autoencoder, public: Examples) -> tuple[float, ...]:
    y = public.y[:MEASURED]
    found = []
    with torch.no_grad():
        h = net.generator.features(net.encode(public.x[:MEASURED], y)[0], y)
        for stage in range(1, len(net.generator.names)):
            found.append(max(float((h - h.mean(0)).abs().mean()), 1e-12))
            h = net.generator.through(h, stage)
    return tuple(found)


@dataclass(frozen=True)
class Setting:
    """The options of the searches, see `attacks/generative.py`. normal: weight of ½ ‖z‖²; near: weight of
    the Gaussian around G(z*)."""

    steps: int
    restarts: int
    lr: float
    lr_parameters: float
    radius: float
    normal: float
    near: float


@dataclass(frozen=True)
class Searched:
    """One victim's images x `[N, C, H, W]`, the space that won, the objective there and over time
    `[iterations + 1]`, where each restart's codes ended `[R]`, and gradients taken."""

    x: Tensor
    space: str
    loss: float
    trace: Tensor
    restart_losses: Tensor
    evaluations: int


class Search:
    """The searches for a stack of victims with labels `[V, N]`."""

    def __init__(
        self,
        observations: Sequence[Observation],
        labels: Tensor,
        objective: Objective,
        setting: Setting,
        prior: Prior,
        progress: Progress,
    ) -> None:
        self.prior, self.setting, self.progress = prior, setting, progress
        self.victims, self.batch = labels.shape
        self.shape = (self.batch, *observations[0].input_shape)
        self.labels, self.generator = labels, prior.generator
        self.rows = torch.arange(self.victims, device=labels.device)
        owner = self.rows.repeat_interleave(setting.restarts)
        self.stacked = labels.repeat_interleave(setting.restarts, 0)
        self.problem = GradientMatching(observations, owner, self.stacked, objective)
        self.winner, self.trace, self.evaluations = owner, torch.empty(0), 0

    def __call__(self, rngs: Sequence[torch.Generator], space: str) -> list[Searched]:
        """Search the codes, from N(0, I) out of each victim's generator, and what `space` names after."""
        restarts, z = self._codes(rngs)
        x, loss = self._images(Codes(self.generator, self.labels), z), restarts.min(1).values
        names = ["latent"] * self.victims
        offset = 0.5 * self.setting.normal * z.square().sum(1)
        near = Near(x, self.prior.variance, self.setting.near, offset)
        for kind in SPACES[space]:
            after = self._features if kind == "features" else self._parameters
            for name, found, ended in after(z, near):
                better = ended < loss
                x, loss = torch.where(better[:, None], found, x), torch.where(better, ended, loss)
                names = [name if b else n for n, b in zip(names, better.tolist(), strict=True)]
        restarts[self.rows, restarts.argmin(1)] = loss
        return [
            Searched(
                x=x[v].reshape(self.shape),
                space=names[v],
                loss=float(loss[v]),
                trace=self.trace[:, v].cpu(),
                restart_losses=restarts[v].cpu(),
                evaluations=self.evaluations,
            )
            for v in range(self.victims)
        ]

    def _codes(self, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Where each restart ended `[V, R]`, and the best codes of each victim `[V, N · k]`."""
        s = self.setting
        starts = [torch.randn(s.restarts, self.batch * self.generator.latent, generator=r) for r in rngs]
        rows = torch.arange(len(self.stacked), device=self.labels.device)
        energy = Through(self.problem, Codes(self.generator, self.stacked), rows, Normal(s.normal))
        start = torch.cat(starts).to(self.labels.device)
        done = descend(Adam(energy, start, Schedule(s.lr, s.steps, "cosine")), self._report("codes"))
        losses = done.loss.view(self.victims, s.restarts)
        self.winner = self.rows * s.restarts + losses.argmin(1)
        self.trace = done.trace[:, self.winner]
        self.evaluations += s.restarts * done.evaluations
        return losses.clone(), done.v[self.winner]

    def _features(self, z: Tensor, near: Near) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, images and objective of each stage's end; a stage starts where the one before it ended."""
        space, h = Codes(self.generator, self.labels).features(z)
        for stage, spread in enumerate(self.prior.spread):
            if stage:
                space, h = space.next(h)
            size = h.shape[1] // self.batch
            radius = torch.full((self.victims * self.batch,), self.setting.radius * spread * size).to(h)
            schedule = Schedule(self.setting.lr * spread, self.setting.steps, "cosine")
            energy = Through(self.problem, space, self.winner, near)
            done = self._run(BallAdam(energy, h, schedule, size, radius), self.generator.names[stage])
            h = done.v
            yield f"features {self.generator.names[stage]!r}", self._images(space, h), done.loss

    def _parameters(self, z: Tensor, near: Near) -> Iterator[tuple[str, Tensor, Tensor]]:
        space = Parameters(self.generator, self.labels, z)
        schedule = Schedule(self.setting.lr_parameters, self.setting.steps, "cosine")
        energy = Through(self.problem, space, self.winner, near)
        done = self._run(Adam(energy, space.start(), schedule), "parameters")
        yield "parameters", self._images(space, done.v), done.loss

    def _run(self, optimiser: Adam, name: str) -> Descent:
        """One more search of each victim's best row; the trace goes on with the best so far."""
        done = descend(optimiser, self._report(name))
        self.trace = torch.cat([self.trace, done.trace[1:]]).cummin(0).values
        self.evaluations += done.evaluations
        return done

    def _images(self, space: Space, v: Tensor) -> Tensor:
        with torch.no_grad():
            return space(v, self.rows)

    def _report(self, name: str) -> Callable[[int, Tensor], None]:
        def report(step: int, loss: Tensor) -> None:
            self.progress(step, self.setting.steps, f"{name}: objective median {float(loss.median()):.3g}")

        return report
