"""Files appear whole or not at all."""

from __future__ import annotations

import json

import pytest

from fltoolkit.report.files import write_atomic, write_json


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})

    def halfway(p):
        p.write_text('{"a": ')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, halfway)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_numbers_that_json_lacks_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "r.json", {"a": float("inf")})
    assert list(tmp_path.iterdir()) == []
