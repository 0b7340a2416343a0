"""An adversary at its rounds: what is played for it, what it sees, and what its attack makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fltoolkit.attack import Attack, Progress, grey, grouped, silent
from fltoolkit.data import Dataset
from fltoolkit.scoring import Scored, score, truth_of
from fltoolkit.threat import Public, ThreatModel
from fltoolkit.training.round import EVERYBODY, NOTHING, Memory, Outcome, Sampling, run_round
from fltoolkit.training.task import Task
from fltoolkit.types import Examples, Observation, PrivacyEvent, Reconstruction


@dataclass(frozen=True)
class Look:
    """observation: None where the rounds came to nothing, for the reason in `stopped`. messages: the masked
    ones of the first round, where a secure sum hides them."""

    observation: Observation | None
    truth: Examples
    events: tuple[PrivacyEvent, ...]
    stopped: str = ""
    messages: Tensor | None = None


def play(
    task: Task,
    params: Tensor,
    data: Sequence[Examples],
    threat: ThreatModel,
    public: Public,
    number: int,
    memory: Memory = NOTHING,
    sampling: Sampling = EVERYBODY,
) -> list[Outcome]:
    """All rounds that `threat` needs over `params [D]`, numbered from `number`, among clients 0, 1, ... that
    hold `data`."""
    outcomes = []
    for i, cohort in enumerate(threat.cohorts(len(data))):
        meddling = threat.meddling(params, cohort, public)
        outcome = run_round(
            task, params, cohort, data, number + i, sampling=sampling, memory=memory, meddling=meddling
        )
        memory = outcome.memory
        outcomes.append(outcome)
    return outcomes


def look(
    outcomes: Sequence[Outcome], threat: ThreatModel, data: Sequence[Examples], public: Public, hidden: bool
) -> Look:
    """What `threat`, which is after client 0, sees of the rounds played for it. hidden: whether a secure sum
    hides single messages."""
    transcripts = [o.transcript for o in outcomes if o.transcript is not None]
    events = outcomes[-1].events
    if len(transcripts) < len(outcomes):
        return Look(None, data[0], events, reason(next(o for o in outcomes if o.transcript is None)))
    mixed = threat.members(transcripts[0], 0)
    if not mixed:
        return Look(None, data[0], events, "the target dropped out")
    seen = threat.observe_all(transcripts, len(data), public)
    return Look(
        seen,
        truth_of(transcripts[0], mixed),
        events,
        messages=transcripts[0].messages if hidden else None,
    )


def reason(outcome: Outcome) -> str:
    """Why a round came to nothing."""
    first = outcome.failures[0]
    return f"client {first.client} {first.reason}"


def attack_looks(
    attack: Attack,
    looks: Sequence[Look],
    rngs: Sequence[torch.Generator],
    data: Dataset,
    progress: Progress = silent,
) -> tuple[Scored, ...]:
    """Attack what was seen, and score it against the truth; grey counts where nothing was seen."""
    seen = [v for v, each in enumerate(looks) if each.observation is not None]
    observations = [o for each in looks if (o := each.observation) is not None]
    found: dict[int, Reconstruction] = {}
    for group in grouped(observations, _alike):
        some = [rngs[seen[i]] for i in group]
        recovered = attack.many([observations[i] for i in group], some, progress)
        found |= {seen[i]: r for i, r in zip(group, recovered, strict=True)}
    mean_image = data.train.x.mean(0)
    return tuple(
        score(
            found.get(v) or grey(each.truth.x, each.truth.y, data.input_range, f"stopped: {each.stopped}"),
            each.truth,
            mean_image,
            data.input_range,
            data.num_classes,
        )
        for v, each in enumerate(looks)
    )


def _alike(a: Observation, b: Observation) -> bool:
    """Whether two observations are of one shape."""
    return (a.num_examples, a.clients) == (b.num_examples, b.clients)
