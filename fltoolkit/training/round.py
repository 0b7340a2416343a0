"""One round of federated learning, from the broadcast to the released aggregate, as a transcript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fltoolkit.data import Dataset
from fltoolkit.defense import DefenseStack, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.rng import stream
from fltoolkit.threat import Public
from fltoolkit.training.local import client_updates
from fltoolkit.types import Examples, Layout, LocalSpec, Loss, Transcript, Updates


@dataclass(frozen=True)
class Task:
    """What every participant knows before the first round: the model, the loss, the local recipe and the
    defenses, and under which seed the random streams are named."""

    model: nn.Module
    loss: Loss
    local: LocalSpec
    stack: DefenseStack
    seed: int

    def public(self, data: Dataset) -> Public:
        """What everybody knows of a federation that trains this task on `data`."""
        return Public(
            model=self.model,
            loss=self.loss,
            layout=Layout.of(self.model),
            input_shape=data.input_shape,
            input_range=data.input_range,
            num_classes=data.num_classes,
            local=self.local,
            defenses=self.stack.public(),
        )


def run_round(
    task: Task, params: Tensor, cohort: Sequence[int], data: Sequence[Examples], number: int
) -> Transcript:
    """Train the `cohort` on its `data` from `params [D]` in round `number`, through all defenses.

    Raises InputError where a client's update is not finite, naming client and layer.
    """
    layout = Layout.of(task.model)
    clients = tuple(cohort)
    rngs = [stream(task.seed, "round", number, "client", c, "batches") for c in clients]
    delta = client_updates(task.model, task.loss, params, data, task.local, rngs)
    _check_finite(layout, delta, clients)
    sizes = torch.tensor([len(d) for d in data], device=params.device)
    weights = (sizes / sizes.sum()).to(params.dtype)
    updates = Updates(delta, clients, sizes, layout, number)
    done = task.stack.protect(delta, RoundContext(task.seed, number, clients, weights))
    return Transcript(
        broadcast=params,
        messages=done.messages,
        messages_hidden=done.messages_hidden,
        total=done.total,
        aggregate=done.aggregate,
        weights=weights,
        updates=updates,
        truth=tuple(data),
        events=done.events,
    )


def _check_finite(layout: Layout, delta: Tensor, clients: tuple[int, ...]) -> None:
    for k in (~torch.isfinite(delta).all(1)).nonzero()[:, 0].tolist():
        name = layout.first_non_finite(delta[k])
        raise InputError(
            f"update of client {clients[k]} must be finite, got NaN or infinity in layer {name!r}"
        )
