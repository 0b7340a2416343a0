"""A federation in plain values, and the federation that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

from fltoolkit import models, registry
from fltoolkit.checks import check_device, check_local
from fltoolkit.data import load
from fltoolkit.data.partition import partition
from fltoolkit.defense import Defense
from fltoolkit.errors import InputError, require
from fltoolkit.loss import cross_entropy
from fltoolkit.rng import stream, torch_stream
from fltoolkit.training.clients import Dealt
from fltoolkit.training.federation import Federation
from fltoolkit.training.task import Task
from fltoolkit.types import LocalSpec

ON_FAILURE = ("skip", "stop")


@dataclass(frozen=True)
class Recipe:
    """All that a federation is but its defenses; the flags of `train` by the same names.

    data, model, partition: names, the partition with its options. clients: K (None: 100, or those that the
    data comes from). fraction: C. epochs, batch (None: ∞), lr, lr_decay, momentum, weight_decay,
    shuffle_buffer, precision: the local recipe. on_failure: skip or stop. See `Federation` and `Task` for the
    others.
    """

    data: str = "digits"
    model: str = "mlp"
    partition: str = "iid"
    clients: int | None = None
    fraction: float = 0.1
    epochs: int = 5
    batch: int | None = 10
    lr: float = 0.5
    lr_decay: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    shuffle_buffer: int | None = None
    precision: str = "float32"
    server_lr: float = 1.0
    eval_every: int = 1
    target: float | None = None
    sampling: str = "fixed"
    equal_weights: bool = False
    engine: str = "auto"
    on_failure: str = "skip"
    seed: int = 0
    device: str = "cpu"

    @classmethod
    def of(cls, options: Any) -> Recipe:
        """The recipe in an object that has these values and others beside."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls)})

    def check(self) -> None:
        """Raise InputError for a value that no federation can have."""
        require(0 < self.lr_decay <= 1, "lr_decay", "above 0 and at most 1", self.lr_decay)
        require(0 < self.server_lr < inf, "server_lr", "a finite number > 0", self.server_lr)
        require(self.seed >= 0, "seed", ">= 0", self.seed)
        require(self.on_failure in ON_FAILURE, "on_failure", "skip or stop", self.on_failure)
        check_device(self.device)
        check_local(self.local)

    @property
    def local(self) -> LocalSpec:
        local = LocalSpec(self.epochs, self.batch, self.lr, self.momentum, self.weight_decay)
        return replace(local, buffer=self.shuffle_buffer, precision=self.precision)


class Kitchen:
    """A recipe with its data loaded and dealt; makes the federation of any list of defenses."""

    def __init__(self, recipe: Recipe) -> None:
        recipe.check()
        self.recipe, self.data = recipe, load(recipe.data)
        shape, classes = self.data.input_shape, self.data.num_classes
        self.plain = models.build(recipe.model, shape, classes, torch_stream(recipe.seed, "model"))
        if self.data.test is None:
            raise InputError(f"data must have a test part to train on, got {recipe.data!r}, which has none")
        self.test = self.data.test.to(recipe.device)
        rng = stream(recipe.seed, "partition")
        labels, ids = self.data.train.y.numpy(), self.data.client_ids
        parts = partition(recipe.partition, labels, recipe.clients, rng, ids)
        self.clients = Dealt(self.data.train.to(recipe.device), parts)

    @property
    def cohort(self) -> int | None:
        """The size of every round's cohort; None where chance decides it."""
        r = self.recipe
        return max(round(r.fraction * len(self.clients)), 1) if r.sampling == "fixed" else None

    def federation(self, defenses: Sequence[str | Defense]) -> Federation:
        """The federation under these defenses. Raises InputError where they or the model do not fit."""
        r, data = self.recipe, self.data
        named = registry.make_stack(defenses).all
        model = registry.make_stack(named).model(self.plain, data.input_shape).to(r.device)
        each = data.labels_each_token
        models.check_fits(model, data.input_shape, data.num_classes, data.tokens, each)
        task = Task(
            model,
            cross_entropy,
            r.local,
            registry.make_stack(named, self.cohort),
            r.seed,
            lr_decay=r.lr_decay,
            server_lr=r.server_lr,
            engine=r.engine,
            stop_on_failure=r.on_failure == "stop",
            equal_weights=r.equal_weights,
        )
        return Federation(task, self.clients, self.test, r.fraction, r.eval_every, r.target, r.sampling)
