"""The options of GradInversion."""

import pytest
import torch
from conftest import observe, tiny_examples, tiny_model

from attacks.gradinversion import GradInversion
from fltoolkit.errors import InputError


@pytest.mark.parametrize(("distance", "of_twice"), [("squared", 1.0), ("cosine", 0.0)])
def test_cosine_alone_is_blind_to_how_long_an_update_is(distance, of_twice):
    seen = observe(tiny_model(), tiny_examples(2))
    objective, _ = GradInversion(distance=distance).objective(seen)
    row = seen.gradient[None]
    assert objective.distance(2 * row, row).item() == pytest.approx(of_twice, abs=1e-6)
    assert objective.distance(torch.zeros_like(row), row).item() == pytest.approx(1.0 if of_twice else 0.5)


def test_an_unknown_distance_is_refused():
    with pytest.raises(InputError, match=r"distance must be one of .*cosine.*, got 'l1'"):
        GradInversion(distance="l1")
