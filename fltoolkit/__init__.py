"""Privacy attacks and defenses for federated learning, measured in one pipeline."""

__version__ = "0.1.0"
