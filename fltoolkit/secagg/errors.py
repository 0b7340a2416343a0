# ruff: noqa: N818 (a raised `Forged` says what it is)
"""Why a party of a secure sum refuses a message, by name.

Whoever sent a message that is refused counts as dropped out from then on; whoever is asked for what it must
not give stops taking part. Neither costs another client its data.
"""


class ProtocolError(Exception):
    """A message or request that is refused."""


class Malformed(ProtocolError):
    """Not a message of this protocol: truncated, too long, or of impossible content."""


class Replayed(ProtocolError):
    """A message of another session, or the second one of a party in a round."""


class OutOfOrder(ProtocolError):
    """A message of another round than the one that is open, or from somebody who is not expected."""


class Forged(ProtocolError):
    """A signature, authentication tag, key or commitment that does not verify."""


class Inconsistent(ProtocolError):
    """Parties were told different things: of the broadcast model, of the members, or of the survivors."""


class Greedy(ProtocolError):
    """A request for both secrets of one client, which would lay its input open."""


class TooFew(ProtocolError):
    """Fewer parties than the threshold."""
