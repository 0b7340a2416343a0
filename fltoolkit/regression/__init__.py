"""Leakage as a regression test: what leaked before, measured again, and judged by a test of stated error
rates."""
