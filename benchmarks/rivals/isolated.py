"""A rival in a process of its own, so that no simulator's threads, settings or memory reach another's.

Between its turns the process waits on a pipe and uses no processor time.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

import numpy as np

from rivals import Client, Cohorts, load

Arguments = tuple[str, list[Client], int, float, int]
NOTHING: Mapping[str, str] = MappingProxyType({})


class RivalError(RuntimeError):
    """A rival could not be built or failed in a round; `reason` is its last line, `args[0]` the trace."""

    @property
    def reason(self) -> str:
        return str(self.args[0]).strip().splitlines()[-1]


def _serve(pipe: Connection, name: str, arguments: Arguments, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        rival = load(name)(*arguments)
        pipe.send((True, rival.version))
        while True:
            method, values = pipe.recv()
            pipe.send((True, getattr(rival, method)(*values)))
            if method == "close":
                return
    except EOFError:
        return
    except Exception:
        pipe.send((False, traceback.format_exc()))


class Isolated:
    """The rival called `name`, started at once; `ready()` waits until it is built."""

    def __init__(
        self, name: str, arguments: Arguments, threads: int, environment: Mapping[str, str] = NOTHING
    ) -> None:
        self.name, self.version = name, ""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # pfl takes a process for a data loader's, without communication, unless it has the main one's name.
        self.process = context.Process(
            target=_serve, name="MainProcess", args=(theirs, name, arguments, threads)
        )
        changes = {"OMP_NUM_THREADS": str(threads), **environment}
        before = {key: os.environ.get(key) for key in changes}
        os.environ.update(changes)
        try:
            self.process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        theirs.close()

    def ready(self) -> Isolated:
        self.version = self.wait()
        return self

    def send(self, method: str, *values: Any) -> None:
        self.pipe.send((method, values))

    def wait(self) -> Any:
        """What the method called by the last `send` returned."""
        try:
            good, value = self.pipe.recv()
        except EOFError:
            raise RivalError(f"the process of {self.name!r} ended") from None
        if not good:
            raise RivalError(value)
        return value

    def rounds(self, cohorts: Cohorts) -> float:
        self.send("rounds", cohorts)
        return float(self.wait())

    def row(self) -> np.ndarray:
        self.send("row")
        return np.asarray(self.wait())

    def close(self) -> None:
        if self.process.is_alive():
            self.send("close")
            with suppress(RivalError):
                self.wait()
            self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()
