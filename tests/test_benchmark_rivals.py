"""The rivals of the speed benchmark do the work that they are timed for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)

from rivals.common import TASKS, random_clients, row_of, same_work, start, training_loss  # noqa: E402
from rivals.isolated import Isolated, RivalError  # noqa: E402
from rivals.ours import Ours  # noqa: E402
from rivals.plain import Plain  # noqa: E402
from rivals.work import round_flops  # noqa: E402

COHORT = list(range(10))
CLIENTS = random_clients("2nn", 10, 600, seed=3)
ARGUMENTS = ("2nn", CLIENTS, 10, 0.1, 1)
BEFORE = training_loss("2nn", row_of(start("2nn")), CLIENTS)


@pytest.fixture(scope="module")
def plain_loss() -> float:
    plain = Plain(*ARGUMENTS)
    assert plain.rounds([COHORT]) > 0
    return training_loss("2nn", plain.row(), CLIENTS)


def test_the_plain_loop_learns(plain_loss):
    assert plain_loss < 0.9 * BEFORE


def test_our_round_does_the_plain_loops_work(plain_loss):
    ours = Ours(*ARGUMENTS)
    assert ours.rounds([COHORT]) > 0
    assert same_work(BEFORE, training_loss("2nn", ours.row(), CLIENTS), plain_loss)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_rival_that_does_nothing_or_half_is_found_out(plain_loss, share):
    idle = row_of(start("2nn"))
    plain = Plain(*ARGUMENTS)
    plain.rounds([COHORT])
    lazy = idle + np.float32(share) * (plain.row() - idle)
    assert not same_work(BEFORE, training_loss("2nn", lazy, CLIENTS), plain_loss)


@pytest.mark.parametrize(
    ("name", "package"), [("pfl", "pfl"), ("pfl-2", "pfl"), ("fedjax", "fedjax"), ("flower", "flwr")]
)
def test_the_others_do_the_plain_loops_work(plain_loss, name, package):
    pytest.importorskip(package)
    rival = Isolated(name, ARGUMENTS, 2)
    try:
        assert rival.ready().rounds([COHORT]) > 0
        assert same_work(BEFORE, training_loss("2nn", rival.row(), CLIENTS), plain_loss)
    finally:
        rival.close()


def test_a_rival_that_cannot_be_built_says_why():
    rival = Isolated("lean", ARGUMENTS, 1)
    with pytest.raises(RivalError) as raised:
        rival.ready()
    assert "must get the model 'lstm', got '2nn'" in raised.value.reason


def test_the_cnns_arithmetic():
    """Of 28x28x32x(25), 14x14x64x(800), 3136x512 and 512x10 multiplications, 3 times, the first layer's 2."""
    import torch

    layers = [28 * 28 * 32 * 25, 14 * 14 * 64 * 800, 3136 * 512, 512 * 10]
    example = torch.zeros(1, *TASKS["cnn"][1])
    assert round_flops(start("cnn"), example, 10, 600, 1) == 6000 * 2 * (3 * sum(layers) - layers[0])
