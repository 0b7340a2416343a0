"""What the defenses that hide messages have in common: encoding, dropouts, and the mean of who survives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import ceil, sqrt
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fltoolkit.defense import Defense, RoundContext, SecureSum
from fltoolkit.errors import InputError, require
from fltoolkit.metrics.traffic import Traffic
from fltoolkit.noise import numpy_generator
from fltoolkit.secagg import session
from fltoolkit.secagg.errors import TooFew
from fltoolkit.secagg.fixed_point import FixedPoint
from fltoolkit.secagg.parties import Client, Server

ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Played:
    """A session's end. total `[D + 1]`: the survivors' sum. messages: masked inputs as sent, by client, where
    somebody looks on. refused: why parties refused a message, by client. traffic: bytes of a client, all
    rounds of the protocol together, mean over those that were there at the start."""

    total: np.ndarray
    survivors: tuple[int, ...]
    messages: Mapping[int, np.ndarray]
    refused: Mapping[int, str]
    traffic: Traffic


@dataclass(frozen=True)
class SecureAggregation(Defense):
    """Base of the protocols that show a server Σ n_k Δ_k and Σ n_k, and nothing else of the clients.

    clients: the cohort size K it insists on (None: any); K = 1 has nothing to hide behind. bits: the size of
    the integers. range: bound on the absolute value of an update's coordinates; a larger one is refused,
    never clipped. threshold: the share of the cohort that must survive; with fewer the round is given up.
    dropout: the chance that a client falls silent, from a round of the protocol chosen at random. rounding:
    "nearest" or "stochastic", which is unbiased. max_examples: W, the most a client may have (None: the most
    that one of the round has, which is then known to all).
    """

    hides_messages: ClassVar[bool] = True
    input_round: ClassVar[int] = 2
    """The last round, from 0, whose silence keeps a client out of the sum: that of the masked inputs."""
    aliases: ClassVar[Mapping[str, str]] = {
        "clients": "cohort",
        "range": "value_range",
        "max_examples": "most",
    }
    cohort: int | None = None
    bits: int = 32
    value_range: float = 8.0
    threshold: float = 0.67
    dropout: float = 0.0
    rounding: str = "nearest"
    most: int | None = None

    def __post_init__(self) -> None:
        require(self.cohort is None or self.cohort >= 1, "clients", ">= 1", self.cohort)
        require(0 < self.threshold <= 1, "threshold", "above 0 and at most 1", self.threshold)
        require(0 <= self.dropout < 1, "dropout", "from 0 to below 1", self.dropout)
        require(self.rounding in ROUNDINGS, "rounding", f"one of {ROUNDINGS}", self.rounding)
        require(self.most is None or self.most >= 1, "max_examples", ">= 1", self.most)
        self.encoding(1, self.most or 1)

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Rounds of the protocol, in each of which a client may fall silent."""

    @property
    def modulus(self) -> int:
        """What sums are taken modulo."""
        return 2**self.bits

    @abstractmethod
    def play(self, words: Mapping[int, np.ndarray], silent: Mapping[int, int], ctx: RoundContext) -> Played:
        """Run the protocol on the clients' inputs. silent: by client, the first round in which nothing is
        heard from it. Raises TooFew where it is given up."""

    @property
    def wanted_cohort(self) -> int | None:
        return self.cohort

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        if None not in (self.cohort, cohort) and self.cohort != cohort:
            raise InputError(
                f"{self.name}:clients must equal the round's cohort of {cohort}, got {self.cohort}"
            )
        if cohort is not None:
            self.encoding(cohort, self.most or 1)

    def encoding(self, cohort: int, most: int) -> FixedPoint:
        return FixedPoint(cohort, self.modulus, self.value_range, most)

    def rounded(self, sensitivity: float, ctx: RoundContext) -> float:
        """Rounding lengthens a row by √D / 2 steps at most, and doubles it at most, as what is below half a
        step becomes zero; at random, by √D steps. Counted for the largest cohort that these may be the
        survivors of, whose steps are the widest."""
        if ctx.local is None or not ctx.clients:
            return sensitivity
        largest = max(ctx.counts, default=1)
        most = self.most if self.most and ctx.counts else largest
        how = ctx.sampling
        known = 0 if how.kind == "poisson" else round(how.rate * how.population)
        cohort = known or ceil(len(ctx.clients) / self.threshold)
        longer = sqrt(ctx.local.layout.size) * most / largest / self.encoding(cohort, most).scale
        if self.rounding == "stochastic":
            return sensitivity + longer
        return min(2 * sensitivity, sensitivity + longer / 2)

    def survivors_needed(self, cohort: int) -> int:
        """⌈threshold · K⌉."""
        return max(1, ceil(self.threshold * cohort - 1e-9))

    def secure_sum(self, rows: Tensor, ctx: RoundContext) -> SecureSum:
        """Masked messages as int64 `[n, D + 1]`, of those that arrived, and the survivors' weighted mean.

        The int64 holds the integer modulo 2^b; for b = 64 it is the same bit pattern read as signed. A
        Poisson cohort's sum is divided by the cohort's expected size.
        """
        if ctx.sampling.kind != "poisson":  # whose size is random
            self.check(ctx.sensitivity, len(rows))
        if not len(rows):
            return SecureSum(_integers({}, rows), rows.sum(0), ())
        require(len(set(ctx.clients)) == len(rows), "clients of a round", "distinct", ctx.clients)
        counts = _counts(ctx)
        encoding = self.encoding(len(rows), self.most or max(counts))
        words = self._encoded(rows, counts, encoding, ctx)
        position = {c: i for i, c in enumerate(ctx.clients)}
        try:
            played = self.play(words, self._silent(ctx), ctx)
        except TooFew as e:
            reason = dict.fromkeys(range(len(rows)), f"had its round given up: {e}")
            return SecureSum(_integers({}, rows), torch.zeros_like(rows[0]), (), reason)
        if ctx.sampling.kind == "poisson":
            total = encoding.decode(played.total)[0] * (ctx.largest_weight * encoding.most)
        else:
            total = encoding.mean(played.total)
        return SecureSum(
            _integers(played.messages, rows),
            torch.from_numpy(total).to(rows),
            tuple(sorted(position[c] for c in played.survivors)),
            {position[c]: reason for c, reason in played.refused.items()},
            played.traffic,
        )

    def survivors(self, ctx: RoundContext) -> tuple[int, ...]:
        """Those who are there to send their inputs; all where too few would be, since such a round is charged
        as if all were."""
        silent = self._silent(ctx)
        n = len(ctx.clients)
        if n - len(silent) < self.survivors_needed(n):
            return tuple(range(n))
        return tuple(i for i, c in enumerate(ctx.clients) if silent.get(c, self.rounds) > self.input_round)

    def _encoded(
        self, rows: Tensor, counts: tuple[int, ...], encoding: FixedPoint, ctx: RoundContext
    ) -> dict[int, np.ndarray]:
        words = {}
        for client, row, count in zip(ctx.clients, rows.detach().cpu().double().numpy(), counts, strict=True):
            rng = numpy_generator(ctx.client_rng(client)) if self.rounding == "stochastic" else None
            try:
                words[client] = encoding.encode(row, count, rng)
            except InputError as e:
                raise InputError(f"{self.name}, client {client}: {e}") from None
        return words

    def _silent(self, ctx: RoundContext) -> dict[int, int]:
        """Who drops out, and from which round on: by chance, or as the server pretends."""
        draw = torch.rand(len(ctx.clients), 2, generator=ctx.server_rng()).tolist()
        silent = {
            c: int(when * self.rounds)
            for c, (chance, when) in zip(ctx.clients, draw, strict=True)
            if chance < self.dropout
        }
        for client in ctx.meddling.ignored:
            silent[client] = min(silent.get(client, self.rounds), self.input_round)
        return silent


def play_session(
    server: Server,
    clients: Mapping[int, Client],
    silent: Mapping[int, int],
    read: Callable[[memoryview], np.ndarray] | None,
    workers: int = 1,
) -> Played:
    """Run a session to its end. read: a masked input from its bytes; None where nobody looks on."""
    sent: dict[int, np.ndarray] = {}

    def watch(number: int, client: int, message: bytes | bytearray) -> None:
        if read is not None and number == SecureAggregation.input_round:
            sent[client] = read(server.wire.unpack(message, number, client))

    record = session.run(server, clients, silent, workers, watch)
    refused = {c: f"{type(e).__name__}: {e}" for c, e in record.refused.items()}
    up = sum(sum(t.sent.values()) for t in record.rounds)
    down = sum(sum(t.received.values()) for t in record.rounds)
    traffic = Traffic(up / len(clients), down / len(clients))
    return Played(record.total, record.survivors, sent, refused, traffic)


def digests(ctx: RoundContext) -> dict[int, bytes]:
    """By client, a hash of the parameters that it received; empty ones where a context holds none."""
    if ctx.local is None:
        return dict.fromkeys(ctx.clients, b"")
    same = _digest(ctx.local.params)
    other = {c: _digest(params) for c, params in ctx.meddling.broadcasts.items()}
    return {c: other.get(c, same) for c in ctx.clients}


def _digest(params: Tensor) -> bytes:
    return sha256(params.detach().cpu().contiguous().numpy().tobytes()).digest()


def _counts(ctx: RoundContext) -> tuple[int, ...]:
    if ctx.counts:
        return ctx.counts
    if not torch.allclose(ctx.weights, ctx.weights[:1].expand_as(ctx.weights)):
        raise InputError("a secure sum of unequal weights must know every client's number of examples")
    return (1,) * len(ctx.clients)


def _integers(messages: Mapping[int, np.ndarray], like: Tensor) -> Tensor:
    if not messages:
        return torch.zeros(0, like.shape[1] + 1, dtype=torch.int64, device=like.device)
    return torch.from_numpy(np.stack(list(messages.values())).astype(np.int64)).to(like.device)
