"""Improved Deep Leakage from Gradients (iDLG).

Zhao, Mopuri, Bilen 2020, arXiv:2001.02610: with cross-entropy, the gradient of logit i is p_i − 1 for the
true label and p_i > 0 for every other (eq. 3-4), so the label is where that gradient is negative. With it
fixed, only the input is searched. The paper treats one example; for N examples the N most negative
entries are taken, which is right when their labels are all different.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fltoolkit.inversion.base import LBFGSInversion
from fltoolkit.inversion.labels import infer
from fltoolkit.types import Observation


@dataclass(frozen=True)
class IDLG(LBFGSInversion):
    """Read the labels off the sign of the last layer's gradient, then match the gradient by the inputs."""

    name: ClassVar[str] = "idlg"

    def infer_labels(self, observation: Observation) -> Tensor:
        """The `num_examples` classes with the most negative logit gradient, in increasing order `[N]`."""
        return infer("sign", observation)


if __name__ == "__main__":
    from fltoolkit.cli import attack_main

    attack_main("idlg")
