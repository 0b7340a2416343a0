"""Data sets as examples in [0, 1], by name; and how they are dealt to clients."""

from fltoolkit.data.own import from_torch
from fltoolkit.data.sources import DATASETS, Dataset, load

__all__ = ["DATASETS", "Dataset", "from_torch", "load"]
