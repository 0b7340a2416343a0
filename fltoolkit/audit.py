"""One scene through the whole pipeline, from private data to a measured leak.

`run(scene)` builds the round itself; `update(model, loss, update, spec)` attacks an update that came from
anywhere else, such as a file or another framework's run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fltoolkit import models, registry
from fltoolkit.attack import Attack, Progress, grey, silent
from fltoolkit.data import Dataset, load
from fltoolkit.defense import Defense
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.loss import cross_entropy
from fltoolkit.report import document
from fltoolkit.report.epsilon import epsilons
from fltoolkit.rng import stream, torch_stream
from fltoolkit.scoring import Scored, score, summarise, truth_of
from fltoolkit.threat import THREATS, Public, ThreatModel
from fltoolkit.training.budget import Budget
from fltoolkit.training.round import Memory, Outcome, run_round
from fltoolkit.training.task import Task
from fltoolkit.types import (
    Examples,
    Layout,
    LocalSpec,
    Loss,
    Observation,
    PrivacyEvent,
    Reconstruction,
    Transcript,
)


@dataclass(frozen=True)
class Scene:
    """One question: what does this attack recover of these data through this model and these defenses?

    Names or ready objects both work for attack, data, model, threat and defenses. threat: None for
    "server", or for the adversary that an attack brings along. batch: private examples a client. victims:
    independent repetitions. clients: K a round mixes (None: what a `secagg` asks for, else 1). A model
    given as an object keeps its weights for every victim; a named one is initialised anew. frozen_norm:
    clients train with BatchNorm in evaluation mode, as it is when a pretrained model is tuned; otherwise in
    the mode that the model is in, for named ones the statistics of the batch.
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

    def _check_labels(self) -> None:
        y, classes = self.data.train.y, self.data.num_classes
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise InputError(f"labels must be in 0..{classes - 1} for {classes} classes, got {low}..{high}")

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
        cohorts = self.threat.cohorts(self.clients)
        memory: Memory = {}
        outcomes = []
        for i, cohort in enumerate(cohorts):
            meddling = self.threat.meddling(params, cohort, public)
            number = victim * len(cohorts) + i + 1
            outcome = run_round(task, params, cohort, data, number, memory=memory, meddling=meddling)
            memory = outcome.memory
            outcomes.append(outcome)
        return outcomes, public

    def round(self, victim: int) -> tuple[Transcript, Public]:
        """The victim's first round; raises InputError where it came to nothing."""
        outcomes, public = self.play(victim)
        if outcomes[0].transcript is None:
            raise InputError(f"a round must come to an end, got: {_reason(outcomes[0])}")
        return outcomes[0].transcript, public

    def look(self, victim: int, again: int = 0) -> Look:
        """What the adversary sees of the victim's rounds, and the truth behind it."""
        outcomes, public = self.play(victim, again)
        transcripts = [o.transcript for o in outcomes if o.transcript is not None]
        events = outcomes[-1].events
        if len(transcripts) < len(outcomes):
            stopped = next(o for o in outcomes if o.transcript is None)
            return Look(None, self.private(victim)[0], events, _reason(stopped))
        mixed = self.threat.members(transcripts[0], 0)
        if not mixed:
            return Look(None, self.private(victim)[0], events, "the target dropped out")
        seen = self.threat.observe_all(transcripts, self.clients, public)
        messages = transcripts[0].messages if self.stack.hides_messages else None
        return Look(seen, truth_of(transcripts[0], mixed), events, messages=messages)


@dataclass(frozen=True)
class Look:
    """observation: None where the rounds came to nothing, for the reason in `stopped`. messages: the masked
    ones of the first round, where a secure sum hides them."""

    observation: Observation | None
    truth: Examples
    events: tuple[PrivacyEvent, ...]
    stopped: str = ""
    messages: Tensor | None = None


def run(scene: Scene, progress: Progress = silent) -> Result:
    """Play every victim's rounds, attack what the adversary saw, and score it. Raises InputError first
    where the scene is impossible."""
    stage = Stage(scene)
    return attacked(stage, [stage.look(v) for v in range(scene.victims)], progress)


def attacked(stage: Stage, looks: Sequence[Look], progress: Progress = silent) -> Result:
    """Attack what the adversary saw of each victim, and score it."""
    scene = stage.scene
    seen = [(v, look.observation) for v, look in enumerate(looks) if look.observation is not None]
    rngs = [torch_stream(scene.seed, "victim", v, "attack", stage.attack.name) for v, _ in seen]
    begun = time.perf_counter()
    recovered = stage.attack.many([o for _, o in seen], rngs, progress) if seen else []
    seconds = time.perf_counter() - begun
    found = dict(zip((v for v, _ in seen), recovered, strict=True))
    mean_image, data = stage.data.train.x.mean(0), stage.data
    scored = tuple(
        score(
            found.get(v) or grey(look.truth.x, look.truth.y, data.input_range, f"stopped: {look.stopped}"),
            look.truth,
            mean_image,
            data.input_range,
            data.num_classes,
        )
        for v, look in enumerate(looks)
    )
    budget = Budget(stage.stack.hides_messages, scene.delta, rounds=[looks[0].events])
    return Result(_report(stage, scored, budget, seconds), scored, stage.data.input_range)


def _reason(outcome: Outcome) -> str:
    first = outcome.failures[0]
    return f"client {first.client} {first.reason}"


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


@dataclass(frozen=True)
class UpdateSpec:
    """What the adversary knows of an update that came from outside.

    num_examples: private examples behind it. input_shape: one input. kind: "delta" (w_k − w_t),
    "gradient", or "weights" (w_k, the client's new parameters). local: E, B and η if known; without it a
    delta is read as one step of size 1. clients: how many clients the update averages. defenses: the public
    parameters of what was done to it, such as `{"name": "clip", "norm": 1.0}`. auxiliary: public data of the
    same kind, for attacks that learn from it.
    """

    num_examples: int
    input_shape: tuple[int, ...]
    num_classes: int
    input_range: tuple[float, float] = (0.0, 1.0)
    kind: str = "delta"
    local: LocalSpec | None = None
    clients: int = 1
    labels: Tensor | None = None
    attack: str | Attack = "idlg"
    seed: int = 0
    defenses: Sequence[Mapping[str, Any]] = ()
    auxiliary: Examples | None = None


KINDS = ("delta", "gradient", "weights")


def update(
    model: nn.Module,
    loss: Loss,
    update: Tensor | Mapping[str, Tensor] | Sequence[Any],
    spec: UpdateSpec,
    progress: Progress = silent,
) -> Reconstruction:
    """Attack one update of `model`, whose current weights are those the client started from.

    update: a row `[D]`, a mapping from parameter names, or arrays in the order of the trainable
    parameters (what Flower calls NDArrays). Raises InputError where it does not fit the model.
    """
    require(spec.num_examples >= 1, "num_examples", ">= 1", spec.num_examples)
    require(spec.clients >= 1, "clients", ">= 1", spec.clients)
    require(spec.kind in KINDS, "kind", f"one of {KINDS}", spec.kind)
    models.check_fits(model, spec.input_shape, spec.num_classes)
    layout = Layout.of(model)
    params = layout.row(model)
    row = as_row(layout, update).to(params)
    local = spec.local
    if spec.kind == "weights":
        row = row - params
    elif spec.kind == "gradient":
        row, local = -row, LocalSpec()
    attack = registry.make_attack(spec.attack) if isinstance(spec.attack, str) else spec.attack
    observation = Observation(
        model=model,
        loss=loss,
        layout=layout,
        params=params,
        update=row,
        clients=spec.clients,
        num_examples=spec.num_examples,
        input_shape=tuple(spec.input_shape),
        input_range=spec.input_range,
        num_classes=spec.num_classes,
        local=local,
        labels=spec.labels,
        defenses=tuple(spec.defenses),
        auxiliary=spec.auxiliary,
    )
    rng = torch_stream(spec.seed, "update", "attack", attack.name)
    return attack.many([observation], [rng], progress)[0]


def as_row(layout: Layout, update: Tensor | Mapping[str, Tensor] | Sequence[Any]) -> Tensor:
    """An update in any of the accepted forms -> a row `[D]`; InputError names what does not fit."""
    if isinstance(update, Tensor):
        if update.shape != (layout.size,):
            raise InputError(f"update must be a row of {layout.size} numbers, got {tuple(update.shape)}")
        return update.detach().clone()
    if not isinstance(update, Mapping):
        if len(update) != len(layout.names):
            raise InputError(f"update must hold {len(layout.names)} arrays, got {len(update)}")
        update = dict(zip(layout.names, update, strict=True))
    tensors = {n: torch.as_tensor(update[n]) for n in layout.names if n in update}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in tensors:
            raise InputError(f"update must hold every trainable parameter, got none for {name!r}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"update of {name!r} must have shape {shape}, got {tuple(tensors[name].shape)}")
    return layout.flatten(tensors).detach()


def check_local(local: LocalSpec) -> None:
    require(local.epochs >= 1, "epochs", ">= 1", local.epochs)
    require(local.batch is None or local.batch >= 1, "local batch", ">= 1 or inf", local.batch)
    require(np.isfinite(local.lr) and local.lr > 0, "lr", "a finite number > 0", local.lr)
    require(0 <= local.momentum < 1, "momentum", "at least 0 and below 1", local.momentum)
    good = np.isfinite(local.weight_decay) and local.weight_decay >= 0
    require(good, "weight_decay", "a finite number >= 0", local.weight_decay)


def check_searchable(data: Dataset) -> None:
    if data.tokens:
        raise InputError(f"data must hold real numbers, such as pixels, to be attacked, got {data.name!r}")


def check_loss(loss: Loss, num_classes: int) -> None:
    """Refuse a loss that is already averaged: the round weighs examples itself."""
    shape = tuple(loss(torch.zeros(2, num_classes), torch.zeros(2, dtype=torch.long)).shape)
    if shape != (2,):
        raise InputError(
            f"loss must give one value an example, shape (2,), got {shape}: use reduction='none'"
        )


def check_device(device: str) -> torch.device:
    """The device, tried once so that one that is not there stops before work starts."""
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device must be one that PyTorch can use here, got {device!r}: {e}") from e


def make_threat(threat: str | ThreatModel) -> ThreatModel:
    """The threat model by name, or itself; InputError lists the known names."""
    if not isinstance(threat, str):
        return threat
    if threat not in THREATS:
        unknown("threat model", threat, THREATS)
    return THREATS[threat]()
