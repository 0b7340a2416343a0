"""Norms and weighted sums of a layer's per-example gradients, mostly without the gradients themselves.

With a_t the m inputs and d_t the p pre-activation gradients of an example at T places, the gradient by the
weight is g = Σ_t d_t a_tᵀ, of p·m numbers. At T = 1, ‖g‖² = ‖d‖² ‖a‖² (Goodfellow 2015, arXiv:1510.01799).
Otherwise ‖g‖² = Σ_{t,s} (a_tᵀ a_s)(d_tᵀ d_s), which takes T² (p + m) products against T p m for g (Li et al.
2022, arXiv:2110.05679; Bu et al. 2022, arXiv:2205.10683, take the cheaper, layer by layer). Its terms may
cancel to less than their rounding in single precision, so they are summed in double precision and count
twice. The weighted sum Σ_i c_i g_i needs no further backward pass (Bu et al. 2023, arXiv:2210.00038): it is
one product of a and c·d, or of c and the g, where those were made and are few enough to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

KEEP_BYTES = 32 << 20
"""What the gradients of one parameter by the examples of a piece may take to be kept for the weighted sum."""


@dataclass(frozen=True)
class Term:
    """One parameter's part: `squares [n]`, the squared norms of its gradient by each example, in double
    precision, and `add(c [n], out)`, which adds Σ_i c_i g_i to `out`, of the parameter's shape."""

    squares: Tensor
    add: Callable[[Tensor, Tensor], object]


def explicit(rows: Tensor) -> Term:
    """From the gradients `[n, *shape]`."""
    flat = rows.flatten(1)
    return Term(_squared(flat), lambda c, out: out.view(-1).addmv_(flat.t(), c))


def from_chunks(
    chunks: Callable[[int], Iterator[Tensor]],
    size: int,
    like: Tensor,
    add: Callable[[Tensor, Tensor], object],
) -> Term:
    """From `chunks(many)`, which makes the gradients of the n examples of `like`, `size` numbers each, in
    chunks `[<= many, *shape]`. They are kept within KEEP_BYTES; beyond that, `add` is the weighted sum."""
    n, each = len(like), size * like.element_size()
    made = chunks(max(1, KEEP_BYTES // each))
    if n * each > KEEP_BYTES:
        return Term(torch.cat([_squared(g.flatten(1)) for g in made]), add)
    first = next(made)
    if len(first) == n:
        return explicit(first)
    rows, at = like.new_empty(n, size), 0
    for g in itertools.chain([first], made):
        rows[at : at + len(g)] = g.flatten(1)
        at += len(g)
    return explicit(rows)


def gram_is_cheaper(places: int, inputs: int, outputs: int) -> bool:
    """Whether 2 T² (p + m) < T p m."""
    return 2 * places * (inputs + outputs) < inputs * outputs


def gram_squares(a: Tensor, d: Tensor) -> Tensor:
    """‖Σ_t d_t a_tᵀ‖² `[n]`, in double precision, of a `[n, T, in]`, d `[n, T, out]`."""
    a, d = a.double(), d.double()
    return (a @ a.transpose(1, 2)).mul_(d @ d.transpose(1, 2)).sum((1, 2)).clamp_min_(0)


def outer(a: Tensor, d: Tensor) -> Term:
    """For a weight `[out, in]`, from a `[n, in]`, d `[n, out]` or a `[n, .., in]`, d `[n, .., out]`."""
    if a.dim() == 2:
        return Term(_squared(a) * _squared(d), lambda c, out: out.addmm_((c[:, None] * d).t(), a))
    a, d = a.flatten(1, -2), d.flatten(1, -2)
    places, inputs, outputs = a.shape[1], a.shape[2], d.shape[2]

    def add(c: Tensor, out: Tensor) -> None:
        out.addmm_((c[:, None, None] * d).flatten(0, 1).t(), a.flatten(0, 1))

    if gram_is_cheaper(places, inputs, outputs):
        return Term(gram_squares(a, d), add)

    def chunks(many: int) -> Iterator[Tensor]:
        for p, q in zip(a.split(many), d.split(many), strict=True):
            yield q.transpose(1, 2) @ p

    return from_chunks(chunks, inputs * outputs, d, add)


def lookup(ids: Tensor, d: Tensor, rows: int, padding: int | None) -> Term:
    """For a table `[rows, width]`, from ids `[n, ..]` and d `[n, .., width]`: what an example gives to a row
    that it looks up several times is summed before it is squared. The row `padding` gets no gradient."""
    n, width = len(ids), d.shape[-1]
    ids, d = ids.reshape(n, -1), d.reshape(-1, width)
    if padding is not None:
        d = d * (ids.reshape(-1, 1) != padding)
    keys = (torch.arange(n, device=ids.device)[:, None] * rows + ids).flatten()
    found, which = torch.unique(keys, return_inverse=True)
    sums = d.new_zeros(len(found), width).index_add_(0, which, d)
    example, row = found // rows, found % rows
    squares = d.new_zeros(n, dtype=torch.float64).index_add_(0, example, _squared(sums))
    return Term(squares, lambda c, out: out.index_add_(0, row, c[example, None] * sums))


def _squared(rows: Tensor) -> Tensor:
    """Squared norms `[n]`, in double precision, of the rows `[n, ..]`."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()
