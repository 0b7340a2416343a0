"""Engines: ClientUpdate of McMahan et al. 2017, Algorithm 1, for a whole cohort.

Every engine computes the same numbers from the same random order (a test holds them equal to a plain
loop over clients); they differ in what they are fast at. `choose` picks by the model's shape.
"""

from __future__ import annotations

from torch import nn

from fltoolkit.errors import InputError, unknown
from fltoolkit.training.engines.base import Engine
from fltoolkit.training.engines.batched import Batched
from fltoolkit.training.engines.compiled import Compiled
from fltoolkit.training.engines.graphed import Graphed
from fltoolkit.training.engines.looped import Looped
from fltoolkit.training.engines.vmapped import Vmapped
from fltoolkit.types import Loss

ENGINES: dict[str, type[Engine]] = {e.name: e for e in (Compiled, Batched, Looped, Vmapped, Graphed)}
AUTO = "auto"


def choose(model: nn.Module, loss: Loss, input_shape: tuple[int, ...], name: str = AUTO) -> Engine:
    """The engine called `name`, or the fastest that can train `model`; InputError where it cannot.

    Fully connected networks run in compiled kernels on a CPU, elsewhere as batched matrix products. Of the
    rest, CPUs run one client a thread; GPUs run all clients as one recorded program.
    """
    if name != AUTO:
        if name not in ENGINES:
            unknown("engine", name, [AUTO, *ENGINES])
        reason = ENGINES[name].refuses(model, loss, input_shape)
        if reason:
            raise InputError(f"engine {name!r} cannot train this model: {reason}")
        return ENGINES[name](model, loss)
    on_cpu = next(model.parameters()).device.type == "cpu"
    order = (Compiled, Batched, Looped) if on_cpu else (Graphed, Looped)
    able = [e for e in order if e.refuses(model, loss, input_shape) is None]
    return able[0](model, loss)
