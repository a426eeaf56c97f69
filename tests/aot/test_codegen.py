"""What the compiled kernels use, against budgets.json: registers at most, no spills, shared memory, instructions.

A budget of registers is what ptxas of Triton 3.7 needs, rounded up to a multiple of 8, and 8 more: another ptxas
allocates a little differently. Regenerate, and print what is used now, with

    python tests/aot/test_codegen.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from vjepa_fast.common import markdown

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.json"
CAPABILITIES = ("80", "90", "100")
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}


def compile_all() -> dict[str, Any]:
    """In a process without the interpreter, with a cache of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VJEPA_FAST_OPS")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), *filter(None, [env.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, str(HERE / "compile_kernels.py"), *CAPABILITIES],
            env={**env, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels: dict[str, Any] = json.loads(done.stdout)["kernels"]
    return kernels


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    pytest.importorskip("triton")
    return compile_all()


@pytest.fixture(scope="module")
def budgets() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BUDGETS.read_text())
    return found


@pytest.mark.slow
def test_every_kernel_has_a_budget(compiled: dict[str, Any], budgets: dict[str, Any]) -> None:
    """A new one is compiled by COMPILED of its operator's tests, and gets a budget from the command above."""
    assert set(compiled) == set(budgets)
    kernels = {
        name
        for file in (HERE.parents[1] / "vjepa_fast" / "ops").rglob("*.py")
        for name in re.findall(r"^@jit\ndef (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert kernels and kernels == {name.split()[0] for name in compiled}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_within_budget(compiled: dict[str, Any], budgets: dict[str, Any], capability: str) -> None:
    over = []
    for name, by_capability in compiled.items():
        if capability not in by_capability:
            assert capability not in budgets[name]
            continue
        used, budget = by_capability[capability], budgets[name][capability]
        missing = set(budget["instructions"]) - set(used["instructions"])
        if used["stack"] or missing or used["registers"] > budget["registers"] or used["shared"] > budget["shared"]:
            over.append(f"{name}: uses {used}, budget {budget}")
        assert budget["shared"] <= SHARED_LIMIT[capability]
    assert not over, "\n".join(over)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fp32_products_are_fp32(compiled: dict[str, Any], capability: str) -> None:
    """The tensor cores would round the operands to TF32."""
    products = {"wgmma.mma_async", "mma.sync", "tcgen05.mma"}
    for name, by_capability in compiled.items():
        if " fp32 " in name and capability in by_capability:
            assert not products & set(by_capability[capability]["instructions"]), name


def _budget(used: dict[str, Any]) -> dict[str, Any]:
    return {
        "registers": -(-used["registers"] // 8) * 8 + 8,
        "shared": used["shared"],
        "instructions": used["instructions"],
    }


def table(compiled: dict[str, Any]) -> str:
    """What each kernel uses, in Markdown; a cell has one figure where all architectures agree."""
    rows = []
    for kernel, found in compiled.items():
        cells = []
        for key in ("registers", "stack", "shared", "instructions"):
            values = [found[c][key] for c in CAPABILITIES if c in found]
            texts = [", ".join(value) if isinstance(value, list) else str(value) for value in values]
            cells.append(texts[0] if len(set(texts)) == 1 else " / ".join(texts))
        rows.append([kernel, *cells])
    head = ["kernel (case)", f"registers, sm_{' / '.join(CAPABILITIES)}", "stack", "shared, bytes", "instructions"]
    return "\n".join(markdown.table(head, rows))


if __name__ == "__main__":
    lines, everything = [], compile_all()
    print(table(everything))
    for kernel, found in everything.items():
        rows = ",\n".join(f'    "{capability}": {json.dumps(_budget(used))}' for capability, used in found.items())
        lines.append(f'  "{kernel}": {{\n{rows}\n  }}')
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
