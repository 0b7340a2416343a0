"""Federated algorithms: one file each, written like its paper's pseudocode."""
