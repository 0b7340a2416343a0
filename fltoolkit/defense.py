"""What a defense is, and how a list of them acts on one round.

A defense may act at five places, each optional: on the model before training (`model`), on a client's inputs
(`inputs`), on rows (`clients`, in list order), on the sum itself (`secure_sum`, at most one and last among
the client-side steps), and on the aggregate (`server`, in reversed order). Rows are what clients send; a
defense with `level` "example" does the same to the gradients of single examples inside local training,
where the client plays the server. It describes its privacy as events and knows no accountant. Defenses are
public: what `public()` returns is part of every adversary's observation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fltoolkit.errors import InputError, require
from fltoolkit.metrics.traffic import Traffic
from fltoolkit.one_sample import on_one_sample
from fltoolkit.rng import Key, torch_stream
from fltoolkit.types import HONEST, Examples, Layout, Loss, Meddling, PrivacyEvent

LEVELS = ("client", "example")
"""Whose rows a defense acts on."""


@dataclass(frozen=True)
class Local:
    """What a client-side defense may use beside the rows: the model, the broadcast `params [D]`, the loss,
    and each client's own data, by client."""

    model: nn.Module
    params: Tensor
    loss: Loss
    layout: Layout
    data: Mapping[int, Examples] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How the members of a cohort or batch were chosen, as every ε must know.

    kind: "poisson" (each of the population by itself with probability `rate`), "fixed" (`rate · population`
    of them without replacement) or "full" (everybody). population: how many there are to choose from. alike:
    whether each of them counts the same in a sum. Where not, the noise, which follows the largest weight that
    was drawn, tells who was, and chance hides nobody.
    """

    kind: str = "full"
    rate: float = 1.0
    population: int = 0
    alike: bool = True


@dataclass(frozen=True)
class SecureSum:
    """What a secure sum leaves. messages `[n, ...]` as the server saw them, or of no rows where nobody looks
    on; total `[D]`: the weighted mean of the members at positions `survivors` of the cohort; refusals: why
    others are not among them, by position, where somebody refused a message. traffic: what the protocol sent,
    beside the model. Without survivors the sum was given up, and nothing is known of any member."""

    messages: Tensor
    total: Tensor
    survivors: tuple[int, ...]
    refusals: Mapping[int, str] = field(default_factory=dict)
    traffic: Traffic | None = None


@dataclass(frozen=True)
class RoundContext:
    """What a defense may know of the round it acts in.

    clients: the members that sent a row each; at level "example" the numbers of a batch's examples in their
    client's data. weights `[K]`: the public averaging weights; for clients n_k / n, summing to 1.
    sensitivity: the L2 norm that the defenses before this one guarantee for every row, or None where none
    does. name: the stream name. sampling: how the members were chosen. where: what names the streams of
    this round, or of this local step. owner, steps: at level "example" the client, and its local steps in
    this round. memory: what a defense keeps from round to round, see `recall`; local: what clients hold.
    counts: what each member counts in the sum, whole numbers `[K]`: n_k, or 1 where all count alike; empty
    where unknown. witnessed: whether somebody will look at messages. meddling: what the server does to this
    round.
    """

    seed: int
    round: int
    clients: tuple[int, ...]
    weights: Tensor
    sensitivity: float | None = None
    name: str = ""
    sampling: Sampling = Sampling()
    where: tuple[Key, ...] = ()
    owner: int | None = None
    steps: int = 1
    memory: dict[tuple[Key, ...], Tensor] = field(default_factory=dict)
    local: Local | None = None
    counts: tuple[int, ...] = ()
    witnessed: bool = True
    meddling: Meddling = HONEST

    @property
    def level(self) -> str:
        return "client" if self.owner is None else "example"

    @property
    def largest_weight(self) -> float:
        """The most that one member counts in the weighted sum; known without members where the cohort's
        size is random, since then the sum is divided by the expected size."""
        if self.sampling.kind == "poisson":
            return 1 / (self.sampling.rate * self.sampling.population)
        return float(self.weights.max())

    @property
    def _where(self) -> tuple[Key, ...]:
        return self.where or ("round", self.round)

    def client_rng(self, client: int) -> torch.Generator:
        """The stream of one member of the cohort or batch."""
        return torch_stream(self.seed, *self._where, self.level, client, "defense", self.name)

    def server_rng(self) -> torch.Generator:
        """The stream of whoever adds the rows up."""
        return torch_stream(self.seed, *self._where, "server", "defense", self.name)

    def recall(self, *key: Key) -> Tensor | None:
        """What this defense remembered under `key` in an earlier round; None where nothing."""
        return self.memory.get((self.name, *key))

    def remember(self, value: Tensor, *key: Key) -> None:
        """Keep `value` under `key` for later rounds. It becomes part of checkpoints."""
        self.memory[(self.name, *key)] = value


@dataclass(frozen=True)
class Defense:
    """Base of all defenses: does nothing, promises nothing. Subclasses are frozen dataclasses whose
    fields are the `key=value` options of the command line, where `aliases` may rename them."""

    name: ClassVar[str] = ""
    hides_messages: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = False
    """True where what clients send depends on their examples by more than the rows this defense was given:
    then noise on rows before it, or on gradients of single examples, bounds nothing of what is sent."""
    aliases: ClassVar[Mapping[str, str]] = {}

    def check(self, sensitivity: float | None, cohort: int | None) -> None:
        """Raise InputError where this defense cannot work after the ones before it or with this cohort."""

    def bound(self, sensitivity: float | None) -> float | None:
        """The L2 norm guaranteed for every row after this defense, given the one before."""
        return sensitivity

    def bound_in(self, sensitivity: float | None, ctx: RoundContext) -> float | None:
        """The same for one round, where it depends on what the defense remembers."""
        return self.bound(sensitivity)

    def rounded(self, sensitivity: float, ctx: RoundContext) -> float:
        """The L2 norm of a row of at most `sensitivity` as this defense adds it up; only where
        `hides_messages`."""
        return sensitivity

    @property
    def flat_norm(self) -> float | None:
        """C, where all that `clients` does is scale each row by min(1, C / its L2 norm); else None. Such a
        defense needs no rows of single examples, see `fltoolkit.training.private`."""
        return None

    def model(self, model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """The model that everybody trains instead of `model`, which is left untouched."""
        return model

    def inputs(self, data: Examples, ctx: RoundContext, client: int) -> Examples:
        """What a client trains on instead of `data` in this round."""
        return data

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """Rows `[K, D]` in, rows `[K, D]` out."""
        return rows

    def secure_sum(self, rows: Tensor, ctx: RoundContext) -> SecureSum:
        """What the server learns of rows `[K, D]`; only where `hides_messages`."""
        return SecureSum(rows, ctx.weights @ rows, tuple(range(len(rows))))

    def survivors(self, ctx: RoundContext) -> tuple[int, ...]:
        """Positions of those who will be in this round's sum, as far as chance decides it beforehand."""
        return tuple(range(len(ctx.clients)))

    def server(self, aggregate: Tensor, ctx: RoundContext) -> Tensor:
        """Aggregate `[D]` in, aggregate `[D]` out."""
        return aggregate

    def read(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """Messages, or their mean, `[n, D]` in the update's own coordinates, where this defense sends them in
        others that are public. For those who look on: what anybody can undo is no protection."""
        return rows

    def privacy(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        """The privacy events of one round."""
        return ()

    @property
    def acts_at(self) -> str:
        """Whose rows this defense acts on: "client" or "example"."""
        return str(getattr(self, "level", "client"))

    @property
    def noises_the_sum(self) -> bool:
        """True where `server` adds noise in proportion to the bound on rows."""
        return False

    @property
    def acts_on_rows(self) -> bool:
        """True where `clients` does something."""
        return type(self).clients is not Defense.clients

    @property
    def wanted_cohort(self) -> int | None:
        """The number of clients a round must have, None where any will do."""
        return None

    def public(self) -> Mapping[str, Any]:
        """The parameters that everybody knows (Kerckhoffs), by their command-line names."""
        flags = {field: flag for flag, field in self.aliases.items()}
        return {"name": self.name, **{flags.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}}


class DefenseStack:
    """A checked list of defenses that acts as one, on the rows of clients.

    cohort: the number K of clients in a round, where it is already known. `examples` is the same for those
    that act on the gradients of single examples. Raises InputError, before any work, where the list makes no
    sense.
    """

    def __init__(self, defenses: Sequence[Defense], cohort: int | None = None, level: str = "client") -> None:
        self.all = tuple(defenses)
        self.defenses = tuple(d for d in self.all if d.acts_at == level)
        self.examples = DefenseStack(self.all, None, "example") if level == "client" else self
        self._check_order()
        seen: Counter[str] = Counter()
        steps = []
        bound: float | None = None
        noises: list[tuple[Defense, float]] = []
        for d in self.defenses:
            d.check(bound, cohort)
            if d.noises_the_sum and bound is not None:
                noises.append((d, bound))
            seen[d.name] += 1
            label = d.name if seen[d.name] == 1 else f"{d.name}#{seen[d.name]}"
            steps.append((d, label))
            bound = d.bound(bound)
            _check_noises(noises, d, bound)
        self._steps = tuple(steps)

    def _check_order(self) -> None:
        hidden = [i for i, d in enumerate(self.defenses) if d.hides_messages]
        if len(hidden) > 1:
            raise InputError("defense list must hold at most one secure sum, got two")
        if not hidden:
            return
        for d in self.defenses[hidden[0] + 1 :]:
            if d.acts_on_rows:
                sum_name = self.defenses[hidden[0]].name
                raise InputError(f"{d.name} acts on clients' rows, so it must come before {sum_name}")

    @property
    def hides_messages(self) -> bool:
        """True where a secure sum hides single messages from the server."""
        return self._secure_sum is not None

    def public(self) -> tuple[Mapping[str, Any], ...]:
        """The public parameters of every defense, those on single examples included, in list order."""
        return tuple(d.public() for d in self.all)

    def events(self, ctx: RoundContext) -> tuple[PrivacyEvent, ...]:
        """The privacy events of one round.

        Noise that clients add protects their sum by all of it together only where the rows are summed as they
        are; where a later defense changes each row by itself, the sum is as protected as a message, and where
        that looks at data, neither is.
        """
        found: list[PrivacyEvent] = []
        steps = self._in(ctx)
        for i, (d, c) in enumerate(steps):
            events = d.privacy(c)
            later = [s for s, _ in steps[i + 1 :] if s.acts_on_rows]
            if d.acts_on_rows and later:
                spoilt = any(s.looks_at_data for s in later)
                messages = [] if spoilt else [e for e in events if e.view == "message"]
                others = [e for e in events if e.view not in ("message", "sum")]
                events = (*messages, *(replace(e, view="sum") for e in messages), *others)
            found += events
        return on_one_sample(found)

    def _in(self, ctx: RoundContext) -> list[tuple[Defense, RoundContext]]:
        found: list[tuple[Defense, RoundContext]] = []
        bound: float | None = None
        for d, name in self._steps:
            counted = bound
            if d.noises_the_sum and bound is not None and self._secure_sum is not None:
                counted = self._secure_sum.rounded(bound, ctx)
            found.append((d, replace(ctx, sensitivity=counted, name=name)))
            bound = d.bound_in(bound, found[-1][1])
        return found

    @property
    def _secure_sum(self) -> Defense | None:
        return next((d for d in self.defenses if d.hides_messages), None)

    def model(self, model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """The model that everybody trains instead of `model`."""
        for d in self.all:
            model = d.model(model, input_shape)
        return model

    def inputs(self, data: Examples, ctx: RoundContext, client: int) -> Examples:
        """What a client trains on instead of `data`."""
        for d, c in self._in(ctx):
            data = d.inputs(data, c, client)
        return data

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """What clients send instead of `rows [K, D]`, before any secure sum. `rows` is left untouched."""
        for d, c in self._in(ctx):
            rows = d.clients(rows, c)
        return rows

    @property
    def flat_norm(self) -> float | None:
        """C, where the rows are changed by nothing but one flat clip to C; else None."""
        acting = [d for d in self.defenses if d.acts_on_rows]
        return acting[0].flat_norm if len(acting) == 1 else None

    def secure_sum(self, rows: Tensor, ctx: RoundContext) -> SecureSum:
        """The messages that reach the server, and their weighted mean."""
        for d, c in self._in(ctx):
            if d.hides_messages:
                return d.secure_sum(rows, c)
        return Defense().secure_sum(rows, ctx)

    def survivors(self, ctx: RoundContext) -> tuple[int, ...]:
        """Positions of those who will be in this round's sum, where clients drop out by chance."""
        for d, c in self._in(ctx):
            if d.hides_messages:
                return d.survivors(c)
        return tuple(range(len(ctx.clients)))

    def server(self, total: Tensor, ctx: RoundContext) -> Tensor:
        """The aggregate `[D]` that the server releases."""
        for d, c in reversed(self._in(ctx)):
            total = d.server(total, c)
        return total

    def read(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        """Messages, or their mean, `[n, D]` with all public changes of coordinates undone."""
        for d, c in reversed(self._in(ctx)):
            rows = d.read(rows, c)
        return rows


def _check_noises(noises: Sequence[tuple[Defense, float]], after: Defense, bound: float | None) -> None:
    """Raise InputError where rows may be longer after `after` than noise on their sum counts on."""
    for noise, counted in noises:
        if after.acts_on_rows and (bound is None or bound > counted * (1 + 1e-12)):
            longer = "of any length" if bound is None else f"up to {bound:.4g} long"
            raise InputError(
                f"{after.name} must come before {noise.name}, whose noise is for rows up to {counted:.4g} "
                f"long: after {after.name} they are {longer}"
            )


def check_level(level: str) -> None:
    """For defenses that act at either level."""
    require(level in LEVELS, "level", f"one of {LEVELS}", level)
