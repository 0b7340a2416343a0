"""breaching (Geiping et al.), a framework of gradient inversion attacks: its attacks on an update at hand.

Its cases, users and data sets are left out, since those download: an attack gets the server's payload and
what the user shared. Settings are breaching's own, by its files config/attack/*.yaml, but for the number of
iterations. PyPI's breaching 0.1.2 wants torchvision, whose import fails beside a PyTorch built for the CPU
alone unless the module that registers its meta kernels is empty.

What it does that a caller should know: "dlg" reports the label it started from, not the one it found. A
search that diverged comes back as zeros, that is, as the mean image. Through local steps it must be told the
true labels of every step, in order. Its total variation takes images of three channels.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fltoolkit.attack import silent
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.types import LocalSpec

Progress = Callable[[int, int, str], None]
Statistic = float | tuple[float, ...]

NEWTON = 20
"""Evaluations in one step of torch.optim.LBFGS, which breaching counts as one iteration."""
EVERY = 100
"""Iterations between two calls of `progress`."""


@dataclass(frozen=True)
class Kind:
    """config: the file in breaching's config/attack. overrides: what is changed in it. each: evaluations of
    the matching loss and its gradient in one of breaching's iterations."""

    config: str
    overrides: tuple[str, ...] = ()
    each: int = 1


KINDS = {
    "dlg": Kind("deepleakage", each=NEWTON),
    "idlg": Kind("deepleakage", ("attack_type=optimization", "label_strategy=iDLG"), NEWTON),
    "invertinggradients": Kind("invertinggradients"),
    "seethroughgradients": Kind("seethroughgradients"),
}


@dataclass(frozen=True)
class Result:
    """x `[N, ...]` in the data's units; y `[N]` as breaching reports it; iterations: evaluations of the
    matching loss and its gradient that were made, for L-BFGS too."""

    x: Tensor
    y: Tensor
    seconds: float
    iterations: int
    seconds_per_iteration: float


class Denormalised(nn.Module):
    """A model of images in the data's units as a model of normalised ones: z -> model(mean + std z). Its
    parameters are the model's, so a gradient by them stays what it was."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Statistic, std: Statistic) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model(self.mean + self.std * z)
        return logits


def available() -> bool:
    """Whether breaching can be imported."""
    try:
        _breaching()
    except ImportError:
        return False
    return True


def reconstruct(
    model: nn.Module,
    gradients: list[Tensor],
    labels: Tensor | None,
    input_shape: tuple[int, ...],
    num_classes: int,
    kind: str,
    iterations: int,
    seed: int,
    mean: Statistic = 0.0,
    std: Statistic = 1.0,
    local: LocalSpec | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Result:
    """breaching's attack `kind` on `batch` examples; `model`, in evaluation mode there, is left as it was.

    gradients: of the mean cross-entropy, in the order of `model.parameters()`; with `local`, the differences
    w_k - w_t. labels `[batch]`: None where not known; with `local`, in the order of the client's steps.
    mean, std: of the data, a number a channel or one for all: `model` takes (x - mean) / std with x in [0, 1]
    and so does the search (see `Denormalised` for a model that takes x). iterations: most evaluations of the
    matching loss and its gradient. The search ends early where the loss is not finite; a step of L-BFGS ends
    after fewer than its 20 evaluations where the loss changes by less than 1e-9.
    """
    _check(gradients, labels, kind, iterations, local, batch, model)
    chosen = KINDS[kind]
    breaching = _breaching()
    config = _config(breaching, chosen, max(1, iterations // chosen.each))
    where = {"dtype": gradients[0].dtype, "device": gradients[0].device}
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, where)
    calls = 0

    def count(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        nonlocal calls
        if calls % EVERY == 0:
            progress(calls, iterations, f"loss {float(output[0]):.3g}")
        calls += 1

    attacker.objective.register_forward_hook(count)
    payload = _payload(model, input_shape, num_classes, mean, std)
    shared = _shared(gradients, labels, batch, local)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Of its learning rate schedules, that call PyTorch's in a way that is now frowned upon.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        begun = time.perf_counter()
        found, _ = attacker.reconstruct([payload], [shared], {})
        seconds = time.perf_counter() - begun
    x = found["data"].detach() * attacker.ds + attacker.dm
    return Result(x, found["labels"].detach(), seconds, calls, seconds / max(1, calls))


def _breaching() -> Any:
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    import breaching

    return breaching


def _config(breaching: Any, kind: Kind, steps: int) -> Any:
    overrides = [*kind.overrides, f"optim.max_iterations={steps}"]
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return breaching.get_attack_config(kind.config, overrides)


def _payload(
    model: nn.Module, shape: tuple[int, ...], classes: int, mean: Statistic, std: Statistic
) -> dict[str, Any]:
    """What breaching's server sends. Buffers, even an empty list of them, ask for evaluation mode."""
    from omegaconf import OmegaConf

    channels = shape[0]
    metadata = OmegaConf.create(
        {
            "modality": "vision",
            "task": "classification",
            "shape": list(shape),
            "classes": classes,
            "mean": _per_channel(mean, channels, "mean"),
            "std": _per_channel(std, channels, "std"),
        }
    )
    return {
        "parameters": [p.detach() for p in model.parameters()],
        "buffers": [b.detach() for b in model.buffers()],
        "metadata": metadata,
    }


def _per_channel(value: Statistic, channels: int, name: str) -> list[float]:
    values = [float(value)] * channels if isinstance(value, float | int) else [float(v) for v in value]
    require(len(values) == channels, name, f"one number or {channels}", value)
    return values


def _shared(
    gradients: list[Tensor], labels: Tensor | None, batch: int, local: LocalSpec | None
) -> dict[str, Any]:
    """What breaching's user sends: one gradient, or the change by local steps together with their recipe."""
    metadata: dict[str, Any] = {"num_data_points": batch, "labels": labels, "local_hyperparams": None}
    if local is not None and labels is not None:
        size, steps = local.batch or batch, local.steps(batch)
        metadata["local_hyperparams"] = {
            "lr": local.lr,
            "steps": steps,
            "data_per_step": size,
            "labels": [labels[i * size % batch :][:size] for i in range(steps)],
        }
    return {"gradients": [g.detach() for g in gradients], "buffers": None, "metadata": metadata}


def _check(
    gradients: list[Tensor],
    labels: Tensor | None,
    kind: str,
    iterations: int,
    local: LocalSpec | None,
    batch: int,
    model: nn.Module,
) -> None:
    if kind not in KINDS:
        unknown("kind", kind, KINDS)
    require(iterations >= 1, "iterations", ">= 1", iterations)
    want, got = [tuple(p.shape) for p in model.parameters()], [tuple(g.shape) for g in gradients]
    require(want == got, "gradients", f"of the shapes {want}", got)
    if kind == "dlg" and labels is not None:
        raise InputError("labels must be None for 'dlg', which searches them")
    if labels is not None:
        require(tuple(labels.shape) == (batch,), "labels", f"[{batch}]", tuple(labels.shape))
    if local is None:
        return
    if labels is None:
        raise InputError("labels must be given with local steps, got None: breaching reads them by step")
    require(local.momentum == 0 and local.weight_decay == 0, "local", "plain SGD", local)
    require(batch % (local.batch or batch) == 0, "local.batch", f"a divisor of {batch}", local.batch)
