"""Privacy attacks and defenses for federated learning, measured in one pipeline."""

import os

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # Threads that wait by spinning, as GNU OpenMP's do for milliseconds, hold the cores that those they wait
    # for need: two attacks side by side on two cores then take dozens of times as long. Read as torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
