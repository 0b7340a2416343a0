"""Searching what a generator is fed with, or made of, instead of pixels.

A space says how variables v become a batch of images x = r(v). `Through` turns the matching loss of x into
one of v by the chain rule, ∂ℓ/∂v = (∂r/∂v)ᵀ ∂ℓ/∂x, a vector-Jacobian product of the generator for the whole
stack.
Spaces: codes z and generator parameters w (Jeon et al. 2021, arXiv:2110.14962), and the features between two
stages, within an l1 ball around where they start (Fang et al. 2023, arXiv:2308.04699).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from fltoolkit.inversion.adam import Adam, Schedule
from fltoolkit.inversion.generator import Generator
from fltoolkit.inversion.lbfgs import Objective
from fltoolkit.inversion.matching import GradientMatching
from fltoolkit.types import Layout


class Space(Protocol):
    """`space(v [S, n], rows [S]) -> x [S, N · C · H · W]`, differentiable in v; rows say which line of the
    stack each v is, and with it which labels and starting point belong to it."""

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Codes:
    """v holds the codes of the N images, z `[S, N · k]`; labels `[S, N]`."""

    generator: Generator
    labels: Tensor

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
        z = v.reshape(-1, self.generator.latent)
        return self.generator(z, self.labels[rows].flatten()).reshape(len(v), -1)

    def features(self, z: Tensor) -> tuple[Features, Tensor]:
        """The space of what comes out of stage 0, and where the codes z of all rows are in it."""
        with torch.no_grad():
            h = self.generator.features(z.reshape(-1, self.generator.latent), self.labels.flatten())
        return Features(self.generator, 0, tuple(h.shape[1:])), h.reshape(len(z), -1)


@dataclass(frozen=True)
class Parameters:
    """v holds the generator's parameters, each image's own, w `[S, N · P]`; codes `[S, N · k]` stay."""

    generator: Generator
    labels: Tensor
    codes: Tensor

    def start(self) -> Tensor:
        """The trained parameters, once for each image, `[S, N · P]`."""
        lines, batch = self.labels.shape
        flat = torch.cat([p.detach().flatten() for p in self.generator.parameters()])
        return flat.repeat(lines, batch)

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
        named = list(self.generator.named_parameters())
        layout = Layout(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named))
        w = layout.unflatten(v.reshape(-1, layout.size))
        z = self.codes[rows].reshape(len(w[layout.names[0]]), 1, -1)
        y = self.labels[rows].reshape(-1, 1)

        def image(w: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
            return functional_call(self.generator, w, (z, y))

        found: Tensor = vmap(image)(w, z, y)
        return found.reshape(len(v), -1)


@dataclass(frozen=True)
class Features:
    """v holds what comes out of stage number `stage`, h `[S, N · size]`, of the shape `[C_l, H_l, W_l]`."""

    generator: Generator
    stage: int
    shape: tuple[int, ...]

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
        return self.generator.onward(v.reshape(-1, *self.shape), self.stage).reshape(len(v), -1)

    def next(self, v: Tensor) -> tuple[Features, Tensor]:
        """The space one stage on, and where the features v are in it."""
        with torch.no_grad():
            h = self.generator.through(v.reshape(-1, *self.shape), self.stage + 1)
        return Features(self.generator, self.stage + 1, tuple(h.shape[1:])), h.reshape(len(v), -1)


Belief = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`belief(v [S, n], x [S, N · C · H · W], rows [S]) -> energy [S]`, differentiable: a negative log prior."""


@dataclass(frozen=True)
class Normal:
    """weight ½ ‖v‖²: at weight 1 the negative log of the codes' prior N(0, I)."""

    weight: float

    def __call__(self, v: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        return 0.5 * self.weight * v.square().sum(1)


@dataclass(frozen=True)
class Near:
    """offset `[S]` + weight ‖x − x_0‖² / (2 σ²): at weight 1 the negative log of what the autoencoder says of
    an image of which it made x_0 `[S, N · C · H · W]`; σ² is the variance it was trained to."""

    centre: Tensor
    variance: float
    weight: float
    offset: Tensor

    def __call__(self, v: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        apart = (x - self.centre[rows]).square().sum(1)
        return self.offset[rows] + self.weight / (2 * self.variance) * apart


class Through:
    """The matching loss plus a belief as a function of a space's variables. Row s of the stack is row
    picked[s] of the problem."""

    def __init__(self, problem: GradientMatching, space: Space, picked: Tensor, belief: Belief) -> None:
        self.problem, self.space, self.picked, self.belief = problem, space, picked, belief

    def __call__(self, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            x = self.space(v, rows)
            energy = self.belief(v, x, rows)
        loss, slope = self.problem(x.detach(), self.picked[rows])
        (gradient,) = torch.autograd.grad([x, energy], v, [slope, torch.ones_like(energy)])
        return loss + energy.detach(), gradient


def onto_l1_ball(v: Tensor, radius: Tensor) -> Tensor:
    """The nearest point of the l1 ball with `radius [S]` to each row of v `[S, n]`.

    Duchi, Shalev-Shwartz, Singer, Chandra 2008 (doi:10.1145/1390156.1390191), figure 1: soft-thresholding at
    the θ that leaves an l1 norm of just the radius; rows that are inside stay as they are.
    """
    size = v.abs()
    ordered = size.sort(1, descending=True).values
    count = torch.arange(1, v.shape[1] + 1, device=v.device)
    threshold = (ordered.cumsum(1) - radius[:, None]) / count
    last = (ordered > threshold).sum(1, keepdim=True).clamp_min(1)
    theta = threshold.gather(1, last - 1).clamp_min(0)
    inside = size.sum(1, keepdim=True) <= radius[:, None]
    return torch.where(inside, v, v.sign() * (size - theta).clamp_min(0))


class BallAdam(Adam):
    """Adam that projects every iterate onto the l1 balls with `radius [S · N]` around each image's part of
    the start, `size` numbers an image."""

    def __init__(
        self, objective: Objective, z: Tensor, schedule: Schedule, size: int, radius: Tensor
    ) -> None:
        self.centre, self.size, self.radius = z.clone(), size, radius
        super().__init__(objective, z, schedule)

    def _evaluate(self) -> None:
        away = (self.z - self.centre[self.rows]).reshape(-1, self.size)
        radius = self.radius.reshape(len(self.centre), -1)[self.rows].flatten()
        self.z = self.centre[self.rows] + onto_l1_ball(away, radius).reshape(self.z.shape)
        super()._evaluate()


@dataclass(frozen=True)
class Descent:
    """Where a stack ended: the best v `[S, n]` with its loss `[S]`, the best loss over time
    `[iterations + 1, S]`, and evaluations of each row."""

    v: Tensor
    loss: Tensor
    trace: Tensor
    evaluations: int


def descend(optimiser: Adam, report: Callable[[int, Tensor], None] = lambda step, loss: None) -> Descent:
    """Run a stack's schedule to its end and keep the best of each row, the start included."""
    best, loss = optimiser.z.clone(), optimiser.loss.clone()
    trace = [loss.clone()]
    for step in range(1, optimiser.schedule.steps + 1):
        optimiser.step()
        better = optimiser.loss < loss
        best[better], loss[better] = optimiser.z[better], optimiser.loss[better]
        trace.append(loss.clone())
        if step % 25 == 0:
            report(step, loss)
    return Descent(best, loss, torch.stack(trace), optimiser.evaluations // len(loss))
