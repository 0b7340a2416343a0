"""Model inconsistency: the others are sent a model under which they add nothing.

Pasquini, Francati, Ateniese 2022, arXiv:2111.07380, "Eluding secure aggregation in federated learning via
model inconsistency", section 4 (gradient suppression): with a layer of dead units, or a last layer of
zeros, the gradients of most parameters are zero whatever the data, so that their sum over a cohort is the
target's alone. The proofs of secure aggregation do not speak of what clients were sent. The remedy is
theirs too: clients who received different models must not add up (`secagg:bind=true`, the default here).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from fltoolkit.errors import InputError
from fltoolkit.exposure import Exposing
from fltoolkit.inversion.labels import infer
from fltoolkit.inversion.labels.layer import layer_names
from fltoolkit.threat import Public, ThreatModel, observation
from fltoolkit.types import Layout, Meddling, Observation, Transcript

STEPS = 2
BIAS = -1.0


class InconsistentServer(ThreatModel):
    """Sends its target the model, and everybody else one that suppresses their gradients."""

    name: ClassVar[str] = "inconsistent"
    about: ClassVar[str] = "malicious server that sends all but its target a model without gradients"

    def meddling(self, params: Tensor, cohort: Sequence[int], public: Public) -> Meddling:
        crafted, _ = suppressed(params, public)
        return Meddling(broadcasts=dict.fromkeys(cohort[1:], crafted))

    def observe(self, transcript: Transcript, target: int, public: Public) -> Observation:
        """The sum over all, without the coordinates to which the others add. That clients have equally many
        examples is a guess; a wrong one is a wrong scale."""
        _, silent = suppressed(transcript.broadcast, public)
        update = transcript.total * silent * len(transcript.truth)
        seen = observation(transcript, update, (target,), public)
        words = {"name": "suppression", "coordinates": int(silent.sum())}
        return replace(seen, defenses=(*seen.defenses, words))

    def members(self, transcript: Transcript, target: int) -> tuple[int, ...]:
        """The target alone; nobody where it has dropped out of the sum."""
        clients = transcript.updates.clients
        return (clients.index(target),) if target in clients else ()


@dataclass(frozen=True)
class Inconsistency(Exposing):
    """Send everybody else a model without gradients, and invert the sum, which is the target's."""

    name: ClassVar[str] = "inconsistency"

    def threat(self) -> ThreatModel:
        return InconsistentServer()

    def expose(self, observation: Observation) -> tuple[Observation | None, str]:
        """The observation is the target's already; its labels are read off the last layer's weights where
        these are among the coordinates that are the target's alone, since its bias is not."""
        weight, _ = layer_names(observation)
        words = f"the sum over {int((observation.update != 0).sum())} coordinates that only the target moves"
        if observation.layout.unflatten(observation.update)[weight].any():
            return replace(observation, labels=infer("gradinversion", observation)), words
        return observation, words


def suppressed(params: Tensor, public: Public) -> tuple[Tensor, Tensor]:
    """The crafted parameters `[D]` that silence most coordinates, and which ones `[D]` (bool): those that
    training on random inputs leaves exactly as they were, for several steps where there are such crafted
    parameters, else for one."""
    crafted = list(_candidates(params, public.layout))
    for steps in (STEPS, 1):
        tried = [(c, _silent(c, public, steps)) for c in crafted]
        best = max(tried, key=lambda pair: int(pair[1].sum()), default=None)
        if best is not None and best[1].any():
            return best
    raise InputError(
        "model must have a layer that can be silenced: a linear last layer, or a bias before a ReLU"
    )


def _candidates(params: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Every layer with a bias dead (zero weights, negative biases: no ReLU behind it lets anything
    through), and the last layer's weights zero."""
    slices = dict(zip(layout.names, params.split(layout.sizes), strict=True))
    at = {n: i for i, n in enumerate(layout.names)}
    weights = [n for n in layout.names if n.endswith("weight") and len(layout.shapes[at[n]]) > 1]
    for name in weights:
        bias = name.removesuffix("weight") + "bias"
        if bias in slices:
            dead = {name: torch.zeros_like(slices[name]), bias: torch.full_like(slices[bias], BIAS)}
            yield torch.cat([dead.get(n, s) for n, s in slices.items()])
    if weights:
        zero = {weights[-1]: torch.zeros_like(slices[weights[-1]])}
        yield torch.cat([zero.get(n, s) for n, s in slices.items()])


def _silent(params: Tensor, public: Public, steps: int) -> Tensor:
    """Which coordinates so many steps of training on random inputs do not move."""
    rng = torch.Generator(device="cpu").manual_seed(0)
    low, high = public.input_range
    row, still = params.clone(), torch.ones_like(params, dtype=torch.bool)
    probes = 4 * public.num_classes + 1  # so that no class has just the share that a model of zeros gives it
    for _ in range(steps):
        x = low + (high - low) * torch.rand(probes, *public.input_shape, generator=rng)
        y = torch.randint(0, public.num_classes, (probes,), generator=rng)
        gradient = _gradient(row, x.to(params), y.to(params.device), public)
        still &= gradient == 0
        row = row - gradient
    return still


def _gradient(row: Tensor, x: Tensor, y: Tensor, public: Public) -> Tensor:
    row = row.detach().requires_grad_()
    named: dict[str, Any] = public.layout.unflatten(row)
    loss = public.loss(functional_call(public.model, named, (x,)), y).mean()
    return torch.autograd.grad(loss, row)[0]


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("inconsistency")
