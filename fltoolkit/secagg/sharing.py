"""A vector in shares for several servers, which only together can read it.

Additive: S shares modulo 2^b that add up to the vector; any S - 1 are uniform. Shamir 1979: the vector is the
value at zero of a random polynomial of degree t - 1 modulo a prime, the shares its values elsewhere; any t
give it back, any t - 1 are uniform. Both are linear: sums of shares, and shares times a public whole
number, are shares of the sum and of the multiple.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fltoolkit.secagg.prime_field import PRIME, check_points, inverse, matmul, vandermonde
from fltoolkit.secagg.words import reduce


def additive(words: np.ndarray, masks: np.ndarray, bits: int) -> np.ndarray:
    """The last share `[D]` of `words [D]` modulo 2^bits, where the first S - 1 are `masks [S - 1, D]`."""
    last = words.copy()
    for mask in masks:
        last -= mask
    return reduce(last, bits)


def add_up(shares: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """The vector `[D]` behind all additive shares."""
    total = shares[0].copy()
    for share in shares[1:]:
        total += share
    return reduce(total, bits)


def polynomial(words: np.ndarray, noise: np.ndarray, points: Sequence[int], prime: int = PRIME) -> np.ndarray:
    """Shares `[S, D]` of `words [D]`, with `noise [t - 1, D]`, any t of which give it back. Raises InputError
    unless points are distinct and from 1 to prime - 1."""
    check_points(points, prime)
    data = np.concatenate([words[None].astype(np.uint64), noise.astype(np.uint64)])
    return matmul(vandermonde(points, len(data), prime), data, prime)


def interpolate(shares: np.ndarray, points: Sequence[int], prime: int = PRIME) -> np.ndarray:
    """The vector `[D]` behind t shares `[t, D]` at their points."""
    weights = inverse(vandermonde(points, len(points), prime), prime)[:1]
    return matmul(weights, shares, prime).reshape(-1)
