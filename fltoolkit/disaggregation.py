"""From the sums of many rounds to the updates of single clients.

Lam, Wei, Cormode, Brooks, Mitzenmacher 2021, arXiv:2106.06089, "Gradient disaggregation": with updates G
`[N, D]` that change little from round to round, the sums are S = P G for the binary participant matrix P
`[T, N]`. Where P is known, as to the server of a secure sum, G is a least-squares solution. Where it is
hidden, every column of P lies in the column space of S, and how often a client took part within windows of
rounds is linear in its column: for each client an integer program finds the binary column nearest to that
space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from fltoolkit.errors import require

EXACT = 1e-9
"""Singular values below this share of the largest are rounding."""

MARGIN = 2.0
"""How many times farther from the column space the second-best column must be."""

SAME = 1e-6
"""Distances below this are zero."""


@dataclass(frozen=True)
class Members:
    """updates `[N, D]`, NaN in the rows of clients whom the sums do not determine; identifiable `[N]`
    (bool): who is determined, that is whose unit vector is in the row space of P; rank: of P."""

    updates: Tensor
    identifiable: Tensor
    rank: int


@dataclass(frozen=True)
class Participation:
    """matrix `[T, N]` (bool): the columns found. residuals `[N]`: the L1 distance of each from the column
    space of the sums, divided by the column's own L1 norm. sure `[N]` (bool): for whom no other column with
    the same counts is as near, within a factor of `MARGIN`; others may have been given a wrong one."""

    matrix: Tensor
    residuals: Tensor
    sure: Tensor


def members(sums: Tensor, matrix: Tensor) -> Members:
    """Least-squares updates from sums `[T, D]` and participants `[T, N]`.

    Raises InputError where the two have different numbers of rounds, or `matrix` is not of zeros and ones.
    """
    p = matrix.double().numpy()
    require(len(sums) == len(p), "matrix", f"of {len(sums)} rounds, as the sums are", len(p))
    require(bool(np.isin(p, (0, 1)).all()), "matrix", "of zeros and ones", "others")
    inverse = np.linalg.pinv(p, rcond=EXACT)
    unit = np.eye(p.shape[1])
    identifiable = torch.from_numpy((np.abs(inverse @ p - unit) < 1e-8).all(1))
    updates = torch.from_numpy(inverse) @ sums.detach().cpu().double()
    updates[~identifiable] = torch.nan
    return Members(updates, identifiable, int(np.linalg.matrix_rank(p, tol=EXACT * max(p.shape))))


def participants(
    sums: Tensor,
    counts: Tensor,
    windows: Sequence[Sequence[int]],
    noise: float = 0.0,
    seconds: float = 10.0,
) -> Participation:
    """Who was in which sum, from sums `[T, D]` and how often each client was in the rounds of each window.

    counts: `[W, N]`. noise: share of the largest singular value of the sums below which there is nothing but
    change between rounds; the column space has at most N dimensions in any case. seconds: for each client's
    integer program. Raises InputError where a window names a round that is none or a count is impossible.
    """
    rounds, clients = len(sums), counts.shape[1]
    require(len(windows) == len(counts), "counts", f"one row for each of {len(windows)} windows", len(counts))
    for window, row in zip(windows, counts.tolist(), strict=True):
        good = all(0 <= t < rounds for t in window)
        require(good, "windows", f"rounds from 0 to {rounds - 1}", tuple(window))
        require(all(0 <= c <= len(window) for c in row), "counts", f"from 0 to {len(window)}", row)
    require(noise >= 0, "noise", ">= 0", noise)
    outside = _outside(sums, clients, noise)
    inside = np.zeros((len(windows), rounds))
    for i, window in enumerate(windows):
        inside[i, list(window)] = 1
    found: dict[tuple[int, ...], list[np.ndarray]] = {}
    columns, residuals, sure = [], [], []
    for k in range(clients):
        wanted = tuple(int(c) for c in counts[:, k])
        taken = found.setdefault(wanted, [])
        column = _column(outside, inside, wanted, taken, seconds)
        if column is None:  # whoever has the same counts has the only column that fits
            column = taken[-1] if taken else np.zeros(rounds)
        second = _column(outside, inside, wanted, [*taken, column], seconds)
        residuals.append(_distance(outside, column))
        near = second is not None and _distance(outside, second) <= MARGIN * max(residuals[-1], SAME)
        sure.append(not taken and not near)
        found[wanted].append(column)
        columns.append(column)
    return Participation(
        torch.from_numpy(np.stack(columns, 1)).bool(),
        torch.tensor(residuals, dtype=torch.float64),
        torch.tensor(sure),
    )


def _distance(outside: np.ndarray, column: np.ndarray) -> float:
    return float(np.abs(outside @ column).sum() / max(1.0, column.sum()))


def _outside(sums: Tensor, clients: int, noise: float) -> np.ndarray:
    """An orthonormal basis `[T - r, T]` of what is orthogonal to the column space of the sums."""
    triangle = torch.linalg.qr(sums.detach().cpu().double().T, mode="r").R  # its rows span what the sums do
    u, s, _ = np.linalg.svd(triangle.T.numpy(), full_matrices=True)
    rank = min(clients, int((s > max(noise, EXACT) * s[0]).sum()) if len(s) and s[0] > 0 else 0)
    basis: np.ndarray = u[:, rank:].T
    return basis


def _column(
    outside: np.ndarray,
    inside: np.ndarray,
    wanted: tuple[int, ...],
    taken: Sequence[np.ndarray],
    seconds: float,
) -> np.ndarray | None:
    """The binary column p `[T]` with `inside` p = wanted, none of those taken, that minimises ‖outside
    p‖₁."""
    dims, rounds = outside.shape
    cost = np.concatenate([np.zeros(rounds), np.ones(dims)])
    slack = np.eye(dims)
    rows = [
        LinearConstraint(np.hstack([outside, -slack]), -np.inf, 0),
        LinearConstraint(np.hstack([-outside, -slack]), -np.inf, 0),
        LinearConstraint(np.hstack([inside, np.zeros((len(inside), dims))]), wanted, wanted),
    ]
    if taken:
        other = 2 * np.stack(taken) - 1  # p differs from c somewhere: (2 c - 1) p <= |c| - 1
        cuts = np.hstack([other, np.zeros((len(taken), dims))])
        rows.append(LinearConstraint(cuts, -np.inf, np.sum(taken, 1) - 1))
    result = milp(
        cost,
        integrality=np.concatenate([np.ones(rounds), np.zeros(dims)]),
        bounds=Bounds(0, np.concatenate([np.ones(rounds), np.full(dims, np.inf)])),
        constraints=rows,
        options={"time_limit": seconds},
    )
    if result.x is None:
        return None
    column: np.ndarray = np.rint(result.x[:rounds])
    return column
