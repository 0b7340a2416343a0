"""One round of federated learning, from the broadcast to the released aggregate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fltoolkit.defense import Local, RoundContext, Sampling, SecureSum
from fltoolkit.errors import InputError
from fltoolkit.metrics.traffic import FLOAT_BITS, Traffic
from fltoolkit.rng import Key, stream
from fltoolkit.training.private.local import Trainer
from fltoolkit.training.task import Task, counts, example_context, round_events
from fltoolkit.types import HONEST, Examples, Meddling, PrivacyEvent, Transcript, Updates

Memory = Mapping[tuple[Key, ...], Tensor]
"""What defenses keep from round to round, by defense and their own key."""

EVERYBODY = Sampling()
NOTHING: Memory = MappingProxyType({})

FINITE = "must be finite"
CHUNK_BYTES = 256 << 20
"""Rows of a cohort that are in memory at once, unless somebody must see them all."""


@dataclass(frozen=True)
class Failure:
    """A client that was left out of a round, and why."""

    client: int
    reason: str

    @property
    def diverged(self) -> bool:
        """Whether its numbers left what floats can hold; otherwise its data or the program failed it."""
        return self.reason.startswith(FINITE)


class NobodyError(InputError):
    """Every client of a round failed. failures: all of them."""

    def __init__(self, number: int, failures: Sequence[Failure]) -> None:
        reasons = "; ".join(f"client {f.client} {f.reason}" for f in failures[:3])
        super().__init__(f"round {number} must have a client that succeeds, got: {reasons}")
        self.failures = tuple(failures)


@dataclass(frozen=True)
class Outcome:
    """What a round left behind.

    clients: those in the mean; num_examples and norms `[K]`: their n_k and ‖w_k − w_t‖₂ before any
    defense. aggregate `[D]` as released. memory: what defenses keep for the next round. empty_batches: local
    steps that Poisson sampling gave no example. transcript: the round as it happened, where somebody looked
    on. traffic: what a secure sum's messages weighed, where there is one.
    """

    number: int
    clients: tuple[int, ...]
    num_examples: tuple[int, ...]
    norms: Tensor
    failures: tuple[Failure, ...]
    aggregate: Tensor
    events: tuple[PrivacyEvent, ...]
    transcript: Transcript | None
    memory: Memory = field(default_factory=dict)
    empty_batches: int = 0
    traffic: Traffic | None = None


def run_round(
    task: Task,
    params: Tensor,
    cohort: Sequence[int],
    clients: Sequence[Examples],
    number: int,
    witnessed: bool = True,
    sampling: Sampling = EVERYBODY,
    memory: Memory = NOTHING,
    meddling: Meddling = HONEST,
) -> Outcome:
    """Train the members `cohort` of `clients` from `params [D]` in round `number`, through all defenses.

    The cohort streams through in chunks and the aggregate is a fold; witnessed keeps every row for the
    transcript. A client fails where its data cannot be read, its training raises, or its update is not
    finite; the weights of the others are renormalised. A Poisson cohort is divided by its expected size
    instead, every client counts alike, and it may be empty. memory: what defenses kept of earlier rounds.
    Those who drop out of a secure sum are left out of the round's mean; where it is given up, the aggregate
    is zero, nobody is in it, and its events are still those of all. meddling: what a malicious server does.
    Raises InputError where the task says to stop on failure, NobodyError where every client failed.
    """
    if sampling == EVERYBODY:  # those who drop out later were counted on
        sampling = replace(sampling, population=len(cohort))
    fold = _Fold(task, params, clients, number, witnessed, sampling, memory, meddling)
    at_once = max(1, CHUNK_BYTES // (params.numel() * params.element_size()))
    for a in range(0, len(cohort), at_once):
        fold.add(cohort[a : a + at_once])
    return fold.close()


class _Fold:
    """What is gathered while a cohort streams through. rows, messages and truth stay empty unless somebody
    must see every row."""

    def __init__(
        self,
        task: Task,
        params: Tensor,
        clients: Sequence[Examples],
        number: int,
        witnessed: bool,
        sampling: Sampling,
        memory: Memory,
        meddling: Meddling,
    ) -> None:
        self.meddling = meddling
        self.task, self.params, self.source, self.number = task, params, clients, number
        self.sampling, self.memory, self.empty = sampling, dict(memory), 0
        self.witnessed, self.keep = witnessed, witnessed or task.stack.hides_messages
        self.local = task.local_in(number)
        self.total = torch.zeros_like(params)
        self.clients: list[int] = []
        self.sizes: list[int] = []
        self.failures: list[Failure] = []
        self.norms: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.messages: list[Tensor] = []
        self.truth: list[Examples] = []

    def add(self, members: Sequence[int]) -> None:
        """Train some of the cohort and add what they send."""
        data = self._fetch(members)
        inputs = self._inputs(data)
        sent, delta = self._train(inputs) if data else ([], self.params.new_empty(0))
        if self.failures and self.task.stop_on_failure:
            raise InputError(f"update of client {self.failures[0].client} {self.failures[0].reason}")
        if not sent:
            return
        sizes = [len(data[c]) for c in sent]
        messages = self.task.stack.clients(delta, self._context(sent, sizes, inputs))
        self.total += self._counts(sizes) @ messages
        self.clients += sent
        self.sizes += sizes
        self.norms.append(vector_norm(delta, dim=1))
        if self.keep:
            self.rows.append(delta)
            self.messages.append(messages)
            self.truth += [data[c] for c in sent]

    def close(self) -> Outcome:
        if not self.clients and (self.failures or self.sampling.kind != "poisson"):
            raise NobodyError(self.number, self.failures)
        messages = torch.cat(self.messages) if self.keep and self.messages else None
        ctx = self._context(self.clients, self.sizes)
        events = round_events(self.task, ctx, self.sizes)
        given_up, traffic = False, None
        if messages is not None and self.task.stack.hides_messages:
            left = self.task.stack.secure_sum(messages, ctx)
            messages, total, traffic = left.messages, left.total, self._with_model(left.traffic)
            self._leave_out(left)
            given_up = not self.clients
            ctx = self._context(self.clients, self.sizes)
            events = events if given_up else round_events(self.task, ctx, self.sizes)
        else:
            total = self.total / self._divisor(self.sizes)
        aggregate = total if given_up else self.task.stack.server(total, ctx)
        return Outcome(
            number=self.number,
            clients=ctx.clients,
            num_examples=tuple(self.sizes),
            norms=torch.cat(self.norms) if self.norms else self.params.new_empty(0),
            failures=tuple(self.failures),
            aggregate=aggregate,
            events=events,
            transcript=self._transcript(messages, total, aggregate, ctx, events)
            if self.witnessed and messages is not None and not given_up
            else None,
            memory=self.memory,
            empty_batches=self.empty,
            traffic=traffic,
        )

    def _with_model(self, traffic: Traffic | None) -> Traffic | None:
        """A protocol's traffic and the model that each client receives."""
        return traffic and Traffic(traffic.up, traffic.down + self.params.numel() * FLOAT_BITS / 8)

    def _leave_out(self, left: SecureSum) -> None:
        """Forget those who are not in a secure sum; they failed."""
        for k in sorted(set(range(len(self.clients))) - set(left.survivors)):
            reason = left.refusals.get(k, "dropped out of the secure sum")
            self.failures.append(Failure(self.clients[k], reason))
        keep = list(left.survivors)
        self.clients = [self.clients[k] for k in keep]
        self.sizes = [self.sizes[k] for k in keep]
        self.truth = [self.truth[k] for k in keep]
        self.norms = [torch.cat(self.norms)[keep]]
        self.rows = [torch.cat(self.rows)[keep]] if keep else []

    def _transcript(
        self,
        messages: Tensor,
        total: Tensor,
        aggregate: Tensor,
        ctx: RoundContext,
        events: tuple[PrivacyEvent, ...],
    ) -> Transcript:
        sizes = torch.tensor(self.sizes, device=self.params.device)
        return Transcript(
            broadcast=self.params,
            messages=messages if self.task.stack.hides_messages else self.task.stack.read(messages, ctx),
            messages_hidden=self.task.stack.hides_messages,
            total=self.task.stack.read(total[None], ctx)[0],
            aggregate=aggregate,
            weights=ctx.weights,
            updates=Updates(torch.cat(self.rows), ctx.clients, sizes, self.task.layout, self.number),
            local=self.local,
            truth=tuple(self.truth),
            events=events,
        )

    def _counts(self, sizes: Sequence[int]) -> Tensor:
        return counts(self.task, self.sampling, sizes).to(self.params)

    def _divisor(self, sizes: Sequence[int]) -> float:
        """What the sum is divided by: all that the clients count, or the expected size of a Poisson
        cohort."""
        poisson = self.sampling.kind == "poisson"
        return self.sampling.rate * self.sampling.population if poisson else float(self._counts(sizes).sum())

    def _context(
        self,
        clients: Sequence[int],
        sizes: Sequence[int],
        data: Mapping[int, Examples] = MappingProxyType({}),
    ) -> RoundContext:
        task = self.task
        return RoundContext(
            task.seed,
            self.number,
            tuple(clients),
            self._counts(sizes) / self._divisor(sizes),
            sampling=self.sampling,
            memory=self.memory,
            local=Local(task.model, self.params, task.loss, task.layout, data),
            counts=tuple(int(c) for c in self._counts(sizes).tolist()),
            witnessed=self.witnessed,
            meddling=self.meddling,
        )

    def _inputs(self, data: dict[int, Examples]) -> dict[int, Examples]:
        """What the members train on, after the defenses that act on inputs."""
        ctx = self._context(list(data), [len(d) for d in data.values()], data)
        return {c: self.task.stack.inputs(d, ctx, c) for c, d in data.items()}

    def _fetch(self, members: Sequence[int]) -> dict[int, Examples]:
        """The members' data; who cannot be read is noted as failed."""
        data = {}
        for c in members:
            try:
                data[c] = self.source[c]
            except Exception as e:
                self.failures.append(Failure(c, f"must have readable data, got {type(e).__name__}: {e}"))
        return data

    def _train(self, data: Mapping[int, Examples]) -> tuple[list[int], Tensor]:
        """Who sends, and their w_k − w_t `[K, D]`. Where training raises, each client trains alone, so that
        one cannot take the others with it."""
        members, examples, empty = list(data), list(data.values()), self.empty
        try:
            rows = self._rows(members, examples)
        except Exception as e:
            self.empty = empty
            if len(members) > 1:
                alone = [self._train({c: d}) for c, d in data.items()]
                return [c for sent, _ in alone for c in sent], torch.cat([rows for _, rows in alone])
            self.failures.append(Failure(members[0], f"must train, got {type(e).__name__}: {e}"))
            return [], self.params.new_empty(0, self.params.numel())
        finite = torch.isfinite(vector_norm(rows, dim=1))
        for k in (~finite).nonzero()[:, 0].tolist():
            layer = self.task.layout.first_non_finite(rows[k])
            where = f"NaN or infinity in layer {layer!r}" if layer else "a norm that overflows"
            self.failures.append(Failure(members[k], f"{FINITE}, got {where}"))
        if finite.all():
            return members, rows
        return [c for c, good in zip(members, finite.tolist(), strict=True) if good], rows[finite]

    def _rows(self, members: Sequence[int], examples: Sequence[Examples]) -> Tensor:
        """w_k − w_t of every member `[K, D]`, w_t as that member received it."""
        told = self.meddling.broadcasts
        honest = [k for k, c in enumerate(members) if c not in told]
        if len(honest) == len(members):
            return self._trained(self.params, members, examples)
        rows = self.params.new_empty(len(members), len(self.params))
        for alike in [honest, *([k] for k, c in enumerate(members) if c in told)]:
            if alike:
                params = told.get(members[alike[0]], self.params)
                some = [members[k] for k in alike], [examples[k] for k in alike]
                rows[alike] = self._trained(params, *some)
        return rows

    def _trained(self, params: Tensor, members: Sequence[int], examples: Sequence[Examples]) -> Tensor:
        """What the members' training adds to `params [D]`, `[K, D]`."""
        task = self.task
        rngs = [stream(task.seed, "round", self.number, "client", c, "batches") for c in members]
        if not task.stack.examples.defenses:
            engine = task.engine_for(tuple(examples[0].x.shape[1:]))
            return engine(params, examples, self.local, rngs)
        trainer = Trainer(task.model, task.loss, task.stack.examples, self.local, task.engine)
        rows = []
        for c, d, rng in zip(members, examples, rngs, strict=True):
            where: tuple[Key, ...] = ("round", self.number, "client", c)
            ctx = example_context(task, self.number, c, len(d), where)
            ctx = replace(ctx, local=Local(task.model, params, task.loss, task.layout, {c: d}))
            row, empty = trainer(params, d, ctx, rng)
            self.empty += empty
            rows.append(row)
        return torch.stack(rows)
