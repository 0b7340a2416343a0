"""Adam on a whole stack of independent problems, with the options that gradient inversion uses.

Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1; signed gradients, step decay and projection onto the box of
valid inputs as in Geiping et al. 2020, arXiv:2003.14053, section 5 and their appendix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor

from fltoolkit.errors import require
from fltoolkit.inversion.lbfgs import Objective

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
MILESTONES = (3 / 8, 5 / 8, 7 / 8)
DECAYS = ("step", "cosine", "none")
ROWS = ("rows", "z", "loss", "gradient", "mean", "square", "stalled", "clock")
"""What a row has of its own."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a search of `steps` iterations.

    lr: at the start, in units of the variables. decay: "step" divides it by 10 after 3/8, 5/8 and 7/8 of the
    steps (Geiping et al. 2020), "cosine" lets it fall to zero along half a cosine, "none" keeps it. warmup:
    iterations over which it rises linearly.
    """

    lr: float
    steps: int
    decay: str = "step"
    warmup: int = 0

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", "> 0", self.lr)
        require(self.decay in DECAYS, "decay", f"one of {DECAYS}", self.decay)
        require(self.warmup >= 0, "warmup", ">= 0", self.warmup)

    def at(self, clock: Tensor) -> Tensor:
        """The rates at iterations `clock [S]`, counted from 0."""
        part = (clock / self.steps).clamp_max(1.0)
        if self.decay == "step":
            factor = 0.1 ** sum(part >= m for m in MILESTONES)
        elif self.decay == "cosine":
            factor = 0.5 * (1 + torch.cos(pi * part))
        else:
            factor = torch.ones_like(part)
        return self.lr * factor * ((clock + 1) / max(1, self.warmup)).clamp_max(1.0)

    def hastened(self, clock: Tensor) -> Tensor:
        """Where in the schedule to go on when the rate at `clock [S]` brings nothing more: at the next
        milestone, or an eighth of the way further."""
        if self.decay != "step":
            return clock + self.steps / 8
        later = torch.full_like(clock, self.steps)
        for m in reversed(MILESTONES):
            later = torch.where(clock < m * self.steps, m * self.steps, later)
        return later

    def settled(self, clock: Tensor) -> Tensor:
        """`[S]`, whether the rate is as good as at its end, so that a plateau is the end too."""
        if self.decay == "none":
            return torch.ones_like(clock, dtype=torch.bool)
        return clock >= MILESTONES[-1] * self.steps


class Adam:
    """Minimise S independent functions of n variables from `z [S, n]`; the interface is that of `LBFGS`.

    signed: feed the sign of the gradient. box: bounds `(low [n], high [n])` that z is projected on. unit
    `[n]`: the step of each variable is the schedule's rate times its unit. Each row has its own clock in the
    schedule, which `hasten` moves on.
    """

    def __init__(
        self,
        objective: Objective,
        z: Tensor,
        schedule: Schedule,
        signed: bool = False,
        box: tuple[Tensor, Tensor] | None = None,
        unit: Tensor | None = None,
    ) -> None:
        self.objective, self.schedule, self.signed, self.box = objective, schedule, signed, box
        self.unit = torch.ones_like(z[0]) if unit is None else unit
        self.rows = torch.arange(len(z), device=z.device)
        self.z = z.clone()
        self.mean, self.square = torch.zeros_like(z), torch.zeros_like(z)
        self.clock = torch.zeros(len(z), device=z.device)
        self.evaluations = 0
        self.taken = 0
        self.stalled = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        self._evaluate()

    @property
    def settled(self) -> Tensor:
        """Rows `[S]` for which a plateau is the end."""
        return self.schedule.settled(self.clock)

    @property
    def finished(self) -> Tensor:
        """Rows `[S]` whose schedule has run out."""
        return self.clock >= self.schedule.steps

    def hasten(self, mask: Tensor) -> None:
        """Move the rows of `mask [S]` to the next stage of the schedule."""
        self.clock = torch.where(mask, self.schedule.hastened(self.clock), self.clock)

    def step(self) -> None:
        """One iteration of every row; rows that have diverged stand still."""
        self.taken += 1
        g = self.gradient.sign() if self.signed else self.gradient
        self.mean.lerp_(g, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        scale = (self.square / (1 - BETA2**self.taken)).sqrt_().add_(EPS)
        rate = self.schedule.at(self.clock) / (1 - BETA1**self.taken)
        move = (self.mean / scale).mul_(self.unit).mul_(rate[:, None])
        self.z = torch.where(self.stalled[:, None], self.z, self.z - move)
        if self.box is not None:
            self.z = torch.minimum(torch.maximum(self.z, self.box[0]), self.box[1])
        self.clock = self.clock + 1
        self._evaluate()

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` only."""
        for name in ROWS:
            setattr(self, name, getattr(self, name)[index])

    def state(self) -> dict[str, Any]:
        """All that `step`, `hasten` and `keep` change, not copied."""
        return {name: getattr(self, name) for name in (*ROWS, "taken", "evaluations")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, whatever has been kept since."""
        for name, value in state.items():
            setattr(self, name, value)

    def _evaluate(self) -> None:
        self.loss, self.gradient = self.objective(self.z, self.rows)
        self.evaluations += len(self.z)
        broken = ~(torch.isfinite(self.loss) & torch.isfinite(self.gradient).all(1))
        self.loss = torch.where(broken, torch.inf, self.loss)
        self.gradient = torch.where(broken[:, None], 0.0, self.gradient)
        self.stalled = self.stalled | broken
