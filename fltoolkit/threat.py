"""Who sees what. A threat model turns the transcript of a round into what its adversary holds.

docs/threat-models.md maps these to the models A-H of Carletti et al., USENIX Security 2025.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fltoolkit.types import HONEST, Examples, Layout, Loss, Meddling, Observation, Transcript


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


class ThreatModel(ABC):
    """Base of all threat models: a name, one line about it, what it sends, and what it sees of its rounds."""

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""

    def cohorts(self, clients: int) -> tuple[tuple[int, ...], ...]:
        """Who takes part in each round that it needs, of clients numbered from 0; the target is number 0."""
        return (tuple(range(clients)),)

    def meddling(self, params: Tensor, cohort: Sequence[int], public: Public) -> Meddling:
        """What it does to a round over `params [D]`; only a malicious server does anything."""
        return HONEST

    @abstractmethod
    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        """The adversary's view of a round when it is after the cohort's member number `target`."""

    def observe_all(self, transcripts: Sequence[Transcript], clients: int, public: Public) -> Observation:
        """Its view of all its rounds, when it is after client 0 of `clients`."""
        return self.observe(transcripts[-1], 0, public)

    @abstractmethod
    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        """Positions in the cohort of the clients whose data the observed update mixes; for scoring."""


class CuriousServer(ThreatModel):
    """Honest but curious server: sees each client's message as sent, follows the protocol otherwise.

    Where messages are masked, a single one tells nothing and the server's best view is their sum.
    """

    name: ClassVar[str] = "server"
    about: ClassVar[str] = (
        "honest-but-curious server: each client's message (their sum under secure aggregation)"
    )

    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        hidden = transcript.messages_hidden
        update = transcript.total if hidden else transcript.messages[target]
        return observation(transcript, update, self.members(transcript, target), public)

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        return tuple(range(len(transcript.truth))) if transcript.messages_hidden else (target,)


class AggregateOnly(ThreatModel):
    """Sees nothing but the released aggregate of each round, as any participant does."""

    name: ClassVar[str] = "aggregate"
    about: ClassVar[str] = "aggregate only: the released weighted mean of the cohort, after every defense"

    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        members = self.members(transcript, target)
        return observation(transcript, transcript.aggregate, members, public, released=True)

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        return tuple(range(len(transcript.truth)))


THREATS: dict[str, type[CuriousServer] | type[AggregateOnly]] = {
    t.name: t for t in (CuriousServer, AggregateOnly)
}


def observation(
    transcript: Transcript,
    update: Tensor,
    members: tuple[int, ...],
    public: Public,
    released: bool = False,
) -> Observation:
    """What is seen of an `update [D]` that mixes these members of the cohort. released: whether the server's
    defenses are done."""
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
        released=released,
    )
