"""Learning to Invert: a network trained to read inputs off updates.

Wu, Chen, Guo, Weinberger 2023, arXiv:2210.10880 (UAI 2023). The adversary plays the client on public data: it
computes the updates g of auxiliary batches X at the broadcast parameters, sends them through the public
defense D, hashes them (φ), and trains a network f on the pairs,

    min_f E_X min_π (1/N) Σ_i ‖f(φ(D(g(X))))_π(i) − X_i‖²,

π over the orders of a batch. What was observed is then inverted in one forward pass. Because D is inside the
training data, the attack adapts to any defense that it can run, random ones included.

The paper's code: two hidden layers of 3,000 ReLU units (10,000 for LeNet and batches of 4), Adam at 1e-4,
minibatches of 256, 200 epochs over CIFAR-10 (5,000 for batches of 4; 40 and 200 for ResNet20), a tenth of the
rate for the last quarter. ResNet20's updates are hashed, without signs, to half their length and the rate
falls half-way. The defaults here are sized for a CPU: fewer units, bins and steps, a larger rate. Beyond the
paper: several local steps and clients are simulated as they are, features are standardised, labels predicted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fltoolkit import registry
from fltoolkit.attack import Attack, Progress, grouped, silent
from fltoolkit.defense import DefenseStack, Local, RoundContext
from fltoolkit.errors import require
from fltoolkit.inversion.checks import check_auxiliary, check_observation
from fltoolkit.inversion.inverter import Hashing, Training, one_round, read, train
from fltoolkit.rng import stream, torch_stream
from fltoolkit.training.engines import choose
from fltoolkit.training.private.local import Trainer
from fltoolkit.training.task import Task, example_context
from fltoolkit.types import Examples, LocalSpec, Observation, Reconstruction

CHUNK_FLOATS = 2**24
"""Simulated updates held at once have at most this many entries (64 MiB)."""


@dataclass(frozen=True)
class Learned(Attack):
    """Train a network on public data, sent through the same defenses, to read inputs off an update.

    steps: training steps. simulations: updates simulated to train on; fewer where they would only repeat.
    hidden: units of each hidden layer. features: numbers that hashing leaves of an update. lr: Adam's rate.
    batch: simulated updates a step. Observations of one round that differ in the update alone share one
    network, drawn from the first one's generator.
    """

    name: ClassVar[str] = "learned"
    steps: int = 1000
    simulations: int = 8192
    hidden: int = 512
    features: int = 4096
    lr: float = 1e-3
    batch: int = 128

    def __post_init__(self) -> None:
        for option in ("steps", "simulations", "hidden", "features", "batch"):
            require(getattr(self, option) >= 1, option, ">= 1", getattr(self, option))
        require(isfinite(self.lr) and self.lr > 0, "lr", "a finite number > 0", self.lr)

    def many(
        self,
        observations: Sequence[Observation],
        rngs: Sequence[torch.Generator],
        progress: Progress = silent,
    ) -> list[Reconstruction]:
        for o in observations:
            check(o)
        found: dict[int, Reconstruction] = {}
        for group in grouped(observations, one_round):
            seed = int(torch.randint(2**62, (), generator=rngs[group[0]]))
            members = [observations[i] for i in group]
            found |= zip(group, self._invert(members, seed, progress), strict=True)
        return [found[i] for i in range(len(observations))]

    def _invert(self, members: list[Observation], seed: int, progress: Progress) -> list[Reconstruction]:
        """Train one network and read every member's update with it."""
        begun = time.perf_counter()
        client = Simulation(members[0], seed)
        low, high = members[0].input_range
        hashing = Hashing.draw(members[0].layout.size, self.features, torch_stream(seed, "hashing"))
        private = client.draw(self.simulations, "draw")
        inverter, trace = train(
            torch.cat([hashing(rows) for rows in client.observed(private)]),
            (private.x - low) / (high - low),
            private.y,
            members[0].num_classes,
            Training(self.steps, self.hidden, self.lr, self.batch),
            seed,
            lambda step, loss: progress(step, self.steps, f"inverter's squared error {loss:.3g}"),
        )
        shared = Reconstruction(
            x=private.x[0],
            y=private.y[0],
            loss=float("nan"),
            trace=trace,
            iterations=self.steps,
            evaluations=client.gradients * len(private),
            note=f"inverter trained for {self.steps} steps on {len(private)} simulated updates of "
            f"{len(client.public)} auxiliary examples, {client.through}",
            adaptation=f"trained on updates {client.through}" if client.stack.all else "",
        )
        found = []
        for o in members:
            x, y = read(inverter, hashing(o.update[None]), o.labels)
            x = low + (high - low) * x.reshape(-1, *o.input_shape)
            found.append(replace(shared, x=x, y=y, loss=client.distance(x, y, o.update)))
        return [replace(f, seconds=(time.perf_counter() - begun) / len(members)) for f in found]


class Simulation:
    """The observed round, played again on public data under the adversary's own seed."""

    def __init__(self, observation: Observation, seed: int) -> None:
        assert observation.auxiliary is not None
        o, self.seed = observation, seed
        self.params, self.round, self.layout = o.params, o.round, o.layout
        self.local = o.local or LocalSpec()
        self.public = observation.auxiliary.to(o.params.device)
        self.model, self.loss = o.model, o.loss
        self.engine = choose(o.model, o.loss, o.input_shape)
        self.sizes = [len(part) for part in np.array_split(range(o.num_examples), o.clients)]
        self.weights = torch.tensor(self.sizes).to(o.params) / o.num_examples
        self.stack = simulated(o.defenses, o.clients)
        self.released = o.released

    @property
    def through(self) -> str:
        """What the updates went through, in words."""
        if not self.stack.all:
            return "without defenses"
        stage = "as the server releases them" if self.released else "as the server receives them"
        return f"through {' + '.join(map(registry.spec_of, self.stack.public()))}, {stage}"

    @property
    def gradients(self) -> int:
        """Gradients that one simulated update takes."""
        return sum(self.local.steps(n) for n in self.sizes)

    def draw(self, most: int, name: str) -> Examples:
        """Batches that might be the private one: x `[P, N, ...]`, y `[P, N]`. The public data are gone
        through in ever new orders; P is `most`, or less where no update would differ from an earlier one."""
        size, have, rng = sum(self.sizes), len(self.public), stream(self.seed, name)
        if size == 1 and not self._random():
            most = min(most, have)
        lines = have // size
        orders = [rng.permutation(have)[: lines * size].reshape(-1, size) for _ in range(-(-most // lines))]
        return self.public.take(torch.from_numpy(np.concatenate(orders)[:most]).to(self.public.x.device))

    def observed(self, batches: Examples) -> Iterator[Tensor]:
        """What the adversary would see of each batch, in chunks `[·, D]`."""
        at_once = max(1, CHUNK_FLOATS // (self.layout.size * len(self.sizes)))
        for a in range(0, len(batches), at_once):
            some = batches.take(slice(a, a + at_once))
            cohorts = self.trained(some, a, self.stack)
            if self.stack.defenses:
                lines = zip(cohorts, some.x, some.y, strict=True)
                messages = [self._message(c, p, x, y) for p, (c, x, y) in enumerate(lines, a)]
                yield torch.stack(messages)
            else:
                yield self.weights @ cohorts

    def trained(self, batches: Examples, first: int = 0, stack: DefenseStack | None = None) -> Tensor:
        """w_k − w_t of the K clients of each batch `[P, K, D]`, by the engine that trains real clients, with
        what the defenses of `stack` do to inputs and inside local training; `first` is the number of the
        first batch."""
        stack = stack or DefenseStack([])
        data, rngs = [], []
        for p, (x, y) in enumerate(zip(batches.x, batches.y, strict=True), first):
            ctx = self._context(p, x, y)
            assert ctx.local is not None
            for k, part in ctx.local.data.items():
                data.append(stack.inputs(part, ctx, k))
                rngs.append(stream(self.seed, "simulation", p, "client", k))
        if not stack.examples.defenses:
            return self.engine(self.params, data, self.local, rngs).unflatten(0, (-1, len(self.sizes)))
        trainer = Trainer(self.model, self.loss, stack.examples, self.local)
        task = Task(self.model, self.loss, self.local, stack, self.seed)
        rows = []
        for i, (part, rng) in enumerate(zip(data, rngs, strict=True)):
            p, k = first + i // len(self.sizes), i % len(self.sizes)
            ctx = example_context(task, self.round, k, len(part), ("simulation", p, "client", k))
            rows.append(trainer(self.params, part, ctx, rng)[0])
        return torch.stack(rows).unflatten(0, (-1, len(self.sizes)))

    def distance(self, x: Tensor, y: Tensor, update: Tensor) -> float:
        """The matching loss ‖g(x, y) − g‖² between updates read as gradients, defenses left out."""
        found = self.weights @ self.trained(Examples(x[None], y[None]))[0]
        scale = self.local.lr * self.local.steps(max(1, len(x) // len(self.sizes)))
        return float(((found - update) / scale).square().sum())

    def _context(self, number: int, x: Tensor, y: Tensor) -> RoundContext:
        """The simulated round `number` of clients who share the batch x `[N, ...]`, y `[N]`."""
        seed = int(stream(self.seed, "simulation", number, "defenses").integers(2**62))
        parts = zip(x.split(self.sizes), y.split(self.sizes), strict=True)
        data = {k: Examples(*part) for k, part in enumerate(parts)}
        local = Local(self.model, self.params, self.loss, self.layout, data)
        return RoundContext(seed, self.round, tuple(data), self.weights, local=local)

    def _message(self, cohort: Tensor, number: int, x: Tensor, y: Tensor) -> Tensor:
        """One cohort's rows `[K, D]`, made from x and y -> the weighted mean of what they send `[D]`, or
        what is released, as the adversary sees it."""
        ctx = self._context(number, x, y)
        total = self.weights @ self.stack.clients(cohort, ctx)
        return self.stack.server(total, ctx) if self.released else self.stack.read(total[None], ctx)[0]

    def _random(self) -> bool:
        """Whether the defenses may make two messages of one batch."""
        few = self.public.take(slice(0, sum(self.sizes)))
        one = Examples(few.x[None], few.y[None])
        made = []
        for number in (0, 1):
            cohort = self.trained(one, number, self.stack)[0]
            made.append(self._message(cohort, number, few.x, few.y))
        return not torch.equal(*made)


def simulated(defenses: Sequence[Mapping[str, Any]], cohort: int) -> DefenseStack:
    """The public defenses, ready to run. A secure sum is left out: it hides messages and changes no sum."""
    ready = []
    for public in defenses:
        cls = registry.defense_class(public["name"])
        if not cls.hides_messages:
            ready.append(cls(**{cls.aliases.get(k, k): v for k, v in public.items() if k != "name"}))
    return DefenseStack(ready, cohort)


def check(observation: Observation) -> None:
    """Refuse, before any work, what this attack cannot do."""
    o, need = observation, observation.num_examples
    check_observation(o)
    check_auxiliary(o, "learned", "train on")
    assert o.auxiliary is not None
    have = len(o.auxiliary)
    require(need >= o.clients, "num_examples", f"at least one for each of {o.clients} clients", need)
    require(have >= need, "auxiliary data", f"at least one batch of {need} examples", have)


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("learned")
