"""What a Bonawitz session costs each party in bytes, by formula.

Bonawitz et al. 2017, ePrint 2017/281, section 7, "Communication": with public keys of a_K bits and shares
of a_S bits, a client of n exchanges 2 n a_K + (5 n - 4) a_S bits beside its m values of ⌈log2 R⌉ bits.
"""

from __future__ import annotations

from math import ceil, log2


def modulus_bits(clients: int, value_bits: int) -> int:
    """⌈log2 R⌉ for R = n (2^bits - 1) + 1, which no sum of n values reaches."""
    return ceil(log2(clients * (2**value_bits - 1) + 1))


def paper_bytes(clients: int, dim: int, value_bits: int, key_bits: int = 256, share_bits: int = 256) -> float:
    """Bytes that a client sends and receives, by the paper's formula."""
    overhead = 2 * clients * key_bits + (5 * clients - 4) * share_bits
    return (overhead + dim * modulus_bits(clients, value_bits)) / 8


def expansion(clients: int, dim: int, value_bits: int) -> float:
    """The same over what sending the values in the clear takes."""
    return paper_bytes(clients, dim, value_bits) / (dim * value_bits / 8)
