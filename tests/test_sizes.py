"""No file is longer than 400 lines, and no function of package, benchmarks and experiments longer than 60."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE, MAX_FUNCTION = 400, 60
ROOT = Path(__file__).parents[1]
CODE = [path for name in ("vjepa_fast", "benchmarks", "experiments") for path in (ROOT / name).rglob("*.py")]
TESTS = list((ROOT / "tests").rglob("*.py"))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last, without signature and docstring.

    Without the signature, as the options of a verb are the parameters of a function.
    """
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is compiled by Triton: `jit` or `triton.jit`, with arguments or not."""
    decorators = (one.func if isinstance(one, ast.Call) else one for one in function.decorator_list)
    return any(ast.unparse(one) in ("jit", "triton.jit") for one in decorators)


def long_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            count = body_lines(node)
            if count > MAX_FUNCTION:
                yield node.name, count


def test_files() -> None:
    found = {path: len(path.read_text().splitlines()) for path in [*CODE, *TESTS]}
    assert len(found) > 400
    offenders = [f"{path.relative_to(ROOT)}: {count}" for path, count in found.items() if count > MAX_FILE]
    assert not offenders, f"files of more than {MAX_FILE} lines; cut them at a seam: {offenders}"


def test_functions() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}: {name} {count}" for path in CODE for name, count in long_functions(path.read_text())
    ]
    assert not offenders, f"functions of more than {MAX_FUNCTION} lines: {offenders}"


@pytest.mark.parametrize("decorator", ["", "@app.command()\n", "@jit\n", "@triton.jit(debug=True)\n"])
@pytest.mark.parametrize("statements", [MAX_FUNCTION, MAX_FUNCTION + 1])
def test_what_counts(decorator: str, statements: int) -> None:
    signature = "def f(\n" + "    x: int,\n" * 100 + ") -> None:\n"
    text = decorator + signature + '    """Doc.\n\n    More.\n    """\n' + "    x = 1\n" * statements
    expected = [("f", statements)] if statements > MAX_FUNCTION and "jit" not in decorator else []
    assert list(long_functions(text)) == expected
