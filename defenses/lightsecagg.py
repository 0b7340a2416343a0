"""Secure aggregation with one mask a client, whose sum is recovered in one shot.

So et al. 2022, arXiv:2109.14236; see `fltoolkit.secagg.lightsecagg`. Dropouts cost the server nothing
beyond the one decoding that it does anyway; clients pay with shares of their masks, each D / (U - T) values
long, for all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_bytes
from typing import ClassVar

import numpy as np

from fltoolkit.defense import RoundContext
from fltoolkit.errors import require
from fltoolkit.secagg.defense import Played, SecureAggregation, digests, play_session
from fltoolkit.secagg.lightsecagg import ROUNDS, WORD, Client, Server, Terms
from fltoolkit.secagg.prime_field import PRIME
from fltoolkit.secagg.wire import SESSION_BYTES, Wire


@dataclass(frozen=True)
class LightSecAgg(SecureAggregation):
    """Hide every message behind one mask whose coded shares the others hold; exact sum modulo 2^32 - 5, no ε.

    The options of every secure sum are those of `fltoolkit.secagg.defense.SecureAggregation`; bits must be
    32. colluding: T as a share of the cohort, ⌊colluding · K⌋ and below U = ⌈threshold · K⌉; so many
    clients learn nothing of another's mask, even together with the server.
    """

    name: ClassVar[str] = "lightsecagg"
    colluding: float = 0.5

    def __post_init__(self) -> None:
        require(self.bits == 32, "bits", "32", self.bits)
        super().__post_init__()
        require(0 <= self.colluding < 1, "colluding", "from 0 to below 1", self.colluding)

    @property
    def rounds(self) -> int:
        return len(ROUNDS)

    @property
    def modulus(self) -> int:
        return PRIME

    def play(self, words: Mapping[int, np.ndarray], silent: Mapping[int, int], ctx: RoundContext) -> Played:
        n, dim = len(ctx.clients), len(next(iter(words.values())))
        needed = self.survivors_needed(n)
        private = min(needed - 1, int(self.colluding * n))
        terms = Terms(Wire(token_bytes(SESSION_BYTES)), ctx.clients, needed, private, dim)
        told = digests(ctx)
        clients = {c: Client(c, words[c], terms, told[c]) for c in ctx.clients}
        read = (lambda body: np.frombuffer(body, WORD)) if ctx.witnessed else None
        return play_session(Server(terms), clients, silent, read)
