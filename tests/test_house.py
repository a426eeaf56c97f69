"""No test file imports from another: what several need is in tests/helpers/ or in a file that holds no tests."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent

EXEMPT = ROOT / "parity"
"""Its test files still share fixtures and builders with each other."""


def imported(path: Path) -> set[str]:
    """Modules that a file may import, within functions too; `from a import b` counts as a and as a.b."""
    package = [ROOT.name, *path.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def is_test_module(name: str) -> bool:
    parts = name.split(".")
    return (
        parts[0] == ROOT.name
        and parts[-1].startswith("test_")
        and ROOT.parent.joinpath(*parts).with_suffix(".py").is_file()
    )


def test_no_test_file_is_imported() -> None:
    found = {
        str(path.relative_to(ROOT)): sorted(names)
        for path in ROOT.rglob("*.py")
        if not path.is_relative_to(EXEMPT)
        if (names := {name for name in imported(path) if is_test_module(name)})
    }
    assert not found
