"""Integer samplers against their exact distributions, normals, the cryptographic source, the rotation."""

from __future__ import annotations

import math
import os
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import chi2, chisquare, kstest, norm
from scipy.stats import skellam as skellam_law

from fltoolkit import noise
from fltoolkit.errors import InputError
from fltoolkit.hadamard import random_signs, rotate, unrotate, walsh_hadamard
from fltoolkit.noise import Secure, discrete_gaussian, exp_bounds, normal, numpy_generator, skellam, uniform

# Fixed seeds throughout; a p-value below this is one chance in ten thousand.
UNLIKELY = 1e-4


def discrete_gaussian_law(sigma2, reach):
    x = np.arange(-reach, reach + 1)
    p = np.exp(-(x**2) / (2 * sigma2))
    return x, p / p.sum()


def p_value(samples, x, p):
    """Chi-square of counts against `p` on the integers `x`; cells expected below 10 are added up."""
    assert np.isin(samples, x).all()
    counts = np.bincount(samples - x[0], minlength=len(x)).astype(float)
    expected = p * len(samples)
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        counts, expected = (
            np.append(counts[:-2], counts[-2:].sum()),
            np.append(expected[:-2], expected[-2:].sum()),
        )
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("sigma2", [0.3, 1.0, 2.5, 30.0, Fraction(100, 7)])
def test_discrete_gaussian_follows_its_exact_law(sigma2):
    samples = discrete_gaussian(sigma2, 200_000, np.random.default_rng(3))
    x, p = discrete_gaussian_law(float(sigma2), 80)
    assert p_value(samples, x, p) > UNLIKELY
    near = discrete_gaussian_law(float(sigma2) * 1.03, 80)[1]
    assert p_value(samples, x, near) < UNLIKELY, "the test could not tell a variance 3 % off"


def test_discrete_gaussian_from_the_secure_source_follows_the_same_law():
    samples = discrete_gaussian(2.5, 100_000, Secure())
    assert p_value(samples, *discrete_gaussian_law(2.5, 80)) > 1e-9


@pytest.mark.parametrize("sigma2", [2.0**20, 2.0**40])
def test_discrete_gaussian_of_large_variance_is_as_normal_as_rounding_allows(sigma2):
    samples = discrete_gaussian(sigma2, 400_000, np.random.default_rng(4)).astype(float)
    assert kstest(samples / sigma2**0.5, "norm").pvalue > UNLIKELY
    assert samples.var() / sigma2 == pytest.approx(1, abs=5 * (2 / 400_000) ** 0.5)
    assert set((samples % 2).tolist()) == {0.0, 1.0}


def test_a_million_and_a_half_large_samples_take_seconds():
    begun = time.process_time()
    assert discrete_gaussian(2.0**40, 1_600_000, np.random.default_rng(0)).shape == (1_600_000,)
    assert time.process_time() - begun < 10


def test_variance_is_as_the_docstring_says():
    for sigma2 in (0.2, 0.5, 1.0, 2.0, 10.0):
        x, p = discrete_gaussian_law(sigma2, 80)
        variance = float((x**2 * p).sum())
        assert variance <= sigma2 * (1 + 1e-12)
        if sigma2 >= 1:
            assert variance == pytest.approx(sigma2, abs=1e-6)


def slow_coin(gamma, rng):
    """Canonne et al. 2020, Algorithm 1: exp(-γ) from coins of chance γ / k, in rationals."""
    while gamma > 1:
        if not slow_coin(Fraction(1), rng):
            return False
        gamma -= 1
    k = 1
    while rng.integers(0, gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1


def slow_discrete_gaussian(sigma2, rng):
    """Algorithms 2 and 3 as they are printed, one sample at a time."""
    t = math.isqrt(int(sigma2)) + 1
    while True:
        u = int(rng.integers(0, t))
        if not slow_coin(Fraction(u, t), rng):
            continue
        v = 0
        while slow_coin(Fraction(1), rng):
            v += 1
        y, negative = u + t * v, rng.integers(0, 2)
        if negative and y == 0:
            continue
        if slow_coin((y - sigma2 / t) ** 2 / (2 * sigma2), rng):
            return -y if negative else y


def test_fast_sampler_and_the_papers_pseudocode_have_one_law():
    """Two-sample chi-square over the values that occur often."""
    rng, sigma2 = np.random.default_rng(5), Fraction(7, 2)
    slow = np.array([slow_discrete_gaussian(sigma2, rng) for _ in range(8_000)])
    fast = discrete_gaussian(sigma2, 8_000, rng)
    cells = [np.bincount(np.clip(s, -5, 5) + 5, minlength=11) for s in (slow, fast)]
    difference = ((cells[0] - cells[1]) ** 2 / (cells[0] + cells[1])).sum()
    assert chi2.sf(difference, 10) > UNLIKELY


def test_rational_arithmetic_decides_as_float64_does(monkeypatch):
    """With the guard over everything, every coin is decided in rationals from the same words."""
    fast = discrete_gaussian(11.3, 150, np.random.default_rng(6))
    asked = []
    decide = noise._decide
    monkeypatch.setattr(noise, "GUARD", 2.0)
    monkeypatch.setattr(noise, "_decide", lambda *a: asked.append(1) or decide(*a))
    slow = discrete_gaussian(11.3, 150, np.random.default_rng(6))
    assert len(asked) > 500
    assert fast.tolist() == slow.tolist()


def test_near_a_tie_the_coin_asks_for_more_bits():
    """The 64 bits of exp(-1/3) itself: only further bits of the uniform number can decide."""
    word = int(exp_bounds(Fraction(1, 3), 200)[0] * 2**64)
    further = exp_bounds(Fraction(1, 3), 200)[0] * 2**128 - word * 2**64
    for more, heads in ((int(further) - 1, True), (int(further) + 1, False)):
        drawn = []
        source = lambda n, m=more, d=drawn: d.append(n) or np.array([m], np.uint64)  # noqa: E731
        assert noise._decide(word, Fraction(1, 3), source) is heads
        assert drawn == [1]
    for sure, heads in ((word - 1, True), (word + 1, False)):
        assert noise._decide(sure, Fraction(1, 3), lambda n: pytest.fail("asked for more")) is heads


@pytest.mark.parametrize("gamma", [0, Fraction(1, 7), 1, Fraction(22, 7), 40, 600])
def test_bounds_of_the_exponential_enclose_it_tightly(gamma):
    low, high = exp_bounds(Fraction(gamma), 400)
    assert 0 <= high - low <= Fraction(1, 2**400)
    assert low <= high
    assert float(low) == pytest.approx(math.exp(-gamma), rel=1e-14, abs=1e-120)
    nearer = exp_bounds(Fraction(gamma), 900)
    assert low <= nearer[0] <= nearer[1] <= high


def test_float_error_of_the_acceptance_is_far_below_the_guard():
    rng = np.random.default_rng(7)
    for sigma2 in (Fraction(0.37), Fraction(10**5, 3), Fraction(2) ** 40 + Fraction(1, 3)):
        t = math.isqrt(int(sigma2)) + 1
        y = np.unique(np.abs(rng.normal(0, 3 * float(sigma2) ** 0.5, 30)).astype(np.int64))
        for i, value in enumerate((y - float(sigma2 / t)) ** 2 / (2 * float(sigma2))):
            low, _ = exp_bounds((int(y[i]) - sigma2 / t) ** 2 / (2 * sigma2), 120)
            assert abs(math.exp(-value) - float(low)) < 2.0**-47 < noise.GUARD / 64


@pytest.mark.parametrize("mu", [0.5, 4.0, 60.0])
def test_skellam_follows_its_exact_law(mu):
    samples = skellam(mu, 200_000, np.random.default_rng(8))
    x = np.arange(-100, 101)
    assert p_value(samples, x, skellam_law.pmf(x, mu / 2, mu / 2)) > UNLIKELY
    assert p_value(samples, x, skellam_law.pmf(x, mu / 1.94, mu / 1.94)) < UNLIKELY
    assert samples.var() == pytest.approx(mu, rel=0.02)


def test_skellam_of_large_variance_has_it():
    samples = skellam(2.0**40, 200_000, np.random.default_rng(9)).astype(float)
    assert samples.var() / 2.0**40 == pytest.approx(1, abs=5 * (2 / 200_000) ** 0.5)
    assert kstest(samples / 2.0**20, "norm").pvalue > UNLIKELY


def test_same_state_gives_the_same_numbers_and_another_gives_others():
    def drawn(seed):
        rng = torch.Generator().manual_seed(seed)
        return [discrete_gaussian(50.0, 20, rng).tolist(), skellam(50.0, 20, rng).tolist()]

    assert drawn(1) == drawn(1)
    assert drawn(1)[0] != drawn(2)[0]
    assert drawn(1)[1] != drawn(2)[1]
    rng = torch.Generator().manual_seed(1)
    assert numpy_generator(rng).integers(2**62) != numpy_generator(rng).integers(2**62)


def test_integers_are_uniform_below_any_bound():
    words = noise._words_of(np.random.default_rng(10))
    for bound in (1, 3, 1000, 2**20 + 1):
        drawn = noise._below(bound, 60_000, words)
        assert drawn.min() >= 0
        assert drawn.max() < bound
        if 1 < bound <= 1000:
            assert chisquare(np.bincount(drawn, minlength=bound)).pvalue > UNLIKELY


def test_words_of_an_incomplete_cycle_are_drawn_again():
    """2^64 = 3 · k + 1: the largest word would make 0 likelier."""
    given = iter([np.array([2**64 - 1, 2**64 - 2], np.uint64), np.array([7], np.uint64)])
    assert noise._below(3, 2, lambda n: next(given)).tolist() == [1, 2]


def test_normals_of_a_seed_are_torchs_own():
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(normal((4, 5), a), torch.randn(4, 5, generator=b))


def test_secure_normals_are_normal_and_each_call_differs():
    z = normal((200, 1000), Secure())
    assert (z.shape, z.dtype) == ((200, 1000), torch.float32)
    assert kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-9
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(normal((10,), Secure()), normal((10,), Secure()))
    source = Secure()
    assert not torch.equal(normal((10,), source), normal((10,), source))


def test_secure_normal_is_half_the_sum_of_four(monkeypatch):
    source = Secure()
    given = [np.array([w, 2**64 - 1 - w], np.uint64) for w in (2**60, 2**61, 2**62, 2**63)]
    monkeypatch.setattr(source, "words", lambda n: given.pop(0))
    expected = sum(norm.ppf(2.0 ** (k - 64)) for k in (60, 61, 62, 63)) / 2
    got = normal((2,), source).tolist()
    assert got[0] == pytest.approx(expected, rel=1e-6)
    assert got[0] == -got[1]


def test_uniforms_stay_inside_and_are_symmetric():
    ends = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert ends.tolist() == [2.0**-53, 1 - 2.0**-53]
    assert np.isfinite(norm.ppf(ends)).all()


def test_secure_words_are_aes_ctr_of_a_key_from_the_operating_system(monkeypatch):
    """AES-256 of the counters 0 and 1 under the zero key, known values; in one piece or in two."""
    asked = []
    monkeypatch.setattr(os, "urandom", lambda n: asked.append(n) or bytes(n))
    known = "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"
    assert Secure().words(4).astype("<u8").tobytes().hex() == known
    source = Secure()
    parts = np.concatenate([source.words(1), source.words(3)])
    assert parts.astype("<u8").tobytes().hex() == known
    assert asked == [32, 32]


def test_secure_words_are_uniform_bytes():
    counts = np.bincount(Secure().words(40_000).view(np.uint8), minlength=256)
    assert chisquare(counts).pvalue > 1e-9


@pytest.mark.parametrize("sigma2", [0.0, -1.0, float("nan"), float("inf"), 2.0**81, 2.0**-41])
def test_impossible_variances_are_refused(sigma2):
    with pytest.raises(InputError, match=r"sigma2 must be from 2\^-40 to 2\^80"):
        discrete_gaussian(sigma2, 3, np.random.default_rng(0))
    if not 0 < sigma2 < 1:
        with pytest.raises(InputError, match=r"mu must be above 0 and at most 2\^60"):
            skellam(sigma2, 3, np.random.default_rng(0))


def test_skellam_from_the_secure_source_is_refused():
    with pytest.raises(InputError, match="skellam must be drawn from a seeded generator, got Secure"):
        skellam(1.0, 3, Secure())


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128, 4096])
def test_walsh_hadamard_is_the_matrix(size):
    rows = torch.randn(3, size, dtype=torch.float64)
    matrix = torch.from_numpy(hadamard(size) / size**0.5)
    assert torch.allclose(walsh_hadamard(rows), rows @ matrix, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 6, 7, 12, 64, 100, 255, 257])
def test_rotation_is_orthonormal_and_undone(dim):
    signs = random_signs(dim, torch.Generator().manual_seed(dim)).double()
    identity = torch.eye(dim, dtype=torch.float64)
    turned = rotate(identity, signs)
    assert torch.allclose(turned @ turned.T, identity, atol=1e-12)
    assert torch.allclose(unrotate(turned, signs), identity, atol=1e-12)
    assert torch.equal(identity, torch.eye(dim, dtype=torch.float64))
    assert torch.equal(turned, rotate(identity, signs)), "arguments stay as they were"
    other = signs.clone()
    other[-1] *= -1
    assert not torch.allclose(turned, rotate(identity, other), atol=1e-3)


@pytest.mark.parametrize("dim", [1000, 1024, 1025])
def test_every_column_comes_out_flat(dim):
    """Each coordinate of a rotated unit vector is below 6 / √P, six standard deviations."""
    signs = random_signs(dim, torch.Generator().manual_seed(1)).double()
    largest = rotate(torch.eye(dim, dtype=torch.float64), signs).abs().max()
    assert largest < 6 / (1 << (dim.bit_length() - 1)) ** 0.5
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_rotation_keeps_the_type_and_takes_empty_rows():
    for dtype in (torch.float32, torch.float64):
        rows = torch.randn(2, 77, dtype=dtype)
        signs = random_signs(77, torch.Generator().manual_seed(0))
        assert rotate(rows, signs).dtype == unrotate(rows, signs).dtype == dtype
    assert rotate(torch.empty(3, 0), torch.empty(0)).shape == (3, 0)
    assert unrotate(torch.empty(3, 0), torch.empty(0)).shape == (3, 0)
