"""Who may import whom: fltoolkit imports neither attacks nor defenses, and those import each other never."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "fltoolkit": {"attacks", "defenses"},
    "attacks": {"defenses", "attacks"},
    "defenses": {"attacks", "defenses"},
}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_stay_behind_the_walls(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        crossed = imported(ast.parse(file.read_text(encoding="utf-8"))) & (FORBIDDEN[package] | {"."})
        assert not crossed, f"{file.relative_to(ROOT)} imports {crossed}"


def test_the_check_sees_imports_inside_functions():
    assert imported(ast.parse("def f():\n    from attacks.dlg import DLG\n    import defenses.clip")) == {
        "attacks",
        "defenses",
    }
