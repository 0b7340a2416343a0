"""Who took part, and with what, out of the sums that secure aggregation leaves a server.

Lam, Wei, Brooks, Janapa Reddi and Mitzenmacher 2021 ("Gradient Disaggregation: Breaking Privacy in Federated
Learning by Reconstructing the User Participant Matrix", ICML 2021, arXiv:2106.06089). Clients whose updates
G `[K, D]` (nearly) stay as they are over T rounds give the sums S = P G, P `[T, K]` of zeros and ones.
Device analytics tell how often client k took part in each window of rounds, C p_k = c_k, so each column is
found for itself, min ‖Nᵀ p_k‖ over binary p_k with C p_k = c_k, N an orthonormal basis of what is orthogonal
to the columns of S (with noise, to its leading K singular vectors); then G by least squares.

The paper minimises the squared L2 norm with Gurobi; here it is the L1 norm, which makes the program linear
(HiGHS in scipy). What noise does to Nᵀ p follows from the angles between the singular vectors of a matrix of
low rank and of its noisy copy, Benaych-Georges and Nadakuditi 2012 (arXiv:1103.2221).
A server that knows P, as it does in the protocol of Bonawitz et al. 2017, needs `members` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from fltoolkit.errors import InputError, require

SOLVER_TOLERANCE = 1e-6
"""HiGHS takes a row of a program for satisfied within about this."""

MARGIN = 5.0
"""How far beyond its mean the L1 norm of a true column's residual may lie; see `_Space.reach`."""

DETERMINED = 1e-9
"""A client is identifiable if its unit vector is nearer than this to the row space of P."""


@dataclass(frozen=True)
class Participation:
    """matrix `[T, K]` bool: the columns found; all False where none was (residual inf).
    residuals `[K]`: distance of a column from the space of the sums, relative to its norm, in [0, 1].
    proven `[K]` bool: the solver proved that no column with these counts is nearer in the L1 norm, except
    the columns given to other clients of the same counts.
    unique `[K]` bool: moreover the column lies as near as rounding and noise let a true one lie, and no other
    column with these counts does, which is proven too."""

    matrix: Tensor
    residuals: Tensor
    proven: Tensor
    unique: Tensor


@dataclass(frozen=True)
class Members:
    """updates `[K, D]` in the type of the sums; NaN for a client that is not identifiable.
    rank: of the participant matrix. identifiable `[K]` bool: the rounds determine this client's update.
    condition: largest over smallest nonzero singular value of the matrix (NaN if it is zero).
    residuals `[T]`: ‖sum - sum explained‖ of each round over the largest ‖sum‖.
    standard_errors `[K]`: of any coordinate of a client's update if all sums carry independent noise of one
    size, judged from the residuals; NaN if not identifiable or if T = rank leaves nothing to judge from."""

    updates: Tensor
    rank: int
    identifiable: Tensor
    condition: float
    residuals: Tensor
    standard_errors: Tensor


def participants(
    sums: Tensor,
    counts: Tensor,
    windows: Sequence[Sequence[int]],
    *,
    noise: float = 0.0,
    seconds: float = 10.0,
) -> Participation:
    """The participant matrix behind sums `[T, D]` (sums, not means) that K clients gave in T rounds.

    windows: W sets of rounds, each a sequence of indices in [0, T). counts `[W, K]`: in how many rounds of
    each window each client took part. noise: the standard deviation of a coordinate of a sum around P G, be
    it drift of the updates or noise put on; 0 leaves the rounding of the sums' type. seconds: the limit of
    each integer program, of which there are at most K and one more for each different column of counts.

    Clients of equal counts cannot be told apart: they get the different columns that fit, nearest first, and
    none is unique; if fewer fit than there are clients, some share one. Columns can be found only if every
    client's update adds a dimension to the sums, so for T > K and D ≥ K; read `unique` before anything is
    built on a column, and the residuals of `members`, which are large if the columns do not explain the sums.
    Raises `InputError` for bad values and for counts that no column of zeros and ones has.
    """
    _check_sums(sums)
    rounds = len(sums)
    incidence = _incidence(windows, rounds)
    wanted = _check_counts(counts, incidence)
    require(0 <= noise < float("inf"), "noise", "a finite number >= 0", noise)
    require(seconds > 0, "seconds", "> 0", seconds)
    space = _space(sums, wanted.shape[1], noise)

    matrix = np.zeros((rounds, wanted.shape[1]), dtype=bool)
    residuals = np.full(wanted.shape[1], np.inf)
    proven, unique = np.zeros((2, wanted.shape[1]), dtype=bool)
    alike: dict[tuple[int, ...], list[int]] = {}
    for client, column in enumerate(wanted.T.tolist()):
        alike.setdefault(tuple(column), []).append(client)
    for column, clients in alike.items():
        search = _Search(space, incidence, np.array(column), seconds)
        found, only = search.columns(len(clients))
        if not found and search.impossible:
            got = list(column)
            raise InputError(f"counts of client {clients[0]} must be those of zeros and ones, got {got}")
        for place, client in enumerate(clients if found else ()):
            p, proof = found[place % len(found)]
            matrix[:, client] = p == 1
            residuals[client] = space.relative_distance(p)
            proven[client], unique[client] = proof, only
    out = (torch.from_numpy(a).to(sums.device) for a in (matrix, residuals, proven, unique))
    return Participation(*out)


def members(sums: Tensor, matrix: Tensor) -> Members:
    """The updates behind sums `[T, D]` of the clients that matrix `[T, K]` of zeros and ones says took part.

    Least squares, for any T and K. Two rounds whose cohorts differ in one client determine that client: its
    unit vector is the difference of two rows. Raises `InputError` for bad values.
    """
    _check_sums(sums)
    require(
        matrix.ndim == 2 and matrix.shape[1] > 0, "matrix", "of shape [T, K], K >= 1", tuple(matrix.shape)
    )
    require(len(matrix) == len(sums), "rows of matrix", f"{len(sums)}, one for each sum", len(matrix))
    odd = matrix[(matrix != 0) & (matrix != 1)]
    require(not len(odd), "matrix", "of zeros and ones", odd[0].item() if len(odd) else None)
    p, s = matrix.to(sums.device, torch.float64), sums.detach().double()

    left, sizes, right = torch.linalg.svd(p, full_matrices=True)
    rank = int((sizes > sizes[0] * max(p.shape) * torch.finfo(torch.float64).eps).sum())
    left, sizes = left[:, :rank], sizes[:rank]
    identifiable = right[rank:].norm(dim=0) < DETERMINED
    inverse = right[:rank].T / sizes @ left.T
    errors = s - left @ (left.T @ s)
    freedom = (len(p) - rank) * s.shape[1]
    sigma = (errors.square().sum() / freedom).sqrt() if freedom else torch.tensor(torch.nan)
    unknown = ~identifiable
    return Members(
        updates=(inverse @ s).masked_fill(unknown[:, None], torch.nan).to(sums.dtype),
        rank=rank,
        identifiable=identifiable,
        condition=float(sizes[0] / sizes[-1]) if rank else float("nan"),
        residuals=(errors.norm(dim=1) / s.norm(dim=1).max()).nan_to_num(nan=0.0),
        standard_errors=(inverse.norm(dim=1) * sigma.to(inverse)).masked_fill(unknown, torch.nan),
    )


@dataclass(frozen=True)
class _Space:
    """basis `[T, r]`: the leading singular vectors of the sums; normal `[T - r, T]`: Nᵀ, the rest.
    spread `[r]`: by how much noise sways a coordinate of Nᵀ p for a unit of p along each basis vector."""

    basis: np.ndarray
    normal: np.ndarray
    spread: np.ndarray

    def distance(self, p: np.ndarray) -> float:
        """‖Nᵀ p‖₁, what the programs minimise."""
        return float(np.abs(self.normal @ p).sum())

    def relative_distance(self, p: np.ndarray) -> float:
        """‖Nᵀ p‖₂ / ‖p‖₂, 0 for p = 0."""
        return float(np.linalg.norm(self.normal @ p)) / max(1.0, float(np.linalg.norm(p)))

    def reach(self, sigma: float) -> float:
        """What ‖Nᵀ p‖₁ of a true column hardly exceeds if its coordinates are normal with deviation `sigma`:
        the mean and `MARGIN` times more than the deviation of the sum."""
        size = len(self.normal)
        return (size * sqrt(2 / pi) + MARGIN * sqrt(size)) * sigma + size * SOLVER_TOLERANCE

    def sigma(self, p: np.ndarray) -> float:
        """The deviation of a coordinate of Nᵀ p, p a column of the true matrix."""
        return float(np.linalg.norm(self.spread * (self.basis.T @ p)))

    def fits(self, p: np.ndarray) -> bool:
        return self.distance(p) <= self.reach(self.sigma(p))


def _space(sums: Tensor, clients: int, noise: float) -> _Space:
    rounds, dim = sums.shape
    triangle = torch.linalg.qr(sums.detach().double().T, mode="r").R
    left, sizes, _ = torch.linalg.svd(triangle.T, full_matrices=True)
    u, s = left.cpu().numpy(), sizes.cpu().numpy()
    noise = max(noise, torch.finfo(sums.dtype).eps * float(s[0]))
    rank = min(clients, int((s > noise * (sqrt(rounds) + sqrt(dim))).sum()))
    power = (s[:rank] / noise) ** 2 - rounds - dim if rank else s[:0]
    power = (power + np.sqrt(np.maximum(power**2 - 4 * rounds * dim, 0))) / 2
    spread = np.sqrt((power + dim) / (power * (power + rounds)))
    return _Space(u[:, :rank], np.ascontiguousarray(u[:, rank:].T), spread)


class _Search:
    """The columns of one tuple of counts `[W]` in the windows that incidence `[W, T]` marks, near `space`."""

    def __init__(self, space: _Space, incidence: np.ndarray, counts: np.ndarray, seconds: float) -> None:
        self.space, self.incidence, self.counts, self.seconds = space, incidence, counts, seconds
        self.impossible = False
        free = int((~incidence.any(0)).sum())
        most = min(incidence.shape[1], int(counts.sum()) + free)
        self._reach = space.reach(sqrt(most) * float(space.spread.max(initial=0.0)))

    def columns(self, clients: int) -> tuple[list[tuple[np.ndarray, bool]], bool]:
        """Up to `clients` different columns, each with whether it was proven to be the nearest yet, and
        whether there is one alone that fits, proven."""
        found, settled = self._fitting(clients)
        if found:
            return found, settled and len(found) == 1
        self.impossible = False
        for _ in range(clients):
            p, proof = self._nearest([p for p, _ in found], float("inf"))
            if p is None:
                break
            found.append((p, proof))
        return found, False

    def _fitting(self, clients: int) -> tuple[list[tuple[np.ndarray, bool]], bool]:
        found: list[tuple[np.ndarray, bool]] = []
        while len(found) < clients:
            p, proof = self._nearest([p for p, _ in found], self._reach)
            if p is None or not self.space.fits(p):
                return found, proof
            found.append((p, proof))
        if clients > 1:
            return found, False
        only = found[0][0]
        p, proof = self._nearest([only], self.space.reach(self.space.sigma(only)))
        return found, proof and (p is None or not self.space.fits(p))

    def _nearest(self, but: list[np.ndarray], reach: float) -> tuple[np.ndarray | None, bool]:
        """The binary p `[T]` with these counts and the least ‖Nᵀ p‖₁ ≤ reach that is none of `but`, and
        whether that is proven; None and whether it is proven that there is none."""
        result = self._solve(but, reach)
        self.impossible |= result.status == 2
        if result.x is None:
            return None, result.status == 2
        p = np.round(result.x[: self.incidence.shape[1]])
        good = (self.incidence @ p == self.counts).all() and not any((p == q).all() for q in but)
        return (p, result.status == 0) if good else (None, False)

    def _solve(self, but: list[np.ndarray], reach: float) -> Any:
        """min Σ z over binary p `[T]` and z `[T - r]`: -z ≤ Nᵀ p ≤ z, Σ z ≤ reach, C p = c, p ≠ q for q in
        `but`: Σ p over the zeros of q plus Σ (1 - p) over its ones is at least 1."""
        normal = self.space.normal
        size, rounds = normal.shape
        eye, zero, up = np.eye(size), np.zeros(size), np.full(size, np.inf)
        others = np.array(but).reshape(-1, rounds)
        rows = np.block(
            [
                [self.incidence, np.zeros((len(self.incidence), size))],
                [normal, -eye],
                [normal, eye],
                [np.zeros((1, rounds)), np.ones((1, size))],
                [1 - 2 * others, np.zeros((len(others), size))],
            ]
        )
        low = np.concatenate([self.counts, -up, zero, [0], 1 - others.sum(1)])
        high = np.concatenate([self.counts, zero, up, [reach], np.full(len(others), np.inf)])
        return milp(
            np.repeat([0.0, 1.0], [rounds, size]),
            integrality=np.repeat([1, 0], [rounds, size]),
            bounds=Bounds(0, np.concatenate([np.ones(rounds), np.full(size, reach)])),
            constraints=LinearConstraint(rows, low, high),
            options={"time_limit": self.seconds, "mip_rel_gap": 0.0},
        )


def _check_sums(sums: Tensor) -> None:
    require(sums.ndim == 2 and sums.numel() > 0, "sums", "of shape [T, D], T and D >= 1", tuple(sums.shape))
    require(sums.is_floating_point(), "sums", "of a floating-point type", sums.dtype)
    odd = sums[~sums.isfinite()]
    require(not len(odd), "sums", "finite", odd[0].item() if len(odd) else None)


def _incidence(windows: Sequence[Sequence[int]], rounds: int) -> np.ndarray:
    """C `[W, T]` of zeros and ones, float64."""
    require(len(windows) > 0, "windows", "at least one", windows)
    out = np.zeros((len(windows), rounds))
    for row, window in zip(out, windows, strict=True):
        good = all(0 <= t < rounds for t in window) and len(set(window)) == len(window) > 0
        require(good, "a window", f"different rounds in [0, {rounds})", list(window))
        row[list(window)] = 1
    return out


def _check_counts(counts: Tensor, incidence: np.ndarray) -> np.ndarray:
    """counts `[W, K]` as integers."""
    good = counts.ndim == 2 and len(counts) == len(incidence) and counts.shape[1] > 0
    require(good, "counts", f"of shape [{len(incidence)}, K], K >= 1", tuple(counts.shape))
    require(not counts.is_floating_point() and not counts.is_complex(), "counts", "integers", counts.dtype)
    out: np.ndarray = counts.cpu().numpy().astype(np.int64)
    sizes = incidence.sum(1).astype(int)
    for window, client in np.argwhere((out < 0) | (out > sizes[:, None])):
        name = f"count of client {client} in window {window}"
        require(False, name, f"in [0, {sizes[window]}]", int(out[window, client]))
    return out
