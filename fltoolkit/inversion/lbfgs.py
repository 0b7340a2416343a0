"""L-BFGS on a whole stack of independent problems at once.

The inverse-Hessian product uses the compact representation of Byrd, Nocedal and Schnabel 1994
(doi:10.1007/BF01582063, eq. 3.13): with S, Y the last m steps and gradient differences as rows, R the
upper triangle of S Yᵀ and D its diagonal,

    H g = γ M g + Sᵀ q − γ M Yᵀ p,    p = R⁻¹ S g,    q = R⁻ᵀ (D p + γ Y M Yᵀ p − γ Y M g),

where γ M is the first guess of the inverse Hessian: M the identity or a better metric that the caller knows,
and γ = sᵀy / yᵀMy of the newest pair. So a step costs four batched matrix products and two m × m triangular
solves instead of 2m sequential updates. Histories are float32, the small m × m algebra float64. The line
search backtracks by quadratic interpolation until Armijo's condition holds (Nocedal and Wright 2006, section
3.5), for every row of the stack in the same calls; only rows still searching are evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`f(z [S, n], rows [S]) -> (loss [S], gradient [S, n])`; `rows` says which problem each line of z is."""

Metric = Callable[[Tensor], Tensor]

ARMIJO = 1e-4
MAX_BACKTRACKS = 10

ROWS = ("rows", "z", "loss", "gradient", "stalled", "_fresh", "_gamma", "_sg", "_yg")
HISTORIES = ("_s", "_y", "_sy", "_yy", "_diagonal")
"""What a row has of its own; histories must be contiguous."""


class LBFGS:
    """Minimise S independent functions of n variables from `z [S, n]`.

    After each `step()`: z, loss `[S]`, and stalled `[S]`, true where even steepest descent found no
    decrease. `keep(index)` drops all other rows. The loss of a row never increases; a row that starts at
    a loss that is not finite has loss inf and stalls. metric: M, a symmetric positive definite map of rows
    `[S, n]`, the identity where it is None.
    """

    def __init__(
        self, objective: Objective, z: Tensor, history: int = 100, metric: Metric | None = None
    ) -> None:
        self.objective, self.history = objective, history
        self.metric: Metric = metric or _identity
        self.rows = torch.arange(len(z), device=z.device)
        self.z = z.clone()
        self.loss, self.gradient = objective(self.z, self.rows)
        broken = ~(torch.isfinite(self.loss) & torch.isfinite(self.gradient).all(1))
        self.loss = torch.where(broken, torch.inf, self.loss)
        self.gradient = torch.where(broken[:, None], 0.0, self.gradient)
        self.stalled = broken
        self.evaluations = len(z)
        self.taken = 0
        self._reset_history()

    def _reset_history(self) -> None:
        (count, n), m, like = self.z.shape, self.history, self.z
        self._s, self._y = like.new_zeros(count, m, n), like.new_zeros(count, m, n)
        self._sy = torch.eye(m, dtype=torch.float64, device=like.device).repeat(count, 1, 1)
        self._yy = torch.zeros_like(self._sy)
        self._diagonal = self._yy.new_zeros(count, m)
        self._sg, self._yg = self._yy.new_zeros(count, 0), self._yy.new_zeros(count, 0)
        self._gamma = self._yy.new_ones(count)
        self._fresh = torch.ones(count, dtype=torch.bool, device=like.device)

    @property
    def settled(self) -> Tensor:
        """Rows `[S]` for which a plateau is the end: all, as there is no schedule."""
        return torch.ones_like(self.stalled)

    @property
    def finished(self) -> Tensor:
        """Rows `[S]` whose schedule has run out: none."""
        return torch.zeros_like(self.stalled)

    def hasten(self, mask: Tensor) -> None:
        """Nothing: there is no schedule."""

    def step(self) -> None:
        """One iteration of every row."""
        direction = self._direction()
        slope = (self.gradient * direction).sum(1)
        uphill = ~(slope < 0)
        direction = torch.where(uphill[:, None], self._steepest(), direction)
        slope = torch.where(uphill, (self.gradient * direction).sum(1), slope)
        z, loss, gradient = self._search(direction, slope)
        failed = ~(loss < self.loss)
        self.stalled = self.stalled | (failed & (self._fresh | uphill))
        z = torch.where(failed[:, None], self.z, z)
        loss = torch.where(failed, self.loss, loss)
        gradient = torch.where(failed[:, None], self.gradient, gradient)
        s, y = z - self.z, gradient - self.gradient
        self.z, self.loss, self.gradient = z, loss, gradient
        self._remember(s, y, failed)
        self.taken += 1

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` only."""
        for name in ROWS:
            setattr(self, name, getattr(self, name)[index])
        for name in HISTORIES:
            setattr(self, name, getattr(self, name)[index].contiguous())

    def anew(self, at: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Go on from where the rows at `at` are as from a start, the objective being another there."""
        self.loss, self.gradient = self.loss.clone(), self.gradient.clone()
        self.loss[at], self.gradient[at] = loss, gradient
        self.stalled, self._fresh = self.stalled.clone(), self._fresh.clone()
        self.stalled[at] = ~(torch.isfinite(loss) & torch.isfinite(gradient).all(1))
        self._fresh[at] = True
        self._forget(at)

    def state(self) -> dict[str, Any]:
        """All that `step` and `keep` change, not copied."""
        return {name: getattr(self, name) for name in (*ROWS, *HISTORIES, "taken", "evaluations")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, whatever has been kept since."""
        for name, value in state.items():
            setattr(self, name, value)

    def _steepest(self) -> Tensor:
        down = -self.metric(self.gradient)
        return down / down.abs().sum(1, keepdim=True).clamp_min(1.0)

    def _direction(self) -> Tensor:
        used = min(self.taken, self.history)
        if used == 0:
            return self._steepest()
        order = torch.arange(self.taken - used, self.taken, device=self.z.device) % self.history
        s, y = self._s[:, :used], self._y[:, :used]
        sg, yg = self._sg[:, order, None], self._yg[:, order, None]
        gamma = self._gamma[:, None, None]
        upper = self._sy[:, order][:, :, order].triu()
        yy, diagonal = self._yy[:, order][:, :, order], self._diagonal[:, order, None]
        p = torch.linalg.solve_triangular(upper, sg, upper=True)
        q = torch.linalg.solve_triangular(upper.mT, diagonal * p + gamma * (yy @ p) - gamma * yg, upper=False)
        slot = torch.empty_like(order).scatter_(0, order, torch.arange(used, device=order.device))
        scale = self._gamma[:, None].to(self.z.dtype)
        first = self.metric(scale * self.gradient - _combine(gamma * p[:, slot], y))
        direction = -(first + _combine(q[:, slot], s))
        return torch.where(self._fresh[:, None], self._steepest(), direction)

    def _search(self, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.z + direction
        loss, gradient = self._evaluate(z, self.rows)
        t = torch.ones_like(self.loss)
        for _ in range(MAX_BACKTRACKS):
            short = ~(loss <= self.loss + ARMIJO * t * slope) & ~self.stalled
            again = short.nonzero()[:, 0]
            if len(again) == 0:
                break
            t[again] = _shorter(t[again], self.loss[again], loss[again], slope[again])
            z[again] = self.z[again] + t[again, None] * direction[again]
            loss[again], gradient[again] = self._evaluate(z[again], self.rows[again])
        return z, loss, gradient

    def _evaluate(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += len(z)
        loss, gradient = self.objective(z, rows)
        finite = torch.isfinite(loss) & torch.isfinite(gradient).all(1)
        return torch.where(finite, loss, torch.inf), gradient

    def _remember(self, s: Tensor, y: Tensor, failed: Tensor) -> None:
        """Put the pair (s, y) in the ring; rows without positive curvature store an inert pair.

        The products with the new gradient, which the next direction needs, ride along here, so that
        each history is read from memory once.
        """
        slot = self.taken % self.history
        curvature = (s * y).sum(1).double()
        good = (curvature > 1e-10 * (y * y).sum(1).double()) & ~failed
        s, y = torch.where(good[:, None], s, 0.0), torch.where(good[:, None], y, 0.0)
        curvature = torch.where(good, curvature, 0.0)
        self._forget(failed.nonzero()[:, 0])
        self._s[:, slot], self._y[:, slot] = s, y
        used = min(self.taken + 1, self.history)
        both = torch.stack([y, self.gradient], dim=2)
        scaled = torch.stack([self.metric(y), self.metric(self.gradient)], dim=2)
        column, self._sg = torch.bmm(self._s[:, :used], both).double().unbind(2)
        gram, self._yg = torch.bmm(self._y[:, :used], scaled).double().unbind(2)
        self._sy[:, slot, :] = 0.0
        self._sy[:, :used, slot] = column
        self._sy[:, slot, slot] = torch.where(good, curvature, 1.0)
        self._yy[:, :used, slot] = gram
        self._yy[:, slot, :used] = gram
        self._diagonal[:, slot] = curvature
        self._gamma = torch.where(good, curvature / gram[:, slot].clamp_min(1e-300), self._gamma)
        self._fresh = (self._fresh & ~good) | failed

    def _forget(self, rows: Tensor) -> None:
        """Empty the history of rows that restart from steepest descent."""
        if len(rows) == 0:
            return
        for history in (self._s, self._y, self._yy, self._diagonal):
            history[rows] = 0.0
        self._sy[rows] = torch.eye(self.history, dtype=torch.float64, device=self.z.device)


def _identity(v: Tensor) -> Tensor:
    return v


def _combine(coefficients: Tensor, history: Tensor) -> Tensor:
    """`[S, m, 1]` and `[S, m, n]` -> the combinations `[S, n]`."""
    return torch.bmm(coefficients.mT.to(history.dtype), history)[:, 0]


def _shorter(t: Tensor, loss0: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
    """The minimiser of the parabola through both losses and the slope, within [0.1 t, 0.5 t]."""
    parabola = -slope * t.square() / (2 * (loss - loss0 - t * slope))
    parabola = torch.where(torch.isfinite(parabola), parabola, 0.0)
    return torch.maximum(torch.minimum(parabola, 0.5 * t), 0.1 * t)
