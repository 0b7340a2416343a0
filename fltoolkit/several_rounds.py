"""A server that keeps the sums of several rounds over the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fltoolkit.disaggregation import members, participants
from fltoolkit.threat import CuriousServer, Public, observation
from fltoolkit.types import History, Observation, Transcript

ROUNDING = 1e-6
"""What fixed point does to a coordinate of a sum, as a share of the coordinates' root mean square."""


@dataclass(frozen=True)
class PatientServer(CuriousServer):
    """Repeats the model for several rounds and remembers the sums and who was in them.

    window: rounds over which participation is counted. hidden: whether the counts are all that it knows of
    who took part.
    """

    name: ClassVar[str] = "patient"
    about: ClassVar[str] = "curious server that repeats a model and keeps the sums of several rounds"
    window: int = 1
    hidden: bool = False

    def observe_all(self, transcripts: Sequence[Transcript], clients: int, public: Public) -> Observation:
        sums = torch.stack([_sum(t) for t in transcripts])
        took_part = torch.zeros(len(transcripts), clients, dtype=torch.bool)
        for row, t in zip(took_part, transcripts, strict=True):
            row[list(t.updates.clients)] = True
        windows = tuple(
            tuple(range(a, min(a + self.window, len(transcripts))))
            for a in range(0, len(transcripts), self.window)
        )
        counts = torch.stack([took_part[list(w)].sum(0) for w in windows])
        seen = observation(
            transcripts[0], transcripts[0].total, tuple(range(len(transcripts[0].truth))), public
        )
        history = History(sums, None if self.hidden else took_part, windows, counts, target=0)
        return replace(seen, history=history)

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        """The target alone, which is what the sums are kept for; nobody where it is not in the sum."""
        clients = transcript.updates.clients
        return (clients.index(target),) if target in clients else ()


def single_out(observation: Observation) -> tuple[Observation | None, str]:
    """The observation of the target alone, solved for from the history, and in words how; None and why not
    where the sums do not determine it."""
    history = observation.history
    if history is None:
        return observation, "one round only: what it shows is attacked as it is"
    rounds, clients = len(history.sums), history.counts.shape[1]
    matrix, how = history.participants, "known participants"
    if matrix is None:
        noise = ROUNDING * float(history.sums.square().mean().sqrt())
        told = participants(history.sums, history.counts, history.windows, noise=noise)
        matrix, how = told.matrix, "participants found from their counts"
        if not told.unique.all():
            return None, f"{rounds} sums over {clients} clients: more than one column of participation fits"
    found = members(history.sums, matrix)
    if not found.identifiable[history.target]:
        words = (
            f"{rounds} sums over {clients} clients, {how}: rank {found.rank}, the target is not determined"
        )
        return None, words
    row = found.updates[history.target]
    count = max(1, round(float(row[-1])))
    update = (row[:-1] / row[-1]).to(observation.update)
    words = f"the target's update out of {rounds} sums over {clients} clients, {how}"
    alone = replace(observation, update=update, clients=1, num_examples=count, history=None)
    return alone, words


def _sum(transcript: Transcript) -> Tensor:
    """Σ n_k Δ_k and Σ n_k: what a secure sum decodes to."""
    weight = transcript.updates.num_examples.sum().to(transcript.total)
    return torch.cat([transcript.total * weight, weight[None]])
