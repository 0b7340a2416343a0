"""Secure aggregation and multi-party sums as protocols between objects that exchange bytes."""
