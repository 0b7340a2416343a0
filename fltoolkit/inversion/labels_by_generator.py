"""Which labels a batch has, by whose likeliest images have the update that was seen.

Noise hides the last layer's bias gradient, which tells labels otherwise (`fltoolkit/inversion/labels`), long
before it hides the whole update. A generator that takes labels says how an image of each looks: G(0, y).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fltoolkit.inversion.generator import Generator
from fltoolkit.inversion.matching import GradientMatching, Objective
from fltoolkit.types import Observation

SWEEPS = 2


def refine(
    observations: Sequence[Observation], labels: Tensor, objective: Objective, generator: Generator
) -> tuple[Tensor, int]:
    """Better labels `[V, N]`, each victim's in increasing order, and evaluations a victim.

    From `labels` on, one label at a time becomes the one with which the batch G(0, y) matches best, in at
    most `SWEEPS` passes over the batch.
    """
    victims, batch = labels.shape
    classes = generator.classes
    device = labels.device
    owner = torch.arange(victims, device=device).repeat_interleave(classes)
    rows = torch.arange(len(owner), device=device)
    with torch.no_grad():
        every = torch.arange(classes, device=device)
        images = generator(torch.zeros(classes, generator.latent, device=device), every).flatten(1)
    labels, evaluations = labels.clone(), 0
    for _ in range(SWEEPS):
        before = labels.clone()
        for n in range(batch):
            tried = labels.repeat_interleave(classes, 0)
            tried[:, n] = every.repeat(victims)
            problem = GradientMatching(observations, owner, tried, objective)
            loss = problem(images[tried].flatten(1), rows)[0].view(victims, classes)
            labels[:, n] = loss.argmin(1)
            evaluations += classes
        if torch.equal(labels, before):
            break
    return labels.sort(1).values, evaluations
