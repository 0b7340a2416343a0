"""Attacks on the live updates of a training.

Where the view is of single messages, the victims are the first clients of the round's cohort. Where it mixes
a cohort, and where the adversary does more than look, a round gives one observation: the first is the round
as it happened, the others are what it would have been with other cohorts and other random numbers from the
same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fltoolkit import registry
from fltoolkit.algorithms.fedavg import cohort_sampling, select_clients
from fltoolkit.attack import Attack
from fltoolkit.audit import make_threat
from fltoolkit.looking import Look, attack_looks, look, play, reason
from fltoolkit.rng import stream, torch_stream
from fltoolkit.scoring import Scored, truth_of
from fltoolkit.threat import ThreatModel
from fltoolkit.tradeoff.pictures import png
from fltoolkit.tradeoff.training import States, kitchen, replay
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
        looks = _looks(federation, threat, states[str(number)], number, job, place.data)
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


def _looks(
    federation: Federation,
    threat: ThreatModel,
    state: dict[str, Any],
    number: int,
    job: Attacking,
    data: Any,
) -> list[Look]:
    if job.threat is None:
        return [_played(federation, threat, state, number, v, data) for v in range(job.victims)]
    outcome = replay(federation, state, number)
    transcript = outcome.transcript
    public = federation.task.public(data)
    if transcript is None:
        lost = federation.clients[outcome.failures[0].client]
        return [Look(None, lost, outcome.events, reason(outcome))]
    alone = threat.members(transcript, 0) == (0,) and len(transcript.truth) > 1
    if not alone:
        first = look([outcome], threat, transcript.truth, public, False)
        others = [_mixed(federation, threat, state, number, v, data) for v in range(1, job.victims)]
        return [first, *others]
    return [
        Look(
            threat.observe(transcript, v, public),
            truth_of(transcript, threat.members(transcript, v)),
            outcome.events,
        )
        for v in range(min(job.victims, len(transcript.truth)))
    ]


def _mixed(
    federation: Federation, threat: ThreatModel, state: dict[str, Any], number: int, victim: int, data: Any
) -> Look:
    """The view of the round with another cohort and other random numbers."""
    task = _again(federation.task, number, victim)
    cohort = select_clients(
        len(federation.clients), federation.fraction, task.seed, number, federation.sampling
    )
    how = cohort_sampling(len(federation.clients), federation.fraction, federation.sampling)
    outcome = run_round(
        task, state["params"], cohort, federation.clients, number, sampling=how, memory=state["memory"]
    )
    truth = [federation.clients[c] for c in cohort]
    return look([outcome], threat, truth, task.public(data), False)


def _played(
    federation: Federation, threat: ThreatModel, state: dict[str, Any], number: int, victim: int, data: Any
) -> Look:
    """What an adversary gets that plays rounds of its own with a cohort, the first of which it is after."""
    task = _again(federation.task, number, victim)
    seed = task.seed if victim else federation.task.seed
    cohort = select_clients(len(federation.clients), federation.fraction, seed, number, federation.sampling)
    truth = [federation.clients[c] for c in cohort]
    public = task.public(data)
    outcomes = play(
        task, state["params"], truth, threat, public, number, _renumbered(state["memory"], cohort)
    )
    return look(outcomes, threat, truth, public, task.stack.hides_messages)


def _again(task: Task, number: int, victim: int) -> Task:
    """The same task with other random numbers."""
    seed = int(stream(task.seed, "round", number, "victim", victim).integers(2**31))
    return replace(task, seed=seed)


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
