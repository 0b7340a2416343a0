"""Arithmetic modulo a prime below 2^32, on arrays.

Words are unsigned 64-bit integers below the prime, so that sums and products of two do not overflow.
Products of matrices are exact and run at the speed of floating-point ones: halves of 16 bits are multiplied
as float64, whose sums over up to 2^19 terms stay below 2^53.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fltoolkit.errors import require

PRIME = 2**32 - 5
"""The largest prime below 2^32."""

COLUMNS = 1 << 14
"""Of a product, computed at a time."""


def matmul(a: np.ndarray, b: np.ndarray, prime: int = PRIME) -> np.ndarray:
    """`[m, k]` times `[k, n]` modulo the prime, `[m, n]` uint64, exact for k <= 2^19."""
    out = np.empty((a.shape[0], b.shape[1]), np.uint64)
    low, high = _halves(a)
    both = low + high
    for at in range(0, b.shape[1], COLUMNS):
        blow, bhigh = _halves(b[:, at : at + COLUMNS])
        bottom, top = low @ blow, high @ bhigh
        middle = both @ (blow + bhigh) - bottom - top
        found = _reduced(top, prime) * np.uint64(2**32 % prime) % np.uint64(prime)
        found += (_reduced(middle, prime) << np.uint64(16)) % np.uint64(prime)
        found += _reduced(bottom, prime)
        out[:, at : at + COLUMNS] = found % np.uint64(prime)
    return out


def inverse(matrix: np.ndarray, prime: int = PRIME) -> np.ndarray:
    """The inverse `[k, k]` of a matrix modulo the prime, by Gauss and Jordan. Raises ZeroDivisionError
    where there is none."""
    k = len(matrix)
    work = np.concatenate([matrix.astype(np.uint64), np.eye(k, dtype=np.uint64)], axis=1)
    p = np.uint64(prime)
    for column in range(k):
        below = np.flatnonzero(work[column:, column])
        if not len(below):
            raise ZeroDivisionError("matrix must have an inverse modulo the prime")
        pivot = column + int(below[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = work[column] * np.uint64(pow(int(work[column, column]), -1, prime)) % p
        factors = work[:, column].copy()
        factors[column] = 0
        work = (work + (p - factors)[:, None] * work[column][None] % p) % p
    return work[:, k:]


def vandermonde(points: Sequence[int], degree: int, prime: int = PRIME) -> np.ndarray:
    """x^j for every point x and j from 0 to degree - 1, `[points, degree]` uint64."""
    x = np.array(points, np.uint64)
    rows = np.ones((len(x), degree), np.uint64)
    for j in range(1, degree):
        rows[:, j] = rows[:, j - 1] * x % np.uint64(prime)
    return rows


def check_points(points: Sequence[int], prime: int = PRIME) -> None:
    """Raises InputError unless they are distinct and from 1 to prime - 1. A share at 0 would be a secret."""
    good = len(set(points)) == len(points) and all(0 < x < prime for x in points)
    require(good, "points", f"distinct and from 1 to {prime - 1}", list(points))


def uniform(words: Callable[[int], np.ndarray], size: int, prime: int = PRIME) -> np.ndarray:
    """Uniform integers `[size]` below the prime, uint64, from `words(n)`, n uniform 32-bit words: those not
    below the largest multiple of the prime are passed over."""
    most = 2**32 // prime * prime
    found = np.empty(0, np.uint64)
    while len(found) < size:
        drawn = words(size - len(found) + 16)
        found = np.concatenate([found, drawn[drawn < most].astype(np.uint64)])
    return found[:size] % np.uint64(prime)


def _halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper 16 bits as float64."""
    words = words.astype(np.uint32)
    return (words & np.uint32(0xFFFF)).astype(np.float64), (words >> np.uint32(16)).astype(np.float64)


def _reduced(values: np.ndarray, prime: int) -> np.ndarray:
    return values.astype(np.uint64) % np.uint64(prime)
