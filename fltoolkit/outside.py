"""Attacking an update that came from anywhere else, such as a file or another framework's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fltoolkit import models, registry
from fltoolkit.attack import Attack, Progress, silent
from fltoolkit.errors import InputError, require
from fltoolkit.rng import torch_stream
from fltoolkit.training.buffers import norms_in_training
from fltoolkit.types import Examples, Layout, LocalSpec, Loss, Observation, Reconstruction


@dataclass(frozen=True)
class UpdateSpec:
    """What the adversary knows of an update that came from outside.

    num_examples: private examples behind it. input_shape: one input. kind: "delta" (w_k − w_t),
    "gradient", or "weights" (w_k, the client's new parameters; a whole `state_dict` brings BatchNorm's
    buffers along). local: E, B and η if known; without it a
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
        buffers=_buffers(model, update) if spec.kind == "weights" else None,
    )
    rng = torch_stream(spec.seed, "update", "attack", attack.name)
    return attack.many([observation], [rng], progress)[0]


def _buffers(
    model: nn.Module, update: Tensor | Mapping[str, Tensor] | Sequence[Any]
) -> dict[str, Tensor] | None:
    """The model's buffers in `update` by name, where it holds all there are and BatchNorm moved them."""
    own = dict(model.named_buffers())
    if not norms_in_training(model) or not isinstance(update, Mapping) or not own.keys() <= update.keys():
        return None
    return {n: torch.as_tensor(update[n]).to(b) for n, b in own.items()}


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
