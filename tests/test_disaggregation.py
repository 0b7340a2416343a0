"""Single updates out of sums: exact where they are determined, and never claimed where they are not."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fltoolkit.disaggregation import members, participants
from fltoolkit.errors import InputError
from fltoolkit.metrics.interval import rate_interval


def problem(rounds, clients, dim, seed=0, fraction=0.5):
    rng = np.random.default_rng(seed)
    p = rng.random((rounds, clients)) < fraction
    g = rng.normal(size=(clients, dim))
    return torch.from_numpy(p), torch.from_numpy(g), torch.from_numpy(p.astype(float) @ g)


def windows_of(rounds, size):
    return [list(range(a, min(a + size, rounds))) for a in range(0, rounds, size)]


def counted(p, windows):
    return torch.stack([p[w].sum(0) for w in windows])


def rank(rows):
    """By elimination with fractions."""
    rows = [[Fraction(int(v)) for v in r] for r in rows]
    found = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for r in range(len(rows)):
            if r != found and rows[r][column]:
                factor = rows[r][column] / rows[found][column]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[found], strict=True)]
        found += 1
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 7), st.integers(0, 10**6))
def test_who_is_identifiable_is_what_exact_elimination_says(rounds, clients, seed):
    p, g, sums = problem(rounds, clients, 3, seed)
    found = members(sums, p)
    rows = p.int().tolist()
    assert found.rank == rank(rows)
    for k in range(clients):
        unit = [int(i == k) for i in range(clients)]
        assert bool(found.identifiable[k]) == (rank([*rows, unit]) == found.rank)
        if found.identifiable[k]:
            assert torch.allclose(found.updates[k], g[k], atol=1e-8)
        else:
            assert found.updates[k].isnan().all()


def test_the_difference_of_two_sums_is_the_one_who_left():
    _, g, _ = problem(2, 9, 50)
    p = torch.ones(2, 9, dtype=torch.bool)
    p[1, 4] = False
    found = members(p.double() @ g, p)
    assert found.identifiable.tolist() == [k == 4 for k in range(9)]
    assert torch.allclose(found.updates[4], g[4])


@pytest.mark.parametrize(("rounds", "clients", "dim"), [(16, 6, 200), (24, 10, 60)])
def test_hidden_participants_are_found_from_counts(rounds, clients, dim):
    p, g, sums = problem(rounds, clients, dim, seed=3)
    windows = windows_of(rounds, 4)
    found = participants(sums, counted(p, windows), windows)
    alone = found.sure
    assert alone.sum() >= clients - 2
    assert torch.equal(found.matrix[:, alone], p[:, alone])
    assert found.residuals.max() < 1e-6
    solved = members(sums, found.matrix)
    told = alone & solved.identifiable
    assert told.any()
    assert torch.allclose(solved.updates[told], g[told], atol=1e-6)


def test_clients_of_equal_counts_get_different_columns_and_are_marked():
    p, _, sums = problem(10, 4, 30, seed=1)
    windows = [list(range(10))]
    p[:, 0] = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).bool()
    p[:, 1] = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 1, 0]).bool()
    sums = p.double() @ torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = participants(sums, counted(p, windows), windows)
    assert not found.sure[:2].any()
    assert {tuple(c.tolist()) for c in found.matrix.T} == {tuple(c.tolist()) for c in p.T}


@pytest.mark.parametrize("seed", range(3))
def test_columns_are_as_near_as_the_best_of_all_binary_ones(seed):
    """Against all 2^T columns, with sums that no column fits exactly."""
    p, _, sums = problem(8, 3, 20, seed)
    sums = sums + 0.3 * torch.randn(
        sums.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    windows = windows_of(8, 4)
    counts = counted(p, windows)
    u, _, _ = np.linalg.svd(sums.numpy(), full_matrices=True)
    basis = u[:, 3:].T
    found = participants(sums, counts, windows)
    for k in range(3):
        fits = [
            np.array(c)
            for c in product((0, 1), repeat=8)
            if [sum(c[:4]), sum(c[4:])] == counts[:, k].tolist()
        ]
        best = min(np.abs(basis @ c).sum() for c in fits)
        if found.sure[k]:
            mine = np.abs(basis @ found.matrix[:, k].double().numpy()).sum()
            assert mine == pytest.approx(best, abs=1e-6)


def test_updates_that_drift_are_still_told_apart():
    """Each round's updates differ from the mean by 10 %: at least nine columns of ten are right."""
    right, tried = 0, 0
    for seed in range(5):
        p, g, _ = problem(24, 6, 400, seed)
        rng = torch.Generator().manual_seed(seed)
        drift = 0.1 * torch.randn(24, 6, 400, dtype=torch.float64, generator=rng)
        sums = (p.double()[:, :, None] * (g + drift)).sum(1)
        windows = windows_of(24, 4)
        found = participants(sums, counted(p, windows), windows, noise=0.05)
        right += int((found.matrix == p).all(0)[found.sure].sum())
        tried += int((found.sure).sum())
    assert rate_interval(right, tried)["ci95"][0] > 0.75
    assert right / tried >= 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.zeros(3, 4)}, "counts must be one row for each of 2 windows, got 3"),
        ({"windows": [[0, 1], [2, 9]]}, r"windows must be rounds from 0 to 3, got \(2, 9\)"),
        ({"counts": torch.full((2, 4), 3)}, r"counts must be from 0 to 2, got \[3, 3, 3, 3\]"),
        ({"noise": -1.0}, "noise must be >= 0, got -1.0"),
    ],
)
def test_impossible_counts_are_refused(change, message):
    values = {"sums": torch.zeros(4, 5), "counts": torch.zeros(2, 4), "windows": [[0, 1], [2, 3]]} | change
    with pytest.raises(InputError, match=message):
        participants(**values)


def test_impossible_matrices_are_refused():
    with pytest.raises(InputError, match="matrix must be of 4 rounds, as the sums are, got 3"):
        members(torch.zeros(4, 2), torch.ones(3, 2))
    with pytest.raises(InputError, match="matrix must be of zeros and ones"):
        members(torch.zeros(2, 2), torch.full((2, 2), 0.5))
