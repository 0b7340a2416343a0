"""Sessions of secure sums whose parties can be looked at, and messages that are none."""

from __future__ import annotations

from fltoolkit.secagg import session
from fltoolkit.secagg.wire import HEADER_BYTES


class Rounds:
    """What a session's `server`, `clients` and inputs `words`, by client, go through. modulus: of the sum."""

    def __init__(self, server, clients, words, modulus):
        self.server, self.clients, self.words, self.modulus = server, clients, words, modulus

    def run(self, silent=None, workers=1, watch=None):
        return session.run(self.server, self.clients, silent, workers, watch)

    def until(self, number):
        """Play the rounds before `number`; the messages that open it."""
        inbox = self.server.opening()
        for _ in range(number):
            for c in inbox:
                self.server.receive(c, self.clients[c].reply(inbox[c]))
            inbox = self.server.close()
        return inbox

    def expected(self, clients):
        """The sum in Python's own integers."""
        columns = zip(*(self.words[c].tolist() for c in clients), strict=True)
        return [sum(column) % self.modulus for column in columns]


CHANGES = {
    "truncated": lambda m: m[:-1],
    "longer": lambda m: m + b"\0",
    "empty": lambda m: b"",
    "flipped": lambda m: m[:-3] + bytes([m[-3] ^ 1]) + m[-2:],
    "other session": lambda m: m[:6] + bytes(16) + m[22:],
    "other round": lambda m: m[:5] + bytes([m[5] + 1]) + m[6:],
    "other sender": lambda m: m[:22] + (11).to_bytes(4, "little") + m[26:],
    "magic": lambda m: b"????" + m[4:],
    "ones": lambda m: m[:HEADER_BYTES] + b"\xff" * (len(m) - HEADER_BYTES),
}


def changed(message, how):
    """The message with something wrong."""
    return CHANGES[how](bytes(message))


class Saboteur:
    """A client whose answer of round `number` is changed on its way."""

    def __init__(self, inner, number, how):
        self.inner, self.number, self.how = inner, number, how

    def reply(self, message):
        answer = self.inner.reply(message)
        return changed(answer, self.how) if self.inner._round == self.number + 1 else answer
