"""One scene through the whole pipeline, from private data to a measured leak.

`run(scene)` builds the round itself; `update(model, loss, update, spec)` attacks an update that came from
anywhere else, see `fltoolkit.outside`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from fltoolkit import models, registry
from fltoolkit.attack import Attack, Progress, silent
from fltoolkit.checks import check_device, check_local, check_loss, check_searchable
from fltoolkit.data import Dataset, load
from fltoolkit.defense import Defense
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.looking import Look, attack_looks, look, play, reason
from fltoolkit.loss import cross_entropy
from fltoolkit.outside import UpdateSpec, as_row, update
from fltoolkit.report import document
from fltoolkit.report.epsilon import epsilons
from fltoolkit.rng import stream, torch_stream
from fltoolkit.scoring import Scored, summarise
from fltoolkit.threat import THREATS, Public, ThreatModel
from fltoolkit.training.budget import Budget
from fltoolkit.training.buffers import after_one_step, norms_in_training
from fltoolkit.training.round import Outcome
from fltoolkit.training.task import Task
from fltoolkit.types import (
    Examples,
    Layout,
    LocalSpec,
    Loss,
    Transcript,
)

__all__ = ["Look", "Result", "Scene", "Stage", "UpdateSpec", "as_row", "attacked", "run", "update"]


@dataclass(frozen=True)
class Scene:
    """One question: what does this attack recover of these data through this model and these defenses?

    Names or ready objects both work for attack, data, model, threat and defenses. threat: None for
    "server", or for the adversary that an attack brings along. batch: private examples a client. victims:
    independent repetitions. clients: K a round mixes (None: what a `secagg` asks for, else 1). A model
    given as an object keeps its weights for every victim; a named one is initialised anew. frozen_norm:
    clients train with BatchNorm in evaluation mode, as it is when a pretrained model is tuned; otherwise in
    the mode that the model is in, for named ones the statistics of the batch. sends_buffers: a client sends
    BatchNorm's buffers along, as one does that sends a whole `state_dict`; for one client of one local step
    and no defenses, none of which covers buffers.
    """

    attack: str | Attack = "dlg"
    data: str | Dataset = "photos"
    model: str | nn.Module = "lenet"
    batch: int = 1
    victims: int = 1
    clients: int | None = None
    threat: str | ThreatModel | None = None
    defenses: Sequence[str | Defense] = ()
    local: LocalSpec = field(default_factory=LocalSpec)
    frozen_norm: bool = False
    sends_buffers: bool = False
    loss: Loss = cross_entropy
    seed: int = 0
    device: str = "cpu"
    delta: float = 1e-5
    threshold_db: float = 30.0


@dataclass(frozen=True)
class Result:
    """report: what `report.json` holds. victims: the evidence behind it, for pictures and further study."""

    report: dict[str, Any]
    victims: tuple[Scored, ...]
    input_range: tuple[float, float]


class Stage:
    """A checked scene: names resolved, impossible values refused, nothing computed yet."""

    def __init__(self, scene: Scene) -> None:
        require(scene.batch >= 1, "batch", ">= 1", scene.batch)
        require(scene.victims >= 1, "victims", ">= 1", scene.victims)
        require(scene.clients is None or scene.clients >= 1, "clients", ">= 1", scene.clients)
        require(scene.seed >= 0, "seed", ">= 0", scene.seed)
        require(0 < scene.delta < 1, "delta", "between 0 and 1", scene.delta)
        require(isfinite(scene.threshold_db), "threshold_db", "a finite number", scene.threshold_db)
        check_local(scene.local)
        self.device = check_device(scene.device)
        self.scene = scene
        self.attack = registry.make_attack(scene.attack) if isinstance(scene.attack, str) else scene.attack
        self.threat = _threat_of(self.attack, scene.threat)
        named = registry.make_stack(scene.defenses).all
        wanted = [d.wanted_cohort for d in named if d.wanted_cohort is not None]
        self.clients: int = scene.clients or (wanted[0] if wanted else 1)
        self.stack = registry.make_stack(named)
        for size in {len(cohort) for cohort in self.threat.cohorts(self.clients)}:
            registry.make_stack(named, size)
        self.data = load(scene.data) if isinstance(scene.data, str) else scene.data
        check_searchable(self.data)
        needed, have = self.clients * scene.batch, len(self.data.train)
        if needed > have:
            raise InputError(
                f"batch must be at most the data's {have} examples over {self.clients} clients, "
                f"got {scene.batch}"
            )
        self._check_labels()
        check_loss(scene.loss, self.data.num_classes)
        models.check_fits(self.model(0), self.data.input_shape, self.data.num_classes)
        self._check_buffers()

    def _check_labels(self) -> None:
        y, classes = self.data.train.y, self.data.num_classes
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise InputError(f"labels must be in 0..{classes - 1} for {classes} classes, got {low}..{high}")

    def _check_buffers(self) -> None:
        if not self.scene.sends_buffers:
            return
        steps = self.scene.local.steps(self.scene.batch)
        reasons = {
            f"{self.clients} clients": self.clients > 1,
            f"{steps} local steps": steps > 1,
            "defenses": bool(self.stack.all),
            "a model without BatchNorm in training mode": not norms_in_training(self.model(0)),
        }
        for got, holds in reasons.items():
            if holds:
                raise InputError(
                    "sends_buffers must be off but for one client of one local step, no defenses and a model "
                    f"with BatchNorm in training mode, got {got}"
                )

    def model(self, victim: int) -> nn.Module:
        """The model that victim number `victim` receives."""
        if isinstance(self.scene.model, nn.Module):
            model = self.scene.model
        else:
            rng = torch_stream(self.scene.seed, "victim", victim, "model")
            model = models.build(self.scene.model, self.data.input_shape, self.data.num_classes, rng)
        model = self.stack.model(model, self.data.input_shape)
        return models.with_frozen_norm(model) if self.scene.frozen_norm else model

    def private(self, victim: int) -> list[Examples]:
        """The cohort's data for this victim: `clients` parts of `batch` examples, none used twice until
        the data set is used up."""
        size = self.clients * self.scene.batch
        per_pass = len(self.data.train) // size
        rng = stream(self.scene.seed, "victims", victim // per_pass, "draw")
        at = (victim % per_pass) * size
        index = rng.permutation(len(self.data.train))[at : at + size]
        parts = np.split(index, self.clients)
        return [self.data.train.take(torch.from_numpy(p)).to(self.device) for p in parts]

    def play(self, victim: int, again: int = 0) -> tuple[list[Outcome], Public]:
        """Play all rounds that the adversary needs of this victim, from one model. again: above 0 for the
        same data and model with other random numbers in training and defenses."""
        scene = self.scene
        model = self.model(victim).to(self.device)
        seed = int(stream(scene.seed, "again", again).integers(2**31)) if again else scene.seed
        task = Task(model, scene.loss, scene.local, self.stack, seed)
        params, data, public = Layout.of(model).row(model), self.private(victim), task.public(self.data)
        first = victim * len(self.threat.cohorts(self.clients)) + 1
        return play(task, params, data, self.threat, public, first), public

    def round(self, victim: int) -> tuple[Transcript, Public]:
        """The victim's first round; raises InputError where it came to nothing."""
        outcomes, public = self.play(victim)
        if outcomes[0].transcript is None:
            raise InputError(f"a round must come to an end, got: {reason(outcomes[0])}")
        return outcomes[0].transcript, public

    def look(self, victim: int, again: int = 0) -> Look:
        """What the adversary sees of the victim's rounds, and the truth behind it."""
        outcomes, public = self.play(victim, again)
        found = look(outcomes, self.threat, self.private(victim), public, self.stack.hides_messages)
        if not self.scene.sends_buffers or found.observation is None:
            return found
        o = found.observation
        sent = after_one_step(o.model, o.params, found.truth.x)
        return replace(found, observation=replace(o, buffers=sent))


def run(scene: Scene, progress: Progress = silent) -> Result:
    """Play every victim's rounds, attack what the adversary saw, and score it. Raises InputError first
    where the scene is impossible."""
    stage = Stage(scene)
    return attacked(stage, [stage.look(v) for v in range(scene.victims)], progress)


def attacked(stage: Stage, looks: Sequence[Look], progress: Progress = silent) -> Result:
    """Attack what the adversary saw of each victim, and score it."""
    scene = stage.scene
    rngs = [torch_stream(scene.seed, "victim", v, "attack", stage.attack.name) for v in range(len(looks))]
    begun = time.perf_counter()
    scored = attack_looks(stage.attack, looks, rngs, stage.data, progress)
    seconds = time.perf_counter() - begun
    budget = Budget(stage.stack.hides_messages, scene.delta, rounds=[looks[0].events])
    return Result(_report(stage, scored, budget, seconds), scored, stage.data.input_range)


def _threat_of(attack: Attack, threat: str | ThreatModel | None) -> ThreatModel:
    """The adversary that looks on: the attack's own where it brings one, else the one asked for."""
    own = attack.threat()
    if own is None:
        return make_threat(threat or "server")
    if threat is not None:
        given = threat if isinstance(threat, str) else threat.name
        raise InputError(f"threat must be left out for {attack.name}, which is {own.name!r}, got {given!r}")
    return own


def _report(stage: Stage, scored: tuple[Scored, ...], budget: Budget, seconds: float) -> dict[str, Any]:
    scene, found = stage.scene, [s.found for s in scored]
    losses = [f.loss for f in found]
    return {
        "schema": document.AUDIT_SCHEMA,
        "command": document.command_line(),
        "attack": stage.attack.name,
        "attack_options": asdict(stage.attack),
        "data": stage.data.name,
        "model": scene.model if isinstance(scene.model, str) else type(scene.model).__name__,
        "threat": stage.threat.name,
        "defenses": [dict(d) for d in stage.stack.public()],
        "batch": scene.batch,
        "victims": scene.victims,
        "clients": stage.clients,
        "seed": scene.seed,
        "local": asdict(scene.local),
        "frozen_norm": scene.frozen_norm,
        "sends_buffers": scene.sends_buffers,
        "metrics": summarise(scored, scene.threshold_db),
        "epsilon": epsilons(budget),
        "iterations": float(np.mean([f.iterations for f in found])),
        "evaluations": float(np.mean([f.evaluations for f in found])),
        "seconds": seconds,
        "victim_seconds": [f.seconds for f in found],
        "matching_loss": [v if np.isfinite(v) else None for v in losses],
        "notes": [f.note for f in found],
        "adaptations": [f.adaptation for f in found],
        "diagnoses": [list(f.diagnosis) for f in found],
        "versions": document.versions(),
    }


def make_threat(threat: str | ThreatModel) -> ThreatModel:
    """The threat model by name, or itself; InputError lists the known names."""
    if not isinstance(threat, str):
        return threat
    if threat not in THREATS:
        unknown("threat model", threat, THREATS)
    return THREATS[threat]()
