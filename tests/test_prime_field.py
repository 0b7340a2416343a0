"""Arithmetic modulo a prime, and the coded masks of LightSecAgg, against Python's own integers."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fltoolkit.errors import InputError
from fltoolkit.secagg.coded_mask import decode, encode, piece_size
from fltoolkit.secagg.prime_field import PRIME, inverse, matmul, uniform, vandermonde

PRIMES = st.sampled_from([2, 3, 5, 7, 65_537, 2**31 - 1, PRIME])


def slow_product(a, b, prime):
    return [
        [sum(int(x) * int(y) for x, y in zip(row, column, strict=True)) % prime for column in b.T]
        for row in a
    ]


@settings(max_examples=80, deadline=None)
@given(PRIMES, st.integers(1, 6), st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_products_are_python_integers_products(prime, m, k, n, seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, prime, (m, k), dtype=np.uint64)
    b = rng.integers(0, prime, (k, n), dtype=np.uint64)
    if seed % 2:
        a[:], b[:] = prime - 1, prime - 1
    assert matmul(a, b, prime).tolist() == slow_product(a, b, prime)


def test_products_are_exact_over_long_sums_and_many_columns():
    k = 1 << 9
    a, b = np.full((1, k), PRIME - 1, np.uint64), np.full((k, 20_000), PRIME - 1, np.uint64)
    assert set(matmul(a, b)[0].tolist()) == {k % PRIME}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([5, 7, 65_537, PRIME]), st.integers(1, 8), st.integers(0, 10**6))
def test_an_inverse_is_one_or_there_is_none(prime, k, seed):
    a = np.random.default_rng(seed).integers(0, prime, (k, k), dtype=np.uint64)
    try:
        found = inverse(a, prime)
    except ZeroDivisionError:
        assert prime < 10  # at random, a chance of 1 / prime
        return
    assert matmul(a, found, prime).tolist() == np.eye(k, dtype=int).tolist()


def test_a_singular_matrix_has_no_inverse_and_one_with_a_zero_pivot_has():
    with pytest.raises(ZeroDivisionError):
        inverse(np.array([[1, 2], [2, 4]], np.uint64))
    assert inverse(np.array([[0, 1], [1, 0]], np.uint64)).tolist() == [[0, 1], [1, 0]]


def test_vandermonde_is_powers():
    rows = vandermonde([1, 2, PRIME - 1], 5)
    assert rows.tolist() == [[pow(x, j, PRIME) for j in range(5)] for x in (1, 2, PRIME - 1)]


def test_uniform_integers_pass_over_words_that_would_bias_them():
    given = iter([np.array([2**32 - 1, 2**32 - 5, 3] + [7] * 20, np.uint32)])
    assert uniform(lambda n: next(given), 3).tolist() == [3, 7, 7]
    rng = np.random.default_rng(0)
    for prime in (3, 5):
        found = uniform(lambda n: rng.integers(0, 2**32, n, dtype=np.uint32), 100_000, prime)
        assert chisquare(np.bincount(found.astype(int), minlength=prime)).pvalue > 1e-4


# --- coded masks ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_u_shares_of_sums_give_the_sum_of_the_masks(data):
    n = data.draw(st.integers(1, 8))
    needed = data.draw(st.integers(1, n))
    private = data.draw(st.integers(0, needed - 1))
    dim, clients = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    masks = rng.integers(0, PRIME, (clients, dim), dtype=np.uint64)
    size = piece_size(dim, needed, private)
    points = list(range(1, n + 1))
    shares = [
        encode(m, rng.integers(0, PRIME, (private, size), dtype=np.uint64), points, needed) for m in masks
    ]
    assert shares[0].shape == (n, size)
    chosen = sorted(data.draw(st.permutations(range(n)))[:needed])
    total = sum(s.astype(object) for s in shares) % PRIME
    back = decode(total[chosen].astype(np.uint64), [points[i] for i in chosen], dim, private)
    assert back.tolist() == [sum(column) % PRIME for column in masks.T.tolist()]


@pytest.mark.parametrize(("n", "needed", "private", "dim"), [(4, 2, 1, 1), (4, 3, 1, 2), (4, 3, 2, 1)])
def test_the_shares_of_t_holders_are_the_same_for_every_mask(n, needed, private, dim):
    """Every mask and every noise over the field of five: any T shares are uniform, whatever the mask."""
    prime = 5
    size = piece_size(dim, needed, private)
    for holders in combinations(range(n), private):
        views = []
        for mask in product(range(prime), repeat=dim):
            seen = Counter()
            for noise in product(range(prime), repeat=private * size):
                drawn = np.array(noise, np.uint64).reshape(private, size)
                shares = encode(np.array(mask, np.uint64), drawn, range(1, n + 1), needed, prime)
                seen[tuple(shares[list(holders)].flatten().tolist())] += 1
            views.append(seen)
        assert all(v == views[0] for v in views)
        assert len(views[0]) == prime ** (private * size)


@pytest.mark.parametrize("holders", [(0, 1), (0, 4), (2, 3)])
def test_the_shares_of_t_holders_are_uniform_together_at_full_size(holders):
    rng = np.random.default_rng(3)
    noise = uniform(lambda n: rng.integers(0, 2**32, n, dtype=np.uint32), 2 * 50_000).reshape(2, -1)
    shares = encode(np.full(100_000, 7, np.uint64), noise, range(1, 6), 4)[list(holders)]
    high, low = shares // 2**28, shares % 16
    for a, b in (high, low):
        assert chisquare(np.bincount((16 * a + b).astype(int), minlength=256)).pvalue > 1e-6


def test_one_share_more_than_t_tells_something():
    prime, views = 5, []
    for mask in range(prime):
        seen = Counter()
        for noise in range(prime):
            shares = encode(np.array([mask], np.uint64), np.array([[noise]], np.uint64), [1, 2, 3], 2, prime)
            seen[tuple(shares[:2, 0].tolist())] += 1
        views.append(seen)
    assert views[0] != views[1]


def test_impossible_codes_are_refused():
    with pytest.raises(InputError, match="needed must be above 2, at most 3, got 2"):
        encode(np.zeros(3, np.uint64), np.zeros((2, 1), np.uint64), [1, 2, 3], 2)
    with pytest.raises(InputError, match="needed must be above 0, at most 3, got 4"):
        encode(np.zeros(3, np.uint64), np.zeros((0, 1), np.uint64), [1, 2, 3], 4)
    for points in ([0, 1, 2], [1, 1, 2], [5, 1, 2]):
        with pytest.raises(InputError, match="points must be distinct and from 1 to 4, got"):
            encode(np.zeros(1, np.uint64), np.zeros((1, 1), np.uint64), points, 2, 5)
