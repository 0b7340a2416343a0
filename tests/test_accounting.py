"""ε against closed forms and the accountant's published truth values."""

from __future__ import annotations

from math import exp, inf, sqrt

import pytest
import torch
from dp_accounting import GaussianDpEvent
from scipy.optimize import brentq
from scipy.stats import norm

from defenses.clip import Clip
from defenses.gaussian import Gaussian
from fltoolkit.accounting import epsilon, epsilon_by_view
from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.types import PrivacyEvent

BOTH = frozenset({"message", "sum", "aggregate"})


def closed_form(mu: float, delta: float) -> float:
    """ε of a Gaussian mechanism with sensitivity / noise = mu (Balle and Wang 2018, arXiv:1805.06530)."""

    def excess(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta)

    return float(brentq(excess, 0.0, mu**2 / 2 + 10 * mu + 10))


def gaussian(sigma, view="message", release="update"):
    return PrivacyEvent(GaussianDpEvent(sigma), view, release=release)


@pytest.mark.parametrize(
    ("sigma", "rounds", "expected"), [(1.0, 1, 4.377178), (5.0, 100, 9.997256), (2.0, 10, None)]
)
def test_gaussian_equals_the_closed_form(sigma, rounds, expected):
    truth = closed_form(sqrt(rounds) / sigma, 1e-5)
    if expected is not None:
        assert truth == pytest.approx(expected, abs=1e-6)
    got = epsilon([(gaussian(sigma),)] * rounds, BOTH, 1e-5)
    assert truth <= got <= truth * 1.001


def test_nothing_protects_means_infinity():
    assert epsilon([()], BOTH, 1e-5) == inf
    assert epsilon([(gaussian(1.0, "aggregate"),)], frozenset({"message"}), 1e-5) == inf
    assert epsilon([(gaussian(1.0),), ()], BOTH, 1e-5) == inf
    assert epsilon([], BOTH, 1e-5) == 0.0


def test_alternatives_take_the_better_and_releases_compose():
    strong, weak = gaussian(4.0), gaussian(1.0)
    assert epsilon([(weak, strong)], BOTH, 1e-5) == epsilon([(strong,)], BOTH, 1e-5)
    two = epsilon([(gaussian(2.0), gaussian(2.0, release="norms"))], BOTH, 1e-5)
    assert two == pytest.approx(closed_form(sqrt(2) / 2, 1e-5), rel=1e-3)


def events(*defenses, weights=(0.25,) * 4):
    w = torch.tensor(weights)
    return DefenseStack(defenses).events(RoundContext(0, 1, tuple(range(len(w))), w))


def test_views_of_the_gaussian_placements():
    central = epsilon_by_view([events(Clip(norm=0.5), Gaussian(noise_multiplier=1.0))], False, 1e-5)
    assert central["message"] == inf
    assert central["aggregate"] == pytest.approx(4.377178, rel=1e-3)
    local = epsilon_by_view(
        [events(Clip(norm=0.5), Gaussian(noise_multiplier=1.0, placement="client"))], False, 1e-5
    )
    assert local["message"] == pytest.approx(4.377178, rel=1e-3)
    assert local["aggregate"] == pytest.approx(closed_form(0.5, 1e-5), rel=1e-3)


def test_unequal_weights_protect_the_heaviest_client_least():
    """Sum of noises has std σ C ‖w‖, the heaviest client moves the sum by C max w."""
    w = (0.7, 0.1, 0.1, 0.1)
    got = epsilon_by_view([events(Clip(), Gaussian(placement="client"), weights=w)], False, 1e-5)
    expected = closed_form(0.7 / sqrt(0.7**2 + 3 * 0.1**2), 1e-5)
    assert got["aggregate"] == pytest.approx(expected, rel=1e-3)


def test_secure_sum_moves_the_message_view_to_the_sum():
    local = [events(Clip(), Gaussian(placement="client"))]
    hidden = epsilon_by_view(local, True, 1e-5)
    assert hidden["message"] == hidden["aggregate"] == pytest.approx(closed_form(0.5, 1e-5), rel=1e-3)
    central = epsilon_by_view([events(Clip(), Gaussian())], True, 1e-5)
    assert central["message"] == inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(InputError, match="delta must be between 0 and 1"):
        epsilon([()], BOTH, delta)


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds"), [(1.0, 1000), (0.05, 1000), (5.0, 100), (50.0, 1), (500.0, 10)]
)
def test_grid_follows_the_size_of_epsilon(noise_multiplier, rounds):
    """T Gaussian releases are one of μ = √T / σ, here for ε from 0.016 to 202,696."""
    exact = closed_form(sqrt(rounds) / noise_multiplier, 1e-5)
    event = PrivacyEvent(GaussianDpEvent(noise_multiplier), "aggregate")
    found = epsilon([(event,)] * rounds, frozenset({"aggregate"}), 1e-5)
    assert found == pytest.approx(exact, rel=2e-6)
    assert found >= exact * (1 - 1e-9)
