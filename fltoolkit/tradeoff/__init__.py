"""Accuracy, ε and leakage of a grid of defenses over one federation: `read` a grid, `run` it, look at it."""

from fltoolkit.tradeoff.grid import Curve, Grid, read
from fltoolkit.tradeoff.running import run

__all__ = ["Curve", "Grid", "read", "run"]
