"""A sum by several servers that do not collude, on secret shares; see `fltoolkit.secagg.mpc`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_bytes
from typing import ClassVar

import numpy as np

from fltoolkit.defense import RoundContext
from fltoolkit.errors import require
from fltoolkit.metrics.traffic import Traffic
from fltoolkit.secagg import mpc
from fltoolkit.secagg.defense import Played, SecureAggregation
from fltoolkit.secagg.prime_field import PRIME
from fltoolkit.secagg.wire import SESSION_BYTES, Wire


@dataclass(frozen=True)
class MPC(SecureAggregation):
    """Share every update among servers that do not collude and show their total alone; exact sum, no ε.

    The options of every secure sum are those of `fltoolkit.secagg.defense.SecureAggregation`. servers: S.
    readers: t, how many of them read the total (None: all, with additive shares; fewer: Shamir's, bits 32),
    so that t - 1 learn nothing. The adversary is one server: its share of a message is what it sees of it.
    """

    name: ClassVar[str] = "mpc"
    input_round: ClassVar[int] = 1
    servers: int = 2
    readers: int | None = None

    def __post_init__(self) -> None:
        require(self.servers >= 2, "servers", ">= 2", self.servers)
        readers = self.servers if self.readers is None else self.readers
        require(2 <= readers <= self.servers, "readers", f"from 2 to {self.servers}", self.readers)
        require(self._additive or self.bits == 32, "bits", "32 with fewer readers than servers", self.bits)
        require(self.bits in range(16, 65), "bits", "an integer from 16 to 64", self.bits)
        super().__post_init__()

    @property
    def _additive(self) -> bool:
        return self.readers in (None, self.servers)

    @property
    def rounds(self) -> int:
        """A client sends nothing, or reaches the first server only."""
        return 2

    @property
    def modulus(self) -> int:
        return 2**self.bits if self._additive else PRIME

    def play(self, words: Mapping[int, np.ndarray], silent: Mapping[int, int], ctx: RoundContext) -> Played:
        n, dim = len(ctx.clients), len(next(iter(words.values())))
        terms = mpc.Terms(
            Wire(token_bytes(SESSION_BYTES)),
            ctx.clients,
            self.servers,
            self.readers or self.servers,
            self.survivors_needed(n),
            dim,
            self.bits,
        )
        done = mpc.run(words, terms, {c: range(number) for c, number in silent.items()})
        seen = {c: done.shares[c] for c in done.survivors} if ctx.witnessed else {}
        traffic = Traffic(sum(done.sent.values()) / n, 0.0)
        return Played(done.total, done.survivors, seen, {}, traffic)
