"""Distances between updates: values and derivatives against autograd through the formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fltoolkit.inversion.distance import (
    Masked,
    Projected,
    Signs,
    Times,
    aligned,
    cosine,
    relative,
    scaled,
    squared,
)
from fltoolkit.projection import subspace


def pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    g, t = torch.randn(2, 5, 60, dtype=torch.float64, generator=generator)
    t = t * 3
    t[:, ::4] = 0
    return g, t


def plain_signs(g, t):
    margin = 4 * g * t.sign() / g.square().mean(1, keepdim=True).sqrt()
    return torch.log2(1 + torch.exp(-margin)).mean(1)


TURNED = subspace(60, 0.3, rotated=True, seed=4, number=2)
BASIS = TURNED(torch.eye(60, dtype=torch.float64))


FORMULAS = {
    "squared": (squared, lambda g, t: (g - t).square().sum(1)),
    "relative": (relative, lambda g, t: (g - t).square().sum(1) / t.square().sum(1)),
    "cosine": (cosine, lambda g, t: 1 - F.cosine_similarity(g, t)),
    "scaled": (scaled, lambda g, t: t.square().sum(1) * (1 - F.cosine_similarity(g, t).clamp_min(0) ** 2)),
    "aligned": (aligned, lambda g, t: 1 - F.cosine_similarity(g, t).clamp_min(0) ** 2),
    "times": (Times(squared, 0.3), lambda g, t: 0.3 * (g - t).square().sum(1)),
    "masked": (Masked(cosine), lambda g, t: 1 - F.cosine_similarity(g * (t != 0), t)),
    "projected": (Projected(cosine, TURNED), lambda g, t: 1 - F.cosine_similarity(g @ BASIS, t)),
    "signs": (Signs(), plain_signs),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_derivative(name):
    distance, formula = FORMULAS[name]
    g, t = pairs()
    kept = t.clone()
    variable = g.clone().requires_grad_()
    expected = formula(variable, t)
    (slope,) = torch.autograd.grad(expected.sum(), variable)
    scratch = g.clone()
    torch.testing.assert_close(distance(scratch, t), expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scratch, slope, rtol=1e-8, atol=1e-12)
    assert torch.equal(t, kept)


def test_scaled_is_the_least_over_all_scales():
    g, t = pairs(1)
    scales = torch.linspace(0, 20, 40001, dtype=torch.float64)
    best = [(scales[:, None] * a - b).square().sum(1).min() for a, b in zip(g, t, strict=True)]
    torch.testing.assert_close(scaled(g.clone(), t), torch.stack(best), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["cosine", "scaled", "aligned", "masked"])
def test_who_is_blind_to_scale(name):
    """Clipping multiplies the observed update by a number; these do not care which."""
    distance, _ = FORMULAS[name]
    g, t = pairs(2)
    relative = distance(0.01 * g, t)
    torch.testing.assert_close(distance(g.clone(), t), relative)


@pytest.mark.parametrize("name", ["cosine", "scaled", "squared"])
def test_an_update_of_zero_has_a_finite_distance_and_slope(name):
    distance, _ = FORMULAS[name]
    g, t = torch.zeros(2, 8), torch.ones(2, 8)
    assert torch.isfinite(distance(g, t)).all()
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("name", ["cosine", "scaled", "aligned"])
def test_small_distances_keep_their_digits(name):
    """In float32, near the truth: the textbook form has no digit left at 1e-8 of the whole."""
    distance, _ = FORMULAS[name]
    g, t = pairs(3)
    near = 2 * t + 3e-4 * g
    exact, slope = near.clone(), near.float()
    expected = distance(exact, t)
    torch.testing.assert_close(distance(slope, t.float()).double(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(slope.double(), exact, rtol=0, atol=1e-2 * float(exact.abs().max()))
