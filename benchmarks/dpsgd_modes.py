"""The ways to a clipped gradient sum that `dpsgd_speed` times, and the models that they are timed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fltoolkit.loss import cross_entropy
from fltoolkit.models import build
from fltoolkit.rng import torch_stream
from fltoolkit.training.private.clipped import clipped_sum, per_example_rows
from fltoolkit.types import Layout

OURS, BASE = "ours", "non-private"


@dataclass(frozen=True)
class Scene:
    """A model on random 28x28 images, and the clip norm."""

    model: nn.Module
    layout: Layout
    x: Tensor
    y: Tensor
    norm: float


@dataclass(frozen=True)
class Case:
    """model: a key of MODELS. targets: what is divided by what, and the bound on the quotient, at least for
    times of a mode over ours, at most for our memory over a mode's."""

    model: str
    batch: int
    at_least: tuple[tuple[str, float], ...] = ()
    memory_at_most: tuple[tuple[str, float], ...] = ()


def small(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The net of Papernot et al. 2021, arXiv:2007.14191, for MNIST, with tanh; 26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, classes),
    )  # fmt: skip


def scene(case: Case, seed: int) -> Scene:
    rng = torch_stream(seed, "benchmark", "dpsgd")
    if case.model == "small":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = small((1, 28, 28), 10)
    else:
        model = build(case.model, (1, 28, 28), 10, rng)
    x = torch.rand(case.batch, 1, 28, 28, generator=rng)
    y = torch.randint(10, (case.batch,), generator=rng)
    layout = Layout.of(model)
    norms = clipped_sum(model, cross_entropy, layout, x[:8], y[:8], 1.0)[1]
    return Scene(model, layout, x, y, float(norms.median()))


Step = Callable[[], Tensor]
"""One call's work; returns the sum as a row `[D]`."""


def ours(s: Scene) -> Step:
    return lambda: clipped_sum(s.model, cross_entropy, s.layout, s.x, s.y, s.norm)[0]


def non_private(s: Scene) -> Step:
    params = [p for p in s.model.parameters() if p.requires_grad]

    def step() -> Tensor:
        found = torch.autograd.grad(cross_entropy(s.model(s.x), s.y).mean(), params)
        return torch.cat([g.flatten() for g in found])

    return step


def vmapped(s: Scene) -> Step:
    def step() -> Tensor:
        rows = per_example_rows(s.model, cross_entropy, s.layout, s.x, s.y)
        return (s.norm / rows.norm(dim=1).clamp_min(s.norm)) @ rows

    return step


def opacus_mode(mode: str) -> Callable[[Scene], Step]:
    """Opacus' way through every example's gradient, which its optimizer clips and sums."""

    def make(s: Scene) -> Step:
        from opacus.grad_sample.utils import wrap_model
        from opacus.optimizers import DPOptimizer

        kind: dict[str, Any] = {} if mode == "ew" else {"force_functorch": mode == "functorch"}
        wrapped = wrap_model(s.model, mode, loss_reduction="sum", **kind)
        params = list(wrapped.parameters())
        optimizer = DPOptimizer(
            torch.optim.SGD(params, 0.1), noise_multiplier=0.0, max_grad_norm=s.norm,
            expected_batch_size=len(s.x), loss_reduction="sum",
        )  # fmt: skip

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(wrapped(s.x), s.y).sum().backward()
            optimizer.clip_and_accumulate()
            return torch.cat([p.summed_grad.flatten() for p in params])

        return step

    return make


def ghost(s: Scene) -> Step:
    """Opacus' ghost clipping: norms by a first backward pass, the sum by a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        s.model, loss_reduction="sum", max_grad_norm=s.norm, use_ghost_clipping=True
    )
    params = list(wrapped.parameters())
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(params, 0.1), noise_multiplier=0.0, max_grad_norm=s.norm,
        expected_batch_size=len(s.x), loss_reduction="sum",
    )  # fmt: skip
    criterion = DPLossFastGradientClipping(
        wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        criterion(wrapped(s.x), s.y).backward()
        return torch.cat([p.grad.flatten() for p in params if p.grad is not None])

    return step


MODES: dict[str, Callable[[Scene], Step]] = {
    OURS: ours,
    BASE: non_private,
    "hooks": opacus_mode("hooks"),
    "functorch": opacus_mode("functorch"),
    "ew": opacus_mode("ew"),
    "ghost": ghost,
    "vmap": vmapped,
}
