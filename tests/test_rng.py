"""Named streams: equal by name, different by anything else, the same in every process."""

from __future__ import annotations

import torch

from fltoolkit.rng import stream, torch_stream


def test_streams_depend_on_the_name_alone():
    assert stream(0, "a", 1).random() == stream(0, "a", 1).random()
    names = [("a", 1), ("a", 2), ("b", 1), ("a",), ("a1",), ("a", "1")]
    assert len({stream(0, *n).random() for n in names} | {stream(1, *n).random() for n in names}) == 12


def test_torch_streams_too():
    first = torch.rand(3, generator=torch_stream(0, "x"))
    assert torch.equal(first, torch.rand(3, generator=torch_stream(0, "x")))
    assert not torch.equal(first, torch.rand(3, generator=torch_stream(0, "y")))


def test_values_are_fixed_for_all_time():
    """A changed derivation would silently change every committed result."""
    assert stream(0, "round", 3, "client", 7).integers(0, 2**31) == 1670834558
