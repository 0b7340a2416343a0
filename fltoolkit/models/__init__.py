"""The papers' models, built for any input shape, initialised from a named random stream alone."""

from fltoolkit.models.build import MODELS, build, check_fits, evaluating, with_frozen_norm

__all__ = ["MODELS", "build", "check_fits", "evaluating", "with_frozen_norm"]
