"""The engine that the gradient-inversion attacks share: victims × restarts as one vectorised program."""
