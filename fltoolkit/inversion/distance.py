"""How far the update of a guess is from the observed one.

A distance is called as `distance(g, t) -> d`, with the guesses' updates g `[S, D]` and the observed ones
t `[S, D]`; it returns d `[S]` and turns g, in place, into its derivative ∂d/∂g. Working in place keeps the
memory traffic, which is what small models are bound by, at one read and one write a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]

TINY = 1e-30


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row: `[S, D]` twice -> `[S]`."""
    return torch.bmm(a[:, None], b[:, :, None]).flatten()


def squared(g: Tensor, t: Tensor) -> Tensor:
    """‖g − t‖² (Zhu, Liu, Han 2019, arXiv:1906.08935, eq. 3)."""
    g.sub_(t)
    d = dot(g, g)
    g.mul_(2)
    return d


def relative(g: Tensor, t: Tensor) -> Tensor:
    """‖g − t‖² / ‖t‖², 1 for g = 0."""
    tt = dot(t, t).clamp_min(TINY)
    d = squared(g, t)
    g.div_(tt[:, None])
    return d / tt


def cosine(g: Tensor, t: Tensor) -> Tensor:
    """1 − ⟨g, t⟩ / (‖g‖ ‖t‖) (Geiping et al. 2020, arXiv:2003.14053, eq. 4), in [0, 2]; blind to the scale
    of either.

    Computed as ½ ‖ĝ − t̂‖² with unit vectors: the difference of two numbers near 1 would have lost all its
    digits long before a search ends, and its derivative with it.
    """
    length = dot(g, g).clamp_min(TINY).sqrt()[:, None]
    g.div_(length)
    apart = g - t * dot(t, t).clamp_min(TINY).rsqrt()[:, None]
    d = 0.5 * dot(apart, apart)
    g.mul_(-d[:, None]).add_(apart).div_(length)
    return d


def scaled(g: Tensor, t: Tensor) -> Tensor:
    """min over s ≥ 0 of ‖s g − t‖² = ‖t‖² (1 − max(0, cos)²): the squared distance for who does not know the
    scale, as under clipping."""
    s = (dot(g, t).clamp_min(0) / dot(g, g).clamp_min(TINY))[:, None]
    g.mul_(s).sub_(t)
    d = dot(g, g)
    g.mul_(2 * s)
    return d


def aligned(g: Tensor, t: Tensor) -> Tensor:
    """1 − max(0, cos)², `scaled` relative to ‖t‖²."""
    tt = dot(t, t).clamp_min(TINY)
    d = scaled(g, t)
    g.div_(tt[:, None])
    return d / tt


SCALE_FREE: dict[Distance, Distance] = {
    squared: scaled,
    relative: aligned,
    cosine: cosine,
    scaled: scaled,
    aligned: aligned,
}
"""What each distance becomes for who does not know the scale of the observed update."""


@dataclass(frozen=True)
class Times:
    """weight `[S]` or a number times another distance: 1 / (2 σ²) makes a squared distance the negative
    log-likelihood under Gaussian noise of standard deviation σ."""

    inner: Distance
    weight: float

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        d = self.inner(g, t)
        g.mul_(self.weight)
        return self.weight * d


@dataclass(frozen=True)
class Masked:
    """Another distance over the coordinates that were sent: where t is exactly zero nothing was, and what the
    guess has there is no evidence against it."""

    inner: Distance

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        sent = t != 0
        g.mul_(sent)
        d = self.inner(g, t)
        g.mul_(sent)
        return d


@dataclass(frozen=True)
class Projected:
    """Another distance in the subspace in which t lies; `onto` is an orthogonal projection of rows."""

    inner: Distance
    onto: Callable[[Tensor], Tensor]

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        g.copy_(self.onto(g))
        d = self.inner(g, t)
        g.copy_(self.onto(g))
        return d


@dataclass(frozen=True)
class Parts:
    """The mean over parts of a row, of the given sizes, of another distance: with one blind to scale, for
    updates of which every layer was scaled by a factor of its own."""

    inner: Distance
    sizes: tuple[int, ...]

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        d = g.new_zeros(len(g))
        for a, b in zip(g.split(self.sizes, dim=1), t.split(self.sizes, dim=1), strict=True):
            d += self.inner(a, b)
        g.div_(len(self.sizes))
        return d / len(self.sizes)


@dataclass(frozen=True)
class First:
    """Another distance over the first `count` coordinates, where the others say nothing, or only noise."""

    inner: Distance
    count: int

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        d = self.inner(g[:, : self.count], t[:, : self.count])
        g[:, self.count :] = 0
        return d


@dataclass(frozen=True)
class Signs:
    """For updates of which only signs were sent: a smooth hinge, mean over coordinates of
    softplus(−κ g_i sign(t_i) / rms(g)) / log 2. It is 1 for g = 0 and falls to 0 as signs agree."""

    sharpness: float = 4.0

    def __call__(self, g: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            v = g.detach().requires_grad_()
            rms = v.square().mean(1, keepdim=True).clamp_min(TINY).sqrt()
            margin = self.sharpness * v * t.sign() / rms
            d = torch.nn.functional.softplus(-margin).mean(1) / log(2)
            (slope,) = torch.autograd.grad(d.sum(), v)
        g.copy_(slope)
        return d.detach()
