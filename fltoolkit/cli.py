"""The command line: `python -m fltoolkit COMMAND` and `python -m attacks.NAME`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import NoReturn

from fltoolkit.commands.audit import AuditOptions, run_audit
from fltoolkit.commands.leakage import AddOptions, CheckOptions, UpdateOptions, run_add, run_check, run_update
from fltoolkit.commands.listing import run_list
from fltoolkit.commands.partition import PartitionOptions, run_partition
from fltoolkit.commands.privacy import EpsilonOptions, SigmaOptions, run_epsilon, run_sigma
from fltoolkit.commands.report import ReportOptions, run_report
from fltoolkit.commands.table import TABLES, TableOptions, run_table
from fltoolkit.commands.tradeoff import TradeoffOptions, run_tradeoff
from fltoolkit.commands.train import TrainOptions, run_train
from fltoolkit.errors import InputError
from fltoolkit.options import add_options, read_options
from fltoolkit.specs import options_of


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fltoolkit`; returns the exit code."""
    _survive_any_character()
    parser = argparse.ArgumentParser("python -m fltoolkit", description=_ABOUT)
    commands = parser.add_subparsers(dest="command", required=True)
    audit = commands.add_parser("audit", help="attack one scene and measure the leak")
    audit.add_argument("--attack", required=True, metavar="NAME[:key=value]", help="the attack to run")
    add_options(audit, AuditOptions)
    add_options(
        commands.add_parser("train", help="federated averaging, with an adversary looking on if asked"),
        TrainOptions,
    )
    add_options(
        commands.add_parser("partition", help="what each client would hold, counted and drawn"),
        PartitionOptions,
    )
    tables = commands.add_parser("table", help="the FedAvg paper's tables, run and printed beside the paper")
    tables.add_argument("name", metavar="NAME", help=TABLES)
    add_options(tables, TableOptions)
    add_options(
        commands.add_parser("epsilon", help="the privacy ε that Gaussian noise gives"), EpsilonOptions
    )
    add_options(commands.add_parser("sigma", help="the least Gaussian noise for a privacy ε"), SigmaOptions)
    leakage = commands.add_parser("leakage", help="leakage as a regression test: check, update, add")
    actions = leakage.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_options(
        actions.add_parser("check", help="measure again; exit code 1 where the leak changed"), CheckOptions
    )
    add_options(actions.add_parser("update", help="accept what leaks now, with a reason"), UpdateOptions)
    new = actions.add_parser("add", help="measure something new and put it into the baseline")
    new.add_argument("name", metavar="NAME", help="what it is called")
    add_options(new, AddOptions)
    tradeoff = commands.add_parser("tradeoff", help="accuracy, ε and leakage of a grid of defenses")
    tradeoff.add_argument(
        "grid", metavar="GRID", nargs="?", default="default", help="a TOML file, or default (the default)"
    )
    add_options(tradeoff, TradeoffOptions)
    report = commands.add_parser("report", help="one HTML page of a finished trade-off")
    report.add_argument("run", metavar="RUN", help="the folder of the run, or its run.json")
    add_options(report, ReportOptions)
    commands.add_parser("list", help="every attack, defense, threat model, model and data set")
    parsed = parser.parse_args(argv)
    if parsed.command == "audit":
        return guarded(lambda: run_audit(parsed.attack, read_options(AuditOptions, parsed)))
    if parsed.command == "train":
        return guarded(lambda: run_train(read_options(TrainOptions, parsed)))
    if parsed.command == "partition":
        return guarded(lambda: run_partition(read_options(PartitionOptions, parsed)))
    if parsed.command == "table":
        return guarded(lambda: run_table(parsed.name, read_options(TableOptions, parsed)))
    if parsed.command == "epsilon":
        return guarded(lambda: run_epsilon(read_options(EpsilonOptions, parsed)))
    if parsed.command == "sigma":
        return guarded(lambda: run_sigma(read_options(SigmaOptions, parsed)))
    if parsed.command == "leakage":
        return guarded(lambda: _leakage(parsed))
    if parsed.command == "report":
        return guarded(lambda: run_report(parsed.run, read_options(ReportOptions, parsed)))
    if parsed.command == "tradeoff":
        return guarded(lambda: run_tradeoff(parsed.grid, read_options(TradeoffOptions, parsed)))
    return guarded(run_list)


def _leakage(parsed: argparse.Namespace) -> int:
    if parsed.action == "check":
        return run_check(read_options(CheckOptions, parsed))
    if parsed.action == "update":
        return run_update(read_options(UpdateOptions, parsed))
    return run_add(parsed.name, read_options(AddOptions, parsed))


def attack_main(name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """`python -m attacks.NAME`: the audit with that attack."""
    from fltoolkit import registry

    _survive_any_character()
    about = registry.describe(registry.attack_class(name))
    parser = argparse.ArgumentParser(f"python -m attacks.{name}", description=f"{about}.")
    add_options(parser, AuditOptions, options_of(registry.attack_class(name)))
    parsed = parser.parse_args(argv)
    sys.exit(guarded(lambda: run_audit(name, read_options(AuditOptions, parsed))))


def _survive_any_character() -> None:
    """η or ε to an output that has no such letter, as files on Windows, becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def guarded(command: Callable[[], int]) -> int:
    """Run a command; bad input ends in one sentence and code 2, an interrupt in code 130, an output that
    nobody reads on in code 141."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _nobody_reads() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


_ABOUT = "Privacy attacks and defenses for federated learning, measured in one pipeline."
