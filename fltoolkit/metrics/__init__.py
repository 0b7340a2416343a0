"""Leakage metrics: pure functions with an explicit data range, and the intervals they are reported with."""
