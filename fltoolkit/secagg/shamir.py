"""Shamir's secret sharing: t shares fix a secret, fewer tell nothing of it.

Shamir 1979, "How to share a secret", over the integers modulo the largest prime below 2^256: the secret is
the value at zero of a random polynomial of degree t - 1, and share i its value at i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from secrets import randbelow

from fltoolkit.errors import require

PRIME = 2**256 - 189
"""The largest prime below 2^256: a share of 32 bytes' secret has 32 bytes."""


def share(
    secret: int,
    threshold: int,
    points: Sequence[int],
    prime: int = PRIME,
    draw: Callable[[int], int] = randbelow,
) -> list[int]:
    """A share for each of `points` (distinct, from 1 to prime - 1), of which any `threshold` fix the secret.

    draw(n): a uniform integer from 0 to n - 1, the system's by default. Raises InputError where the secret is
    not below the prime, or the threshold is not from 1 to the number of points.
    """
    require(0 <= secret < prime, "secret", f"from 0 to {prime - 1}", "another")
    require(1 <= threshold <= len(points), "threshold", f"from 1 to {len(points)}", threshold)
    polynomial = [*(draw(prime) for _ in range(threshold - 1)), secret]
    shares = []
    for x in points:
        value = 0
        for coefficient in polynomial:
            value = (value * x + coefficient) % prime
        shares.append(value)
    return shares


def combine(points: Sequence[int], shares: Sequence[int], prime: int = PRIME) -> int:
    """The secret behind the shares at `points`; any number that is not below the threshold will do."""
    return sum(w * s for w, s in zip(_weights(tuple(points), prime), shares, strict=True)) % prime


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Lagrange's weights for the value at zero: w_i = Π_{j≠i} x_j / (x_j - x_i)."""
    weights = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        weights.append(above * pow(below, -1, prime) % prime)
    return tuple(weights)
