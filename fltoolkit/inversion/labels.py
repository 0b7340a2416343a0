"""What the last layer's gradient says about the labels."""

from __future__ import annotations

from torch import Tensor

from fltoolkit.errors import InputError
from fltoolkit.types import Observation


def logit_gradient(observation: Observation) -> Tensor:
    """The gradient of the loss by each logit, summed over the batch, up to one positive factor `[classes]`.

    It is the last layer's bias gradient where there is a bias. Without one, the sum over inputs of the
    weight gradient has the same sign where that layer's inputs are non-negative (Zhao et al. 2020,
    arXiv:2001.02610, section 3.1). Raises InputError where the model does not end in such a layer.
    """
    gradients = observation.layout.unflatten(observation.gradient)
    classes = observation.num_classes
    last = list(gradients)[-1]
    if gradients[last].shape == (classes,):
        return gradients[last]
    if gradients[last].dim() == 2 and gradients[last].shape[0] == classes:
        return gradients[last].sum(1)
    raise InputError(
        f"model must end in a linear layer with {classes} outputs to infer labels, "
        f"got {last!r} of shape {tuple(gradients[last].shape)} as its last parameter"
    )
