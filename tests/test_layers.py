"""No part of the package imports one that lies above it, and no modules import each other in a circle as they load."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vjepa_fast

ROOT = Path(vjepa_fast.__file__).parent

LAYERS = (
    "common", "config", "ops", "masking", "models", "data", "optim", "distributed", "checkpoints", "swapping",
    "inference", "cost", "train", "evaluation", "bench", "cli",
)  # fmt: skip
"""From low to high; docs/architecture.md says why."""

FACADES = {"vjepa_fast", "vjepa_fast.__main__", "vjepa_fast.submit"}
"""Names of others, handed on: with everything in interop/ they may import from anywhere."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_typing_only(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(path: Path, known: dict[str, Path], *, lazy: bool) -> set[str]:
    """Modules of the package that a file imports; `lazy`: also within functions and for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vjepa_fast"):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in known else str(node.module))
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names if name.name in known)
        for child in ast.iter_child_nodes(node):
            apart = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if lazy or not (apart or isinstance(child, ast.If) and is_typing_only(child)):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found & set(known)


def layer_of(module: str) -> str | None:
    if module in FACADES or module.startswith("vjepa_fast.interop"):
        return None
    return module.split(".")[1]


def test_every_folder_is_a_layer() -> None:
    assert {layer_of(name) for name in modules()} - {None} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_runs_up(layer: str) -> None:
    known = modules()
    upward = [
        f"{name} -> {target}"
        for name, path in known.items()
        if layer_of(name) == layer
        for target in imports_of(path, known, lazy=True)
        if (above := layer_of(target)) is not None and LAYERS.index(above) > LAYERS.index(layer)
    ]
    assert not upward


def test_no_part_imports_a_facade() -> None:
    """What they hand on has a home of its own."""
    known = modules()
    found = [
        f"{name} -> {target}"
        for name, path in known.items()
        if layer_of(name) is not None
        for target in imports_of(path, known, lazy=True)
        if target != "vjepa_fast" and layer_of(target) is None
    ]
    assert not found


def test_no_circles() -> None:
    known = modules()
    graph = {name: imports_of(path, known, lazy=False) - {name, "vjepa_fast"} for name, path in known.items()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                walk(target, (*way, name))
            done.add(name)

    for name in graph:
        walk(name, ())
