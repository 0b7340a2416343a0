"""Instance-wise batch label restoration via gradients (iLRG).

Ma et al., ICLR 2023, openreview.net/forum?id=FIrQfNSOoTr. With ∇W_j, ∇b_j the last layer's
gradient for class j, the mean embedding of class j is about ∇W_j / ∇b_j; the last layer turns it into the
probabilities p_j `[classes]` that examples of class j get. The numbers of examples k then solve

    Σ_j k_j = K        and        Σ_j k_j (p_j,i − [i = j]) = K ∇b_i   for every class i,

by the Moore-Penrose inverse. K is the batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fltoolkit.errors import InputError
from fltoolkit.inversion.labels.layer import LastLayer, last_layer, layer_names, path, scale_is_known
from fltoolkit.inversion.labels.rounding import labels_of, largest_step, whole
from fltoolkit.types import Observation


def ilrg(observation: Observation) -> Tensor:
    """iLRG: embeddings ∇W/∇b, their probabilities, and the linear system of the numbers a class.

    Over several local steps the probabilities are means along the path of the last layer. Where the scale of
    the update is unknown, it is the largest for which no number is negative. Needs a bias.
    """
    layer = last_layer(observation)
    if layer.bias_gradient is None:
        raise InputError(
            f"model must have a bias in its last layer for label strategy 'ilrg', "
            f"got {layer_names(observation)[0]!r} without one"
        )
    k = observation.num_examples
    probabilities = class_probabilities(layer, path(observation))
    start, direction = _solve(probabilities, k * layer.bias_gradient, k)
    step = 1.0 if scale_is_known(observation) else largest_step(start, direction)
    return labels_of(whole(start + step * direction, k))


def class_probabilities(layer: LastLayer, points: list[float]) -> Tensor:
    """p `[classes, classes]`, row j for the mean embedding ∇W_j / ∇b_j of class j, averaged over
    the last layer at broadcast + s · update for each s of `points`. An embedding that is no number counts
    as 0."""
    assert layer.bias_gradient is not None
    embeddings = (layer.weight_gradient / layer.bias_gradient[:, None]).nan_to_num(0.0, 0.0, 0.0)
    logits = [
        embeddings @ (layer.weight + s * layer.weight_update).T + layer.bias + s * layer.bias_update
        for s in points
    ]
    return torch.stack([z.softmax(-1) for z in logits]).mean(0)


def _solve(probabilities: Tensor, right: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Numbers a class as start + direction: what Σ k = total gives, and what the gradient adds
    `[classes]`."""
    eye = torch.eye(len(right), dtype=right.dtype, device=right.device)
    system = torch.cat([torch.ones_like(right)[None], probabilities.T - eye])
    inverse = torch.linalg.pinv(system)
    return total * inverse[:, 0], inverse[:, 1:] @ right
