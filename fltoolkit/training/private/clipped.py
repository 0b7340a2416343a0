"""The clipped sum of DP-SGD in one forward and one backward pass.

Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, needs Σ_i min(1, C / ‖g_i‖₂) g_i over a batch's examples.
Clipping by norms that are found without the gradients is due to Goodfellow 2015, arXiv:1510.01799; Lee, Kifer
2021, arXiv:2009.03106; Li et al. 2022, arXiv:2110.05679. Here the weighted sum too comes from what the one
backward pass stored (Bu et al. 2023, arXiv:2210.00038), and a batch goes in pieces, whose sums add.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor, nn

from fltoolkit.errors import InputError, require
from fltoolkit.training.private.capture import Capture, layers_of
from fltoolkit.training.private.layers import keeps_batch_first
from fltoolkit.training.private.norms import Term
from fltoolkit.training.private.rows import per_example_rows
from fltoolkit.types import Layout, Loss

__all__ = ["check_private", "clipped_sum", "per_example_rows"]

PIECE = 32
"""Examples that pass the model together; the activations of more would not stay in the cache."""

ROWS_BYTES = 64 << 20
"""Gradients of single examples that are in memory at once, for models that need them."""


def clipped_sum(
    model: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """Σ_i min(1, norm / ‖g_i‖₂) g_i as a row `[D]`, and the norms ‖g_i‖₂ `[B]`.

    g_i is the gradient of loss(model(x_i), y_i) by the parameters of `layout`; x `[B, ..]`, y `[B, ..]`, and
    B = 0 gives zeros. norm: the bound C, > 0; an example within it enters unchanged. The model, its `.grad`
    and its hooks stay as they are. Raises InputError for a bad norm and as `check_private`.

    Models of other layers than those in `layers.RULES`, or that use a layer or a parameter twice, take
    `per_example_rows`.
    """
    require(isfinite(norm) and norm > 0, "norm", "a finite number > 0", norm)
    check_private(model)
    with torch.enable_grad():
        found = _from_layers(model, loss, layout, x, y, norm) if len(x) else None
    return found or _from_rows(model, loss, layout, x, y, norm)


def check_private(model: nn.Module) -> None:
    """Raise InputError, naming the layer, where a layer mixes the examples of a batch or remembers them."""
    for name, layer in model.named_modules():
        what, tracked = f"layer {name!r} ({type(layer).__name__})", getattr(layer, "running_mean", None)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or tracked is None):
            raise InputError(
                f"{what} mixes the examples of a batch, so none has a gradient of its own: replace it, for"
                f" example by GroupNorm(1, {layer.num_features or '…'}), or train it in evaluation mode, with"
                " running statistics from public data"
            )
        if (
            isinstance(layer, nn.modules.instancenorm._InstanceNorm)
            and layer.training
            and tracked is not None
        ):
            raise InputError(
                f"{what} keeps running statistics of the examples, which no noise hides: make it with"
                " track_running_stats=False"
            )


def _from_layers(
    model: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor, norm: float
) -> tuple[Tensor, Tensor] | None:
    """The clipped sum by layers' inputs and pre-activation gradients; None where these do not tell it."""
    layers = layers_of(model, layout)
    if layers is None:
        return None
    chain = keeps_batch_first(model)
    capture, norms = Capture(model, layers, chain), []
    row = _zeros(model, layout)
    out = layout.unflatten(row)
    with capture.recording():
        if not chain and not capture.batch_comes_first(x[:1]):
            return None
        for a, b in zip(x.split(PIECE), y.split(PIECE), strict=True):
            terms = capture(loss, a, b)
            if terms is None:
                return None
            norms.append(_add_clipped(terms, out, norm, row.new_zeros(len(a))))
    return row, torch.cat(norms)


@torch.no_grad()
def _add_clipped(terms: dict[str, Term], out: dict[str, Tensor], norm: float, nothing: Tensor) -> Tensor:
    """Add a piece's clipped sum to `out`; the norms `[n]`, `nothing` where there is no term."""
    squares = sum((t.squares for t in terms.values()), nothing.double())
    norms = squares.sqrt().to(nothing.dtype)
    factors = norm / norms.clamp_min(norm)
    for name, term in terms.items():
        term.add(factors, out[name])
    return norms


def _zeros(model: nn.Module, layout: Layout) -> Tensor:
    """A row `[D]` of zeros beside the model's trainable parameters."""
    return dict(model.named_parameters())[layout.names[0]].detach().new_zeros(layout.size)


def _from_rows(
    model: nn.Module, loss: Loss, layout: Layout, x: Tensor, y: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """The clipped sum by the gradient of every example, some at a time."""
    row = _zeros(model, layout)
    norms = [row.new_zeros(0)]
    size = min(PIECE, max(1, ROWS_BYTES // (layout.size * row.element_size())))
    for a, b in zip(x.split(size), y.split(size), strict=True):
        rows = per_example_rows(model, loss, layout, a, b)
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).to(rows.dtype))
        row.addmv_(rows.t(), norm / norms[-1].clamp_min(norm))
    return row, torch.cat(norms)
