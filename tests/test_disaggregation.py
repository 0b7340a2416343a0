"""Participants against all binary columns and the truth, members against exact elimination."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult, milp
from scipy.stats import binomtest

from fltoolkit import disaggregation
from fltoolkit.disaggregation import _space, members, participants
from fltoolkit.errors import InputError


def problem(rounds, clients, dim, seed=0, share=0.5):
    """P `[T, K]` bool and G `[K, D]`, float64."""
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.random((rounds, clients)) < share)
    return p, torch.from_numpy(rng.normal(size=(clients, dim)))


def windows_of(rounds, size):
    return [list(range(a, min(a + size, rounds))) for a in range(0, rounds, size)]


def counted(p, windows):
    return torch.stack([p[list(w)].sum(0) for w in windows])


def right(found, p):
    return (found.matrix == p).all(0)


def binary_columns(counts, windows, rounds):
    """All p of zeros and ones with C p = c, as rows."""
    every = np.array(list(product((0, 1), repeat=rounds)))
    good = [every[:, w].sum(1) == c for w, c in zip(windows, counts, strict=True)]
    return every[np.all(good, 0)]


def outside(sums, rank, columns):
    """Σ |Nᵀ p| and ‖Nᵀ p‖ / ‖p‖ of columns given as rows; N by a plain SVD."""
    u = np.linalg.svd(sums, full_matrices=True)[0][:, rank:]
    parts = columns @ u
    return np.abs(parts).sum(1), np.linalg.norm(parts, axis=1) / np.linalg.norm(columns, axis=1).clip(1)


def exact_rank(rows):
    """By elimination with fractions."""
    rows = [[Fraction(int(v)) for v in row] for row in rows]
    rank = 0
    for column in range(len(rows[0])):
        pivot = next((r for r in range(rank, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for r in range(rank + 1, len(rows)):
            factor = rows[r][column] / rows[rank][column]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[rank], strict=True)]
        rank += 1
    return rank


# --- participants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "clients", "dim", "size", "share", "dtype", "precision"),
    [
        (20, 5, 8, 5, 0.5, torch.float64, 1e-10),
        (30, 10, 10, 5, 0.3, torch.float64, 1e-10),
        (40, 12, 30, 5, 0.5, torch.float64, 1e-10),
        (40, 12, 3000, 5, 0.5, torch.float32, 1e-4),
        (60, 20, 40, 5, 0.2, torch.float64, 1e-10),
    ],
)
def test_sums_without_noise_give_back_all_participants_and_updates(
    rounds, clients, dim, size, share, dtype, precision
):
    p, g = problem(rounds, clients, dim, share=share)
    windows = windows_of(rounds, size)
    sums = (p.double() @ g).to(dtype)
    before = sums.clone()
    found = participants(sums, counted(p, windows), windows)
    assert right(found, p).all()
    assert found.proven.all()
    assert found.unique.all()
    assert found.residuals.max() < 1e-5
    solved = members(sums, found.matrix)
    assert solved.updates.dtype == dtype
    assert (solved.updates - g).abs().max() < precision
    assert torch.equal(sums, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rounds=st.integers(2, 9),
    clients=st.integers(1, 6),
    dim=st.integers(1, 8),
    size=st.integers(2, 9),
    seed=st.integers(0, 10**6),
)
def test_what_fits_is_what_is_found_among_all_binary_columns(rounds, clients, dim, size, seed):
    """Of any rank, so with fewer rounds or dimensions than clients too; unique is one among all of them."""
    p, g = problem(rounds, clients, dim, seed)
    windows = windows_of(rounds, size)
    sums = p.double() @ g
    counts = counted(p, windows)
    found = participants(sums, counts, windows)
    rank = np.linalg.matrix_rank(sums.numpy())
    assert found.proven.all()
    for k in range(clients):
        all_of_them = binary_columns(counts[:, k].tolist(), windows, rounds)
        relative = outside(sums.numpy(), rank, all_of_them)[1]
        fitting = {tuple(c) for c in all_of_them[relative < 1e-7]}
        alike = (counts == counts[:, [k]]).all(0)
        mine = {tuple(c) for c in found.matrix[:, alike].T.int().tolist()}
        if fitting:
            assert mine <= fitting
            assert len(mine) == min(int(alike.sum()), len(fitting))
        else:
            assert found.residuals[k] == pytest.approx(
                relative[(all_of_them == found.matrix[:, k].numpy()).all(1)].item()
            )
        assert bool(found.unique[k]) == (len(fitting) == 1)


@pytest.mark.parametrize("seed", range(6))
def test_with_noise_unsaid_the_nearest_of_all_binary_columns_is_found_and_not_called_unique(seed):
    p, g = problem(9, 4, 20, seed)
    sums = p.double() @ g + 0.3 * torch.from_numpy(np.random.default_rng(7).normal(size=(9, 20)))
    windows = windows_of(9, 5)
    counts = counted(p, windows)
    found = participants(sums, counts, windows)
    assert not found.unique.any()
    assert found.proven.all()
    for k in range(4):
        if (counts == counts[:, [k]]).all(0).sum() > 1:
            continue
        near, _ = outside(sums.numpy(), 4, binary_columns(counts[:, k].tolist(), windows, 9))
        mine, relative = outside(sums.numpy(), 4, found.matrix[:, k].double().numpy()[None])
        assert mine.item() == pytest.approx(near.min())
        assert found.residuals[k].item() == pytest.approx(relative.item())


def test_updates_that_drift_are_told_apart_and_no_wrong_column_is_called_unique():
    """Every client's update drifts by 20 % of its norm from round to round: with 95 % confidence more than
    nine in ten columns are right, and more than seven in ten are right and known to be."""
    correct, known, tried, drift = 0, 0, 0, 0.2
    for seed in range(8):
        p, g = problem(24, 6, 300, seed)
        rng = np.random.default_rng(100 + seed)
        own = g + drift * torch.from_numpy(rng.normal(size=(24, 6, 300)))
        sums = (p.double()[:, :, None] * own).sum(1)
        windows = windows_of(24, 4)
        noise = drift * float(p.sum(1).double().mean().sqrt())
        found = participants(sums, counted(p, windows), windows, noise=noise)
        good = right(found, p)
        assert not (found.unique & ~good).any()
        correct, known, tried = correct + int(good.sum()), known + int(found.unique.sum()), tried + 6
    assert binomtest(correct, tried).proportion_ci(0.95, method="wilson").low > 0.9
    assert binomtest(known, tried).proportion_ci(0.95, method="wilson").low > 0.7


@pytest.mark.parametrize(
    ("rounds", "clients", "dim", "noise"),
    [(40, 8, 100, 0.5), (60, 20, 400, 1.0), (200, 10, 50, 0.5), (40, 8, 100, 1e-6)],
)
def test_residuals_of_true_columns_have_the_deviation_said_and_fit(rounds, clients, dim, noise):
    pulls, fits = [], []
    for seed in range(20):
        p, g = problem(rounds, clients, dim, seed, 0.4)
        rng = np.random.default_rng(1000 + seed)
        sums = p.double() @ g + noise * torch.from_numpy(rng.normal(size=(rounds, dim)))
        space = _space(sums, clients, noise)
        assert space.basis.shape == (rounds, clients)
        for column in p.double().numpy().T:
            pulls.append(space.normal @ column / space.sigma(column))
            fits.append(space.fits(column))
            assert not space.fits(rng.permutation(column))
    assert np.sqrt(np.mean(np.square(pulls))) == pytest.approx(1, abs=0.05)
    assert all(fits)


def test_directions_within_the_noise_are_none_of_the_space():
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=(30, 200)))
    assert _space(noise, 5, 1.1).basis.shape[1] == 0
    strong = torch.from_numpy(np.outer(rng.normal(size=30), rng.normal(size=200)))
    assert _space(noise + strong, 5, 1.1).basis.shape[1] == 1
    assert _space(strong.float(), 5, 0.0).basis.shape[1] == 1


def test_clients_of_equal_counts_get_different_columns_and_none_is_unique():
    p, g = problem(20, 4, 30, seed=1)
    p[:10, 0] = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).bool()
    p[:10, 1] = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 1, 0]).bool()
    p[10:, 0] = p[10:, 1].flip(0)
    p[:3, 2:], p[17:, 2:] = True, torch.tensor([True, False])
    windows = windows_of(20, 10)
    found = participants(p.double() @ g, counted(p, windows), windows)
    assert {tuple(c) for c in found.matrix.T.tolist()} == {tuple(c) for c in p.T.tolist()}
    assert torch.equal(found.matrix[:, 2:], p[:, 2:])
    assert found.unique.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("dtype", "noise"), [(torch.float64, 0.0), (torch.float32, 0.0), (torch.float64, 0.5)]
)
def test_clients_always_together_share_their_column_and_absent_ones_have_zeros(dtype, noise):
    p, g = problem(24, 6, 100, seed=2)
    p[:, 1] = p[:, 0]
    p[:, 4:] = False
    windows = windows_of(24, 4)
    put = noise * torch.from_numpy(np.random.default_rng(3).normal(size=(24, 100)))
    sums = (p.double() @ g + put).to(dtype)
    found = participants(sums, counted(p, windows), windows, noise=noise)
    assert right(found, p).all()
    assert found.unique.all()
    assert found.residuals[4:].tolist() == [0, 0]
    assert members(sums, found.matrix).identifiable.tolist() == [False, False, True, True, False, False]


def test_windows_may_overlap_and_leave_rounds_out():
    p, g = problem(20, 5, 12, seed=3)
    windows = [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8], (19, 11, 3)]
    found = participants(p.double() @ g, counted(p, windows), windows)
    assert right(found, p)[found.unique].all()
    assert found.unique.sum() >= 4


def test_what_the_time_did_not_suffice_for_is_said_and_never_called_proven_or_unique():
    p, g = problem(40, 12, 30)
    windows = windows_of(40, 10)
    found = participants(p.double() @ g, counted(p, windows), windows, seconds=1e-9)
    assert not found.unique.any()
    assert not found.proven.any()
    nothing = found.residuals.isinf()
    assert nothing.any()
    assert not found.matrix[:, nothing].any()
    assert (counted(found.matrix, windows) == counted(p, windows)).all(0)[~nothing].all()


def test_a_column_whose_rivals_time_ran_out_for_is_not_called_unique(monkeypatch):
    p, g = problem(20, 5, 8)
    windows = windows_of(20, 5)

    def solver(*args, constraints, **rest):
        if len(constraints.lb) > len(windows) + 2 * 15 + 1:
            return OptimizeResult(x=None, status=1)
        return milp(*args, constraints=constraints, **rest)

    monkeypatch.setattr(disaggregation, "milp", solver)
    found = participants(p.double() @ g, counted(p, windows), windows)
    assert right(found, p).all()
    assert found.proven.all()
    assert not found.unique.any()


# --- members --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rounds=st.integers(1, 8), clients=st.integers(1, 8), seed=st.integers(0, 10**6), one=st.booleans())
def test_who_is_identifiable_is_what_exact_elimination_says(rounds, clients, seed, one):
    p, g = problem(rounds, clients, 3, seed, 0.3 if one else 0.6)
    solved = members(p.double() @ g, p)
    rows = p.int().tolist()
    assert solved.rank == exact_rank(rows)
    for k in range(clients):
        unit = [int(i == k) for i in range(clients)]
        assert bool(solved.identifiable[k]) == (exact_rank([*rows, unit]) == solved.rank)
        if solved.identifiable[k]:
            assert torch.allclose(solved.updates[k], g[k], atol=1e-9)
        else:
            assert solved.updates[k].isnan().all()
            assert solved.standard_errors[k].isnan()
    assert solved.residuals.max() < 1e-9


def test_the_difference_of_two_sums_is_the_client_who_left():
    p, g = torch.ones(2, 9, dtype=torch.bool), problem(2, 9, 50)[1]
    p[1, 4] = False
    sums = p.double() @ g
    solved = members(sums, p)
    assert solved.identifiable.tolist() == [k == 4 for k in range(9)]
    assert torch.allclose(solved.updates[4], sums[0] - sums[1], atol=1e-12)
    assert solved.updates[torch.arange(9) != 4].isnan().all()
    assert solved.rank == 2
    # Rows of nine and eight ones with eight in common: s² are the roots of x² - 17 x + 8.
    assert solved.condition == pytest.approx(np.sqrt((17 + 257**0.5) / (17 - 257**0.5)))


def test_a_client_that_is_nearly_determined_is_not_taken_for_one_that_is():
    """Rounds {i, a}, {i, b} and {i + 1, a, b} make client i + 1 twice client i in the only null vector, so
    the first is 2^-12 of the last in it; one more round determines all."""
    steps = 12
    p = torch.zeros(3 * steps + 1, 1 + 3 * steps)
    for i in range(steps):
        low, high = steps + 1 + i, 2 * steps + 1 + i
        p[3 * i, [i, low]] = 1
        p[3 * i + 1, [i, high]] = 1
        p[3 * i + 2, [i + 1, low, high]] = 1
    assert not members(torch.zeros(3 * steps, 2), p[:-1]).identifiable.any()
    p[-1, 0] = 1
    solved = members(p.double() @ torch.ones(len(p), 1, dtype=torch.float64), p)
    assert solved.identifiable.all()
    assert solved.updates.flatten().tolist() == pytest.approx([1] * len(p))


def test_noisy_sums_give_the_least_squares_and_standard_errors_that_hold():
    p, g = problem(40, 8, 2000, seed=5)
    noise = torch.from_numpy(np.random.default_rng(6).normal(size=(40, 2000)))
    sums = p.double() @ g + 0.7 * noise
    solved = members(sums, p)
    slow, *_ = np.linalg.lstsq(p.double().numpy(), sums.numpy())
    assert np.allclose(solved.updates, slow)
    misses = (solved.updates - g).square().mean(1).sqrt()
    assert (misses / solved.standard_errors).tolist() == pytest.approx([1] * 8, abs=0.08)
    error = (sums - p.double() @ torch.from_numpy(slow)).norm(dim=1) / sums.norm(dim=1).max()
    assert torch.allclose(solved.residuals, error)


def test_with_no_more_rounds_than_rank_there_is_no_standard_error():
    p, g = torch.eye(4), problem(4, 4, 5)[1]
    solved = members(g.float(), p)
    assert torch.equal(solved.updates, g.float())
    assert solved.standard_errors.isnan().all()


def test_a_matrix_of_zeros_determines_nobody():
    solved = members(torch.zeros(3, 2), torch.zeros(3, 4, dtype=torch.int64))
    assert (solved.rank, solved.identifiable.any().item()) == (0, False)
    assert solved.updates.isnan().all()
    assert np.isnan(solved.condition)
    assert solved.residuals.tolist() == [0, 0, 0]


# --- refusals -------------------------------------------------------------------------------------------

SUMS, COUNTS, WINDOWS = torch.ones(4, 5), torch.ones(2, 3, dtype=torch.int64), [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.ones(4)}, "sums must be of shape [T, D], T and D >= 1, got (4,)"),
        ({"sums": torch.ones(4, 0)}, "sums must be of shape [T, D], T and D >= 1, got (4, 0)"),
        ({"sums": torch.ones(4, 5).long()}, "sums must be of a floating-point type, got torch.int64"),
        ({"sums": SUMS / 0}, "sums must be finite, got inf"),
        ({"windows": []}, "windows must be at least one, got []"),
        ({"windows": [[0, 1], [2, 4]]}, "a window must be different rounds in [0, 4), got [2, 4]"),
        ({"windows": [[0, 1], [2, 2]]}, "a window must be different rounds in [0, 4), got [2, 2]"),
        ({"windows": [[0, 1], []]}, "a window must be different rounds in [0, 4), got []"),
        ({"counts": COUNTS[:1]}, "counts must be of shape [2, K], K >= 1, got (1, 3)"),
        ({"counts": COUNTS[:, :0]}, "counts must be of shape [2, K], K >= 1, got (2, 0)"),
        ({"counts": COUNTS.float()}, "counts must be integers, got torch.float32"),
        ({"counts": COUNTS * 3}, "count of client 0 in window 0 must be in [0, 2], got 3"),
        ({"counts": COUNTS * -1}, "count of client 0 in window 0 must be in [0, 2], got -1"),
        (
            {"windows": [[0, 1], [0]], "counts": torch.tensor([[1, 0], [0, 1]])},
            "counts of client 1 must be those of zeros and ones, got [0, 1]",
        ),
        ({"noise": -1.0}, "noise must be a finite number >= 0, got -1.0"),
        ({"noise": float("nan")}, "noise must be a finite number >= 0, got nan"),
        ({"seconds": 0.0}, "seconds must be > 0, got 0.0"),
    ],
)
def test_participants_refuses(change, message):
    values = {"sums": SUMS, "counts": COUNTS, "windows": WINDOWS} | change
    with pytest.raises(InputError) as caught:
        participants(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("sums", "matrix", "message"),
    [
        (SUMS, torch.ones(4), "matrix must be of shape [T, K], K >= 1, got (4,)"),
        (SUMS, torch.ones(4, 0), "matrix must be of shape [T, K], K >= 1, got (4, 0)"),
        (SUMS, torch.ones(3, 2), "rows of matrix must be 4, one for each sum, got 3"),
        (SUMS, torch.full((4, 2), 0.5), "matrix must be of zeros and ones, got 0.5"),
        (SUMS * torch.nan, torch.ones(4, 2), "sums must be finite, got nan"),
    ],
)
def test_members_refuses(sums, matrix, message):
    with pytest.raises(InputError) as caught:
        members(sums, matrix)
    assert str(caught.value) == message
