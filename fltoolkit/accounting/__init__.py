"""From privacy events to ε, per view and unit; ε and σ of the Gaussian mechanism; what ε says about attacks.

`docs/accounting.md` states the conventions and holds the table of numbers with their sources.
"""

from fltoolkit.accounting.bounds import attained_epsilon, success_bound
from fltoolkit.accounting.calibration import gaussian_epsilon, gaussian_sigma
from fltoolkit.accounting.ledger import Rounds, epsilon, epsilon_by_view, shared_adjacency

__all__ = [
    "Rounds",
    "attained_epsilon",
    "epsilon",
    "epsilon_by_view",
    "gaussian_epsilon",
    "gaussian_sigma",
    "shared_adjacency",
    "success_bound",
]
