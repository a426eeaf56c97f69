"""Compiles the kernels for given compute capabilities and prints, as JSON, what they use. A process of its own.

Needs Triton without its interpreter, but no GPU: a case runs an operator's launcher on CPU tensors, and the launch is
compiled instead of run, with the argument types, alignments and options that a GPU would see. The cases lie beside the
other tests of an operator, as COMPILED in tests/ops/test_<op>.py.

    python tests/aot/compile_kernels.py 80 90 100
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vjepa_fast.ops.triton_support import dispatch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Instructions that a budget may ask for.
INSTRUCTIONS = re.compile(
    r"ld\.global(?:\.[a-z0-9:]+)*?\.v[24]\.b32|st\.global(?:\.[a-z0-9:]+)*?\.v[24]\.b32|"
    r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|cp\.async\.cg"
)


def source_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """What the launcher of Triton would compile for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = args[index] if index < len(args) else options[name]
        # The launcher makes a constant of a 1, as of a contiguous stride.
        if value is None or index >= len(args) or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, stack and shared memory as cuobjdump reports them, and the instructions found."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [str(TOOLS / "cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)}
    found = {
        re.sub(r"\.(?:L[12]::[a-z_]+|nc|ca|cg)(?=\.)", "", text) for text in INSTRUCTIONS.findall(compiled.asm["ptx"])
    }
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "instructions": sorted(found),
    }


def cases() -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, launch and the lowest compute capability of what COMPILED of every tests/ops/test_<op>.py names."""
    for file in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        if "\nCOMPILED = " in file.read_text(encoding="utf-8"):
            module = importlib.import_module(f"tests.ops.{file.stem}")
            for name, case in module.COMPILED.items():
                yield name, case, getattr(module, "COMPILED_FROM", 0)


def main(capabilities: list[int]) -> None:
    """Print {kernel (case): {capability: resources}}."""
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((self, args, options))

    triton.runtime.jit.JITFunction.run = record
    found: dict[str, dict[str, Any]] = {}
    for name, case, lowest in cases():
        for capability in capabilities:
            if capability < lowest:
                continue
            launched.clear()
            dispatch.assumed_capability = capability
            case()
            for kernel, args, options in launched:
                found.setdefault(f"{kernel.fn.__name__} ({name})", {})[str(capability)] = resources(
                    triton.compile(
                        source_of(kernel, args, options),
                        target=GPUTarget("cuda", capability, 32),
                        options={key: options[key] for key in ("num_warps", "num_stages") if key in options},
                    )
                )
    print(json.dumps({"triton": triton.__version__, "kernels": found}))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
