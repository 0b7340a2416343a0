"""A mask in coded pieces: any U of N shares give it back, T of them tell nothing of it.

So et al. 2022, "LightSecAgg", arXiv:2109.14236, section 4: the mask z is cut in U - T pieces, T random ones
are put behind them, and N shares are made of the U by a matrix of which every U rows, and of whose last T
columns every T rows, have an inverse. The rows are those of Vandermonde's matrix at distinct points, none
zero. The code is linear: the sum of several clients' shares at one holder is its share of the sum of their
masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fltoolkit.errors import require
from fltoolkit.secagg.prime_field import PRIME, check_points, inverse, matmul, vandermonde


def piece_size(dim: int, needed: int, private: int) -> int:
    """Words of a piece, and of a share: ⌈D / (U - T)⌉."""
    return -(-dim // (needed - private))


def encode(
    mask: np.ndarray, noise: np.ndarray, points: Sequence[int], needed: int, prime: int = PRIME
) -> np.ndarray:
    """Shares `[N, L]` of a mask `[D]` at N points, with `noise [T, L]`, L = `piece_size`.

    points: distinct, from 1 to prime - 1. needed: U. Raises InputError unless T < U <= N, or where
    points are not so.
    """
    private = len(noise)
    require(private < needed <= len(points), "needed", f"above {private}, at most {len(points)}", needed)
    check_points(points, prime)
    size = piece_size(len(mask), needed, private)
    pieces = np.zeros((needed - private) * size, np.uint64)
    pieces[: len(mask)] = mask
    data = np.concatenate([pieces.reshape(needed - private, size), noise])
    return matmul(vandermonde(points, needed, prime), data, prime)


def decode(
    shares: np.ndarray, points: Sequence[int], dim: int, private: int, prime: int = PRIME
) -> np.ndarray:
    """The mask `[D]`, or the sum of masks, behind U shares `[U, L]` at their points."""
    needed = len(points)
    back = inverse(vandermonde(points, needed, prime), prime)[: needed - private]
    return matmul(back, shares, prime).reshape(-1)[:dim]
