"""Who takes part in a secure sum, and how a session goes through its rounds.

In every round the server sends each client it still counts on one message, and each answers with one. A
client that is silent, or whose message is refused, has dropped out and is not asked again. The session ends
with the exact sum of the survivors' words, or with an error that says why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from fltoolkit.secagg.errors import ProtocolError
from fltoolkit.secagg.parties import Client, Server


@dataclass
class Traffic:
    """What one round took. sent, received: bytes by client, from the client's side. client_seconds: by
    client. server_seconds: of taking in, closing and preparing the next messages."""

    name: str
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    client_seconds: dict[int, float] = field(default_factory=dict)
    server_seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """A finished session. total `[D]`: the survivors' sum. rounds: the traffic. refused: why parties refused
    a message, by client."""

    total: np.ndarray
    survivors: tuple[int, ...]
    rounds: tuple[Traffic, ...]
    refused: Mapping[int, ProtocolError]


def run(
    server: Server,
    clients: Mapping[int, Client],
    silent: Mapping[int, int] | None = None,
    workers: int = 1,
    watch: Callable[[int, int, bytes | bytearray], None] | None = None,
) -> Record:
    """Take a session through its rounds.

    silent: by client, the first round (from 0) in which the server hears nothing from it any more. workers:
    threads that clients share. watch(round, client, message): called with all that clients send. Messages are
    taken in as they come, so that the inputs of all clients are in memory at no time. Raises TooFew where
    the server gives up.
    """
    silent = silent or {}
    refused: dict[int, ProtocolError] = {}
    rounds = []
    inbox = server.opening()
    with ThreadPoolExecutor(workers) as pool:
        for number, name in enumerate(server.rounds):
            asked = [c for c in inbox if silent.get(c, number + 1) > number and c in clients]
            traffic = Traffic(name, received={c: len(inbox[c]) for c in asked})
            for client, answer in _answers(pool, workers, clients, inbox, asked):
                if isinstance(answer, ProtocolError):
                    refused[client] = answer
                    continue
                message, traffic.client_seconds[client] = answer
                traffic.sent[client] = len(message)
                if watch is not None:
                    watch(number, client, message)
                begun = perf_counter()
                try:
                    server.receive(client, message)
                except ProtocolError as e:
                    refused[client] = e
                traffic.server_seconds += perf_counter() - begun
            begun = perf_counter()
            inbox = server.close()
            traffic.server_seconds += perf_counter() - begun
            rounds.append(traffic)
    return Record(server.total(), server.survivors, tuple(rounds), refused)


Answer = tuple[bytes | bytearray, float] | ProtocolError


def _answers(
    pool: ThreadPoolExecutor,
    workers: int,
    clients: Mapping[int, Client],
    inbox: Mapping[int, bytes],
    asked: Sequence[int],
) -> Iterator[tuple[int, Answer]]:
    """What those asked answer, a few of them at a time."""

    def answer(client: int) -> Answer:
        begun = perf_counter()
        try:
            return clients[client].reply(inbox[client]), perf_counter() - begun
        except ProtocolError as e:
            return e

    if workers == 1:
        yield from ((c, answer(c)) for c in asked)
        return
    for a in range(0, len(asked), 2 * workers):
        some = asked[a : a + 2 * workers]
        yield from zip(some, pool.map(answer, some), strict=True)
