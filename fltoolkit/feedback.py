"""Error feedback: what compression left out of a client's row is added to its next one.

Seide et al. 2014 ("1-bit stochastic gradient descent"); Stich, Cordonnier and Jaggi 2018, arXiv:1809.07599,
Algorithm 1, prove that with it compressed SGD converges like SGD.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fltoolkit.defense import RoundContext


def with_feedback(rows: Tensor, ctx: RoundContext, compress: Callable[[Tensor], Tensor]) -> Tensor:
    """C(v) `[K, D]` of v = row + what its client still owed; v − C(v) is owed from now on."""
    wanted = rows.clone()
    for row, c in zip(wanted, ctx.clients, strict=True):
        owed = ctx.recall("residual", c)
        if owed is not None:
            row += owed.to(row)
    sent = compress(wanted)
    for rest, c in zip(wanted - sent, ctx.clients, strict=True):
        ctx.remember(rest.clone(), "residual", c)
    return sent
