"""Correlated noise: factorisations, their noise, sensitivities by brute force, the ledger of rounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from math import comb, sqrt

import numpy as np
import pytest
import torch
from conftest import protect

from defenses.clip import Clip
from defenses.correlated import Correlated, square_root, toeplitz, tree
from fltoolkit.accounting import epsilon
from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.noise import normal
from fltoolkit.rng import torch_stream

C, K = 0.5, 4

VARIANTS = {
    "independent": {"kind": "independent"},
    "tree": {"kind": "tree", "honaker": False},
    "honaker": {"kind": "tree", "honaker": True},
    "banded": {"kind": "banded", "bands": 3},
    "full": {"kind": "banded", "bands": 64},
}


def made(variant, **options):
    return Correlated(**(VARIANTS[variant] | options))


def context(number=1, seed=5, clients=range(K), memory=None, **changes):
    clients = tuple(clients)
    w = torch.full((len(clients),), 1 / len(clients))
    return RoundContext(seed, number, clients, w, memory={} if memory is None else memory, **changes)


def noise_of(defense, dim, seed=5):
    """The noise that each round's mean carries `[T, D]`, in units of that of one z."""
    stack, memory = DefenseStack([Clip(norm=C), defense]), {}
    found = [
        protect(stack, torch.zeros(K, dim), context(t, seed, memory=memory)).aggregate
        for t in range(1, defense.rounds + 1)
    ]
    unit = defense.noise_multiplier * defense.sensitivity(defense.rounds) * C / K
    return torch.stack(found).double().numpy() / unit


def prefixes(defense):
    """B `[T, m]`."""
    return np.cumsum(defense.factorisation.noise, axis=0)


# --- factorisations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_b_times_c_is_the_matrix_of_prefix_sums(variant, rounds):
    """So that the released prefix sums are the true ones plus noise and nothing else. C ≥ 0 is what the
    sensitivity rests on, and no round may use what is not complete by then."""
    f = made(variant, rounds=rounds).factorisation
    assert np.allclose(prefixes(made(variant, rounds=rounds)) @ f.encoder, np.tri(rounds), atol=1e-12)
    assert (f.encoder >= 0).all()
    for t in range(rounds):
        for i in np.flatnonzero(f.noise[t]):
            assert f.ends[i][0] <= t + 1
    for row, (end, _) in zip(f.encoder, f.ends, strict=True):
        assert not row[end:].any()
    assert len(set(f.ends)) == len(f.ends)


@pytest.mark.parametrize("bands", [1, 2, 5, 12])
def test_the_banded_noise_is_the_inverse(bands):
    f = toeplitz(12, bands)
    assert np.allclose(f.encoder @ f.noise, np.eye(12), atol=1e-12)
    assert np.count_nonzero(f.encoder[:, 0]) == bands
    assert np.linalg.norm(f.encoder, axis=0).max() == pytest.approx(1)


def test_all_bands_are_the_square_root_of_the_prefix_sums():
    """C C = A up to the scaling; the coefficients are binom(2k, k) / 4^k."""
    c = square_root(10)
    assert (c / c[0]).tolist() == pytest.approx([comb(2 * k, k) / 4**k for k in range(10)])
    matrix = toeplitz(10, 10).encoder / c[0]
    assert np.allclose(matrix @ matrix, np.tri(10))


def test_one_band_is_independent_noise_to_the_bit():
    one = noise_of(made("banded", bands=1, rounds=5), 50)
    assert (one == noise_of(made("independent", rounds=5), 50)).all()
    plain = [
        normal((50,), torch_stream(5, "round", t, "server", "defense", "correlated")) for t in range(1, 6)
    ]
    assert np.allclose(one, torch.stack(plain).numpy(), atol=1e-6)


def test_a_trees_prefix_carries_one_unit_of_variance_for_each_binary_one():
    variance = (prefixes(made("tree", rounds=21)) ** 2).sum(1)
    assert variance.tolist() == [float(t.bit_count()) for t in range(1, 22)]


def test_honakers_estimate_has_the_stated_variance():
    """1 / (2 - 2^-h) for each range of 2^h rounds in the prefix; no linear unbiased estimate from the
    ranges inside it is better (least squares)."""
    variance = (prefixes(made("honaker", rounds=21)) ** 2).sum(1)
    expected = [sum(1 / (2 - 2.0**-h) for h in range(5) if t >> h & 1) for t in range(1, 22)]
    assert variance.tolist() == pytest.approx(expected)
    encoder = tree(8, True).encoder
    best = np.ones(8) @ np.linalg.pinv(encoder)
    assert variance[7] == pytest.approx(best @ best)


def test_mean_squared_error_of_prefixes_at_64_rounds():
    """One participation, unit noise multiplier: banded < honaker < tree < independent. Independent is
    (T + 1) / 2; the optimum of any factorisation is above 1."""

    def error(variant, **options):
        d = made(variant, rounds=64, participations=1, **options)
        return d.sensitivity(64) ** 2 * float((prefixes(d) ** 2).sum(1).mean())

    found = [error("banded", bands=16), error("honaker"), error("tree"), error("independent")]
    assert found == sorted(found)
    assert found[3] == pytest.approx(32.5)
    assert 1 < error("full") < found[0] < 0.7 * found[1] < 0.7 * found[2] < 0.7 * found[3]


# --- the noise that is added ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_covariance_of_the_prefix_sums_is_that_of_b(variant):
    """Monte Carlo over D = 40,000 coordinates: each entry within six standard errors,
    √((s_ii s_jj + s_ij²) / D)."""
    defense = made(variant, rounds=6, noise_multiplier=0.7)
    dim = 40_000
    sums = np.cumsum(noise_of(defense, dim), axis=0)
    b = prefixes(defense)
    expected = b @ b.T
    diagonal = np.diag(expected)
    error = np.sqrt((np.outer(diagonal, diagonal) + expected**2) / dim)
    assert (np.abs(sums @ sums.T / dim - expected) < 6 * error).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_scales_with_multiplier_clip_weight_and_sensitivity(variant):
    defense = made(variant, rounds=5, noise_multiplier=3.0, participations=2)
    zero = torch.zeros(1, 20_000)
    first = protect(DefenseStack([Clip(norm=2.0), defense]), zero, context(clients=[1])).aggregate
    b = prefixes(defense)[0]
    assert first.std().item() == pytest.approx(3.0 * 2.0 * defense.sensitivity(5) * sqrt(b @ b), rel=0.03)
    quarter = protect(DefenseStack([Clip(norm=2.0), defense]), zero.repeat(4, 1), context()).aggregate
    assert quarter.std().item() == pytest.approx(first.std().item() / 4, rel=1e-4)


def test_a_resumed_run_adds_the_same_noise():
    """Noise of round 5 without having run rounds 1 to 4 in this process."""
    defense = made("banded", rounds=6)
    ctx = replace(context(5), sensitivity=C, name="correlated")
    alone = defense.server(torch.zeros(30), ctx).double().numpy()
    unit = defense.sensitivity(6) * C / K
    assert np.allclose(alone / unit, noise_of(defense, 30)[4], atol=1e-5)
    assert not np.allclose(noise_of(defense, 30, seed=6)[4], noise_of(defense, 30)[4], atol=0.1)


def test_rows_and_messages_stay_as_they_are():
    rows = torch.randn(K, 30) * 0.01
    done = protect(DefenseStack([Clip(norm=C), made("banded")]), rows, context())
    assert torch.equal(done.messages, rows)
    assert done.aggregate.dtype == rows.dtype
    quiet = protect(DefenseStack([Clip(norm=C), made("banded", noise_multiplier=0.0)]), rows, context())
    assert torch.equal(quiet.aggregate, quiet.total)
    assert quiet.events == ()


# --- sensitivity ----------------------------------------------------------------------------------------


def brute_force(encoder, ends, rounds, most, separation):
    """The largest ‖Σ c_j‖ over all sets of rounds that the options allow, of what is released by `rounds`."""
    used = np.array([end <= rounds for end, _ in ends])
    seen, best = encoder[used][:, :rounds], 0.0
    for size in range(1, most + 1):
        for pattern in combinations(range(rounds), size):
            if all(b - a >= separation for a, b in pairwise(pattern)):
                best = max(best, float(np.linalg.norm(seen[:, pattern].sum(1))))
    return best


@pytest.mark.parametrize("separation", [1, 2, 3, 4])
@pytest.mark.parametrize("most", [1, 2, 3, 9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sensitivity_is_that_of_the_worst_pattern_of_participation(variant, most, separation):
    """At T = 9 and every prefix: exact for Toeplitz matrices, never below for trees, and exact for trees
    with all ranges at separation 1."""
    defense = made(variant, rounds=9, participations=most, separation=separation)
    f = defense.factorisation
    for rounds in range(1, 10):
        true = brute_force(f.encoder, f.ends, rounds, most, separation)
        stated = defense.sensitivity(rounds)
        assert stated >= true - 1e-12
        if variant not in ("tree", "honaker") or (variant == "honaker" and separation == 1) or most == 1:
            assert stated == pytest.approx(true)
        assert stated <= 1.5 * true


def test_directions_other_than_equal_ones_move_less():
    """Random unit contributions in five dimensions over all rounds never exceed the sensitivity."""
    rng = np.random.default_rng(0)
    for variant in VARIANTS:
        defense = made(variant, rounds=9)
        for _ in range(200):
            x = rng.normal(size=(9, 5)) + rng.normal(size=5) * rng.integers(0, 4)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            assert np.linalg.norm(defense.factorisation.encoder @ x) <= defense.sensitivity(9) + 1e-12


def test_known_sensitivities():
    assert made("banded", participations=1).sensitivity(100) == pytest.approx(1)
    assert made("banded", participations=4, separation=3).sensitivity(100) == pytest.approx(2)
    assert made("independent", participations=9).sensitivity(100) == pytest.approx(3)
    assert made("tree", rounds=64, participations=1).sensitivity(64) == pytest.approx(sqrt(7))
    assert made("tree", rounds=4).sensitivity(4) == pytest.approx(sqrt(2 * 1 + 2**2 + 4**2))
    assert made("honaker", rounds=4).sensitivity(4) == pytest.approx(sqrt(4 * 1 + 2 * 2**2 + 4**2))
    assert made("independent").sensitivity(0) == made("tree").sensitivity(0) == 0


# --- the ledger -----------------------------------------------------------------------------------------


def events(defense, rounds):
    stack = DefenseStack([Clip(norm=C), defense])
    return [stack.events(context(t)) for t in range(1, rounds + 1)]


def mu(rounds_events):
    """√Σ 1 / σ², the one Gaussian that all are together."""
    found = [e.event for es in rounds_events for e in es]
    return sqrt(sum(e.noise_multiplier**-2 for e in found if hasattr(e, "noise_multiplier")))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("most", [1, 3, None])
def test_rounds_compose_to_the_stated_mechanism_and_no_prefix_is_understated(variant, most):
    defense = made(variant, rounds=9, noise_multiplier=2.0, participations=most)
    f = defense.factorisation
    ledger = events(defense, 9)
    assert all(len(es) == 1 and es[0].view == "aggregate" for es in ledger)
    assert mu(ledger) == pytest.approx(1 / 2.0)
    std = 2.0 * defense.sensitivity(9)
    for t in range(1, 10):
        true = brute_force(f.encoder, f.ends, t, most or 9, 1)
        assert mu(ledger[:t]) >= true / std - 1e-12


def test_epsilon_of_a_whole_run_is_that_of_one_gaussian():
    ledger = events(made("banded", rounds=12, noise_multiplier=1.0, participations=2), 12)
    assert epsilon(ledger, frozenset({"aggregate"}), 1e-5) == pytest.approx(4.377178, rel=1e-3)
    assert epsilon(ledger, frozenset({"message"}), 1e-5) == float("inf")
    assert epsilon(ledger, frozenset({"sum"}), 1e-5) == float("inf")


def test_rounds_that_add_nothing_cost_nothing():
    """Independent noise and one participation: the first round's sensitivity is already the whole."""
    ledger = events(made("independent", rounds=4, participations=1), 4)
    assert [type(es[0].event).__name__ for es in ledger] == ["GaussianDpEvent"] + ["NoOpDpEvent"] * 3
    assert ledger[0][0].event.noise_multiplier == pytest.approx(1.0)


# --- refusals -------------------------------------------------------------------------------------------


def run(defense, cohorts):
    stack, memory = DefenseStack([Clip(norm=C), defense]), {}
    for t, cohort in enumerate(cohorts, 1):
        protect(stack, torch.zeros(len(cohort), 3), context(t, clients=cohort, memory=memory))


def test_too_many_participations_are_refused_and_as_many_as_stated_are_not():
    defense = made("banded", participations=2)
    run(defense, [[1, 2], [3, 2], [1, 3]])
    with pytest.raises(InputError, match=r"participations must be at least 3, .* round 3 .* client 2, got 2"):
        run(defense, [[1, 2], [3, 2], [4, 2]])
    run(made("banded"), [[1]] * 5)


def test_participations_too_near_are_refused():
    defense = made("banded", separation=3)
    run(defense, [[1], [2], [3], [1], [2]])
    with pytest.raises(InputError, match=r"separation must be at most 2, .* from 1 to 3 of client 1, got 3"):
        run(defense, [[1], [2], [1]])


def test_rounds_beyond_the_known_number_are_refused():
    with pytest.raises(InputError, match="rounds must be at least the round's number 3, got 2"):
        run(made("tree", rounds=2), [[1]] * 3)
    with pytest.raises(InputError, match="rounds must be at least the round's number 3, got 2"):
        events(made("tree", rounds=2), 3)


def test_without_a_clip_it_is_refused():
    with pytest.raises(InputError, match="correlated must come after a clip"):
        DefenseStack([Correlated()])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a finite number >= 0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be a finite number >= 0"),
        ({"kind": "forest"}, r"kind must be one of \('tree', 'banded', 'independent'\), got 'forest'"),
        ({"rounds": 0}, "rounds must be from 1 to 2048, got 0"),
        ({"rounds": 2049}, "rounds must be from 1 to 2048, got 2049"),
        ({"bands": 0}, "bands must be >= 1, got 0"),
        ({"participations": 0}, "participations must be >= 1, got 0"),
        ({"separation": 0}, "separation must be >= 1, got 0"),
    ],
)
def test_impossible_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        Correlated(**option)
