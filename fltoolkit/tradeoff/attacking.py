"""Attacks on the live updates of a training.

Where the view is of single messages, the victims are the first clients of the round's cohort. Where it mixes
a cohort, and where the adversary does more than look, a round gives one observation: the first is the round
as it happened, the others are what it would have been with other cohorts and other random numbers from the
same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fltoolkit import registry
from fltoolkit.algorithms.fedavg import select_clients
from fltoolkit.attack import Attack
from fltoolkit.audit import make_threat
from fltoolkit.data import Dataset
from fltoolkit.looking import Look, attack_looks, look, play, reason
from fltoolkit.rng import stream, torch_stream
from fltoolkit.scoring import Scored
from fltoolkit.threat import Public, ThreatModel
from fltoolkit.tradeoff.pictures import png
from fltoolkit.tradeoff.training import States, kitchen, placed, replay
from fltoolkit.training.federation import Federation
from fltoolkit.training.round import Memory, run_round
from fltoolkit.training.task import Task

if TYPE_CHECKING:
    from fltoolkit.tradeoff.jobs import Attacking


def attack_states(job: Attacking, states: States) -> list[dict[str, Any]]:
    """What the attack finds in every attacked round: a list of victims, and the first pictures."""
    place = kitchen(job.training.recipe)
    federation = place.federation(job.training.stack)
    attack = registry.make_attack(job.attack)
    threat = _threat(attack, job.threat)
    found = []
    for number in job.training.attacked:
        if str(number) not in states:
            continue
        state = placed(states[str(number)], job.training.recipe.device)
        here = Vantage(federation, threat, state, number, place.data)
        own = job.threat is None
        looks = [here.played(v) for v in range(job.victims)] if own else here.watched(job.victims)
        seed = job.training.recipe.seed
        rngs = [
            torch_stream(seed, "round", number, "victim", v, "attack", attack.name) for v in range(len(looks))
        ]
        scored = attack_looks(attack, looks, rngs, place.data)
        found.append(
            {
                "round": number,
                "victims": [_numbers(s, job.threshold_db) for s in scored],
                "images": _pictures(scored, place.data.input_range, job.pictures),
            }
        )
    return found


def _threat(attack: Attack, name: str | None) -> ThreatModel:
    if name is not None:
        return make_threat(name)
    own = attack.threat()
    assert own is not None, "an attack without adversary is given one"
    return own


@dataclass(frozen=True)
class Vantage:
    """Where an adversary stands: round `number` of a federation, from the state before it."""

    federation: Federation
    threat: ThreatModel
    state: Mapping[str, Any]
    number: int
    data: Dataset

    @property
    def public(self) -> Public:
        return self.federation.task.public(self.data)

    def watched(self, victims: int) -> list[Look]:
        """What somebody who looks on sees of the round."""
        outcome = replay(self.federation, self.state, self.number)
        transcript = outcome.transcript
        if transcript is None:
            lost = self.federation.clients[outcome.failures[0].client]
            return [Look(None, lost, outcome.events, reason(outcome))]
        if self.threat.members(transcript, 0) != (0,) or len(transcript.truth) == 1:
            first = look([outcome], self.threat, transcript.truth, self.public, False)
            return [first, *(self._otherwise(v) for v in range(1, victims))]
        return [
            Look(self.threat.observe(transcript, v, self.public), transcript.truth[v], outcome.events)
            for v in range(min(victims, len(transcript.truth)))
        ]

    def _otherwise(self, victim: int) -> Look:
        """The same of the round with another cohort and other random numbers."""
        f, task = self.federation, self._task(victim)
        cohort = self._cohort(task.seed)
        params, memory = self.state["params"], self.state["memory"]
        outcome = run_round(task, params, cohort, f.clients, self.number, sampling=f.chosen, memory=memory)
        return look([outcome], self.threat, [f.clients[c] for c in cohort], self.public, False)

    def played(self, victim: int) -> Look:
        """What an adversary gets that plays rounds of its own with a cohort, the first of which it is
        after."""
        task = self._task(victim)
        cohort = self._cohort(task.seed if victim else self.federation.task.seed)
        truth = [self.federation.clients[c] for c in cohort]
        memory = _renumbered(self.state["memory"], cohort)
        outcomes = play(task, self.state["params"], truth, self.threat, self.public, self.number, memory)
        return look(outcomes, self.threat, truth, self.public, task.stack.hides_messages)

    def _task(self, victim: int) -> Task:
        """The federation's task with other random numbers."""
        task = self.federation.task
        seed = int(stream(task.seed, "round", self.number, "victim", victim).integers(2**31))
        return replace(task, seed=seed)

    def _cohort(self, seed: int) -> list[int]:
        f = self.federation
        return select_clients(len(f.clients), f.fraction, seed, self.number, f.sampling)


def _renumbered(memory: Memory, cohort: Sequence[int]) -> dict[Any, Tensor]:
    """What defenses remember, for a cohort whose members are numbered from 0."""
    place = {c: i for i, c in enumerate(cohort)}
    found = {}
    for key, value in memory.items():
        clients = [part for part in key if isinstance(part, int)]
        if all(c in place for c in clients):
            found[tuple(place[p] if isinstance(p, int) else p for p in key)] = value
    return found


def _numbers(scored: Scored, threshold_db: float) -> dict[str, Any]:
    """One victim's means over its images; `recovered` where its best image is."""
    return {
        "psnr_db": float(scored.psnr.double().mean()),
        "gain_db": float(scored.gain.double().mean()),
        "ssim": float(scored.ssim.double().mean()),
        "label_accuracy": scored.labels,
        "recovered": bool(scored.psnr.max() > threshold_db),
        "images": len(scored.truth),
        "adaptation": scored.found.adaptation,
        "note": scored.found.note,
    }


def _pictures(scored: Sequence[Scored], input_range: tuple[float, float], most: int) -> list[dict[str, Any]]:
    """The first images, private and recovered, as PNG in base 64."""
    pairs = [(s, i) for s in scored for i in range(len(s.truth))][:most]
    return [
        {
            "truth": png(s.truth.x[i], input_range),
            "png": png(s.x[i], input_range),
            "psnr_db": float(s.psnr[i]),
        }
        for s, i in pairs
    ]
