"""Data sets as examples in [0, 1], by name; and how they are dealt to clients."""

from fltoolkit.data.sources import DATASETS, Dataset, load

__all__ = ["DATASETS", "Dataset", "load"]
