"""The randomised Walsh-Hadamard rotation, for rows of any length.

Ailon and Chazelle 2009 (SIAM J. Comput. 39(1), "The fast Johnson-Lindenstrauss transform") flatten a vector
by random signs and the Walsh-Hadamard matrix: of x ↦ H diag(s) x every coordinate is about ‖x‖₂ / √D.
H needs a power of two. Padding would make rows longer, so another D is covered by two overlapping blocks of
P columns, P the largest power of two that fits: first the leading P columns are rotated, then the trailing
P. Both steps are orthonormal, so the whole is; every column goes through a block of P > D / 2, so every
coordinate of the result is a sum under random signs with a standard deviation of about ‖x‖₂ / √P at most.
Disjoint blocks of the powers of two in D would leave the last columns as they are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FACTOR = 64
"""H is applied as a Kronecker product of matrices of at most this size."""


def rotate(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows `[K, D]` in an orthonormal basis that `signs [D]` of ±1 chooses; same type, same L2 norms."""
    out = rows * signs
    if out.shape[1] == 0:
        return out
    size = _block(out.shape[1])
    out[:, :size] = walsh_hadamard(out[:, :size])
    if size < out.shape[1]:
        out[:, -size:] = walsh_hadamard(out[:, -size:] * _between(signs, size))
    return out


def unrotate(rows: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate` under the same signs, up to the rounding of the rows' type."""
    out = rows.clone()
    if out.shape[1] == 0:
        return out
    size = _block(out.shape[1])
    if size < out.shape[1]:
        out[:, -size:] = walsh_hadamard(out[:, -size:]) * _between(signs, size)
    out[:, :size] = walsh_hadamard(out[:, :size])
    return out * signs


def random_signs(dim: int, rng: torch.Generator) -> Tensor:
    """±1 with equal chance `[dim]`, float32."""
    return 1 - 2 * torch.randint(0, 2, (dim,), generator=rng, dtype=torch.float32)


def walsh_hadamard(rows: Tensor) -> Tensor:
    """Rows `[K, P]` times the P x P Walsh-Hadamard matrix over √P; P a power of two. Its own inverse."""
    count, size = rows.shape
    assert size == _block(size), size
    out, stride = rows.reshape(count, size), 1
    while stride < size:
        factor = min(FACTOR, size // stride)
        matrix = _matrix(factor).to(out)
        out = torch.matmul(matrix, out.reshape(-1, factor, stride)).reshape(count, size)
        stride *= factor
    return out


def _between(signs: Tensor, size: int) -> Tensor:
    """The signs before the second block's step: fresh columns have theirs already."""
    mid = signs[-size:].clone()
    mid[2 * size - len(signs) :] = 1
    return mid


def _block(dim: int) -> int:
    """The largest power of two that is at most `dim`."""
    return 1 << (dim.bit_length() - 1)


@cache
def _matrix(size: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix of `size`, float64, by Sylvester's doubling."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5
