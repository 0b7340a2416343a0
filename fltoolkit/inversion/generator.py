"""A generator of images, in named stages, and how it is trained on public data.

A variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114, eq. 10), conditioned on the label y:

    min  E_q(z|x,y) −log p(x | z, y)  +  KL(q(z | x, y) ‖ N(0, I)),

with Gaussian p of one variance for all pixels, which takes its best value, the mean squared error, in every
minibatch (Rybkin, Daniilidis, Levine 2021, arXiv:2006.13202), so that nothing is left to weigh by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log2, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fltoolkit.rng import torch_stream
from fltoolkit.types import Examples

LARGEST_BASE = 8
"""The first feature map is at most this wide and high; every stage after it doubles both."""

LEAST_ERROR = 1e-6
"""Floor of the pixels' variance, in units of the squared range."""

Report = Callable[[int, float], None]
"""`report(step, error)`: called now and then during training."""


@dataclass(frozen=True)
class Training:
    """Adam at rate lr, falling along half a cosine, on `steps` minibatches of `batch` public images.

    latent: numbers in z. width: channels of the last feature map, each earlier one has twice those of the
    next.
    """

    steps: int
    latent: int
    width: int
    lr: float = 2e-3
    batch: int = 64


class Generator(nn.Module):
    """G = G_K ∘ ... ∘ G_0: codes z `[B, k]` and labels y `[B]` -> images `[B, C, H, W]` in `bounds`.

    Stage 0 makes the first feature map of (z, y), each following one doubles its sides, and the last makes
    the image; `names` names them. `features(z, y)` is what comes out of stage 0.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, bounds: tuple[float, float], how: Training, seed: int
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape, self.classes, self.bounds, self.latent = tuple(shape), classes, bounds, how.latent
        doublings = max(1, ceil(log2(max(height, width) / LARGEST_BASE)), 2 * (min(height, width) >= 8))
        sides = [ceil(s / 2**doublings) for s in (height, width)]
        maps = [how.width * 2 ** min(2, doublings - i) for i in range(doublings + 1)]
        rng = torch_stream(seed, "generator", "start")
        first = drawn(nn.Linear, rng, how.latent + classes, maps[0] * prod(sides))
        base = nn.Sequential(first, nn.Unflatten(1, (maps[0], *sides)), nn.SiLU())
        doubled = [
            nn.Sequential(drawn(nn.ConvTranspose2d, rng, a, b, 4, 2, 1), nn.SiLU()) for a, b in pairwise(maps)
        ]
        self.stages = nn.ModuleList([base, *doubled, drawn(nn.Conv2d, rng, maps[-1], channels, 3, padding=1)])
        self.names = ("base", *(f"doubled{i + 1}" for i in range(doublings)), "image")

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.onward(self.features(z, y), 0)

    def features(self, z: Tensor, y: Tensor) -> Tensor:
        """h_0 `[B, C_0, H_0, W_0]`."""
        return self.stages[0](torch.cat([z, one_hot(y, self.classes).to(z)], 1))

    def through(self, h: Tensor, stage: int) -> Tensor:
        """What stage number `stage` >= 1 makes of the features h of the one before it."""
        return self.stages[stage](h)

    def onward(self, h: Tensor, stage: int) -> Tensor:
        """Features h that come out of stage number `stage` -> images."""
        for later in self.stages[stage + 1 :]:
            h = later(h)
        low, high = self.bounds
        return low + (high - low) * h[..., : self.shape[1], : self.shape[2]].sigmoid()


class Autoencoder(nn.Module):
    """The generator with the encoder that is needed to train it: images and labels -> mean and log variance
    of q(z | x, y), each `[B, k]`."""

    def __init__(self, generator: Generator, hidden: int, seed: int) -> None:
        super().__init__()
        self.generator = generator
        rng = torch_stream(seed, "encoder", "start")
        inputs = prod(generator.shape) + generator.classes
        self.trunk = nn.Sequential(drawn(nn.Linear, rng, inputs, hidden), nn.SiLU())
        self.codes = drawn(nn.Linear, rng, hidden, 2 * generator.latent)

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.generator.bounds
        flat = (x.flatten(1) - low) / (high - low)
        labels = one_hot(y, self.generator.classes).to(flat)
        mean, log_variance = self.codes(self.trunk(torch.cat([flat, labels], 1))).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """G of the mean code of each image `[B, C, H, W]`."""
        with torch.no_grad():
            return self.generator(self.encode(x, y)[0], y)

    def loss(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The negative evidence bound of a minibatch, up to a constant, and the mean squared error in units
        of the squared range; noise `[B, k]` is N(0, I)."""
        low, high = self.generator.bounds
        mean, log_variance = self.encode(x, y)
        guess = self.generator(mean + (0.5 * log_variance).exp() * noise, y)
        error = ((guess - x) / (high - low)).square().mean().clamp_min(LEAST_ERROR)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return 0.5 * prod(self.generator.shape) * error.log() + divergence, error.detach()


HIDDEN = 256
"""Units of the encoder's hidden layer."""


def train(
    public: Examples,
    classes: int,
    bounds: tuple[float, float],
    how: Training,
    seed: int,
    report: Report = lambda step, error: None,
) -> tuple[Autoencoder, Tensor]:
    """An autoencoder of the public images x `[P, C, H, W]` with labels y `[P]`, and each minibatch's mean
    squared error `[steps]`. Every random number is drawn on the CPU from streams under `seed`."""
    device = public.x.device
    generator = Generator(tuple(public.x.shape[1:]), classes, bounds, how, seed)
    net = Autoencoder(generator, HIDDEN, seed).to(device)
    rng = torch_stream(seed, "generator", "minibatches")
    optimiser = torch.optim.Adam(net.parameters(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how.steps)
    trace = []
    for step in range(how.steps):
        part = torch.randint(len(public), (how.batch,), generator=rng).to(device)
        noise = torch.randn(how.batch, how.latent, generator=rng).to(device)
        loss, error = net.loss(public.x[part], public.y[part], noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        trace.append(float(error))
        if step % 25 == 0:
            report(step, trace[-1])
    return net.eval().requires_grad_(False), torch.tensor(trace)


def drawn(kind: Callable[..., nn.Module], rng: torch.Generator, *args: Any, **options: Any) -> nn.Module:
    """A layer with PyTorch's default start, drawn from `rng`."""
    layer = nn.utils.skip_init(kind, *args, **options)
    with torch.no_grad():
        bound = 1 / sqrt(layer.weight[0].numel())
        for p in layer.parameters():
            p.uniform_(-bound, bound, generator=rng)
    return layer
