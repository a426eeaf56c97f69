"""Compiles the kernels for given compute capabilities and prints, as JSON, what they use. A process of its own.

Needs Triton without its interpreter, but no GPU: a case runs an operator's launcher on CPU tensors, and the launch is
compiled instead of run, with the argument types, alignments and options that a GPU would see.

    python tests/aot/compile_kernels.py 80 90 100
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vjepa_fast.ops import (
    activation,
    adamw_ema,
    ema,
    fp8_linear,
    grad_norm,
    latent_loss,
    layer_norm,
    patch_embed,
    rope3d,
    variance_loss,
    zero_tail,
)
from vjepa_fast.ops.triton_support import dispatch

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


def latent_loss_case(dtype: torch.dtype, width: int, exponent: float, levels: int = 1) -> None:
    rows, weights, affine = torch.zeros(64, dtype=torch.int64), torch.zeros(64), torch.zeros(levels * width)
    x = torch.zeros(64, levels * width, dtype=dtype)
    _, slopes = latent_loss._latent_loss_fwd(x, x, rows, weights, affine, affine, 1e-6, exponent, levels)
    latent_loss._latent_loss_bwd(slopes, weights, torch.zeros(()), dtype, levels)


def layer_norm_case(dtype: torch.dtype, width: int, with_branch: bool) -> None:
    x, affine = torch.zeros(64, width, dtype=dtype), torch.zeros(width)
    branch = x if with_branch else None
    _, y, mean, rstd = layer_norm._layer_norm_fwd(x, branch, affine, affine, 1e-6, dtype)
    layer_norm._layer_norm_bwd(y, branch, x, affine, mean, rstd)


def multi_tensor_case(run: Callable[[torch.Tensor, torch.Tensor], None], size: int) -> None:
    """`size` decides whether the tensors count as aligned."""
    run(torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16))


def adamw_ema_case(x: torch.Tensor, half: torch.Tensor) -> None:
    one = torch.zeros(())
    adamw_ema._adamw_ema([x], [x], [x], [x], [one], [x], [half], [half], [0], torch.zeros(1, 6).double(), one)


def rope3d_case(dtype: torch.dtype, num_heads: int, head_dim: int, precision: rope3d.Precision, back: bool) -> None:
    grid = (8, 16, 16)
    rope = rope3d.Rope(torch.zeros(64, dtype=torch.int32), grid, head_dim, dtype, "tiled", precision)
    qkv = torch.zeros(64, 3 * num_heads * head_dim, dtype=dtype)
    run = rope3d._rope3d_bwd if back else rope3d._rope3d_fwd
    run(qkv, rope.ids, rope.tables[0], rope.tables[2 if back else 1], grid, num_heads, rope.rounds)


def patch_embed_case(
    dtype: torch.dtype,
    width: int,
    kernel: tuple[int, int, int],
    clip: tuple[int, int, int],
    with_table: bool = False,
    pixel_dtype: torch.dtype = torch.uint8,
    channels_last: bool = True,
) -> None:
    sides = [n * unit for n, unit in zip(clip, kernel, strict=True)]
    clips = torch.zeros(2, *sides, 3, dtype=pixel_dtype)
    if not channels_last:
        clips = torch.zeros(2, 3, *sides, dtype=pixel_dtype).movedim(1, -1)
    weight = torch.zeros(width, 3, *kernel[:2], kernel[2])
    num_tokens = clip[0] * clip[1] * clip[2]
    table = torch.zeros(num_tokens, width) if with_table else None
    rows = None if with_table else torch.zeros(3 * num_tokens // 2, dtype=torch.int64)
    tokens, places = patch_embed._patch_embed_fwd(clips, weight, torch.zeros(width), rows, table, dtype)
    patch_embed._patch_embed_bwd(tokens, clips, places, *kernel[:2], torch.float32)


def gelu_case(dtype: torch.dtype, width: int) -> None:
    x = torch.zeros(64, width, dtype=dtype)
    activation._gelu_bwd(activation._gelu_fwd(x), x)


def swiglu_case(dtype: torch.dtype, width: int, halves: bool) -> None:
    x = torch.zeros(64, 2 * width, dtype=dtype)
    gate, value = x.chunk(2, dim=1) if halves else (x, x)
    activation._swiglu_bwd(activation._swiglu_fwd(gate, value), gate, value)


def zero_tail_case(dtype: torch.dtype, width: int) -> None:
    zero_tail._zero_tail(torch.zeros(64, width, dtype=dtype), torch.zeros(49, dtype=torch.int32))


def variance_loss_case(dtype: torch.dtype, width: int) -> None:
    x, cu_seqlens, weights = torch.zeros(64, width, dtype=dtype), torch.zeros(49, dtype=torch.int32), torch.zeros(24)
    loss, *statistics = variance_loss._variance_loss_fwd(x, cu_seqlens, 1305, weights)
    variance_loss._variance_loss_bwd(loss, x, cu_seqlens, 1305, *statistics)


CASES: dict[str, Callable[[], None]] = {
    "latent_loss bf16 1024 p=1": lambda: latent_loss_case(torch.bfloat16, 1024, 1.0),
    "latent_loss bf16 1408 p=1": lambda: latent_loss_case(torch.bfloat16, 1408, 1.0),
    "latent_loss bf16 1024 p=1.5": lambda: latent_loss_case(torch.bfloat16, 1024, 1.5),
    "latent_loss bf16 4 x 1024 p=1": lambda: latent_loss_case(torch.bfloat16, 1024, 1.0, 4),
    "latent_loss fp32 4096 p=1": lambda: latent_loss_case(torch.float32, 4096, 1.0),
    "layer_norm bf16 1024": lambda: layer_norm_case(torch.bfloat16, 1024, False),
    "layer_norm bf16 1024 + residual": lambda: layer_norm_case(torch.bfloat16, 1024, True),
    "layer_norm bf16 1408 + residual": lambda: layer_norm_case(torch.bfloat16, 1408, True),
    "layer_norm fp32 384 + residual": lambda: layer_norm_case(torch.float32, 384, True),
    "layer_norm fp32 4096 + residual": lambda: layer_norm_case(torch.float32, 4096, True),
    "sum_of_squares aligned": lambda: multi_tensor_case(lambda x, _: grad_norm._sum_of_squares([x]), 64),
    "sum_of_squares odd": lambda: multi_tensor_case(lambda x, _: grad_norm._sum_of_squares([x]), 63),
    "ema aligned": lambda: multi_tensor_case(lambda x, half: ema._ema([x], [x], torch.zeros(()).double(), [half]), 64),
    "ema odd": lambda: multi_tensor_case(lambda x, half: ema._ema([x], [x], torch.zeros(()).double(), [half]), 63),
    "adamw_ema aligned": lambda: multi_tensor_case(adamw_ema_case, 64),
    "adamw_ema odd": lambda: multi_tensor_case(adamw_ema_case, 63),
    "rope3d bf16 16 x 64": lambda: rope3d_case(torch.bfloat16, 16, 64, "fp32", False),
    "rope3d bf16 16 x 64 backward": lambda: rope3d_case(torch.bfloat16, 16, 64, "fp32", True),
    "rope3d bf16 16 x 64 reference": lambda: rope3d_case(torch.bfloat16, 16, 64, "reference", False),
    "rope3d bf16 16 x 80": lambda: rope3d_case(torch.bfloat16, 16, 80, "fp32", False),
    "rope3d bf16 16 x 88 backward": lambda: rope3d_case(torch.bfloat16, 16, 88, "fp32", True),
    "rope3d bf16 12 x 32": lambda: rope3d_case(torch.bfloat16, 12, 32, "fp32", False),
    "rope3d fp32 3 x 104": lambda: rope3d_case(torch.float32, 3, 104, "fp32", False),
    "patch_embed bf16 1024": lambda: patch_embed_case(torch.bfloat16, 1024, (2, 16, 16), (8, 16, 16)),
    "patch_embed bf16 1024 + table": lambda: patch_embed_case(torch.bfloat16, 1024, (2, 16, 16), (8, 16, 16), True),
    "patch_embed fp16 192 patch 14": lambda: patch_embed_case(torch.float16, 192, (2, 14, 14), (8, 16, 16)),
    "patch_embed bf16 40 patch 5": lambda: patch_embed_case(torch.bfloat16, 40, (4, 5, 5), (2, 7, 3)),
    "patch_embed bf16 1408 channels first": lambda: patch_embed_case(
        torch.bfloat16, 1408, (2, 16, 16), (8, 16, 16), channels_last=False
    ),
    "patch_embed bf16 1280 float image": lambda: patch_embed_case(
        torch.bfloat16, 1280, (1, 8, 8), (1, 28, 28), pixel_dtype=torch.bfloat16
    ),
    "patch_embed fp32 384": lambda: patch_embed_case(torch.float32, 384, (2, 16, 16), (8, 16, 16)),
    "gelu bf16 4096": lambda: gelu_case(torch.bfloat16, 4096),
    "gelu fp32 1537": lambda: gelu_case(torch.float32, 1537),
    "swiglu bf16 4096": lambda: swiglu_case(torch.bfloat16, 4096, False),
    "swiglu bf16 halves of 8192": lambda: swiglu_case(torch.bfloat16, 4096, True),
    "swiglu fp32 1023": lambda: swiglu_case(torch.float32, 1023, False),
    "quantise_rows bf16 1024": lambda: fp8_linear._quantise_rows(torch.zeros(64, 1024, dtype=torch.bfloat16)) and None,
    "quantise_rows fp32 4096": lambda: fp8_linear._quantise_rows(torch.zeros(64, 4096)) and None,
    "variance_loss bf16 1024": lambda: variance_loss_case(torch.bfloat16, 1024),
    "variance_loss fp32 391": lambda: variance_loss_case(torch.float32, 391),
    "zero_tail bf16 1024": lambda: zero_tail_case(torch.bfloat16, 1024),
    "zero_tail bf16 3072": lambda: zero_tail_case(torch.bfloat16, 3072),
}


SINCE = {"quantise_rows": 90}
"""Compute capability from which an operator exists, of those that do not exist everywhere."""


def main(capabilities: list[int]) -> None:
    """Print {kernel (case): {capability: resources}}."""
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((self, args, options))

    triton.runtime.jit.JITFunction.run = record
    found: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        for capability in capabilities:
            if capability < SINCE.get(name.split()[0], 0):
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
