"""Loops over operations so small that Python would spend as long between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def scripted(function: Callable[..., None]) -> Any:
    """`function` as TorchScript, in which threads do not wait for each other's interpreter lock; where
    TorchScript is not to be had, `function` itself, the same program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except Exception:  # whatever TorchScript raises
            return function
