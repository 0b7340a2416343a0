"""Secure aggregation by masks that cancel in the sum, through dropouts.

Bonawitz et al. 2017, ePrint 2017/281, all rounds of Figure 4, and Bell et al. 2020, ePrint 2020/704, on a
sparse graph of clients; see `fltoolkit.secagg`. Each message alone is uniform; the server reads Σ n_k Δ_k and
Σ n_k over the clients that stayed to the end, exactly as encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from secrets import token_bytes
from typing import ClassVar

import numpy as np

from fltoolkit.defense import RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.noise import numpy_generator
from fltoolkit.rng import torch_stream
from fltoolkit.secagg import bonawitz
from fltoolkit.secagg.bonawitz_client import Client
from fltoolkit.secagg.bonawitz_server import Server
from fltoolkit.secagg.defense import Played, SecureAggregation, digests, play_session
from fltoolkit.secagg.graph import Choice, Graph, complete, harary, parameters
from fltoolkit.secagg.keys import Signer
from fltoolkit.secagg.wire import SESSION_BYTES, Wire
from fltoolkit.secagg.words import unpack

GRAPHS = ("complete", "regular")


@dataclass(frozen=True)
class SecAgg(SecureAggregation):
    """Hide every message behind masks that cancel in the sum; exact modular sum, no ε by itself.

    The options of every secure sum are those of `fltoolkit.secagg.defense.SecureAggregation`; here threshold
    is also the t of the secret sharing, t = ⌈threshold · holders⌉, but where the degree is chosen, t is too.
    graph: "complete", every pair of clients masks each other, or "regular", each with `degree` others (None:
    the smallest even degree that fails with less than 2^-40 in privacy and 2^-20 in finishing, for a fifth of
    the clients colluding and `dropout`, at least a twentieth, dropped). malicious: whether clients sign all
    they send and compare the set of survivors. bind: whether keys are bound to a hash of the model that each
    client received, so that clients who were sent different models add up to nothing. workers: threads that
    make masks.
    """

    name: ClassVar[str] = "secagg"
    graph: str = "complete"
    degree: int | None = None
    malicious: bool = False
    bind: bool = True
    workers: int = 1

    def __post_init__(self) -> None:
        require(self.bits in range(16, 65), "bits", "an integer from 16 to 64", self.bits)
        super().__post_init__()
        require(self.workers >= 1, "workers", ">= 1", self.workers)
        require(self.graph in GRAPHS, "graph", f"one of {GRAPHS}", self.graph)
        if self.degree is not None:
            require(self.degree >= 2, "degree", ">= 2", self.degree)
            require(self.graph == "regular", "graph", "regular where a degree is given", self.graph)
        if self.malicious and self.graph != "complete":
            raise InputError("secagg:graph must be complete with malicious=true, got regular")

    @property
    def rounds(self) -> int:
        return len(bonawitz.SIGNED_ROUNDS if self.malicious else bonawitz.ROUNDS)

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        super().check(sensitivity, cohort)
        if cohort is not None and self.graph == "regular":
            self.degree_for(cohort)

    def degree_for(self, cohort: int) -> int:
        """k of a regular graph of the cohort; raises InputError where there is none."""
        if self.degree is None:
            return self._choice(cohort).degree
        if not (self.degree < cohort and self.degree * cohort % 2 == 0):
            raise InputError(
                f"secagg:degree must be below the cohort of {cohort}, one of the two even, got {self.degree}"
            )
        return self.degree

    def _choice(self, cohort: int) -> Choice:
        return parameters(cohort, corrupt=0.2, dropout=max(self.dropout, 0.05))

    def play(self, words: Mapping[int, np.ndarray], silent: Mapping[int, int], ctx: RoundContext) -> Played:
        signers = {c: Signer() for c in ctx.clients} if self.malicious else {}
        verifiers = {c: s.public for c, s in signers.items()} if self.malicious else None
        terms = self.terms(ctx, len(next(iter(words.values()))), verifiers)
        told = digests(ctx) if self.bind else dict.fromkeys(ctx.clients, b"")
        clients = {c: Client(c, words[c], terms, told[c], signers.get(c)) for c in ctx.clients}
        server = Server(terms, told[ctx.clients[0]], self.workers)
        read = (lambda body: unpack(body, terms.dim, terms.bits)) if ctx.witnessed else None
        return play_session(server, clients, silent, read, self.workers)

    def terms(
        self, ctx: RoundContext, dim: int, verifiers: Mapping[int, bytes] | None = None
    ) -> bonawitz.Terms:
        """The public terms of a round's session, under a number that no other session has."""
        graph = self._graph(ctx)
        least = self.survivors_needed(len(ctx.clients))
        holders = len(ctx.clients) if graph.degree == len(ctx.clients) - 1 else graph.degree
        threshold = max(1, ceil(self.threshold * holders - 1e-9))
        if self.graph == "regular" and self.degree is None:
            threshold = self._choice(len(ctx.clients)).threshold
        wire = Wire(token_bytes(SESSION_BYTES), verifiers)
        return bonawitz.Terms(wire, graph, threshold, least, dim, self.bits)

    def _graph(self, ctx: RoundContext) -> Graph:
        if self.graph == "complete":
            return complete(ctx.clients)
        rng = torch_stream(ctx.seed, "round", ctx.round, "public", "defense", ctx.name)
        return harary(ctx.clients, self.degree_for(len(ctx.clients)), numpy_generator(rng))
