"""The pytest plugin: leakage of your own models as tests.

    def test_my_model_keeps_its_secrets(leakage):
        leakage.check("my model", MyModel(), defenses=["clip:norm=0.5"], attack="inverting", max_psnr_db=15)

`pytest --leakage-update` measures and writes the baseline (ini `leakage_baseline`, by default leakage.json
beside the ini file); without it a test fails where the leak is no longer that of the baseline
(`fltoolkit.regression.decide`), in either direction, or above its limit. The numbers go into JUnit's
properties. Workers of pytest-xdist take turns at the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fltoolkit.regression.decide import Verdict

UPDATE = "run pytest --leakage-update"
PATIENCE = 600.0
"""Seconds to wait for another worker to let go of the baseline."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("leakage", "leakage of models (fltoolkit)")
    group.addoption("--leakage-update", action="store_true", help="measure, and write the baseline")
    group.addoption(
        "--leakage-reason",
        default="accepted with --leakage-update",
        metavar="TEXT",
        help="why what leaks now is accepted; kept in the baseline",
    )
    group.addoption(
        "--leakage-seed", type=int, default=1, metavar="N", help="seed of the new measurement (default: 1)"
    )
    parser.addini("leakage_baseline", "the baseline of leakage tests", default="leakage.json")


@pytest.fixture
def leakage(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Leakage:
    """Checks what models leak against the baseline; see `Leakage.check`."""
    config = request.config
    return Leakage(
        config.rootpath / str(config.getini("leakage_baseline")),
        bool(config.getoption("--leakage-update")),
        str(config.getoption("--leakage-reason")),
        int(config.getoption("--leakage-seed")),
        record_property,
    )


class Leakage:
    """What the fixture `leakage` gives."""

    def __init__(
        self, path: Path, updates: bool, reason: str, seed: int, record: Callable[[str, object], None]
    ) -> None:
        self._path, self._updates, self._reason, self._seed = path, updates, reason, seed
        self._record = record

    def check(
        self,
        name: str,
        model: Any = "mlp",
        *,
        data: Any = "digits",
        defenses: Sequence[str] = (),
        attack: str = "idlg",
        max_psnr_db: float | None = None,
        **case: Any,
    ) -> None:
        """Fail the test where `model` leaks otherwise than the baseline says under `name`, or above the
        limit.

        model: a module, or a name; data: a `fltoolkit.data.Dataset`, or a name. max_psnr_db: a limit of the
        mean PSNR, with which no baseline is needed. case: other fields of
        `fltoolkit.regression.baseline.Case` (victims, batch, clients, threat, local_epochs, local_batch,
        lr).
        """
        __tracebackhide__ = True
        from fltoolkit.regression.baseline import Case
        from fltoolkit.regression.gate import load_or_empty, measured

        given = {"model": model, "data": data}
        objects = {k: v for k, v in given.items() if not isinstance(v, str)}
        names: dict[str, Any] = {k: v if isinstance(v, str) else _called(v) for k, v in given.items()}
        wanted = Case(attack=attack, defenses=tuple(defenses), max_psnr_db=max_psnr_db, **names, **case)
        if self._updates:
            found = measured(wanted, 0, self._reason, **objects)
            with _locked(self._path):
                baseline = load_or_empty(self._path)
                type(baseline)({**baseline.entries, name: found}, baseline.alpha).save(self._path)
            self._tell({k: sum(v) / len(v) for k, v in found.measured.items()})
            return
        baseline = load_or_empty(self._path)
        entry = baseline.entries.get(name)
        if entry is None and max_psnr_db is None:
            pytest.fail(f"no baseline for {name!r} in {self._path}: {UPDATE}", pytrace=False)
        if entry is not None and entry.case != wanted:
            pytest.fail(f"{name!r} measures another case than the baseline: {UPDATE}", pytrace=False)
        self._judge(name, baseline, wanted, objects)

    def _judge(self, name: str, baseline: Any, case: Any, objects: dict[str, Any]) -> None:
        __tracebackhide__ = True
        from fltoolkit.regression.decide import judge, level_of
        from fltoolkit.regression.measure import measure

        level = level_of(baseline.alpha, baseline.entries)
        values = measure(case, self._seed, **objects)
        verdicts = judge(name, baseline.entries.get(name), values, level, case.max_psnr_db)
        self._tell({v.metric: v.new for v in verdicts})
        self._fail(verdicts)

    def _tell(self, means: dict[str, float]) -> None:
        for metric, value in means.items():
            self._record(f"leakage.{metric}", round(value, 4))

    def _fail(self, verdicts: Sequence[Verdict]) -> None:
        __tracebackhide__ = True
        from fltoolkit.regression.gate import failures
        from fltoolkit.regression.show import text

        if failures(verdicts):
            pytest.fail(text(verdicts, str(self._path)), pytrace=False)


def _called(value: Any) -> str:
    """What an object is called in the baseline."""
    return str(getattr(value, "name", type(value).__name__))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One worker at a time: whoever makes the file beside it."""
    lock = path.with_name(path.name + ".lock")
    until = time.monotonic() + PATIENCE
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() > until:
                raise TimeoutError(f"{lock} is held by another run; delete it if there is none") from None
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
