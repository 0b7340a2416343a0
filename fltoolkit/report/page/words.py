"""What the page says in words: threat models, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THREATS = {
    "server": (
        "An honest-but-curious server. It follows the protocol and keeps what it receives: the model that"
        " it sent out and each client's message, after whatever the client did to protect it.",
        "Under secure aggregation a single message is noise to it; what counts then is the sum over the "
        "cohort, before any noise that the server itself adds. Noise added at the server gives no "
        "guarantee here.",
    ),
    "aggregate": (
        "Anyone who sees what a round releases: another participant, or an observer of successive global "
        "models. It holds the model before the round and the weighted mean of all updates, after every "
        "defense.",
        "It never sees a single message. What it recovers belongs to some client of the cohort, and is "
        "scored on all images in the mean.",
    ),
    "isolating": (
        "A malicious server under secure aggregation that says all clients but its target dropped out. "
        "The sum over one survivor is that survivor's update.",
        "What stops it is the protocol's threshold: clients reveal nothing for too few survivors. It is "
        "scored on its target's images alone; ε is that of a message that has lost what hides it.",
    ),
    "inconsistent": (
        "A malicious server under secure aggregation that sends everybody but its target a model under "
        "which most gradients are zero. The sum over the cohort is then almost the target's update alone.",
        "What stops it are keys bound to the model: clients who were sent different ones do not add up. "
        "It is scored on its target's images alone.",
    ),
    "patient": (
        "A server under secure aggregation that repeats a model and keeps the sums of several rounds. "
        "From two sums, with and without its target, the difference is the target's update; from many "
        "sums over changing cohorts, it solves for it.",
        "Nothing in one round's protocol stops this: each sum is a proper one. Noise on the sum does, and"
        " cohorts that the server cannot choose. It is scored on its target's images alone.",
    ),
    "difference": (
        "A server under secure aggregation that repeats a model, once with and once without its target, "
        "and subtracts the two sums. What is left is the target's update.",
        "Each of the two rounds is a proper secure sum. Noise on the sum helps, and cohorts that the "
        "server cannot choose.",
    ),
    "disaggregation": (
        "A server under secure aggregation that repeats a model over many random cohorts. The sums are "
        "equations in the clients' updates, and enough of them can be solved for one client.",
        "Each round is a proper secure sum. Noise on the sum helps, and cohorts that the server cannot "
        "choose.",
    ),
}
THREATS |= {"isolation": THREATS["isolating"], "inconsistency": THREATS["inconsistent"]}
"""By the name of the threat model, and by that of the attack that brings it."""

TITLES = {
    "server": "The curious server",
    "aggregate": "Who sees the aggregate only",
    "isolating": "The server that isolates",
    "inconsistent": "The server with two models",
    "patient": "The server that keeps sums",
}


def threat(entry: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """A title and paragraphs for a threat model of the run; what the run says of it where it is not known."""
    name = entry["name"]
    return TITLES.get(name, name), THREATS.get(name, (f"{entry.get('about') or name}.",))


def metrics(grid: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How to read each metric of the table."""
    threshold, delta = grid["threshold_db"], grid["delta"]
    tried = len(grid["attacks"]) * len(grid["attack_rounds"])
    return [
        ("Test accuracy", _ACCURACY),
        ("Loss", _LOSS),
        ("Leak (PSNR, dB)", _LEAK),
        ("Interval of the leak", _INTERVAL.format(tried=tried)),
        ("Gain, dB", _GAIN),
        ("SSIM", _SSIM),
        ("Label accuracy", _LABELS),
        ("Success rate", _SUCCESS.format(threshold=threshold)),
        ("ε and δ", _EPSILON.format(delta=delta)),
        ("Views of ε", _VIEWS),
        ("Bytes", _BYTES),
        ("Seconds", _SECONDS),
        ("What a failed attack means", _FAILED),
    ]


_ACCURACY = (
    "Share of the test examples that the final model gets right, the mean over seeds. The 95 % interval "
    "is Student's t over the seeds; with two or three of them it is wide, and rightly so."
)
_LOSS = (
    "Accuracy without a defense less accuracy with it, in percentage points. Its interval is over the "
    "differences seed by seed. Where it includes zero, these seeds do not tell the two apart."
)
_LEAK = (
    "Peak signal-to-noise ratio of the recovered image: 10 log₁₀ of the squared range of the pixels over "
    "the mean squared error. Ten decibels more are a tenth of the error. By a rule of thumb an image "
    "above 30 dB looks like the original. The leak is the mean over victims of the strongest attack "
    "tried, in the round where it found most; each victim counts at most 40 dB, so that exact copies do "
    "not drown the others."
)
_INTERVAL = (
    "The leak is the largest of several means, so its interval is a simultaneous one: each pair of attack"
    " and round has an interval at level 1 − 0.05 / m (Bonferroni over the m pairs that could be run; the"
    " question names {tried}, and attacks on secure sums count only where there is one). With 95 % "
    "confidence all hold together. Victims are taken as independent."
)
_GAIN = (
    "The same attack's PSNR over that of the best guess that needs no update (a grey image, or the mean "
    "image of the data). Near zero, the update told the attack nothing that it could use. Exact copies "
    "are not capped here, so that the gain can be larger than the leak less the guess."
)
_SSIM = (
    "Structural similarity of the recovered and the private image: 1 for equal ones, about 0 for "
    "unrelated ones."
)
_LABELS = "Share of the private labels that the attack names correctly, in whatever order."
_SUCCESS = (
    "Share of victims of whom the best image comes back above {threshold:g} dB. The 95 % interval is the "
    "exact one of Clopper and Pearson."
)
_EPSILON = (
    "Differential privacy: whatever the adversary computes, its odds for or against one client having "
    "taken part as it did change by at most a factor eᵋ, but for a probability δ = {delta:g}. Less is "
    "better. ε is for all rounds together and holds against every attack, known or not. ∞ means no "
    "guarantee, not a certain leak. Where the unit is an example, it hides single examples and not "
    "clients: the two do not compare."
)
_VIEWS = (
    "ε belongs to what an adversary sees. Message: each client's message, or the secure sum of them. "
    "Aggregate: what a round releases. Exposed: a message that a malicious server stripped of what hides "
    "it. The same noise can be worth a small ε in one view and ∞ in another."
)
_BYTES = "What a client sends and receives in a round, the mean over rounds and clients, on the wire."
_SECONDS = (
    "Time of a training round on the machine that ran it, without attacks. Useful to compare rows, not "
    "machines."
)
_FAILED = (
    "It proves nothing about stronger ones. A low leak says that the attacks tried here, with the effort "
    "given to them, found little. Only ε speaks of attacks that nobody has tried."
)
