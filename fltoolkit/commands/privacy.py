"""`epsilon` and `sigma`: the privacy that Gaussian noise gives, and the noise that a privacy takes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from math import ceil, floor, log10
from typing import Any

from fltoolkit.options import flag


@dataclass(frozen=True)
class PrivacyOptions:
    """The flags that `epsilon` and `sigma` share."""

    sampling_rate: float | None = flag(
        None, "q, the part of all records that a step draws, above 0 and at most 1 (full: 1)", "Q", float
    )
    steps: int | None = flag(None, "T, how often noise is added: steps, or rounds", "T", int)
    delta: float = flag(1e-5, "δ, between 0 and 1", "DELTA")
    accountant: str = flag("pld", "pld (exact to 1e-4), rdp or prv; the last two are looser", "NAME")
    adjacency: str | None = flag(
        None,
        "what neighbouring data sets differ in: add-remove, replace-one or zero-out "
        "(default: add-remove; replace-one where sampling is fixed)",
        "NAME",
        str,
    )
    sampling: str = flag(
        "poisson",
        "poisson (each record by itself), fixed (cohorts of one size, without replacement) or full (all)",
        "NAME",
    )
    population: int | None = flag(
        None, "N, how many records there are; needed where sampling is fixed", "N", int
    )
    json: bool = flag(False, "print one JSON object on stdout and nothing else there")


@dataclass(frozen=True)
class EpsilonOptions(PrivacyOptions):
    """The flags of `python -m fltoolkit epsilon`."""

    noise_multiplier: float | None = flag(
        None, "σ, the noise's standard deviation divided by the clip norm of one contribution", "SIGMA", float
    )


@dataclass(frozen=True)
class SigmaOptions(PrivacyOptions):
    """The flags of `python -m fltoolkit sigma`."""

    epsilon: float | None = flag(None, "ε that must not be exceeded, above 0", "EPSILON", float)


@dataclass(frozen=True)
class Inputs:
    """What the functions of `fltoolkit.accounting` take, all of it given."""

    sampling_rate: float
    steps: int
    delta: float
    accountant: str
    adjacency: str
    sampling: str
    population: int | None


def run_epsilon(o: EpsilonOptions) -> int:
    """Print ε. InputError where the flags are impossible."""
    from fltoolkit.accounting import gaussian_epsilon

    sigma = float(_given("noise_multiplier", o.noise_multiplier))
    inputs = _inputs(o)
    found = gaussian_epsilon(sigma, **asdict(inputs))
    first = f"ε = {_up(found)} at δ = {inputs.delta:g} after {_steps(inputs)} with σ = {sigma:g}"
    return _show("epsilon", o.json, inputs, {"noise_multiplier": sigma, "epsilon": found}, first)


def run_sigma(o: SigmaOptions) -> int:
    """Print the smallest σ. InputError where the flags are impossible."""
    from fltoolkit.accounting import gaussian_epsilon, gaussian_sigma

    limit = float(_given("epsilon", o.epsilon))
    inputs = _inputs(o)
    sigma = gaussian_sigma(limit, **asdict(inputs))
    found = gaussian_epsilon(sigma, **asdict(inputs))
    at = f"at δ = {inputs.delta:g} after {_steps(inputs)}"
    first = f"σ = {sigma:g} gives ε = {_up(found)}, at most {limit:g}, {at}"
    result = {"target_epsilon": limit, "noise_multiplier": sigma, "epsilon": found}
    return _show("sigma", o.json, inputs, result, first)


def _given(name: str, value: Any) -> Any:
    from fltoolkit.errors import InputError

    if value is None:
        raise InputError(f"{name} must be given, got None")
    return value


def _inputs(o: PrivacyOptions) -> Inputs:
    everyone = 1.0 if o.sampling == "full" else None
    rate = _given("sampling_rate", everyone if o.sampling_rate is None else o.sampling_rate)
    adjacency = o.adjacency or ("replace-one" if o.sampling == "fixed" else "add-remove")
    steps = _given("steps", o.steps)
    return Inputs(rate, steps, o.delta, o.accountant, adjacency, o.sampling, o.population)


def _show(name: str, as_json: bool, inputs: Inputs, result: dict[str, float], first: str) -> int:
    n = inputs.population
    if n is not None and inputs.delta >= 1 / n:
        text = f"δ = {inputs.delta:g} is not below 1 / {n:,}: publishing one record whole would do"
        print(f"warning: {text}", file=sys.stderr)
    fixed = inputs.sampling == "fixed" and inputs.sampling_rate < 1
    others = _other_samplings(result["noise_multiplier"], inputs) if fixed else {}
    if as_json:
        print(json.dumps(_report(name, inputs, result, others), allow_nan=False))
        return 0
    print(first, *(f"  {line}" for line in _assumptions(inputs)), sep="\n")
    if others:
        print(f"  {_warning(others, result['epsilon'])}")
    return 0


def _report(name: str, inputs: Inputs, result: dict[str, float], others: dict[str, float]) -> dict[str, Any]:
    from fltoolkit.report import document

    return {
        "schema": f"fltoolkit.{name}/1",
        "command": document.command_line(),
        "inputs": asdict(inputs),
        **result,
        "assumptions": _assumptions(inputs),
        "other_samplings": others,
        "versions": document.versions(),
    }


def _other_samplings(sigma: float, inputs: Inputs) -> dict[str, float]:
    """What Poisson sampling would give, and what a sample of fixed size is known to reach."""
    from fltoolkit.accounting import attained_epsilon, gaussian_epsilon

    exact = replace(inputs, accountant="pld", sampling="poisson")
    poisson = {a: gaussian_epsilon(sigma, **asdict(replace(exact, adjacency=a))) for a in _POISSON}
    reached = attained_epsilon(sigma, inputs.sampling_rate, inputs.steps, inputs.delta)
    return {**{f"poisson {a}": e for a, e in poisson.items()}, "fixed replace-one at least": reached}


def _warning(others: dict[str, float], found: float) -> str:
    one, other = (others[f"poisson {a}"] for a in _POISSON)
    reached = others["fixed replace-one at least"]
    return (
        "the amplification of Poisson sampling does not hold for cohorts of fixed size: it would say "
        f"ε = {_up(one)} under add-remove and {_up(other)} under replace-one, where this says {_up(found)} "
        f"and one pair of data sets is known to reach {_up(reached)} under replace-one"
    )


def _assumptions(inputs: Inputs) -> list[str]:
    q, n = inputs.sampling_rate, inputs.population
    size = f"{round(q * (n or 0)):,} of {n or 0:,}"
    drawn = {
        "poisson": f"each record is drawn by itself with probability {q:g} in each step",
        "fixed": f"each step draws {size} records without replacement",
        "full": "each step uses all records",
    }
    return [
        "unit: one record, that is an example where examples are clipped and a client where updates are",
        f"adjacency: {inputs.adjacency}, neighbouring data sets differ in {_ADJACENCIES[inputs.adjacency]}",
        f"sampling: {inputs.sampling}, {drawn[inputs.sampling]}",
        f"accountant: {inputs.accountant}, {_ACCOUNTANTS[inputs.accountant]}",
        "σ is the noise's standard deviation divided by the clip norm of one record's contribution",
    ]


def _steps(inputs: Inputs) -> str:
    return "1 step" if inputs.steps == 1 else f"{inputs.steps:,} steps"


def _up(value: float) -> str:
    """`value` with 5 significant digits, rounded up."""
    if value == 0 or value == float("inf"):
        return f"{value:g}"
    digit = 10.0 ** (floor(log10(value)) - 4)
    return f"{ceil(value / digit * (1 - 1e-12)) * digit:.5g}"


_POISSON = ("add-remove", "replace-one")
_ADJACENCIES = {
    "add-remove": "one record that the other lacks",
    "replace-one": "one record, whose contributions may be any others",
    "zero-out": "one record, whose contributions are zero",
}
_ACCOUNTANTS = {
    "pld": "privacy loss distributions, rounded up by less than 1e-4 of ε, or the closed form",
    "rdp": "Rényi differential privacy, an upper bound",
    "prv": "privacy random variables as in Opacus, the upper end of its interval",
}
