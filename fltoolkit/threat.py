"""Who sees what. A threat model turns the transcript of a round into what its adversary holds.

docs/threat-models.md maps these to the models A-H of Carletti et al., USENIX Security 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fltoolkit.types import Examples, Layout, Loss, Observation, Transcript


@dataclass(frozen=True)
class Public:
    """What everybody knows of a federation, adversaries included. auxiliary: public data of the same kind."""

    model: nn.Module
    loss: Loss
    layout: Layout
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    num_classes: int
    defenses: tuple[Mapping[str, Any], ...]
    auxiliary: Examples | None = None


class ThreatModel(Protocol):
    """A name, one line about it, what it broadcasts, and what it sees of a round."""

    name: ClassVar[str]
    about: ClassVar[str]

    def broadcast(self, params: Tensor) -> Tensor:
        """The parameters that clients receive; only a malicious server changes them."""

    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        """The adversary's view when it is after the cohort's member number `target`."""

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        """Positions in the cohort of the clients whose data the observed update mixes; for scoring."""


class CuriousServer:
    """Honest but curious server: sees each client's message as sent, follows the protocol otherwise.

    Where messages are masked, a single one tells nothing and the server's best view is their sum.
    """

    name: ClassVar[str] = "server"
    about: ClassVar[str] = (
        "honest-but-curious server: each client's message (their sum under secure aggregation)"
    )

    def broadcast(self, params: Tensor) -> Tensor:
        return params

    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        hidden = transcript.messages_hidden
        update = transcript.total if hidden else transcript.messages[target]
        return _observation(transcript, update, self.members(transcript, target), public)

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        return tuple(range(len(transcript.truth))) if transcript.messages_hidden else (target,)


class AggregateOnly:
    """Sees nothing but the released aggregate of each round, as any participant does."""

    name: ClassVar[str] = "aggregate"
    about: ClassVar[str] = "aggregate only: the released weighted mean of the cohort, after every defense"

    def broadcast(self, params: Tensor) -> Tensor:
        return params

    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        return _observation(transcript, transcript.aggregate, self.members(transcript, target), public)

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        return tuple(range(len(transcript.truth)))


THREATS: dict[str, type[CuriousServer] | type[AggregateOnly]] = {
    t.name: t for t in (CuriousServer, AggregateOnly)
}


def _observation(
    transcript: Transcript, update: Tensor, members: tuple[int, ...], public: Public
) -> Observation:
    return Observation(
        model=public.model,
        loss=public.loss,
        layout=public.layout,
        params=transcript.broadcast.clone(),
        update=update.clone(),
        clients=len(members),
        num_examples=int(transcript.updates.num_examples[list(members)].sum()),
        input_shape=public.input_shape,
        input_range=public.input_range,
        num_classes=public.num_classes,
        local=transcript.local,
        defenses=public.defenses,
        auxiliary=public.auxiliary,
        round=transcript.updates.round,
    )
