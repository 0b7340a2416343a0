"""Priors against plain formulas."""

from __future__ import annotations

import pytest
import torch

from fltoolkit.inversion.consensus import Consensus
from fltoolkit.inversion.prior import norm, total_variation

NOTHING = (torch.empty(0), torch.empty(0))


def test_total_variation_of_a_checkerboard_and_of_what_is_no_image():
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2.0
    flat = torch.ones(1, 2, 1, 4, 4)
    both = torch.stack([board, torch.ones(4, 4)])[None, :, None]
    assert total_variation(flat, *NOTHING).tolist() == [0.0]
    assert total_variation(both, *NOTHING).tolist() == [1.0]
    assert total_variation(torch.rand(3, 2, 7), *NOTHING).tolist() == [0.0] * 3
    assert torch.isfinite(total_variation(torch.rand(2, 1, 3, 1, 5), *NOTHING)).all()


def test_norm():
    x = torch.rand(3, 2, 1, 4, 4)
    expected = [sum(float(i.norm()) for i in batch) / 2 for batch in x]
    assert norm(x, *NOTHING).tolist() == pytest.approx(expected)


class Flat:
    """A problem of two victims with two guesses each, of two inputs and a label logit, without a loss."""

    owner = torch.tensor([0, 0, 1, 1])
    inputs = 2

    def __call__(self, z, rows):
        return torch.zeros(len(z)), torch.zeros_like(z)


def test_consensus_pulls_a_victims_guesses_together_and_no_others():
    z = torch.tensor([[0.0, 0.0, 9.0], [2.0, 4.0, 9.0], [7.0, 7.0, 0.0], [7.0, 7.0, 5.0]])
    loss, gradient = Consensus(Flat(), 0.5)(z, torch.arange(4))
    assert loss.tolist() == [0.5 * 2.5, 0.5 * 2.5, 0.0, 0.0]
    assert gradient.tolist() == [[-0.5, -1.0, 0.0], [0.5, 1.0, 0.0], [0.0] * 3, [0.0] * 3]
    alone, _ = Consensus(Flat(), 0.5)(z[1:], torch.tensor([1, 2, 3]))
    assert alone[0] == 0
