"""Soteria: prune the data representation that a fully connected layer's gradient reveals.

Sun et al. 2021, arXiv:2012.06043, "Soteria: Provable Defense Against Privacy Leakage in Federated Learning
from Representation Perspective", section 4, equations 4 to 7. The representation r = f(X) is what enters the
defended layer, whose weight gradient is δ rᵀ: whoever sees it reads r off, and inverts f. The paper looks for
a perturbed r' that throws off that inversion, max ‖X − X'‖₂ subject to ‖r − r'‖₀ ≤ ε. To first order
X − X' = (∇_X f(r))⁻¹ (r − r'), to which r'_i = 0 adds a part of length ‖r_i (∇_X r_i)⁻¹‖₂, that is
|r_i| / ‖∇_X r_i‖₂, the inverse of a row being its pseudoinverse. So the entries with the LARGEST
|r_i| / ‖∇_X r_i‖₂ are pruned, which are those with the smallest ‖∇_X r_i‖₂ / |r_i|.

The bias of the defended layer and every other layer are sent as they are, and no view gains a finite ε: an
attack that leaves out the pruned columns, or the whole layer, is as good as before where the other layers say
enough (Balunović et al. 2022, arXiv:2111.04706).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.linalg import vector_norm

from fltoolkit.defense import Defense, Local, RoundContext
from fltoolkit.errors import InputError, require
from fltoolkit.models import evaluating

PIECE = 32
"""Examples whose representations are differentiated together."""

CHUNK_FLOATS = 1 << 18
"""Bound on the floats of one batch of derivatives, by the input and by the representation: small networks
gain by large batches, convolutions lose by what leaves the cache."""


@dataclass(frozen=True)
class Soteria(Defense):
    """Set to zero the columns of a linear layer's update that belong to the most revealing inputs of it.

    ratio: the share of the d inputs that is pruned, in [0, 1). layer: the name of a torch.nn.Linear in the
    model, by default its last one. Exactly round(ratio · d) columns of that layer's weight in a row become
    zero and nothing else changes, so no row grows longer. Every view's ε stays infinite.

    Scores |r_i| / ‖∇_X r_i‖₂ are taken at the broadcast parameters, with the model in evaluation mode (each
    example by itself, nothing drawn; BatchNorm uses its running statistics). An entry that is 0 scores 0, and
    one that is not but does not depend on X scores infinity. A client prunes one set of entries, by its mean
    score over all its examples; of equal scores, the first. After several local steps the same columns of the
    difference of weights are zero, though r has moved on by then. It costs d backward passes over the data.
    """

    name: ClassVar[str] = "soteria"
    looks_at_data: ClassVar[bool] = True
    ratio: float = 0.5
    layer: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, "ratio", "at least 0 and below 1", self.ratio)

    def clients(self, rows: Tensor, ctx: RoundContext) -> Tensor:
        local = ctx.local
        missing = ctx.clients if local is None else [c for c in ctx.clients if c not in local.data]
        if local is None or missing:
            raise InputError(
                "soteria must have a context whose `local` holds the model, the broadcast and each client's "
                f"data to score representations, got none for clients {list(missing)}"
            )
        name = linear_layer(local, self.layer)
        out = rows.clone()
        columns = local.layout.unflatten(out)[f"{name}.weight"]
        pruned = round(self.ratio * columns.shape[-1])
        if pruned:
            for weight, c in zip(columns, ctx.clients, strict=True):
                scores = mean_scores(local, name, local.data[c].x)
                weight[:, scores.argsort(descending=True, stable=True)[:pruned].to(weight.device)] = 0
        return out


def linear_layer(local: Local, wanted: str | None) -> str:
    """The name of the defended layer; InputError where it is not linear or not trained."""
    names = [n for n, m in local.model.named_modules() if isinstance(m, nn.Linear)]
    if wanted is not None and wanted not in names:
        raise InputError(f"layer must be one of the model's linear layers {names}, got {wanted!r}")
    trained = [n for n in names if f"{n}.weight" in local.layout.names]
    if not trained or (wanted is not None and wanted not in trained):
        raise InputError(f"soteria must have a linear layer that is trained, got {wanted!r} of {trained}")
    return trained[-1] if wanted is None else wanted


def mean_scores(local: Local, layer: str, x: Tensor) -> Tensor:
    """|r_i| / ‖∇_X r_i‖₂ of each input of `layer`, the mean over examples `x [N, ...]`: `[d]`, float64."""
    require(x.is_floating_point(), "inputs of soteria", "real numbers, such as pixels", x.dtype)
    with evaluating(local.model), torch.enable_grad():
        return torch.cat([_scores(local, layer, part) for part in x.split(PIECE)]).mean(0)


def _scores(local: Local, layer: str, x: Tensor) -> Tensor:
    """The scores of a few examples `[n, d]`: products of unit vectors with the Jacobian, many at a time."""
    x = x.detach().to(local.params).requires_grad_()
    r = _representation(local, layer, x)
    if not r.requires_grad:
        raise InputError(f"layer must be one whose input depends on the data, got {layer!r}")
    (n, d), norms = r.shape, []
    at_once = max(1, CHUNK_FLOATS // (x.numel() + r.numel()))
    for entries in torch.arange(d, device=r.device).split(at_once):
        unit = torch.nn.functional.one_hot(entries, d).to(r)[:, None].expand(-1, n, -1)
        (slopes,) = torch.autograd.grad(r, x, unit, retain_graph=True, is_grads_batched=True)
        norms.append(vector_norm(slopes.flatten(2).double(), dim=2))
    size = r.detach().double().abs()
    return torch.where(size > 0, size / torch.cat(norms).t(), 0.0)


def _representation(local: Local, layer: str, x: Tensor) -> Tensor:
    """What enters `layer` on the inputs x, `[n, d]`."""
    seen: list[Tensor] = []
    module = local.model.get_submodule(layer)
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        functional_call(local.model, local.layout.unflatten(local.params.detach()), (x,))
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].dim() != 2:
        raise InputError(f"layer must be one that reads each example once, as a vector, got {layer!r}")
    return seen[0]
