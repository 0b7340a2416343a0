"""ε against closed forms, published values, slow integrals and other accountants.

Convolutions and integrals written out here and Opacus are the independent oracles. A printed number is held
to its last digit from below and to 1e-3 of itself from above.
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import exp, inf, log, sqrt

import numpy as np
import pytest
import torch
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant, privacy_loss_mechanism
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.signal import fftconvolve
from scipy.stats import norm

from defenses.clip import Clip
from defenses.gaussian import Gaussian
from fltoolkit.accounting import (
    attained_epsilon,
    epsilon,
    epsilon_by_view,
    gaussian_epsilon,
    gaussian_sigma,
    ledger,
    losses,
    shared_adjacency,
    success_bound,
)
from fltoolkit.accounting.pairs import EITHER_WAY, ONE_WAY, TWO_SIDED, Pair
from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.types import PrivacyEvent

BOTH = frozenset({"message", "sum", "aggregate"})
FIXED = {"sampling": "fixed", "adjacency": "replace-one"}

TABLE = [
    # q, σ, T, δ, pld, rdp, prv
    (0.01, 1.1, 1000, 1e-5, 1.51536, 1.71177, 1.52547),
    (1.0, 5.0, 100, 1e-5, 9.997256, 10.72551, 10.00771),
    (0.001, 0.8, 10000, 1e-6, 0.94720, 1.70363, 0.95728),
    (256 / 60000, 1.1, 14063, 1e-5, 2.38169, 2.59666, 2.39184),
    (1.0, 1.0, 1, 1e-5, 4.377178, 4.72851, 4.38741),
]


def closed_form(mu: float, delta: float) -> float:
    """ε of a Gaussian mechanism with sensitivity / noise = mu (Balle and Wang 2018, arXiv:1805.06530)."""

    def excess(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta)

    return float(brentq(excess, 0.0, mu**2 / 2 + 10 * mu + 10, xtol=1e-13))


def mixture(x, q, shift, sigma):
    """The density of (1 - q) N(0, σ²) + q N(shift, σ²)."""
    return (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, shift, sigma)


def gaussian(sigma, view="message", release="update", **rest):
    return PrivacyEvent(GaussianDpEvent(sigma), view, release=release, **rest)


def example(sigma, owner, **rest):
    return gaussian(sigma, unit="example", owner=owner, **rest)


def drawn(sigma, adjacency, population=100, size=1, **rest):
    event = SampledWithoutReplacementDpEvent(population, size, GaussianDpEvent(sigma))
    return PrivacyEvent(event, "aggregate", adjacency=adjacency, **rest)


@pytest.mark.parametrize(
    ("sigma", "rounds", "expected"), [(1.0, 1, 4.377178), (5.0, 100, 9.997256), (2.0, 10, None)]
)
def test_gaussian_equals_the_closed_form(sigma, rounds, expected):
    truth = closed_form(sqrt(rounds) / sigma, 1e-5)
    if expected is not None:
        assert truth == pytest.approx(expected, abs=1e-6)
    got = epsilon([(gaussian(sigma),)] * rounds, BOTH, 1e-5)
    assert truth * (1 - 1e-9) <= got <= truth * (1 + 1e-6)


def test_different_gaussians_add_their_precisions():
    rounds = [(gaussian(s),) for s in (0.7, 1.9, 1.9, 30.0)]
    exact = closed_form(sqrt(sum(e.event.noise_multiplier**-2 for (e,) in rounds)), 1e-6)
    assert epsilon(rounds, BOTH, 1e-6) == pytest.approx(exact, rel=1e-6)


def test_nothing_protects_means_infinity():
    assert epsilon([()], BOTH, 1e-5) == inf
    assert epsilon([(gaussian(1.0, "aggregate"),)], frozenset({"message"}), 1e-5) == inf
    assert epsilon([(gaussian(1.0),), ()], BOTH, 1e-5) == inf
    assert epsilon([], BOTH, 1e-5) == 0.0
    for nothing in (
        GaussianDpEvent(0.0),
        NonPrivateDpEvent(),
        PoissonSampledDpEvent(0.1, GaussianDpEvent(0.0)),
    ):
        assert epsilon([(PrivacyEvent(nothing, "message"),)], BOTH, 1e-5) == inf
        assert epsilon([(gaussian(1.0), PrivacyEvent(nothing, "message", release="b"))], BOTH, 1e-5) == inf


@pytest.mark.parametrize("nothing", [NoOpDpEvent(), PoissonSampledDpEvent(0.0, GaussianDpEvent(1.0))])
def test_what_tells_nothing_costs_nothing(nothing):
    assert epsilon([(PrivacyEvent(nothing, "message"),)], BOTH, 1e-5) == 0.0


def test_alternatives_take_the_better_and_releases_compose():
    strong, weak = gaussian(4.0), gaussian(1.0)
    assert epsilon([(weak, strong)], BOTH, 1e-5) == epsilon([(strong,)], BOTH, 1e-5)
    two = epsilon([(gaussian(2.0), gaussian(2.0, release="norms"))], BOTH, 1e-5)
    assert two == pytest.approx(closed_form(sqrt(2) / 2, 1e-5), rel=1e-6)


def test_alternatives_are_chosen_for_all_rounds_together():
    """For one round certain participation is the better guarantee here, for 200 rounds amplification is."""
    both = (gaussian(4.0, "aggregate"), drawn(4.0, "replace-one", 10, 3))
    plain, amplified = [(both[0],)] * 200, [(both[1],)] * 200
    assert epsilon(plain[:1], BOTH, 1e-8) < epsilon(amplified[:1], BOTH, 1e-8)
    assert epsilon([both] * 200, BOTH, 1e-8) == epsilon(amplified, BOTH, 1e-8)
    assert epsilon(amplified, BOTH, 1e-8) < 0.9 * epsilon(plain, BOTH, 1e-8)


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
    with pytest.raises(InputError, match="delta must be between 0 and 1"):
        gaussian_epsilon(1.0, 0.1, 10, delta)


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds"), [(1.0, 1000), (0.05, 1000), (5.0, 100), (50.0, 1), (500.0, 10)]
)
def test_gaussian_is_exact_at_every_size_of_epsilon(noise_multiplier, rounds):
    """T Gaussian releases are one of μ = √T / σ, here for ε from 0.016 to 202,696."""
    exact = closed_form(sqrt(rounds) / noise_multiplier, 1e-5)
    event = PrivacyEvent(GaussianDpEvent(noise_multiplier), "aggregate")
    found = epsilon([(event,)] * rounds, frozenset({"aggregate"}), 1e-5)
    assert found == pytest.approx(exact, rel=1e-6)
    assert found >= exact * (1 - 1e-9)


# The two ledgers


def test_units_have_ledgers_of_their_own():
    rounds = [(gaussian(1.0), example(3.0, 0))]
    assert epsilon(rounds, BOTH, 1e-5) == pytest.approx(closed_form(1.0, 1e-5), rel=1e-6)
    assert epsilon(rounds, BOTH, 1e-5, "example") == pytest.approx(closed_form(1 / 3, 1e-5), rel=1e-6)
    assert epsilon_by_view(rounds, False, 1e-5, unit="example")["message"] < 1.3
    assert epsilon([(example(3.0, 0),)], BOTH, 1e-5) == inf
    assert epsilon([(gaussian(1.0),)], BOTH, 1e-5, "example") == inf
    with pytest.raises(InputError, match=r"unit must be one of .*'cell'"):
        epsilon(rounds, BOTH, 1e-5, "cell")


def test_examples_compose_for_each_owner_and_the_largest_counts():
    """Owner 7 takes part twice with σ = 2, owner 8 once with σ = 1.6; a round costs no others."""
    rounds = [(example(2.0, 7),), (example(2.0, 7), example(1.6, 8)), ()]
    assert epsilon(rounds, BOTH, 1e-5, "example") == pytest.approx(closed_form(sqrt(2) / 2, 1e-5), rel=1e-6)
    rounds = [(example(2.0, 7),), (example(2.0, 7), example(1.2, 8)), ()]
    assert epsilon(rounds, BOTH, 1e-5, "example") == pytest.approx(closed_form(1 / 1.2, 1e-5), rel=1e-6)


def test_an_owner_who_is_open_to_a_view_has_no_epsilon():
    rounds = [(example(2.0, 7),), (example(2.0, 8, view="aggregate"),)]
    assert epsilon(rounds, frozenset({"message"}), 1e-5, "example") == inf
    assert epsilon(rounds, BOTH, 1e-5, "example") == pytest.approx(closed_form(0.5, 1e-5), rel=1e-6)


def test_count_is_how_often_an_event_happens():
    once, often = gaussian(3.0), gaussian(3.0, count=12)
    assert epsilon([(often,)], BOTH, 1e-5) == epsilon([(once,)] * 12, BOTH, 1e-5)
    sampled = PrivacyEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.1)), "message", count=10)
    assert epsilon([(sampled,)] * 100, BOTH, 1e-5) == gaussian_epsilon(1.1, 0.01, 1000, 1e-5)


def test_owners_who_spent_the_same_are_counted_once(monkeypatch):
    counted = []
    original = ledger._choices
    monkeypatch.setattr(ledger, "_choices", lambda *a: counted.append(a) or original(*a))
    event = PoissonSampledDpEvent(0.02, GaussianDpEvent(1.31))
    owners = range(1000)
    rounds = [tuple(PrivacyEvent(event, "message", "example", owner=c, count=3) for c in owners)] * 2
    found = epsilon(rounds, BOTH, 1e-5, "example")
    assert found == gaussian_epsilon(1.31, 0.02, 6, 1e-5)
    assert len(counted) == 1


def test_of_different_owners_only_those_that_may_be_the_largest_are_counted_out(monkeypatch):
    precise = []
    original = losses._refined

    def spy(spent, what, at, tolerance):
        if tolerance == losses.TOLERANCE:
            precise.append(spent)
        return original(spent, what, at, tolerance)

    monkeypatch.setattr(losses, "_refined", spy)
    rounds = [
        tuple(
            PrivacyEvent(
                PoissonSampledDpEvent(0.02, GaussianDpEvent(1.3)), "sum", "example", owner=c, count=c
            )
            for c in range(5, 200, 8)
        )
    ]
    assert epsilon(rounds, BOTH, 1e-5, "example") == gaussian_epsilon(1.3, 0.02, 197, 1e-5)
    assert len(set(precise)) <= 5


# Adjacencies


def test_zero_out_and_add_remove_mix():
    rounds = [(gaussian(2.0),), (gaussian(1.5, adjacency="add-remove"),)]
    exact = closed_form(sqrt(1 / 4 + 1 / 2.25), 1e-5)
    assert epsilon(rounds, BOTH, 1e-5) == pytest.approx(exact, rel=1e-6)
    assert shared_adjacency(e for events in rounds for e in events) == "zero-out"


def test_replacing_moves_twice_as_far_and_covers_zero_out():
    replaced = gaussian(2.0, adjacency="replace-one")
    assert epsilon([(replaced,)], BOTH, 1e-5) == pytest.approx(closed_form(1.0, 1e-5), rel=1e-6)
    assert shared_adjacency([replaced]) == "replace-one"
    assert shared_adjacency([replaced, gaussian(1.0)]) == "zero-out"
    mixed = epsilon([(replaced,), (gaussian(2.0),)], BOTH, 1e-5)
    assert mixed == pytest.approx(closed_form(sqrt(1 + 1 / 4), 1e-5), rel=1e-6)


def test_add_remove_and_replace_one_are_refused_together():
    rounds = [(gaussian(2.0, adjacency="add-remove"),), (gaussian(2.0, adjacency="replace-one"),)]
    with pytest.raises(InputError, match="got both 'add-remove' and 'replace-one'"):
        epsilon(rounds, BOTH, 1e-5)
    with pytest.raises(InputError, match=r"adjacency must be one of .*'swap'"):
        epsilon([(gaussian(2.0, adjacency="swap"),)], BOTH, 1e-5)


def test_fixed_size_with_add_remove_is_refused():
    with pytest.raises(InputError, match=r"neighbouring data sets are equally large there, got 'add-remove'"):
        epsilon([(drawn(1.0, "add-remove"),)], BOTH, 1e-5)
    with pytest.raises(InputError, match=r"got 'add-remove'; with 'replace-one' ε = 10\.958"):
        gaussian_epsilon(1.1, 0.01, 1000, 1e-5, sampling="fixed", population=100)
    with pytest.raises(InputError, match=r"got 'add-remove'; with 'replace-one' σ = 4\.76"):
        gaussian_sigma(2.0, 0.1, 100, 1e-5, sampling="fixed", population=100)


def test_fixed_size_with_zero_out_is_the_smaller_of_two_bounds():
    """5 draws of 90 of 100 are best counted as certain, 1000 draws of 1 of 100 as replaced."""
    often = gaussian_epsilon(4.0, 0.9, 5, 1e-5, sampling="fixed", adjacency="zero-out", population=100)
    assert often == pytest.approx(closed_form(sqrt(5) / 4, 1e-5), rel=1e-6)
    assert often < gaussian_epsilon(4.0, 0.9, 5, 1e-5, population=100, **FIXED)
    rare = gaussian_epsilon(1.1, 0.01, 1000, 1e-5, sampling="fixed", adjacency="zero-out", population=100)
    assert rare == gaussian_epsilon(1.1, 0.01, 1000, 1e-5, population=100, **FIXED) < 12
    assert epsilon([(drawn(4.0, "zero-out", 100, 90),)] * 5, BOTH, 1e-5) == often
    assert epsilon([(drawn(1.1, "zero-out"),)] * 1000, BOTH, 1e-5) == rare


def test_compositions_are_taken_apart():
    g = GaussianDpEvent
    inner = ComposedDpEvent((g(1.0), SelfComposedDpEvent(g(2.0), 3)))
    for event, sigma, q in [
        (inner, 1 / sqrt(1.75), 1.0),
        (PoissonSampledDpEvent(0.1, inner), 1 / sqrt(1.75), 0.1),
    ]:
        got = epsilon([(PrivacyEvent(SelfComposedDpEvent(event, 7), "sum"),)], BOTH, 1e-5)
        assert got == pytest.approx(gaussian_epsilon(sigma, q, 7, 1e-5), rel=1e-6)
    listed = ComposedDpEvent([g(1.0), g(1.0)])
    assert epsilon([(PrivacyEvent(listed, "sum"),)], BOTH, 1e-5) == pytest.approx(
        closed_form(sqrt(2), 1e-5), rel=1e-6
    )
    for unknown in (LaplaceDpEvent(1.0), PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0))):
        with pytest.raises(InputError, match="LaplaceDpEvent"):
            epsilon([(PrivacyEvent(unknown, "sum"),)], BOTH, 1e-5)


# Values


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "pld", "rdp", "prv"), TABLE)
def test_table(q, sigma, steps, delta, pld, rdp, prv):
    found = gaussian_epsilon(sigma, q, steps, delta)
    assert pld - 1e-5 <= found <= pld * (1 + 1e-3)
    if q == 1:
        assert found == pytest.approx(pld, rel=1e-6)
    assert gaussian_epsilon(sigma, q, steps, delta, accountant="rdp") == pytest.approx(rdp, rel=1e-3)
    assert gaussian_epsilon(sigma, q, steps, delta, accountant="prv") == pytest.approx(prv, rel=1e-3)


def test_replaced_records_of_a_poisson_sample():
    found = gaussian_epsilon(1.1, 0.01, 1000, 1e-5, adjacency="replace-one")
    assert 2.4778 - 5e-5 <= found <= 2.4778 * (1 + 1e-3)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, 1e-4)
    accountant.compose(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.1)), 1000)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-4)
    rdp = gaussian_epsilon(1.1, 0.01, 1000, 1e-5, adjacency="replace-one", accountant="rdp")
    assert rdp == gaussian_epsilon(1.1, 0.01, 1000, 1e-5, accountant="rdp", population=100, **FIXED)


@pytest.mark.parametrize("noise", [0.4, 1.1, 5.0])
@pytest.mark.parametrize("rate", [0.001, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("kind", "way", "adjacency"), [(ONE_WAY, 0, "REMOVE"), (ONE_WAY, 1, "ADD"), (TWO_SIDED, 0, "REPLACE")]
)
def test_profiles_are_those_of_dp_accounting(noise, rate, kind, way, adjacency):
    """δ(ε), computed there one ε at a time, on both sides of 0."""
    kinds = privacy_loss_mechanism.AdjacencyType
    reference = privacy_loss_mechanism.GaussianPrivacyLoss(
        noise, sampling_prob=rate, adjacency_type=kinds[adjacency]
    )
    at = np.linspace(-20, 20, 801)
    expected = reference.get_delta_for_epsilon(at)
    found = Pair(kind, noise, rate).deltas(way, at)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "grid"),
    [
        (0.2, 1.0, 20, 1e-3),
        (0.02, 0.7, 20, 4e-4),
        (0.9, 3.0, 7, 1e-3),
        (0.01, 30.0, 50, 3e-6),
        (0.3, 80.0, 20, 1e-5),
    ],
)
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_against_a_slow_convolution(q, sigma, steps, grid, delta):
    """Losses ln P/N of x ~ P, rounded to the nearest point of a grid, convolved step by step."""
    x = np.linspace(-8 * sigma, 1 + 8 * sigma, 400_001)
    weight = mixture(x, q, 1, sigma) * (x[1] - x[0])
    loss = np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
    index = np.round(loss / grid).astype(int)
    step = np.bincount(index - index.min(), weight)
    whole = step
    for _ in range(steps - 1):
        whole = fftconvolve(whole, step)
    at = (np.arange(len(whole)) + steps * index.min()) * grid

    def profile(e):
        return whole[at > e] @ -np.expm1(e - at[at > e])

    truth = brentq(lambda e: profile(e) - delta, 0, at[-1]) if profile(0) > delta else 0.0
    found = gaussian_epsilon(sigma, q, steps, delta)
    assert truth * (1 - 3e-4) <= found <= truth * (1 + 6e-4)


@pytest.mark.parametrize("delta", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize(("steps", "sigma"), [(100, 5.0), (1000, 50.0), (1000, 0.05), (10, 500.0), (2, 1.0)])
def test_grids_are_never_below_the_truth_and_hardly_above(delta, steps, sigma):
    """At a rate of 1 - 1e-13 nothing is closed form, and the truth is that of rate 1."""
    exact = closed_form(sqrt(steps) / sigma, delta) if (sigma, delta) != (500.0, 1e-2) else 0.0
    found = losses.epsilon_by_losses({Pair(ONE_WAY, sigma, 1 - 1e-13): steps}, delta)
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 2e-4)


def test_one_sampled_step_is_exact():
    """δ = q (Φ(...) - ...) at ln(1 + (e^ε - 1) / q): amplification of a closed form."""
    q, delta = 0.001, 1e-5
    inside = closed_form(1.0, delta / q)
    exact = log(1 + q * (exp(inside) - 1))
    assert gaussian_epsilon(1.0, q, 1, delta) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("sigma", [1e-2, 1e-3, 1e-4, 1e-5])
def test_hardly_any_noise_is_counted_soon_and_from_above(sigma):
    """With q = 0.5 and T = 30, a record is drawn 27 times or more with probability 4.2e-6, 26 times or more
    with 3.0e-5: at δ = 1e-5 the loss is that of 26 to 30 releases."""
    begun = time.process_time()
    found = gaussian_epsilon(sigma, 0.5, 30, 1e-5)
    assert time.process_time() - begun < 3
    assert 25.99 / (2 * sigma**2) < found < gaussian_epsilon(sigma, 1, 30, 1e-5) * (1 + 1e-9)


def test_rounds_of_different_kinds_compose():
    """A Gaussian and Poisson samples at two rates, against dp_accounting's accountant."""
    parts = [
        (GaussianDpEvent(3.0), 2),
        (PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 5),
        (PoissonSampledDpEvent(0.3, GaussianDpEvent(2.0)), 9),
    ]
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    rounds = []
    for event, times in parts:
        accountant.compose(event, times)
        rounds += [(PrivacyEvent(event, "aggregate", adjacency="add-remove"),)] * times
    reference = accountant.get_epsilon(1e-6)
    assert epsilon(rounds, BOTH, 1e-6) == pytest.approx(reference, rel=2e-4)


def test_deltas_too_small_for_transforms_are_counted_by_rdp():
    tiny = gaussian_epsilon(1.1, 0.01, 1000, 1e-14)
    assert tiny == gaussian_epsilon(1.1, 0.01, 1000, 1e-14, accountant="rdp")
    assert gaussian_epsilon(5.0, 1.0, 100, 1e-14) == pytest.approx(closed_form(2.0, 1e-14), rel=1e-6)


# Samples of fixed size


@pytest.mark.parametrize(("q", "sigma", "delta"), [(0.01, 1.1, 1e-5), (0.3, 2.0, 1e-3)])
def test_one_fixed_sample_is_the_integral(q, sigma, delta):
    """All contributions are -C but one, which is +C, is drawn with probability q and then moves the sum by
    2 C. At any smaller ε that pair of data sets has more than δ."""

    def divergence(e):
        def excess(x):
            return mixture(x, q, 2, sigma) - exp(e) * norm.pdf(x, 0, sigma)

        start = brentq(excess, 0, 2 + 12 * sigma)
        return quad(excess, start, 2 + 12 * sigma, epsabs=0, epsrel=1e-10)[0]

    found = gaussian_epsilon(sigma, q, 1, delta, population=100, **FIXED)
    assert divergence(found) == pytest.approx(delta, rel=1e-6)
    assert divergence(0.99 * found) > 1.01 * delta
    assert attained_epsilon(sigma, q, 1, delta) == pytest.approx(found, rel=1e-9)


def test_fixed_size_is_between_what_is_attained_and_twice_the_noise_under_rdp():
    """9.8125 is attained; 3.19, which dp_accounting's RDP gives for σ over the sensitivity of replacement, is
    ours for σ = 2.2 over the clip norm, and would be far below the truth if it were taken for σ = 1.1."""
    attained = attained_epsilon(1.1, 0.01, 1000, 1e-5)
    assert 9.8125 - 1e-4 <= attained <= 9.8125 * (1 + 1e-3)
    found = gaussian_epsilon(1.1, 0.01, 1000, 1e-5, population=100, **FIXED)
    assert 10.9577 - 1e-4 <= found <= 10.9577 * (1 + 1e-3)
    rdp = {"accountant": "rdp", "population": 100, **FIXED}
    assert gaussian_epsilon(2.2, 0.01, 1000, 1e-5, **rdp) == pytest.approx(3.1900, rel=1e-4)
    assert gaussian_epsilon(1.1, 0.01, 1000, 1e-5, **rdp) == pytest.approx(15.5658, rel=1e-4)
    assert gaussian_epsilon(2.2, 0.01, 1000, 1e-5, population=100, **FIXED) < 3.19


def test_turning_the_pair_round_in_the_middle_beats_both_ways_alone():
    """Why the worse of two compositions that never turn is no bound. One of two records is drawn in each of
    two steps, σ = 2. In step 1 the other record's contribution is -C. In step 2 it is +C where step 1 told
    more than ε, else -C. At the ε that never turning has for δ = 0.1, this instance has more than δ."""
    q, sigma, delta = 0.5, 2.0, 0.1
    unturned = attained_epsilon(sigma, q, 2, delta)
    fine, x = np.linspace(-20, 22, 4001), np.linspace(-20, 22, 1501)
    p, r = mixture(fine, q, 2, sigma), norm.pdf(fine, 0, sigma)

    def step_2(left, turns):
        turned = turns and left < 0
        return np.trapezoid(np.maximum(r - exp(left) * p if turned else p - exp(left) * r, 0), fine)

    left = unturned - np.log(mixture(x, q, 2, sigma) / norm.pdf(x, 0, sigma))
    never, turning = (
        np.trapezoid(mixture(x, q, 2, sigma) * [step_2(e, turns) for e in left], x) for turns in (False, True)
    )
    assert never == pytest.approx(delta, rel=1e-3)
    assert turning > delta * 1.02
    found = gaussian_epsilon(sigma, q, 2, delta, population=2, **FIXED)
    assert found == pytest.approx(0.82705, rel=1e-3)
    assert found > unturned * 1.05


def test_either_way_is_at_each_epsilon_the_worse_way():
    at = np.linspace(-6, 6, 241)
    one, other = (Pair(ONE_WAY, 0.8, 0.2).deltas(way, at) for way in (0, 1))
    both = Pair(EITHER_WAY, 0.8, 0.2).deltas(0, at)
    assert (both == np.maximum(one, other)).all()
    assert (both[at > 0] == one[at > 0]).all()
    assert (both[at < 0] == other[at < 0]).all()


@pytest.mark.parametrize(
    ("shift", "other"), [(2, 0), (0, 2), (1, -1), (1.5, -0.5), (-2, 0), (0.5, 2), (-1, 1)]
)
def test_either_way_covers_every_pair_of_contributions(shift, other):
    """With contributions x, x' and everyone else's b within the clip, x - b and x' - b are at most 2 C long
    and 2 C apart; "either way" at half the noise is above the integral of each such pair."""
    q, sigma = 0.3, 1.4
    x = np.linspace(-18, 18, 200_001)
    p, r = mixture(x, q, shift, sigma), mixture(x, q, other, sigma)
    for e in (-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0):
        found = np.trapezoid(np.maximum(p - exp(e) * r, 0), x)
        assert found <= Pair(EITHER_WAY, sigma / 2, q).deltas(0, np.array([e]))[0] + 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate must be above 0 and at most 1, got 0.0"),
        ({"sampling_rate": 1.5}, "sampling_rate must be above 0 and at most 1, got 1.5"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be a finite number > 0, got 0.0"),
        ({"noise_multiplier": inf}, "noise_multiplier must be a finite number > 0, got inf"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"accountant": "gdp"}, "accountant must be one of .*'gdp'"),
        ({"adjacency": "swap"}, "adjacency must be one of .*'swap'"),
        ({"sampling": "shuffle"}, "sampling must be one of .*'shuffle'"),
        ({"sampling": "full"}, "sampling_rate must be 1 where sampling is full, got 0.01"),
        ({"population": 0}, "population must be >= 1, got 0"),
        (FIXED, "population must be given where sampling is fixed, got None"),
        ({**FIXED, "population": 150}, "sampling_rate must be a whole number m of records .* 150 .*got 0.01"),
        ({**FIXED, "population": 10, "sampling_rate": 1e-5}, "sampling_rate must be a whole number m of "),
        ({**FIXED, "population": 10}, "sampling_rate must be a whole number m of records .* 10 .*got 0.01"),
        (
            {"accountant": "prv", "adjacency": "replace-one"},
            "accountant must be 'pld' or 'rdp' where records",
        ),
        (
            {"accountant": "prv", "population": 100, **FIXED},
            "accountant must be 'pld' or 'rdp' where records",
        ),
    ],
)
def test_impossible_settings_are_refused(change, message):
    values = {"noise_multiplier": 1.1, "sampling_rate": 0.01, "steps": 10, "delta": 1e-5}
    with pytest.raises(InputError, match=message):
        gaussian_epsilon(**{**values, **change})


def test_a_rate_given_to_a_few_digits_is_that_of_a_whole_cohort():
    exact = gaussian_epsilon(1.1, 256 / 60000, 100, 1e-5, population=60000, **FIXED)
    assert gaussian_epsilon(1.1, 0.0042666667, 100, 1e-5, population=60000, **FIXED) == exact


def test_everyone_in_a_cohort_is_no_sample():
    full = gaussian_epsilon(2.0, 1.0, 5, 1e-5, sampling="full")
    assert gaussian_epsilon(2.0, 1.0, 5, 1e-5, sampling="fixed", population=9) == full
    assert gaussian_epsilon(2.0, 1.0, 5, 1e-5) == full
    assert gaussian_epsilon(4.0, 1.0, 5, 1e-5, population=9, **FIXED) == pytest.approx(full, rel=1e-9)


# Calibration


@pytest.mark.parametrize(
    ("target", "expected"), [(1.0, 3.94165), (2.0, 2.24771), (4.0, 1.38599), (8.0, 0.93593)]
)
def test_calibrated_noise(target, expected):
    sigma = gaussian_sigma(target, 0.1, 100, 1e-5)
    assert expected - 1e-5 <= sigma <= expected * (1 + 2e-4)
    assert gaussian_epsilon(sigma, 0.1, 100, 1e-5) <= target


@pytest.mark.parametrize(
    "how",
    [
        {"accountant": "rdp"},
        {"accountant": "prv"},
        {"adjacency": "replace-one"},
        {"population": 50, **FIXED},
        {"population": 50, "sampling": "fixed", "adjacency": "zero-out"},
    ],
)
@pytest.mark.parametrize("target", [0.3, 5.0])
def test_calibration_is_safe_and_tight_everywhere(target, how):
    sigma = gaussian_sigma(target, 0.1, 60, 1e-5, **how)
    assert gaussian_epsilon(sigma, 0.1, 60, 1e-5, **how) <= target
    assert gaussian_epsilon(sigma * (1 - 3e-4), 0.1, 60, 1e-5, **how) > target


@pytest.mark.parametrize("target", [1e-3, 1.0, 300.0])
def test_plain_gaussian_calibration_inverts_the_closed_form(target):
    sigma = gaussian_sigma(target, 1.0, 1, 1e-5, sampling="full")
    assert closed_form(1 / sigma, 1e-5) <= target
    assert closed_form(1 / (sigma * (1 - 2e-4)), 1e-5) > target


def test_targets_that_no_noise_reaches_are_refused():
    with pytest.raises(InputError, match=r"epsilon must be a finite number > 0, got 0\.0"):
        gaussian_sigma(0.0, 0.1, 10, 1e-5)
    with pytest.raises(InputError, match=r"epsilon must be what some σ from .*'prv', got 0\.001"):
        gaussian_sigma(0.001, 0.1, 10, 1e-5, accountant="prv")


# What ε says about attacks


def test_success_of_a_plain_gaussian_is_that_of_the_likelihood_ratio_test():
    for prior in (0.001, 0.1, 0.9):
        expected = float(norm.cdf(norm.ppf(prior) + 2))
        assert success_bound(prior, 5.0, 1.0, 100, sampling="full") == pytest.approx(expected, rel=1e-9)
    assert success_bound(0.1, 5.0, 1.0, 100) == pytest.approx(0.76376, abs=5e-6)


@pytest.mark.parametrize(("prior", "expected"), [(0.1, 0.17912), (0.01, 0.02535)])
def test_success_bound_of_sampled_noise(prior, expected):
    found = success_bound(prior, 1.1, 0.01, 1000)
    assert expected - 1e-5 <= found <= expected * (1 + 1e-3)


def test_success_bound_is_attained_by_one_step():
    """The best event of probability κ under N(0, σ²) is x > c."""
    q, sigma, prior = 0.2, 0.7, 0.05
    c = sigma * norm.isf(prior)
    best = (1 - q) * prior + q * norm.sf((c - 1) / sigma)
    assert best <= success_bound(prior, sigma, q, 1) <= best * (1 + 2e-4)


def test_success_is_never_certain_and_never_below_the_prior():
    assert success_bound(0.3, 1e4, 0.01, 10) == pytest.approx(0.3, abs=1e-4)
    assert success_bound(0.3, 0.01, 0.5, 100) == pytest.approx(1.0, abs=1e-6)
    for_replaced = success_bound(0.1, 1.1, 0.01, 1000, population=100, **FIXED)
    assert 0.17912 < success_bound(0.1, 1.1, 0.01, 1000, adjacency="replace-one") < for_replaced < 1
    with pytest.raises(InputError, match="prior must be between 0 and 1, got 1"):
        success_bound(1, 1.1, 0.01, 10)
    with pytest.raises(InputError, match=r"got 'add-remove'; with 'replace-one' the bound = 0\.\d"):
        success_bound(0.1, 1.1, 0.01, 10, sampling="fixed", population=100)


# Speed: time of the processor, with five times the room that it needs


def test_speed():
    gaussian_epsilon(1.0, 0.1, 10, 1e-5)
    for q, sigma, steps, delta, *_ in TABLE:
        losses._refined.cache_clear()
        start = time.process_time()
        gaussian_epsilon(sigma, q, steps, delta)
        assert time.process_time() - start < 1.0
    for target, q, steps, delta in [(2.0, 0.1, 100, 1e-5), (1.0, 0.001, 10000, 1e-6)]:
        losses._refined.cache_clear()
        start = time.process_time()
        gaussian_sigma(target, q, steps, delta)
        assert time.process_time() - start < 10.0


def test_a_repeat_is_remembered(monkeypatch):
    event = PrivacyEvent(PoissonSampledDpEvent(0.013, GaussianDpEvent(1.17)), "sum")
    first = epsilon([(event,)] * 3000, BOTH, 1e-5)
    monkeypatch.setattr(losses, "_composed", lambda *a: pytest.fail("composed again"))
    assert epsilon([(replace(event),)] * 3000, BOTH, 1e-5) == first
