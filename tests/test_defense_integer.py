"""Discrete Gaussian and Skellam: norm bounds that always hold, decoding, noise, privacy, refusals."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, pi, sqrt

import numpy as np
import pytest
import torch
from conftest import protect
from dp_accounting import ZCDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy.stats import chisquare
from scipy.stats import skellam as skellam_law

from defenses.clip import Clip
from defenses.discrete_gaussian import DiscreteGaussian, sum_epsilon
from defenses.secagg import SecAgg
from defenses.skellam import Skellam, renyi_bound
from fltoolkit import integer_domain
from fltoolkit.defense import DefenseStack, RoundContext, Sampling
from fltoolkit.errors import InputError
from fltoolkit.integer_domain import conditional_round, norm_bound
from fltoolkit.rdp_event import INTEGER_ORDERS, RdpCurve

BOTH = [DiscreteGaussian, Skellam]
C = 0.5


def context(clients=4, number=1, seed=5, **changes):
    w = torch.full((clients,), 1 / clients)
    return RoundContext(seed, number, tuple(range(10, 10 + clients)), w, **changes)


def rows(clients=4, dim=300, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(clients, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


def inner(ctx, defense):
    """The context as a stack hands it to `defense` after a clip to C."""
    return replace(ctx, sensitivity=C, name=defense.name)


def silent(monkeypatch, cls):
    monkeypatch.setattr(cls, "draw", lambda self, variance, size, rng: np.zeros(size, np.int64))


# --- rounding -------------------------------------------------------------------------------------------


def test_rounding_keeps_the_norm_bound_whatever_the_row_and_goes_to_a_neighbour():
    """500 random rows on the sphere of radius `norm`: sparse, dense, near integers, halves."""
    rng = np.random.default_rng(0)
    rejecting = 0
    for trial in range(500):
        dim, norm = int(rng.integers(1, 200)), float(10 ** rng.uniform(-2, 2))
        beta = float(rng.uniform(0.05, 0.95))
        x = [rng.normal(size=dim), rng.random(dim) < 0.1, np.rint(rng.normal(size=dim)), np.ones(dim)][
            trial % 4
        ]
        x = np.asarray(x, float) * norm / max(float(np.linalg.norm(x)), 1e-9)
        limit = norm_bound(norm, dim, beta)
        free = np.floor(x) + (rng.random(dim) < x - np.floor(x))
        rejecting += np.linalg.norm(free) > limit
        rounded = conditional_round(x, limit, rng)
        assert rounded.dtype == np.int64
        assert (rounded**2).sum() <= limit**2
        assert (np.abs(rounded - x) < 1).all()
    assert rejecting > 5, "no row put the condition to the test"


def test_bound_is_that_of_the_paper_and_never_above_that_of_every_rounding():
    assert norm_bound(3.0, 4, exp(-0.5)) == min(5.0, sqrt(9 + 1 + 1 * (3 + 1)))
    assert norm_bound(100.0, 10_000, exp(-0.5)) == pytest.approx(sqrt(10_000 + 2_500 + 150))
    assert norm_bound(5.0, 1, 1e-9) == 6.0


def test_a_free_rounding_keeps_the_bound_with_the_stated_chance():
    rng, dim, norm = np.random.default_rng(1), 100, 10.0
    x = rng.normal(size=dim)
    x *= norm / np.linalg.norm(x)
    for beta in (0.9, 0.6):
        limit = norm_bound(norm, dim, beta)
        kept = np.mean(
            [np.linalg.norm(np.floor(x) + (rng.random(dim) < x - np.floor(x))) <= limit for _ in range(2000)]
        )
        assert kept >= 1 - beta - 0.03


def test_rounding_is_unbiased_where_the_bound_is_wide():
    rng, x = np.random.default_rng(2), np.array([0.25, -0.75, 3.0, 1.5, -2.1])
    mean = np.mean([conditional_round(x, 100.0, rng) for _ in range(20_000)], axis=0)
    assert np.abs(mean - x).max() < 5 * 0.5 / sqrt(20_000)


def test_a_row_that_no_rounding_brings_within_the_bound_is_refused():
    with pytest.raises(InputError, match=r"a rounding of norm <= 2 must exist, got a row of norm 9"):
        conditional_round(np.array([9.0]), 2.0, np.random.default_rng(0))


@pytest.mark.parametrize("rotate", [True, False])
def test_what_a_client_sends_without_noise_keeps_the_limit(monkeypatch, rotate):
    """Also rows that no clip shortened: the defense scales by itself what is too long."""
    silent(monkeypatch, DiscreteGaussian)
    for bits in (6, 10, 20):
        defense = DiscreteGaussian(bits=bits, rotate=rotate, noise_multiplier=20.0)
        ctx = inner(context(), defense)
        grid = defense.grid(ctx, 300)
        sent = defense.clients(rows(scale=100.0), ctx).double() / grid.step
        assert torch.equal(sent, sent.round())
        assert (sent.norm(dim=1) <= grid.limit).all()
        assert sent.norm(dim=1).min() > 0.9 * C / grid.step


# --- the pipeline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 7, 256, 300])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("cls", BOTH)
def test_without_noise_the_sum_decodes_to_the_mean_within_the_step(monkeypatch, cls, dim, rotate):
    """A rounding moves each of K messages by less than √D steps; the mean by less than √D steps."""
    silent(monkeypatch, cls)
    stack = DefenseStack([Clip(norm=C), cls(rotate=rotate)])
    given = rows(dim=dim)
    done = protect(stack, given, context())
    mean = Clip(norm=C).clients(given, context()).mean(0)
    step = cls(rotate=rotate).grid(inner(context(), cls()), dim).step
    assert (done.aggregate - mean).double().norm() <= step * sqrt(dim) + 1e-6
    assert (done.aggregate - mean).abs().max() < 6 * step / sqrt(4) + 1e-6
    if rotate and dim > 7:
        assert (done.total - mean).abs().max() > 100 * step, "messages are rotated"


@pytest.mark.parametrize("cls", BOTH)
def test_noise_of_the_mean_is_that_of_central_noise(cls):
    """Standard deviation noise_multiplier · C / K on each coordinate; K = 5, D = 40,000."""
    stack = DefenseStack([Clip(norm=C), cls(noise_multiplier=1.5, bits=12)])
    done = protect(stack, torch.zeros(5, 40_000), context(5))
    assert done.aggregate.std().item() == pytest.approx(1.5 * C / 5, rel=0.02)
    assert done.messages.std(dim=1).tolist() == pytest.approx([1.5 * C / sqrt(5)] * 5, rel=0.02)
    correlation = torch.corrcoef(done.messages) - torch.eye(5)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize("cls", BOTH)
def test_a_declared_cohort_shares_the_noise_where_a_context_holds_a_part_of_it(cls):
    """Cohorts stream through in chunks: the same rows, the same messages."""
    given, ctx = rows(6), context(6, sampling=Sampling("fixed", 0.1, 60))
    defense = cls()
    whole = defense.clients(given, inner(ctx, defense))
    part = replace(ctx, clients=ctx.clients[:2], weights=ctx.weights[:2])
    assert torch.equal(whole[:2], defense.clients(given[:2], inner(part, defense)))
    told = cls(cohort=6)
    unsampled = replace(part, sampling=Sampling())
    assert torch.equal(whole[:2], told.clients(given[:2], inner(unsampled, told)))


@pytest.mark.parametrize("cls", BOTH)
def test_the_whole_pipeline_is_unbiased(cls):
    """Mean of 400 rounds against the true mean: every coordinate within five standard errors, and within
    four in the mean square; the conditional rounding's bias is far below the noise at 16 bits."""
    given = rows(4, 20, 0.1)
    stack = DefenseStack([Clip(norm=C), cls(noise_multiplier=0.5)])
    found = torch.stack([protect(stack, given, context(number=t)).aggregate for t in range(1, 401)])
    expected = Clip(norm=C).clients(given, context()).mean(0)
    errors = (found.mean(0) - expected) / (0.5 * C / 4 / sqrt(400))
    assert errors.abs().max() < 5
    assert 0.3 < errors.square().mean() < 2.2


@pytest.mark.parametrize("cls", BOTH)
def test_secure_aggregation_gives_exactly_the_same_aggregate(cls):
    """The server puts either mean back on the grid, so nothing of the encodings remains."""
    given = rows(5)
    plain = protect(DefenseStack([Clip(norm=C), cls()]), given, context(5))
    hidden = protect(DefenseStack([Clip(norm=C), cls(), SecAgg(cohort=5)]), given, context(5))
    assert torch.equal(plain.aggregate, hidden.aggregate)
    assert (plain.total - hidden.total).abs().max() <= 1 / (2 * SecAgg().encoding(5, 1).scale) + 1e-7
    assert hidden.messages.dtype == torch.int64


@pytest.mark.parametrize("cls", BOTH)
def test_what_is_released_is_a_function_of_the_integers_sum(cls):
    """Moving a unit from one client to another changes no bit of the aggregate."""
    defense = cls()
    ctx = inner(context(3), defense)
    sent = defense.clients(rows(3), ctx)
    step = defense.grid(ctx, 300).step
    moved = sent.clone()
    moved[0] += step
    moved[1] -= step
    first, second = (defense.server(m.mean(0), ctx) for m in (sent, moved))
    assert torch.equal(first, second)
    moved[1] += step
    assert not torch.equal(first, defense.server(moved.mean(0), ctx))


@pytest.mark.parametrize("cls", BOTH)
def test_messages_are_exact_multiples_of_a_power_of_two(cls):
    for bits in (8, 16, 22):
        defense = cls(bits=bits)
        ctx = inner(context(), defense)
        step = defense.grid(ctx, 300).step
        assert np.log2(step) == round(np.log2(step))
        single, double = (defense.clients(rows().to(t), ctx) for t in (torch.float32, torch.float64))
        assert torch.equal(single.double(), double)
        assert torch.equal(single.double() / step, (single.double() / step).round())


@pytest.mark.parametrize("rotate", [True, False])
def test_the_sum_fits_in_the_stated_bits_and_not_in_two_fewer(rotate):
    """Clients who all send the same row, or a single coordinate where nothing rotates: the widest range."""
    row = torch.zeros(1, 4096)
    row[0, 5] = C
    if rotate:
        row = torch.randn(1, 4096)
        row *= C / row.norm()
    defense = DiscreteGaussian(bits=14, noise_multiplier=0.3, rotate=rotate)
    ctx = inner(context(8), defense)
    total = defense.clients(row.repeat(8, 1), ctx).double().sum(0) / defense.grid(ctx, 4096).step
    assert 2**11 < total.abs().max() <= 2**13


def test_read_undoes_the_rotation_of_messages():
    defense = DiscreteGaussian(noise_multiplier=1e-3)
    ctx = inner(context(), defense)
    sent = defense.clients(rows(scale=0.01), ctx)
    readable = defense.read(sent, ctx)
    clipped = rows(scale=0.01) * (C / rows(scale=0.01).norm(dim=1, keepdim=True)).clamp_max(1)
    cosine = torch.cosine_similarity(readable, clipped, dim=1)
    assert (cosine > 0.99).all()
    assert (torch.cosine_similarity(sent, clipped, dim=1).abs() < 0.3).all()


@pytest.mark.parametrize("cls", BOTH)
def test_rounds_seeds_and_clients_differ_and_a_repeat_does_not(cls):
    stack, zero = DefenseStack([Clip(norm=C), cls()]), torch.zeros(2, 100)
    base = protect(stack, zero, context(2)).messages
    assert torch.equal(base, protect(stack, zero, context(2)).messages)
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base, protect(stack, zero, context(2, number=2)).messages)
    assert not torch.equal(base, protect(stack, zero, context(2, seed=6)).messages)
    defense = cls()
    signs = [defense.signs(inner(context(number=t), defense), 100) for t in (1, 1, 2)]
    assert torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])


def test_secure_noise_never_repeats_and_has_the_same_size():
    stack = DefenseStack([Clip(norm=C), DiscreteGaussian(secure_rng=True)])
    first, second = (protect(stack, torch.zeros(2, 20_000), context(2)).messages for _ in range(2))
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(C / sqrt(2), rel=0.03)


def test_empty_poisson_round_releases_nothing_and_costs_nothing():
    how = Sampling("poisson", 0.1, 30)
    ctx = RoundContext(0, 1, (), torch.empty(0), sampling=how)
    stack = DefenseStack([Clip(norm=C), DiscreteGaussian()])
    assert stack.server(torch.zeros(50), ctx).tolist() == [0.0] * 50
    assert [(e.event.__class__.__name__, e.view) for e in stack.events(ctx)] == [
        ("NoOpDpEvent", "message"),
        ("NoOpDpEvent", "sum"),
    ]


def test_a_poisson_cohorts_sum_is_divided_by_its_expectation():
    """The mean is the sum over 3, though 5 came: decoded all the same, with each client's noise a third."""
    how = Sampling("poisson", 0.1, 30)
    ctx = RoundContext(0, 1, tuple(range(5)), torch.full((5,), 1 / 3.0), sampling=how)
    stack = DefenseStack([Clip(norm=C), DiscreteGaussian(noise_multiplier=0.01)])
    given = rows(5, scale=0.01)
    done = protect(stack, given, ctx)
    expected = Clip(norm=C).clients(given, ctx).sum(0) / 3
    assert (done.aggregate - expected).std().item() == pytest.approx(0.01 * C * sqrt(5 / 3) / 3, rel=0.15)


# --- privacy --------------------------------------------------------------------------------------------


def events(defense, clients=4, dim=300, **changes):
    stack, ctx = DefenseStack([Clip(norm=C), defense]), context(clients, **changes)
    return {e.view: e.event for e in protect(stack, torch.zeros(clients, dim), ctx).events}


def test_discrete_gaussian_states_the_papers_bound():
    found = events(DiscreteGaussian(noise_multiplier=2.0))
    grid = DiscreteGaussian(noise_multiplier=2.0).grid(inner(context(), DiscreteGaussian()), 300)
    assert grid.variance == pytest.approx((2.0 * C / grid.step) ** 2 / 4)
    assert grid.limit == norm_bound(C / grid.step, 300, exp(-0.5))
    assert set(found) == {"message", "sum"}
    assert found["message"].rho == pytest.approx(grid.limit**2 / (2 * grid.variance))
    assert found["sum"].rho == pytest.approx(grid.limit**2 / (8 * grid.variance))
    assert found["sum"].rho > 1 / (2 * 2.0**2), "rounding inflates the sensitivity"


def test_fine_grids_come_close_to_the_gaussian_and_coarse_ones_cost():
    """ρ = 1 / (2 σ²) for the continuous Gaussian."""
    rho = [events(DiscreteGaussian(noise_multiplier=1.0, bits=b))["sum"].rho for b in (8, 12, 20)]
    assert rho[0] > rho[1] > rho[2] > 0.5
    assert rho[2] == pytest.approx(0.5, rel=1e-3)


def test_sum_bound_in_numbers():
    """τ for n = 3: 10 (e^{-π² σ²} + e^{-4 π² σ² / 3}); both branches of the minimum."""
    tau = 10 * (exp(-(pi**2) * 0.5) + exp(-4 / 3 * pi**2 * 0.5))
    plain = 2.0 / sqrt(3 * 0.5)
    assert sum_epsilon(2.0, 0.5, 1, 3) == pytest.approx(sqrt(plain**2 + tau / 2))
    assert sum_epsilon(2.0, 2.0, 10**12, 3) == pytest.approx(
        2.0 / sqrt(6) + 10 * (exp(-2 * pi**2) + exp(-8 / 3 * pi**2)) * 1e6, rel=1e-9
    )
    assert sum_epsilon(2.0, 0.5, 10, 1) == 2.0 / sqrt(0.5)


def pmf_of_sum(variance, terms, reach=60):
    x = np.arange(-reach, reach + 1)
    one = np.exp(-(x**2) / (2 * variance))
    p = one / one.sum()
    total = p
    for _ in range(terms - 1):
        total = np.convolve(total, p)
    return total


def renyi(p, shift, order):
    """Divergence of order α of p from p shifted by an integer, over their common support, with tails cut."""
    a, b = p[shift:], p[: len(p) - shift]
    keep = (a > 1e-250) & (b > 1e-250)
    return float(np.logaddexp.reduce(order * np.log(a[keep]) - (order - 1) * np.log(b[keep])) / (order - 1))


@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("variance", [0.25, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shift", [1, 2])
def test_divergence_of_sums_of_discrete_gaussians_is_within_the_bound(terms, variance, shift):
    """One coordinate, computed from the exact probabilities: D_α ≤ α ε² / 2."""
    p = pmf_of_sum(variance, terms)
    epsilon = sum_epsilon(shift, variance, 1, terms)
    for order in (1.5, 2.0, 4.0):
        assert renyi(p, shift, order) <= order * epsilon**2 / 2 * (1 + 1e-9)
    if terms == 1:
        assert renyi(p, shift, 2.0) == pytest.approx(epsilon**2, rel=1e-6)


@pytest.mark.parametrize("mu", [1.0, 5.0, 40.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_divergence_of_skellam_is_within_the_bound_and_near_it(mu, shift):
    p = skellam_law.pmf(np.arange(-150, 151), mu / 2, mu / 2)
    for order in (2.0, 3.0, 8.0):
        true, bound = renyi(p, shift, order), renyi_bound(order, shift, shift, mu)
        assert true <= bound
        if mu == 40.0:
            assert bound < 1.2 * true


def test_skellam_bound_in_numbers():
    """α Δ₂² / 2μ + ((2α - 1) Δ₂² + 6 Δ₁) / 4μ², and 3 Δ₁ / 2μ where that is less."""
    assert renyi_bound(2.0, 3.0, 2.0, 5.0) == pytest.approx(0.8 + 0.3)
    assert renyi_bound(2.0, 3.0, 2.0, 0.5) == pytest.approx(8 + 9)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_skellam_states_the_papers_bound(bits):
    """On coarse grids Δ₂ < √D, so that Δ₁ ≤ Δ₂² is the better bound."""
    defense = Skellam(noise_multiplier=2.0, bits=bits)
    found = events(defense)
    grid = defense.grid(inner(context(), defense), 300)
    assert (grid.limit < sqrt(300)) == (bits < 16)
    l2 = grid.limit
    l1 = min(sqrt(300) * l2, l2**2)
    for view, terms in (("message", 1), ("sum", 4)):
        curve = found[view]
        assert curve.orders == INTEGER_ORDERS
        mu = terms * grid.variance
        for a, value in list(zip(curve.orders, curve.values, strict=True))[::20]:
            first = ((2 * a - 1) * l2**2 + 6 * l1) / (4 * mu**2)
            assert value == pytest.approx(a * l2**2 / (2 * mu) + min(first, 1.5 * l1 / mu), rel=1e-12)
    assert hash(found["sum"]) == hash(events(defense)["sum"])


def test_epsilon_of_both_is_that_of_rdp_at_their_noise():
    """At 20 bits both cost what a Gaussian costs under the same accountant, to 1 %."""
    accountant = RdpAccountant(INTEGER_ORDERS)
    accountant.compose(ZCDpEvent(0.5))
    gaussian = accountant.get_epsilon(1e-5)
    accountant = RdpAccountant(INTEGER_ORDERS)
    accountant.compose(events(DiscreteGaussian(bits=20))["sum"])
    assert accountant.get_epsilon(1e-5) == pytest.approx(gaussian, rel=0.01)
    curve = events(Skellam(bits=20))["sum"]
    assert compute_epsilon(curve.orders, curve.values, 1e-5)[0] == pytest.approx(gaussian, rel=0.01)


@pytest.mark.parametrize("cls", BOTH)
def test_those_who_fail_take_their_noise_with_them(cls):
    """Noise shared by 10 of whom 4 came: the sum's guarantee is that of 4 shares."""
    how = Sampling("fixed", 0.1, 100)
    full = events(cls(bits=20), 10, sampling=how)["sum"]
    few = events(cls(bits=20), 4, sampling=how)["sum"]
    cost = [getattr(e, "rho", None) or e.values[0] for e in (full, few)]
    assert cost[1] == pytest.approx(cost[0] * 10 / 4, rel=0.01)


def test_privacy_without_knowing_the_dimension_is_refused():
    ctx = inner(context(), DiscreteGaussian())
    with pytest.raises(InputError, match="discrete-gaussian needs the number of parameters"):
        DiscreteGaussian().privacy(ctx)


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
def test_impossible_lists_are_refused(cls):
    with pytest.raises(InputError, match=f"{cls.name} must come after a clip"):
        DefenseStack([cls()])
    with pytest.raises(InputError, match=f"{cls.name} must come after a clip"):
        DefenseStack([Clip(), cls(), cls()])
    with pytest.raises(InputError, match=f"{cls.name}:clients must equal the round's cohort of 3, got 4"):
        DefenseStack([Clip(), cls(cohort=4)], 3)
    assert cls(cohort=4).wanted_cohort == 4
    assert cls(cohort=4).public()["clients"] == 4


@pytest.mark.parametrize("cls", BOTH)
def test_unequal_weights_are_refused_wherever_they_are_met(cls):
    ctx = inner(replace(context(), weights=torch.tensor([0.4, 0.2, 0.2, 0.2])), cls())
    for act in (
        lambda: cls().clients(rows(), ctx),
        lambda: cls().server(rows()[0], ctx),
        lambda: cls().privacy(ctx),
    ):
        with pytest.raises(InputError, match=r"all clients must have equal weights.* from 0.2 to 0.4"):
            act()


def test_rows_that_somebody_changed_after_it_are_refused():
    stack = DefenseStack([Clip(norm=C), DiscreteGaussian(), Clip(norm=C)])
    with pytest.raises(InputError, match="the sum must be a multiple of the step"):
        protect(stack, rows(), context())


def test_integers_that_the_float_cannot_hold_are_refused():
    defense = DiscreteGaussian(bits=24, k_stddevs=0.1, noise_multiplier=1.0)
    ctx = inner(context(), defense)
    with pytest.raises(InputError, match=r"integers in torch.float32 must be below 16777216"):
        defense.clients(rows(), ctx)
    assert defense.clients(rows().double(), ctx).dtype == torch.float64


@pytest.mark.parametrize("value", [inf, float("nan")])
def test_rows_that_are_not_finite_are_refused(value):
    given = rows()
    given[2, 7] = value
    with pytest.raises(InputError, match="update of client 12 must be finite"):
        DiscreteGaussian().clients(given, inner(context(), DiscreteGaussian()))


def test_noise_too_small_for_the_theorem_is_refused():
    defense = DiscreteGaussian(bits=4, noise_multiplier=0.01)
    with pytest.raises(InputError, match=r"discrete-gaussian:bits must be such that .* 0\.25 steps², got 4"):
        defense.clients(rows(), inner(context(), defense))
    assert Skellam(bits=4, noise_multiplier=0.01).clients(rows(), inner(context(), Skellam())).shape == (
        4,
        300,
    )
    crowd = DiscreteGaussian(bits=4)
    with pytest.raises(InputError, match="discrete-gaussian:bits must be enough for 64 clients, got 4"):
        crowd.grid(inner(context(64), crowd), 300)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"noise_multiplier": 0.0}, r"noise_multiplier must be a finite number > 0, got 0\.0"),
        ({"noise_multiplier": inf}, "noise_multiplier must be a finite number > 0"),
        ({"cohort": 0}, "clients must be >= 1, got 0"),
        ({"bits": 1}, "bits must be an integer from 2 to 24, got 1"),
        ({"bits": 25}, "bits must be an integer from 2 to 24, got 25"),
        ({"k_stddevs": 0.0}, "k_stddevs must be a finite number > 0"),
        ({"beta": 0.0}, "beta must be between 0 and 1"),
        ({"beta": 1.0}, "beta must be between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(cls, option, message):
    with pytest.raises(InputError, match=message):
        cls(**option)


def test_skellam_has_no_secure_source():
    with pytest.raises(InputError, match="secure_rng must be false"):
        Skellam(secure_rng=True)


def test_impossible_curves_are_refused():
    with pytest.raises(InputError, match="values must be one for each order, got 1"):
        RdpCurve((2.0, 3.0), (1.0,))
    with pytest.raises(InputError, match="orders must be above 1"):
        RdpCurve((1.0,), (1.0,))
    with pytest.raises(InputError, match="values must be finite numbers >= 0"):
        RdpCurve((2.0,), (-1.0,))
    assert RdpCurve.of(lambda a: a / 2, (2.0, 4.0)) == RdpCurve((2.0, 4.0), (1.0, 2.0))


def test_what_a_client_sends_is_rounding_plus_the_drawn_noise():
    """Of a zero row the integers are the noise: its law by chi-square, D = 50,000."""
    defense = DiscreteGaussian(bits=6, noise_multiplier=1.0, k_stddevs=20.0)
    ctx = inner(context(1), defense)
    grid = defense.grid(ctx, 50_000)
    sent = (defense.clients(torch.zeros(1, 50_000), ctx)[0].double() / grid.step).long().numpy()
    reach = 5
    x = np.arange(-reach, reach + 1)
    p = np.exp(-(x**2) / (2 * grid.variance))
    counts = np.bincount(np.clip(sent, -reach, reach) + reach, minlength=2 * reach + 1)
    expected = p / np.exp(-(np.arange(-60, 61) ** 2) / (2 * grid.variance)).sum() * len(sent)
    expected[[0, -1]] += (len(sent) - expected.sum()) / 2
    used = expected > 10
    assert chisquare(counts[used], expected[used] * counts[used].sum() / expected[used].sum()).pvalue > 1e-4
    assert integer_domain.TRIES >= 100
