"""Labels from signs alone. Free of the update's scale, and exact for labels that are all different."""

from __future__ import annotations

from torch import Tensor

from fltoolkit.inversion.labels.layer import last_layer, logit_gradient
from fltoolkit.types import Observation


def sign(observation: Observation) -> Tensor:
    """iDLG's rule: the N most negative logit gradients.

    Zhao, Mopuri, Bilen 2020, arXiv:2001.02610, eq. 3-4: entry c is p_c − 1 < 0 for the true label and p_c > 0
    for every other. The paper treats one example; for N, a negative entry still proves its class present.
    Labels are taken as different; beyond the number of classes they repeat.
    """
    return _smallest(logit_gradient(observation), observation.num_examples)


def gradinversion(observation: Observation) -> Tensor:
    """GradInversion's rule: the N classes whose row of the weight gradient has the smallest minimum.

    Yin et al. 2021, arXiv:2104.07586, section 3.2: min over features of ∇W `[classes, features]`, then the N
    smallest. It takes non-negative features (ReLU, sigmoid), and labels that are all different; beyond the
    number of classes they repeat.
    """
    return _smallest(last_layer(observation).weight_gradient.min(1).values, observation.num_examples)


def _smallest(per_class: Tensor, number: int) -> Tensor:
    taken = per_class.argsort(stable=True)[: min(number, len(per_class))].sort().values
    return taken.repeat(-(-number // len(taken)))[:number].sort().values
