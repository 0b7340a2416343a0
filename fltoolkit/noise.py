"""Where noise comes from: exact integer samplers, normals, and a cryptographic source of bits.

**Integers.** The discrete Gaussian N_Z(0, σ²) of Canonne, Kamath and Steinke 2020, arXiv:2004.00010,
Algorithm 3: rejection from the discrete Laplace distribution (Algorithm 2). Each coin that shows heads with
probability exp(-γ) compares a uniform 64-bit word with exp(-γ) in float64, and only where the two are
nearer than `GUARD`, far more than float64 can be wrong by, in rational arithmetic with as many more bits as
it takes. So every coin, and with it every sample, is exact: the distribution is N_Z(0, σ²) itself for the
number σ² that was given, provided that the words are uniform.

**Normals.** A float is no real number: which float64 or float32 values a sampler can return, and which the
sum of signal and noise can be, depends on the signal, and Mironov 2012 (CCS, "On significance of the least
significant bits for differential privacy") reads the signal off the low bits. Holohan and Braghin 2021,
arXiv:2107.10138, show that one Gaussian sample can be inverted to the generator's state and propose sums of
several samples, as Opacus' secure mode does with four over two. Normals from a `Secure` source are such a
sum. What remains: it makes the attack costly but is no proof; the sum of signal and noise is still rounded
to a float, tails end near 8.2 standard deviations for each summand, and running times are not constant.
A proof needs the integer mechanisms (`discrete_gaussian`).

**Sources.** A `torch.Generator` or `numpy.random.Generator` repeats, as experiments must, and whoever knows
the seed knows the noise. `Secure` is the AES-256-CTR keystream of a key from the operating system: it never
repeats, and telling it from uniform bits would break AES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isqrt, prod

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri
from torch import Tensor

from fltoolkit.errors import InputError, require

GUARD = 2.0**-40
"""How near a uniform word may come to a float64 probability before rational arithmetic decides. The
probabilities below are wrong by less than 2^-47, see `_accept`."""

SMALLEST_VARIANCE, LARGEST_VARIANCE = 2.0**-40, 2.0**80
"""Samples then stay below 2^53 in absolute value, where float64 still knows every integer."""


class Secure:
    """Uniform 64-bit words from the AES-256-CTR keystream of a fresh key of `os.urandom`."""

    def __init__(self) -> None:
        self._keystream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next `count` words, uint64."""
        return np.frombuffer(self._keystream.update(bytes(8 * count)), "<u8").astype(np.uint64)


Source = torch.Generator | np.random.Generator | Secure


def numpy_generator(rng: torch.Generator) -> np.random.Generator:
    """NumPy's Philox seeded with the next 256 bits of `rng`: the same numbers for the same state."""
    seed = torch.randint(0, 2**32, (8,), generator=rng, dtype=torch.int64).tolist()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def normal(shape: Sequence[int], rng: torch.Generator | Secure) -> Tensor:
    """Standard normals in `shape`, float32.

    From a `torch.Generator` what `torch.randn` gives. From a `Secure` source half the sum of four inverse
    normal distribution functions at uniform odd multiples of 2^-53, in float64, rounded once.
    """
    if isinstance(rng, torch.Generator):
        return torch.randn(tuple(shape), generator=rng)
    total = np.zeros(prod(shape))
    for _ in range(4):
        total += ndtri(uniform(rng.words(len(total))))
    return torch.from_numpy((total / 2).astype(np.float32)).reshape(tuple(shape))


def uniform(words: np.ndarray) -> np.ndarray:
    """Words -> float64 in (0, 1), odd multiples of 2^-53 each with chance 2^-52: neither 0 nor 1 occurs,
    and u and 1 - u are equally likely."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def discrete_gaussian(sigma2: float | Fraction, size: int, rng: Source) -> np.ndarray:
    """`size` exact samples of N_Z(0, σ²), int64: P(x) ∝ exp(-x² / (2 σ²)) on the integers.

    sigma2: σ², the parameter, from 2^-40 to 2^80. The variance is at most that, and equal to within 1e-6
    from σ² = 1 on.
    """
    require(SMALLEST_VARIANCE <= sigma2 <= LARGEST_VARIANCE, "sigma2", "from 2^-40 to 2^80", sigma2)
    exact = Fraction(sigma2)
    scale = isqrt(int(exact)) + 1
    words = _words_of(rng)

    def draw(count: int) -> np.ndarray:
        y = _discrete_laplace(scale, count, words)
        return y[_accept(np.abs(y), exact, scale, words)]

    return _collect(draw, size)


def _accept(y: np.ndarray, sigma2: Fraction, scale: int, words: Words) -> np.ndarray:
    """Coins of chance exp(-(y - σ²/t)² / (2 σ²)). With r = |y - σ²/t| / σ, float64's error in the exponent
    is below 2^-49 (1 + r)², and (1 + r)² exp(-r² / 2) < 2.5."""
    s2, centre = float(sigma2), float(sigma2 / scale)

    def gamma(i: int) -> Fraction:
        return (int(y[i]) - sigma2 / scale) ** 2 / (2 * sigma2)

    return _coins((y - centre) ** 2 / (2 * s2), gamma, words)


def _discrete_laplace(scale: int, count: int, words: Words) -> np.ndarray:
    """About `count` samples with P(y) ∝ exp(-|y| / scale), int64; Algorithm 2 with s = 1, t = scale."""
    u = _below(scale, count, words)
    u = u[_coins(u / scale, lambda i: Fraction(int(u[i]), scale), words)]
    size = u + scale * _geometric(len(u), words)
    negative = (words(len(u)) >> np.uint64(63)).astype(bool)
    keep = ~(negative & (size == 0))
    return np.where(negative, -size, size)[keep]


def _geometric(count: int, words: Words) -> np.ndarray:
    """How often in a row a coin of chance exp(-1) shows heads, int64."""
    heads, alive = np.zeros(count, np.int64), np.arange(count)
    while len(alive):
        alive = alive[_coins(np.ones(len(alive)), lambda i: Fraction(1), words)]
        heads[alive] += 1
    return heads


def _coins(gamma: np.ndarray, exact: Callable[[int], Fraction], words: Words) -> np.ndarray:
    """Exact coins of chance exp(-γ). gamma: γ in float64; exact(i): γ_i itself, ≥ 0."""
    u = words(len(gamma))
    gap = np.exp(-gamma) - u * 2.0**-64
    heads = gap > 0
    for i in np.flatnonzero(np.abs(gap) < GUARD):
        heads[i] = _decide(int(u[i]), exact(int(i)), words)
    return heads


def _decide(word: int, gamma: Fraction, words: Words) -> bool:
    """Whether the uniform number that starts with the 64 bits of `word` is below exp(-γ)."""
    bits, precision = 64, 96
    while True:
        low, high = exp_bounds(gamma, precision)
        if Fraction(word + 1, 2**bits) <= low:
            return True
        if Fraction(word, 2**bits) >= high:
            return False
        if high - low < Fraction(1, 2 ** (bits + 8)):
            word, bits = (word << 64) | int(words(1)[0]), bits + 64
        precision += 64


def exp_bounds(gamma: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Rationals around exp(-γ), γ ≥ 0, at most 2^-bits apart; from the alternating series at γ / 2^k ≤ 1/2,
    squared k times in fixed point, rounded outwards."""
    if gamma > bits:
        return Fraction(0), Fraction(1, 2**bits)
    halvings = max(0, int(2 * gamma).bit_length())
    work = bits + 2 * halvings + 16
    one = 2**work
    x = Fraction(gamma, 2**halvings)
    low = high = Fraction(1)
    term, k = Fraction(1), 0
    while term > Fraction(1, 2 * one):
        k += 1
        term = _grid(term * x / k, one)
        low, high = (high - term, high) if k % 2 else (low, low + term)
    slack = k + 2
    down, up = int(low * one) - slack, -int(-high * one) + slack
    for _ in range(halvings):
        down, up = (down * down) // one, -((-up * up) // one)
    return Fraction(max(down, 0), one), Fraction(up, one)


def _grid(value: Fraction, one: int) -> Fraction:
    return Fraction(round(value * one), one)


def skellam(mu: float, size: int, rng: Source) -> np.ndarray:
    """`size` samples of the Skellam distribution of variance `mu`, int64: Poisson(μ/2) - Poisson(μ/2).

    NumPy's Poisson sampler accepts by float64 logarithms, so probabilities are right to about 1e-14
    relative, not exact; a `Secure` source is refused.
    """
    require(0 < mu <= 2.0**60, "mu", "above 0 and at most 2^60", mu)
    if isinstance(rng, Secure):
        raise InputError("skellam must be drawn from a seeded generator, got Secure: no exact sampler here")
    numpy_rng = numpy_generator(rng) if isinstance(rng, torch.Generator) else rng
    return numpy_rng.poisson(mu / 2, size) - numpy_rng.poisson(mu / 2, size)


Words = Callable[[int], np.ndarray]
"""The next n uniform 64-bit words."""


def _words_of(rng: Source) -> Words:
    if isinstance(rng, Secure):
        return rng.words
    generator = numpy_generator(rng) if isinstance(rng, torch.Generator) else rng
    return lambda n: generator.integers(0, 2**64, n, np.uint64)


def _below(bound: int, count: int, words: Words) -> np.ndarray:
    """Integers in [0, bound) with equal chance, int64; words of the last, incomplete cycle are redrawn."""
    cycles = np.uint64(2**64 // bound * bound - 1)
    out = words(count)
    while (bad := out > cycles).any():
        out[bad] = words(int(bad.sum()))
    return (out % np.uint64(bound)).astype(np.int64)


def _collect(draw: Callable[[int], np.ndarray], size: int) -> np.ndarray:
    """`size` of what `draw` accepts, in the order of drawing, a proposal being accepted about half the
    time."""
    parts: list[np.ndarray] = []
    have = 0
    while have < size:
        parts.append(draw(int(2.2 * (size - have)) + 32))
        have += len(parts[-1])
    return np.concatenate(parts)[:size] if parts else np.zeros(0, np.int64)
