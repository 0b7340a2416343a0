"""What a defense is, and how a list of them acts on one round.

A defense may act at three places, each optional: on the rows that clients send (`clients`, in list
order), on the sum itself (`secure_sum`, at most one and last among the client-side steps), and on the
aggregate at the server (`server`, in reversed order). It describes its privacy as events and knows no
accountant. Defenses are public: what `public()` returns is part of every adversary's observation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fltoolkit.errors import InputError
from fltoolkit.rng import torch_stream
from fltoolkit.types import PrivacyEvent


@dataclass(frozen=True)
class RoundContext:
    """What a defense may know of the round it acts in.

    weights `[K]`: the public averaging weights n_k / n, summing to 1. sensitivity: the L2 norm that the
    defenses before this one guarantee for every row, or None where none does. name: the stream name.
    """

    seed: int
    round: int
    clients: tuple[int, ...]
    weights: Tensor
    sensitivity: float | None = None
    name: str = ""

    def client_rng(self, client: int) -> torch.Generator:
        return torch_stream(self.seed, "round", self.round, "client", client, "defense", self.name)

    def server_rng(self) -> torch.Generator:
        return torch_stream(self.seed, "round", self.round, "server", "defense", self.name)


@dataclass(frozen=True)
class Defense:
    """Base of all defenses: does nothing, promises nothing. Subclasses are frozen dataclasses whose
    fields are the `key=value` options of the command line, where `aliases` may rename them."""

    name: ClassVar[str] = ""
    hides_messages: ClassVar[bool] = False
    aliases: ClassVar[Mapping[str, str]] = {}

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        """Raise InputError where this defense cannot work after the ones before it or with this cohort."""

    def bound(self, sensitivity: float | None) -> float | None:
        """The L2 norm guaranteed for every row after this defense, given the one before."""
        return sensitivity

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """Rows `[K, D]` in, rows `[K, D]` out."""
        return rows

    def secure_sum(self, rows: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """Messages as the server sees them and their weighted sum `[D]`; only where `hides_messages`."""
        return rows, ctx.weights @ rows

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        """Aggregate `[D]` in, aggregate `[D]` out."""
        return aggregate

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        """The privacy events of one round."""
        return ()

    @property
    def acts_on_rows(self) -> bool:
        """True where `clients` does something."""
        return type(self).clients is not Defense.clients

    @property
    def wanted_cohort(self) -> int | None:
        """The number of clients a round must have, None where any will do."""
        return None

    def public(self) -> Mapping[str, Any]:
        """The parameters that everybody knows (Kerckhoffs), by their command-line names."""
        flags = {field: flag for flag, field in self.aliases.items()}
        return {"name": self.name, **{flags.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}}


class DefenseStack:
    """A checked list of defenses that acts as one.

    cohort: the number K of clients in a round, where it is already known. Raises InputError, before any
    work, where the list makes no sense.
    """

    def __init__(self, defenses: Sequence[Defense], cohort: int | None = None) -> None:
        self.defenses = tuple(defenses)
        self._check_order()
        seen: Counter[str] = Counter()
        steps = []
        bound: float | None = None
        for d in self.defenses:
            d.check(bound, cohort)
            seen[d.name] += 1
            label = d.name if seen[d.name] == 1 else f"{d.name}#{seen[d.name]}"
            steps.append((d, bound, label))
            bound = d.bound(bound)
        self._steps = tuple(steps)

    def _check_order(self) -> None:
        hidden = [i for i, d in enumerate(self.defenses) if d.hides_messages]
        if len(hidden) > 1:
            raise InputError("defense list must hold at most one secure sum, got two")
        if not hidden:
            return
        for d in self.defenses[hidden[0] + 1 :]:
            if d.acts_on_rows:
                sum_name = self.defenses[hidden[0]].name
                raise InputError(f"{d.name} acts on clients' rows, so it must come before {sum_name}")

    @property
    def hides_messages(self) -> bool:
        """True where a secure sum hides single messages from the server."""
        return any(d.hides_messages for d in self.defenses)

    def public(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(d.public() for d in self.defenses)

    def events(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        """The privacy events of one round."""
        return tuple(e for d, c in self._in(ctx) for e in d.privacy(c))

    def _in(self, ctx: RoundContext) -> list[tuple[Defense, RoundContext]]:
        return [(d, replace(ctx, sensitivity=b, name=n)) for d, b, n in self._steps]

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """What clients send instead of `rows [K, D]`, before any secure sum. `rows` is left untouched."""
        for d, c in self._in(ctx):
            rows = d.clients(rows, c)
        return rows

    def secure_sum(self, rows: Tensor, ctx: RoundContext) -> tuple[Tensor, Tensor]:
        """The messages `[K, ...]` that reach the server and their weighted mean `[D]`."""
        for d, c in self._in(ctx):
            if d.hides_messages:
                return d.secure_sum(rows, c)
        return rows, ctx.weights @ rows

    def server(self, total: Tensor, ctx: RoundContext) -> Tensor:
        """The aggregate `[D]` that the server releases."""
        for d, c in reversed(self._in(ctx)):
            total = d.server(total, c)
        return total
