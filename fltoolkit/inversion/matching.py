"""Gradient matching: how far the update of a guessed batch is from the observed one.

Zhu, Liu, Han 2019, arXiv:1906.08935, eq. 3, in general form: d(g(x', y'), t) + prior(x') for every row of a
stack of guesses at once, g what the client would send for a guess and t what was observed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from fltoolkit.errors import InputError
from fltoolkit.inversion.client import State, Update, eager_step, in_bf16, local_steps, one_step
from fltoolkit.inversion.compiled import CompilationError, Compiled, evaluation, unfolded
from fltoolkit.inversion.difference import ROUGH, Difference
from fltoolkit.inversion.distance import Distance, squared
from fltoolkit.inversion.prior import Prior
from fltoolkit.models import evaluating
from fltoolkit.training.engines.base import without_draws
from fltoolkit.types import LocalSpec, Observation

CHUNK_FLOATS = 2**25
"""Rows evaluated together hold at most this many gradient entries (128 MiB each for a few tensors)."""

LARGE, HARD = 1_000_000, 100_000_000
"""Parameters, or operations of a forward pass, from which a convolutional network is evaluated guess by guess
on a CPU."""


Priors = tuple[tuple[float, Prior], ...]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    distance: between updates. priors: (weight, prior) pairs added to it. simulate: run a client's local steps
    through instead of reading the update as one gradient. one_by_one: evaluate guesses one after the other
    by plain autograd, which is faster where convolutions are large. compile: evaluate by one compiled
    program, which is faster where networks are small. precision: of the network's own arithmetic, "float32"
    or "bf16"; distances are always float32. fading: a pair like those of priors that the optimiser adds, with
    a weight that falls (`Fading`). rough: the optimiser puts up with slopes that are off by a percent, so
    that one gradient's may come from a difference (`Difference`), where guesses are evaluated one by one.
    """

    distance: Distance = squared
    priors: Priors = ()
    simulate: bool = False
    one_by_one: bool = False
    compile: bool = False
    precision: str = "float32"
    fading: tuple[float, Prior] | None = None
    rough: bool = False


def one_by_one_is_faster(observation: Observation) -> bool:
    """Large convolutions fill a processor alone; stacking guesses only costs memory traffic there."""
    kernels = sum(m.weight.numel() for m in observation.model.modules() if isinstance(m, nn.Conv2d))
    if not kernels or observation.params.device.type != "cpu":
        return False
    at_most = 2 * kernels * observation.num_examples * prod(observation.input_shape[1:])
    return observation.layout.size > LARGE or (at_most > HARD and _operations(observation) > HARD)


def _operations(observation: Observation) -> int:
    """Of one forward pass of a batch."""
    x = torch.zeros(observation.num_examples, *observation.input_shape)
    with evaluating(observation.model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        observation.model(x)
    return int(counter.get_total_flops())


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class GradientMatching:
    """The objective of V observed problems, as a function of stacked guesses.

    Row s of a guess belongs to problem `owner[s]` and holds the flat inputs, then, where labels are
    optimised too (`labels` is None), the label logits `[N, classes]`. labels `[S, N]` fixes them row by row.
    All observations must share architecture, batch size and input shape. Layers that draw are in evaluation
    mode: what a client drew is not known.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        owner: Tensor,
        labels: Tensor | None,
        objective: Objective | None = None,
    ) -> None:
        first = replace(observations[0], model=without_draws(observations[0].model))
        self.objective = objective or Objective()
        if self.objective.precision == "bf16" and has_batch_norm(first.model):
            # PyTorch cannot stack a BatchNorm whose input and statistics differ in precision.
            self.objective = replace(self.objective, one_by_one=True)
        self.layout, self.batch = first.layout, first.num_examples
        self.shape, self.classes = first.input_shape, first.num_classes
        for o in observations[1:]:
            same = (o.layout, o.num_examples, o.input_shape) == (self.layout, self.batch, self.shape)
            if not same:
                raise InputError("observations attacked together must share model, batch and input shape")
        self.owner, self.labels = owner, labels
        self._update = self._client(first)
        self.params = torch.stack([o.params for o in observations])
        self._target = torch.stack([o.gradient for o in observations])
        buffers = [dict(o.model.named_buffers()) for o in observations]
        self._buffers = {n: torch.stack([b[n] for b in buffers]) for n in buffers[0]}
        self.inputs = self.batch * torch.Size(self.shape).numel()
        self._scratch = torch.empty(0)
        self._cached: tuple[Tensor, Tensor, Tensor] | None = None
        self._first, self._program = first, cast(Compiled | None, None)
        self._compiles = self.objective.compile
        self._rough, self._tried = self._may_be_rough(), False
        self.remark = ""
        """What there is to say about how the objective was evaluated."""

    def _may_be_rough(self) -> bool:
        plain = self.steps == 1 and type(self)._updates is GradientMatching._updates
        o = self.objective
        return plain and o.rough and o.one_by_one and o.precision == "float32"

    def _client(self, o: Observation) -> Update:
        """`update(params, buffers, x, y)` of one guess, or of a stack of them unless one by one."""
        update = self._alone(o, o.model)
        return update if self.objective.one_by_one else cast(Update, vmap(update))

    def _alone(self, o: Observation, model: nn.Module) -> Update:
        """`update(params, buffers, x, y)` of one guess, by `model`."""
        self.steps = 1
        update = (eager_step if self.objective.one_by_one else one_step)(model, o.loss)
        if self.objective.precision == "bf16":
            update = in_bf16(update)
        if self.objective.simulate and o.local is not None:
            self.steps = o.local_steps
            if self.steps > 1 or o.local.weight_decay:
                update = self._several(update, o.local, o.clients)
        return update

    def _several(self, gradient: Update, local: LocalSpec, clients: int) -> Update:
        """The update of a client's several local steps."""
        return local_steps(gradient, local, clients)

    def add_prior(self, weight: float, prior: Prior) -> None:
        """One more term, which may depend on the problems."""
        self.objective = replace(self.objective, priors=(*self.objective.priors, (weight, prior)))

    @property
    def variables(self) -> int:
        """n, the length of a guess."""
        return self.inputs + (self.batch * self.classes if self.labels is None else 0)

    @property
    def scale(self) -> Tensor:
        """The distance of a guess whose update is zero, of each problem `[V]`: what a search starts from."""
        return self.objective.distance(torch.zeros_like(self._target), self._target)

    def decode(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses `[S, n]` -> x `[S, N, *shape]` and labels, `[S, N]` or distributions `[S, N, classes]`."""
        return self._decode(z, None if self.labels is None else self.labels[rows])

    def _decode(self, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        x = z[:, : self.inputs].reshape(len(z), self.batch, *self.shape)
        if labels is not None:
            return x, labels
        return x, z[:, self.inputs :].reshape(len(z), self.batch, self.classes).softmax(-1)

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The objective `[S]` and its gradient `[S, n]` at `z [S, n]`, row s of problem owner[rows[s]]."""
        chunk = max(1, CHUNK_FLOATS // (self.layout.size * self.steps))
        if self.objective.one_by_one:
            chunk = 1
        if len(z) <= chunk:
            return self._evaluate(z, *self._select(rows))
        parts = [
            self._evaluate(z[i : i + chunk], *self._gather(rows[i : i + chunk]))
            for i in range(0, len(z), chunk)
        ]
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def _select(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._cached is None or len(self._cached[0]) != len(rows) or not self._cached[0].equal(rows):
            self._cached = self._gather(rows)
        return self._cached

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        owner = self.owner[rows]
        return rows, self.params[owner], self._target[owner]

    def _evaluate(self, z: Tensor, rows: Tensor, params: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiles:
            try:
                return self._by_program(z.detach(), rows, params, target)
            except CompilationError as e:
                self._compiles, self.remark = False, f"not compiled: {e}"
                warnings.warn(f"going on without compilation: {e}", stacklevel=2)
        return self._eagerly(z, rows, params, target)

    def _by_program(self, z: Tensor, rows: Tensor, params: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The same by a program, which is made for the first rows that ask for it."""
        if self._program is None:
            o = self._first
            if type(self)._updates is not GradientMatching._updates or self.objective.one_by_one:
                raise CompilationError("this search has no program")
            update = self._alone(o, unfolded(o.model))
            self._program = Compiled(
                evaluation(update, self.layout, self._decode, self.objective.distance, self.objective.priors)
            )
        owner = self.owner[rows]
        labels = None if self.labels is None else self.labels[rows]
        buffers = {n: b[owner] for n, b in self._buffers.items()}
        found = self._program(z, params, target, owner, labels, buffers)
        self.remark = f"compiled in {self._program.seconds:.1f} s"
        return found

    def _eagerly(self, z: Tensor, rows: Tensor, params: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self._rough and not self._tried:
            self._rough, self._tried = self._difference_fits(), True
        way = self._by_difference if self._rough else self._exactly
        return way(z, rows, params, target, self.objective.priors)

    def _difference_fits(self) -> bool:
        """Whether a difference gives the slope of the distance, tried on the same noise each time."""
        rows, params, target = self._gather(torch.zeros(1, dtype=torch.long, device=self.owner.device))
        low, high = self._first.input_range
        noise = torch.rand(1, self.variables, generator=torch.Generator().manual_seed(0))
        z = (low + (high - low) * noise).to(params)
        x, y = self.decode(z, rows)
        if not self._difference(rows, params).followed(x[0], y[0]):
            return False
        _, exact = self._exactly(z, rows, params, target, ())
        _, slope = self._by_difference(z, rows, params, target, ())
        return bool((slope - exact).norm() <= ROUGH * exact.norm())

    def _difference(self, rows: Tensor, params: Tensor) -> Difference:
        owner = self.owner[rows[0]]
        single = {n: p.requires_grad_() for n, p in self.layout.unflatten(params[0]).items()}
        buffers = {n: b[owner] for n, b in self._buffers.items()}
        return Difference(self._first.model, self._first.loss, single, buffers)

    def _by_difference(
        self, z: Tensor, rows: Tensor, params: Tensor, target: Tensor, priors: Priors
    ) -> tuple[Tensor, Tensor]:
        """For one guess, by two passes and a difference."""
        z, passes = z.detach().requires_grad_(), self._difference(rows, params)
        x, y = self.decode(z, rows)
        found = passes.first(x[0], y[0], z)
        g = self._flat({n: f[None] for n, f in found.items()}, target)
        loss = self.objective.distance(g, target)
        x, y = self.decode(z, rows)
        slope = passes.slope(self.layout.unflatten(g[0]), x[0], y[0], z)
        for weight, prior in priors:
            penalty = weight * prior(self.decode(z, rows)[0], params, self.owner[rows])
            loss = loss + penalty.detach()
            slope = slope + torch.autograd.grad(penalty.sum(), z)[0]
        return loss, slope

    def _exactly(
        self, z: Tensor, rows: Tensor, params: Tensor, target: Tensor, priors: Priors
    ) -> tuple[Tensor, Tensor]:
        """For all guesses, by double backward."""
        z = z.detach().requires_grad_()
        x, y = self.decode(z, rows)
        owner = self.owner[rows]
        found = self._updates(z, params, owner, x, y)
        # ∂d/∂z = (∂g/∂z)ᵀ ∂d/∂g: the distance gives its own derivative, no graph through it.
        g = self._flat(found, target)
        loss = self.objective.distance(g, target)
        outputs, cotangents = list(found.values()), list(self.layout.unflatten(g).values())
        for weight, prior in priors:
            penalty = weight * prior(x, params, owner)
            loss = loss + penalty.detach()
            outputs.append(penalty)
            cotangents.append(torch.ones_like(penalty))
        (gradient,) = torch.autograd.grad(outputs, z, cotangents)
        return loss, gradient

    def _updates(self, z: Tensor, params: Tensor, owner: Tensor, x: Tensor, y: Tensor) -> State:
        """What would be sent for guesses z, whose data are x and y, from params `[S, D]`."""
        return self._run(params, owner, x, y)

    def _run(self, params: Tensor, owner: Tensor, *guess: Tensor) -> State:
        buffers = {n: b[owner] for n, b in self._buffers.items()}
        if not self.objective.one_by_one:
            return dict(self._update(self.layout.unflatten(params), buffers, *guess))
        single = {n: p.requires_grad_() for n, p in self.layout.unflatten(params[0]).items()}
        found = self._update(single, {n: b[0] for n, b in buffers.items()}, *(g[0] for g in guess))
        return {n: f[None] for n, f in found.items()}

    def _flat(self, found: State, target: Tensor) -> Tensor:
        """Updates as rows `[S, D]`, in memory that evaluations share: fresh memory costs more than a copy."""
        if self._scratch.shape != target.shape:
            self._scratch = torch.empty_like(target)
        for name, out in self.layout.unflatten(self._scratch).items():
            out.copy_(found[name].detach())
        return self._scratch
