"""Graphs of secure aggregation: regular, connected, and good as often as the bounds say."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from fltoolkit.errors import InputError
from fltoolkit.secagg.graph import Graph, _log_parted, complete, harary, parameters


def connected(graph, left):
    """By walking, over those who are left."""
    left = set(left)
    if not left:
        return True
    seen, todo = set(), [next(iter(left))]
    while todo:
        c = todo.pop()
        if c not in seen:
            seen.add(c)
            todo += [v for v in graph.neighbours(c) if v in left]
    return seen == left


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 30), st.data())
def test_a_harary_graph_is_regular_and_symmetric(n, data):
    degree = data.draw(st.integers(2, n - 1).filter(lambda k: k * n % 2 == 0))
    members = data.draw(st.permutations(range(100, 100 + n)))
    graph = harary(members, degree, np.random.default_rng(0))
    again = harary(members, degree, np.random.default_rng(0))
    assert graph == again
    assert graph.members == tuple(members)
    assert graph.degree == degree
    for c in members:
        near = graph.neighbours(c)
        assert len(near) == degree
        assert list(near) == sorted(set(near) - {c})
        assert all(c in graph.neighbours(v) for v in near)


@pytest.mark.parametrize(("n", "degree"), [(5, 2), (6, 3), (7, 4), (8, 3), (8, 5), (9, 4), (8, 7)])
def test_it_stays_connected_when_any_k_minus_1_leave_and_not_always_when_k_do(n, degree):
    graph = harary(range(n), degree, np.random.default_rng(1))
    for gone in combinations(range(n), degree - 1):
        assert connected(graph, set(range(n)) - set(gone))
    left = n - degree
    apart = any(not connected(graph, set(range(n)) - set(g)) for g in combinations(range(n), degree))
    assert apart == (left >= 2)


def test_neighbours_are_random():
    n, degree, turns = 12, 4, 3000
    rng = np.random.default_rng(2)
    found = sum(1 in harary(range(n), degree, rng).neighbours(0) for _ in range(turns))
    assert binomtest(found, turns, degree / (n - 1)).pvalue > 1e-4


def test_the_degree_is_that_of_the_client_with_fewest_neighbours():
    assert Graph((1, 2, 3), {1: (2,), 2: (1, 3), 3: (2,)}).degree == 1


def test_the_complete_graph_is_everybody():
    graph = complete([3, 1, 2])
    assert graph.members == (3, 1, 2)
    assert graph.adjacent == {3: (1, 2), 1: (2, 3), 2: (1, 3)}
    assert complete([7]).degree == 0


def failures(n, choice, corrupt, dropout, turns, rng):
    """How often random clients gone make the ring bad: (secrets rebuilt or apart, secrets lost)."""
    half = choice.degree // 2
    order = np.argsort(rng.random((turns, n)), axis=1)
    bad, lost = int(corrupt * n), int(dropout * n)
    corrupted = np.zeros((turns, n), bool)
    dropped = np.zeros((turns, n), bool)
    np.put_along_axis(corrupted, order[:, :bad], True, 1)
    np.put_along_axis(dropped, order[:, bad : bad + lost], True, 1)
    near = [s for s in range(-half, half + 1) if s]
    colluding = sum(np.roll(corrupted, s, 1).astype(int) for s in near)
    there = sum(np.roll(~dropped, s, 1).astype(int) for s in near)
    left = ~(corrupted | dropped)
    apart = np.zeros(turns, bool)
    runs = sum(np.roll(~left, s, 1).astype(int) for s in range(half)) == half
    for t in np.flatnonzero(runs.sum(1) >= 2):
        ring = np.flatnonzero(left[t])
        gaps = np.diff(np.append(ring, ring[0] + n))
        apart[t] = (gaps > half).sum() >= 2
    rebuilt = (colluding >= choice.threshold).any(1)
    return int((rebuilt | apart).sum()), int((there < choice.threshold).any(1).sum())


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout", "bits"), [(60, 0.15, 0.15, 3), (100, 0.2, 0.1, 4), (200, 0.1, 0.3, 2)]
)
def test_random_graphs_fail_no_more_often_than_the_bounds_say_and_not_much_less(n, corrupt, dropout, bits):
    choice = parameters(n, corrupt, dropout, bits, bits)
    turns = 20_000
    insecure, incorrect = failures(n, choice, corrupt, dropout, turns, np.random.default_rng(3))
    for found, bound in ((insecure, choice.insecure), (incorrect, choice.incorrect)):
        assert beta.ppf(0.001, found, turns - found + 1) <= bound or found == 0
    assert insecure / turns > choice.insecure / 5
    assert choice.insecure <= 2.0**-bits
    assert choice.incorrect <= 2.0**-bits


def exact(n, degree, threshold, corrupt, dropout):
    """Both bounds in exact arithmetic."""
    bad, lost = int(corrupt * n + 1e-9), int(dropout * n + 1e-9)

    def tail(marked, least):
        ways = sum(comb(marked, j) * comb(n - 1 - marked, degree - j) for j in range(least, degree + 1))
        return Fraction(ways, comb(n - 1, degree))

    parted = Fraction(n * (n - degree - 1), 2) * Fraction(comb(bad + lost, degree), comb(n, degree))
    return n * tail(bad, threshold) + parted, n * tail(lost, degree - threshold + 1)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout", "security", "correctness"),
    [
        (60, 0.15, 0.15, 3, 3),
        (100, 0.05, 0.05, 40, 20),
        (100, 0.29, 0.57, 5, 1),
        (300, 0.2, 0.1, 30, 20),
        (40, 0, 0, 10, 10),
    ],
)
def test_degree_and_threshold_are_the_smallest_for_which_the_exact_bounds_hold(
    n, corrupt, dropout, security, correctness
):
    def good(k, t):
        insecure, incorrect = exact(n, k, t, corrupt, dropout)
        return insecure <= Fraction(1, 2**security) and incorrect <= Fraction(1, 2**correctness)

    expected = next(((k, t) for k in range(2, n - 1, 2) for t in range(2, k + 1) if good(k, t)), None)
    if expected is None:
        with pytest.raises(InputError, match="use the complete graph"):
            parameters(n, corrupt, dropout, security, correctness)
        return
    choice = parameters(n, corrupt, dropout, security, correctness)
    assert (choice.degree, choice.threshold) == expected
    insecure, incorrect = exact(n, *expected, corrupt, dropout)
    assert choice.insecure == pytest.approx(float(insecure))
    assert choice.incorrect == pytest.approx(float(incorrect))


def test_fractions_that_floats_round_down_count_whole():
    """0.29 · 100 is 28.999... as a product of floats."""
    assert parameters(100, 0.29, 0.1, 10, 10) == parameters(100, 0.2999, 0.1, 10, 10)
    assert parameters(100, 0.29, 0.1, 10, 10) != parameters(100, 0.2899, 0.1, 10, 10)


def test_no_threshold_hands_secrets_to_a_single_neighbour():
    assert parameters(60, 0, 0.2, 10, 10).threshold == 2


def test_the_authors_own_parameters_are_met():
    """k = 38, t = 22 at 5 % each and k = 518, t = 270 at 33 % each for a million, by a coarser rule."""
    for share, degree, threshold in ((0.05, 38, 22), (0.33, 518, 270)):
        choice = parameters(10**6, share, share)
        assert 0.95 * degree <= choice.degree <= degree
        assert 0.9 * threshold <= choice.threshold <= threshold


def test_the_degree_grows_with_the_logarithm_of_n_and_with_every_demand():
    degrees = [parameters(n, 0.2, 0.1).degree for n in (500, 5_000, 50_000, 500_000)]
    assert degrees == sorted(degrees)
    assert degrees[-1] < 2 * degrees[1]
    base = parameters(1000, 0.1, 0.1).degree
    assert parameters(1000, 0.2, 0.1).degree > base
    assert parameters(1000, 0.1, 0.2).degree > base
    assert parameters(1000, 0.1, 0.1, security_bits=60).degree > base
    assert parameters(1000, 0.1, 0.1, correctness_bits=40).degree > base


def test_a_ring_falls_apart_no_more_often_than_its_bound_says():
    """By the ring itself, cut where k / 2 in a row are gone in two places, and by walking the graph."""
    n, degree, gone, turns = 24, 4, 8, 4000
    rng = np.random.default_rng(5)
    apart = 0
    for _ in range(turns):
        graph = harary(range(n), degree, rng)
        apart += not connected(graph, rng.permutation(n)[gone:].tolist())
    bound = float(np.exp(_log_parted(n, degree, gone)))
    assert bound == pytest.approx(n * (n - degree - 1) / 2 * comb(gone, degree) / comb(n, degree))
    assert bound / 4 < apart / turns <= bound
    assert _log_parted(100, 20, 9) == -np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: harary(range(5), 3, np.random.default_rng(0)),
            "degree must be even for an odd number of clients",
        ),
        (
            lambda: harary(range(5), 5, np.random.default_rng(0)),
            "degree must be an integer from 2 to 4 for 5 clients",
        ),
        (
            lambda: harary(range(5), 0, np.random.default_rng(0)),
            "degree must be an integer from 2 to 4 for 5 clients",
        ),
        (lambda: harary(range(5), 1, np.random.default_rng(0)), "degree must be an integer from 2 to 4"),
        (lambda: harary(range(2), 2, np.random.default_rng(0)), "members must be at least 3 clients"),
        (lambda: complete([1, 1]), "members must be distinct, got 1 more than once"),
        (lambda: parameters(0, 0.1, 0.1), "n must be >= 1, got 0"),
        (lambda: parameters(3, 0.1, 0.1), "use the complete graph"),
        (lambda: parameters(100, 1.0, 0.1), "corrupt must be from 0 to below 1, got 1.0"),
        (lambda: parameters(100, 0.1, -0.1), "dropout must be from 0 to below 1, got -0.1"),
        (lambda: parameters(100, 0.6, 0.4), r"corrupt \+ dropout must be below 1, got 1\.0"),
        (lambda: parameters(100, 0.1, 0.1, 0), "security_bits must be a finite number > 0, got 0"),
        (
            lambda: parameters(12, 0.5, 0.4),
            "no degree below 11 suffices for 12 clients .* use the complete graph",
        ),
    ],
)
def test_impossible_graphs_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
