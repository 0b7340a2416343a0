"""What the clients and the servers of all protocols have in common: rounds, and who may say what when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

import numpy as np

from fltoolkit.secagg.errors import Greedy, Malformed, OutOfOrder, ProtocolError, Replayed, TooFew
from fltoolkit.secagg.keys import Signer
from fltoolkit.secagg.wire import SERVER, Wire

Step = Callable[[bytes], "bytes | memoryview | bytearray"]
"""What a client does in a round: the server's message, without its header, to the answer. A bytearray has
room for the answer's own header before it, so that a long one is written once."""

Take = Callable[[int, memoryview, "bytes | bytearray"], None]
"""What a server does with an answer: client, the answer without header and signature, and all of it."""

Closing = Callable[[frozenset[int]], dict[int, bytes]]
"""How a server ends a round: who answered, to the next messages."""


class Client(ABC):
    """One client: answers once in each round, and never again after it has refused a message."""

    def __init__(self, identity: int, wire: Wire, signer: Signer | None = None) -> None:
        self.identity, self.wire = identity, wire
        self._signer, self._round, self._stopped = signer, 0, False

    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """The steps of the rounds."""

    def reply(self, message: bytes) -> bytes | bytearray:
        """The answer to the server's message of the current round. Raises ProtocolError where it is refused;
        everything after that is refused too."""
        if self._stopped:
            raise OutOfOrder(f"client {self.identity} has refused a message and takes part no more")
        steps = self.steps()
        if self._round == len(steps):
            raise Greedy(f"client {self.identity} must reveal one share of each peer, and once")
        try:
            body = self.wire.unpack(message, self._round, SERVER)
            answer = steps[self._round](bytes(body))
        except ProtocolError:
            self._stopped = True
            raise
        number, self._round = self._round, self._round + 1
        if not isinstance(answer, bytearray):
            return self.wire.pack(number, self.identity, answer, self._signer)
        self.wire.fill(answer, number, self.identity)
        return answer if self._signer is None else answer + self._signer.sign(bytes(answer))


class Server(ABC):
    """A server: takes one answer of each client that it asked, and goes on with those who answered. rounds:
    their names. survivors: the clients in the sum, known at the end."""

    def __init__(self, wire: Wire, members: Sequence[int], rounds: Sequence[str]) -> None:
        self.wire, self.members, self.rounds = wire, tuple(members), tuple(rounds)
        self.survivors: tuple[int, ...] = ()
        self._round = 0
        self._asked: frozenset[int] = frozenset(members)
        self._answered: set[int] = set()

    @abstractmethod
    def steps(self) -> Sequence[tuple[Take, Closing]]:
        """For each round, what is done with an answer, and how it ends."""

    @abstractmethod
    def needed(self) -> int:
        """How many must answer in the current round."""

    @abstractmethod
    def total(self) -> np.ndarray:
        """The sum `[D]` of the survivors' words, after the last round."""

    def opening(self) -> dict[int, bytes]:
        """The first message to each client."""
        return self.to_all(self._asked, b"")

    def receive(self, client: int, message: bytes | bytearray) -> None:
        """Take in one answer. Raises ProtocolError, and keeps nothing of it, where it is refused."""
        if client not in self._asked:
            raise OutOfOrder(f"client {client} must be one that is asked in this round")
        if client in self._answered:
            raise Replayed(f"client {client} must answer once in a round")
        body = self.wire.unpack(message, self._round, client)
        take, _ = self.steps()[self._round]
        take(client, body, message)
        self._answered.add(client)

    def close(self) -> dict[int, bytes]:
        """End the round: the next message to each client still counted on, none after the last round. Raises
        TooFew where too few have answered."""
        answered, need = frozenset(self._answered), self.needed()
        if len(answered) < need:
            name = self.rounds[self._round]
            raise TooFew(
                f"clients that answered in round {name!r} must be at least {need}, got {len(answered)}"
            )
        _, closing = self.steps()[self._round]
        self._round += 1
        self._asked, self._answered = answered, set()
        return closing(answered)

    @property
    def is_last_round(self) -> bool:
        return self._round == len(self.rounds) - 1

    def message(self, body: bytes) -> bytes:
        return self.wire.pack(self._round, SERVER, body)

    def to_all(self, clients: Collection[int], body: bytes) -> dict[int, bytes]:
        return dict.fromkeys(clients, self.message(body))


def bitmap(members: Sequence[int], clients: Collection[int]) -> bytes:
    """A set of members as one bit each."""
    return np.packbits([c in clients for c in members]).tobytes()


def members_in(members: Sequence[int], data: bytes | memoryview) -> frozenset[int]:
    """The set behind a bitmap; raises Malformed where it has another length than the members ask for."""
    n = len(members)
    if len(data) != -(-n // 8):
        raise Malformed(f"a set of {n} clients must be {-(-n // 8)} bytes, got {len(data)}")
    held = np.unpackbits(np.frombuffer(data, np.uint8))
    if held[n:].any():
        raise Malformed("bits beyond the last client must be zero")
    return frozenset(c for c, there in zip(members, held, strict=False) if there)
