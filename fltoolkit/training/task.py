"""What a round's participants share, and what defenses and accounting must know of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fltoolkit.data import Dataset
from fltoolkit.defense import DefenseStack, RoundContext, Sampling
from fltoolkit.errors import require
from fltoolkit.rng import Key
from fltoolkit.threat import Public
from fltoolkit.training.clients import Dealt
from fltoolkit.training.engines import AUTO, Engine, choose
from fltoolkit.training.private.clipped import check_private
from fltoolkit.training.private.local import OPACUS
from fltoolkit.types import Examples, Layout, LocalSpec, Loss, PrivacyEvent


@dataclass(frozen=True)
class Task:
    """What every participant knows before the first round: the model, the loss, the local recipe and the
    defenses, and under which seed the random streams are named.

    equal_weights: every client counts alike in the mean, not by its n_k. lr_decay: η in round t is lr ·
    lr_decay^(t−1). server_lr: w_{t+1} = w_t + server_lr · aggregate. engine: which engine trains the
    cohort. stop_on_failure: raise InputError when a client fails or sends NaN, instead of leaving it out of
    the round's mean.
    """

    model: nn.Module
    loss: Loss
    local: LocalSpec
    stack: DefenseStack
    seed: int
    lr_decay: float = 1.0
    server_lr: float = 1.0
    engine: str = AUTO
    stop_on_failure: bool = True
    equal_weights: bool = False

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.model)

    def local_in(self, number: int) -> LocalSpec:
        """The local recipe of round `number`, counted from 1."""
        return replace(self.local, lr=self.local.lr * self.lr_decay ** max(0, number - 1))

    @cached_property
    def _engines(self) -> dict[tuple[int, ...], Engine]:
        return {}

    def engine_for(self, input_shape: tuple[int, ...]) -> Engine:
        """The same in every round, so that what an engine keeps between calls pays off."""
        if input_shape not in self._engines:
            self._engines[input_shape] = choose(self.model, self.loss, input_shape, self.engine)
        return self._engines[input_shape]

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Raise InputError where no engine can train the model as the defenses want."""
        if not self.stack.examples.defenses:
            self.engine_for(input_shape)
            return
        check_private(self.model)
        require(
            self.engine in (AUTO, OPACUS), "engine", "auto or opacus with defenses on examples", self.engine
        )

    def engine_name(self, input_shape: tuple[int, ...]) -> str:
        """What trains the cohort, for reports."""
        if self.stack.examples.defenses:
            return "private" if self.engine == AUTO else self.engine
        return self.engine_for(input_shape).name

    def public(self, data: Dataset) -> Public:
        """What everybody knows of a federation that trains this task on `data`, the test split of which is
        public."""
        return Public(
            model=self.model,
            loss=self.loss,
            layout=self.layout,
            input_shape=data.input_shape,
            input_range=data.input_range,
            num_classes=data.num_classes,
            defenses=self.stack.public(),
            auxiliary=data.test,
        )


def counts(task: Task, sampling: Sampling, sizes: Sequence[int]) -> Tensor:
    """What each client counts in the sum `[K]`: its n_k, or 1 with equal weights and in a Poisson cohort."""
    alike = task.equal_weights or sampling.kind == "poisson"
    return torch.tensor([1.0 if alike else float(n) for n in sizes])


def alike(task: Task, clients: Sequence[Examples], sampling: str) -> bool:
    """Whether every one of these clients counts the same in a sum; one whose data cannot be read does not.
    Nobody is asked where no defense wants to know."""
    if task.equal_weights or sampling == "poisson" or not task.stack.defenses:
        return True
    try:
        sizes = clients.sizes if isinstance(clients, Dealt) else map(len, clients)
        return len(set(sizes)) <= 1
    except Exception:
        return False


def example_context(
    task: Task, number: int, client: int, num_examples: int, where: tuple[Key, ...] = ()
) -> RoundContext:
    """The context of one client's local steps in round `number`, for defenses at the level of examples: each
    step takes every one of the client's `num_examples` by itself with probability B / n_k."""
    size = min(task.local.batch or num_examples, num_examples)
    full = size == num_examples
    return RoundContext(
        task.seed,
        number,
        (),
        torch.empty(0),
        sampling=Sampling("full" if full else "poisson", size / num_examples, num_examples),
        where=where,
        owner=client,
        steps=task.local.steps(num_examples),
    )


def round_events(task: Task, ctx: RoundContext, sizes: Sequence[int]) -> tuple[PrivacyEvent, ...]:
    """The privacy events of a round in which `ctx.clients`, with `sizes` examples, took part. Single examples
    have none where a defense on clients looks at them too."""
    events = task.stack.events(ctx)
    if task.stack.examples.defenses and not any(d.looks_at_data for d in task.stack.defenses):
        for c, n in zip(ctx.clients, sizes, strict=True):
            events += task.stack.examples.events(example_context(task, ctx.round, c, n))
    return events
