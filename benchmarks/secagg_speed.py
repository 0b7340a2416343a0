"""What a secure sum costs each party, in seconds and bytes, beside the arithmetic that nobody can avoid.

    python benchmarks/secagg_speed.py --clients 100 --dim 1663370 --dropouts 30 --graph complete
    python benchmarks/secagg_speed.py --clients 100 --dim 1663370 --dropouts 10 --graph regular --degree 20

A whole session of the protocol in one process: keys, shares, masked inputs and unmasking go as bytes between
client and server objects, and the sum is compared with that of the inputs. Those who drop out do so when
inputs are due, after they have shared their secrets, which costs the server most. `arithmetic` is a loop in
the same process that makes as many masks as the session and adds each to a vector (the fastest of as many
turns): what a lean implementation cannot do without. Bytes are counted from messages and stand beside the
formula of Bonawitz et al. 2017, ePrint 2017/281, section 7, and the expansion over values in the clear that
they report for 2^10 users. --flower times Flower's own primitives for the same work in the same process,
where it is installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from fltoolkit.errors import InputError, require
from fltoolkit.report import document
from fltoolkit.report.files import write_json
from fltoolkit.report.terminal import table
from fltoolkit.secagg import bonawitz, graph, session, shamir
from fltoolkit.secagg.bonawitz_client import Client
from fltoolkit.secagg.bonawitz_server import Server
from fltoolkit.secagg.cost import expansion, paper_bytes
from fltoolkit.secagg.keys import KeyPair, Signer
from fltoolkit.secagg.wire import SESSION_BYTES, Wire
from fltoolkit.secagg.words import SEED_BYTES, add_mask, reduce, word

INPUT_ROUND = 2
PAPER = (2**10, 2**20, 16)


def terms_of(o: argparse.Namespace, rng: np.random.Generator, signers: dict[int, Signer]) -> bonawitz.Terms:
    members = range(o.clients)
    net = graph.complete(members) if o.graph == "complete" else graph.harary(members, o.degree, rng)
    holders = o.clients if o.graph == "complete" else o.degree
    verifiers = {c: s.public for c, s in signers.items()} or None
    wire = Wire(os.urandom(SESSION_BYTES), verifiers)
    least = math.ceil(o.threshold * o.clients)
    return bonawitz.Terms(wire, net, math.ceil(o.threshold * holders), least, o.dim, o.bits)


def measure(o: argparse.Namespace) -> dict[str, Any]:
    """One session, and what its masks alone take."""
    rng = np.random.default_rng(o.seed)
    signers = {c: Signer() for c in range(o.clients)} if o.malicious else {}
    terms = terms_of(o, rng, signers)
    inputs = [
        reduce(rng.integers(0, 2**32, o.dim, np.uint64).astype(word(o.bits)), o.bits)
        for _ in range(o.clients)
    ]
    gone = {int(c): INPUT_ROUND for c in rng.choice(o.clients, o.dropouts, replace=False)}
    floors, seconds = [], math.inf
    for _ in range(o.turns):
        floors += [arithmetic(o, masks_of(terms, gone))] if o.floor else []
        begun = time.perf_counter()
        clients = {c: Client(c, inputs[c], terms, signer=signers.get(c)) for c in range(o.clients)}
        done = session.run(Server(terms, workers=o.workers), clients, gone, o.workers)
        took = time.perf_counter() - begun
        if took < seconds:
            seconds, record = took, done
    expected = np.zeros(o.dim, word(o.bits))
    for c in record.survivors:
        expected += inputs[c]
    if not (record.total == reduce(expected, o.bits)).all():
        raise SystemExit("the sum is wrong")
    return {
        "seconds": seconds,
        "masks": masks_of(terms, gone),
        "arithmetic_seconds": min(floors, default=None),
        "survivors": len(record.survivors),
        "rounds": [rounds_row(r) for r in record.rounds],
    }


def rounds_row(traffic: session.Traffic) -> dict[str, Any]:
    times = list(traffic.client_seconds.values())
    return {
        "round": traffic.name,
        "client_seconds": mean(times),
        "client_seconds_most": max(times),
        "server_seconds": traffic.server_seconds,
        "client_sends": mean(traffic.sent.values()),
        "client_receives": mean(traffic.received.values()),
    }


def masks_of(terms: bonawitz.Terms, gone: dict[int, int]) -> int:
    """How many masks of D words a session expands: clients' own and their pairs', and what the server takes
    out again."""
    there = [c for c in terms.graph.members if c not in gone]
    sent = sum(1 + len(terms.graph.neighbours(c)) for c in there)
    left = sum(1 for c in gone for v in terms.graph.neighbours(c) if v not in gone)
    return sent + len(there) + left


def arithmetic(o: argparse.Namespace, masks: int) -> float:
    """Seconds of a loop over so many masks; at most `o.floor` are made, the rest is by proportion."""
    words, made = np.zeros(o.dim, word(o.bits)), min(masks, o.floor)
    seeds = [os.urandom(SEED_BYTES) for _ in range(made)]
    add_mask(words, seeds[0])
    begun = time.perf_counter()
    for seed in seeds:
        add_mask(words, seed)
    return (time.perf_counter() - begun) * masks / made


def timed(call: Callable[[], object], turns: int = 5) -> float:
    call()
    times = []
    for _ in range(turns):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return median(times)


def primitives(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Our parts beside Flower's: a mask of D words, shares of a key, a key rebuilt, an agreed key."""
    try:
        from flwr.common.secure_aggregation.crypto import shamir as theirs
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
        from flwr.supercore.primitives.asymmetric import generate_key_pairs
    except ImportError as e:
        raise InputError(f"flower must be installed, as by pip install -e .[bench], got: {e}") from e

    n, t = o.clients, math.ceil(o.threshold * o.clients)
    words, seed, secret = np.zeros(o.dim, word(o.bits)), os.urandom(SEED_BYTES), os.urandom(32)
    points, number = range(1, n + 1), int.from_bytes(secret, "little")
    shares, other = shamir.share(number, t, points), theirs.create_shares(secret, t, n)
    mine, peer = KeyPair(), KeyPair()
    (private, _), (_, public) = generate_key_pairs(), generate_key_pairs()
    values = np.zeros(o.dim, np.int64)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "mask and add": (
            lambda: add_mask(words, seed),
            lambda: np.add(values, pseudo_rand_gen(secret, 2**o.bits, [(o.dim,)])[0], out=values),
        ),
        "share a key": (
            lambda: shamir.share(number, t, points),
            lambda: theirs.create_shares(secret, t, n),
        ),
        "rebuild a key": (
            lambda: (shamir._weights.cache_clear(), shamir.combine(points[:t], shares[:t])),
            lambda: theirs.combine_shares(other[:t]),
        ),
        "agree on a key": (
            lambda: mine.agree(peer.public, b"label", b"context"),
            lambda: generate_shared_key(private, public),
        ),
    }
    return [{"part": k, "ours": timed(a), "flower": timed(b, 3)} for k, (a, b) in calls.items()]


def show(result: dict[str, Any]) -> str:
    found = result["session"]
    header = ("round", "client, s", "slowest", "server, s", "client sends", "receives")
    rows = [
        (
            r["round"],
            f"{r['client_seconds']:.4f}",
            f"{r['client_seconds_most']:.4f}",
            f"{r['server_seconds']:.3f}",
            f"{r['client_sends']:,.0f} B",
            f"{r['client_receives']:,.0f} B",
        )
        for r in found["rounds"]
    ]
    lines = [table(header, rows), ""]
    if found["arithmetic_seconds"]:
        ratio = found["seconds"] / found["arithmetic_seconds"]
        lines.append(
            f"session {found['seconds']:.2f} s; its {found['masks']:,} masks alone "
            f"{found['arithmetic_seconds']:.2f} s: {ratio:.2f}x"
        )
    else:
        lines.append(f"session {found['seconds']:.2f} s")
    lines.append(
        f"a client's bytes: {result['client_bytes']:,.0f}, by the paper's formula "
        f"{result['paper_bytes']:,.0f}; expansion {result['expansion']:.2f}x here, "
        f"{result['paper_expansion']:.2f}x by formula for n = 2^10, 2^20 values of 16 bits"
    )
    parts = part_table(result)
    if parts:
        lines += ["", parts]
    return "\n".join(lines)


def compare(results: Sequence[dict[str, Any]]) -> str:
    """Several sessions, a line each, and primitives beside Flower's where they were timed."""
    header = (
        "graph",
        "dropped",
        "session, s",
        "masks alone, s",
        "ratio",
        "a client, s",
        "server, s",
        "client bytes",
    )
    rows = []
    for r in results:
        o, found = r["options"], r["session"]
        floor = found["arithmetic_seconds"]
        rows.append(
            (
                _graph_words(o),
                str(o["dropouts"]),
                f"{found['seconds']:.2f}",
                f"{floor:.2f}",
                f"{found['seconds'] / floor:.2f}",
                f"{sum(t['client_seconds'] for t in found['rounds']):.3f}",
                f"{sum(t['server_seconds'] for t in found['rounds']):.2f}",
                f"{r['client_bytes']:,.0f}",
            )
        )
    first = results[0]["options"]
    lines = [f"n = {first['clients']}, D = {first['dim']:,}, b = {first['bits']}", table(header, rows)]
    parts = next((p for r in results if (p := part_table(r))), "")
    return "\n".join([*lines, *(["", parts] if parts else [])])


def _graph_words(options: dict[str, Any]) -> str:
    words = "complete" if options["graph"] == "complete" else f"{options['degree']}-regular"
    words += ", signed" if options["malicious"] else ""
    return words + (f", {options['workers']} threads" if options["workers"] > 1 else "")


def part_table(result: dict[str, Any]) -> str:
    """Our primitives beside Flower's; empty where they were not timed."""
    if not result["primitives"]:
        return ""
    o = result["options"]
    rows = [
        (p["part"], f"{1e3 * p['ours']:.3f}", f"{1e3 * p['flower']:.3f}", f"{p['flower'] / p['ours']:.1f}x")
        for p in result["primitives"]
    ]
    title = f"n = {o['clients']}, t = {math.ceil(o['threshold'] * o['clients'])}, D = {o['dim']:,}"
    return table((title, "ours, ms", "Flower, ms", "ratio"), rows)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--clients", type=int, default=100, help="n (default: 100)")
    add("--dim", type=int, default=1_663_370, help="D, values of an update (default: 1663370)")
    add("--bits", type=int, default=32, help="sums are modulo 2^bits (default: 32)")
    add("--dropouts", type=int, default=0, help="clients that drop out before they send inputs")
    add("--graph", choices=("complete", "regular"), default="complete")
    add("--degree", type=int, default=20, help="k of a regular graph (default: 20)")
    add("--threshold", type=float, default=0.67, help="share of holders that rebuild a secret")
    add("--malicious", action="store_true", help="clients sign, and compare the set of survivors")
    add("--workers", type=int, default=1, help="threads (default: 1)")
    add("--turns", type=int, default=1, help="sessions, of which the fastest counts (default: 1)")
    add("--floor", type=int, default=200, help="masks to time the arithmetic with, 0: none (default: 200)")
    add("--flower", action="store_true", help="time Flower's primitives too")
    add("--seed", type=int, default=0)
    add("--show", nargs="+", metavar="FILE", help="run nothing: compare results that were written")
    add("--json", action="store_true", help="print the result as JSON")
    add("--out", metavar="FILE", help="write the result there as JSON")
    o = parser.parse_args(argv)
    for name, least in (
        ("clients", 1),
        ("dim", 1),
        ("dropouts", 0),
        ("workers", 1),
        ("turns", 1),
        ("floor", 0),
    ):
        require(getattr(o, name) >= least, name, f">= {least}", getattr(o, name))
    require(o.dropouts < o.clients, "dropouts", f"below {o.clients}", o.dropouts)
    if o.graph == "complete" and o.malicious:
        require(o.threshold > 2 / 3, "threshold", "above 2/3 with --malicious", o.threshold)
    return o


def main(argv: list[str] | None = None) -> int:
    try:
        o = parsed(argv)
        if o.show:
            print(compare([json.loads(Path(f).read_text(encoding="utf-8")) for f in o.show]))
            return 0
        parts = primitives(o) if o.flower else []
        found = measure(o)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    sent = sum(r["client_sends"] + r["client_receives"] for r in found["rounds"])
    value_bits = o.bits - math.ceil(math.log2(o.clients))
    result = {
        "command": document.command_line(),
        "options": {k: v for k, v in vars(o).items() if k not in ("json", "out", "show")},
        "session": found,
        "client_bytes": sent,
        "paper_bytes": paper_bytes(o.clients, o.dim, value_bits),
        "expansion": 8 * sent / (o.dim * value_bits),
        "paper_expansion": expansion(*PAPER),
        "primitives": parts,
        "cores": len(os.sched_getaffinity(0)),
        "versions": document.versions(),
    }
    if o.out:
        write_json(Path(o.out), result)
    print(json.dumps(result, indent=1) if o.json else show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
