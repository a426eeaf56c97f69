"""The patch-embedding kernels against PyTorch: pixels of every layout, dtype and size, with and without positions."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from tests.ops.conftest import FAR
from tests.ops.tolerance import assert_as_good
from vjepa_fast.ops import patch_embed as module
from vjepa_fast.ops.patch_embed import normalise, patch_embed, patch_embed_ref
from vjepa_fast.ops.triton_support import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Clips [B, T, H, W], tubelet and patch, width.
SIZES = [
    ((2, 4, 32, 48), (2, 16), 24),
    ((3, 1, 28, 42), (1, 14), 31),
    ((1, 8, 24, 16), (4, 8), 70),
    ((1, 1, 64, 32), (1, 32), 7),
    ((1, 1, 5, 5), (1, 5), 1),
]
LAUNCHED = {f"_patch_embed_{name}_kernel": 1 for name in ("fold", "fwd", "bwd", "unfold")}


def grid_size(shape: tuple[int, ...], kernel: tuple[int, int]) -> int:
    return shape[1] // kernel[0] * (shape[2] // kernel[1]) * (shape[3] // kernel[1])


def parameters(kernel: tuple[int, int], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(width)
    weight = 0.02 * torch.randn(width, 3, kernel[0], kernel[1], kernel[1], generator=g)
    return weight.to(device), torch.randn(width, generator=g).to(device)


def pixels(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)


def rows_of(count: int, total: int, device: torch.device) -> Tensor:
    """Unordered, some more than once."""
    return torch.randint(total, (count,), generator=torch.Generator().manual_seed(2)).to(device)


def check(
    clips: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
    table: Tensor | None = None,
    spread_grad: bool = False,
) -> None:
    """Tokens and gradients by kernel, by PyTorch, and in fp64."""

    def run(choice: str, dtype: torch.dtype) -> list[Tensor]:
        wide = dtype == torch.float64
        leaves = [(x.detach().double() if wide else x.detach()).requires_grad_() for x in (weight, bias)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VJEPA_FAST_OPS", choice)
            out = patch_embed(
                clips.double() if wide and clips.is_floating_point() else clips,
                *leaves,
                rows,
                dtype,
                table.double() if wide and table is not None else table,
            )
            g = torch.Generator().manual_seed(3)
            grad = torch.randn(out.shape, generator=g).to(upstream).to(dtype).to(clips.device)
            if spread_grad:
                grad = grad[:, :1].expand(out.shape)
            return [out, *torch.autograd.grad(out, leaves, grad)]

    upstream = dtype
    for name, *triple in zip(
        ["tokens", "dweight", "dbias"], run("triton", dtype), run("ref", dtype), run("ref", torch.float64), strict=True
    ):
        assert_as_good(name, *triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, kernel, width", SIZES)
def test_kept_tokens_with_positions(kernels, shape, kernel, width, dtype):
    num_tokens = grid_size(shape, kernel)
    table = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(4)).to(kernels)
    check(
        pixels(shape, kernels),
        *parameters(kernel, width, kernels),
        rows_of(29, shape[0] * num_tokens, kernels),
        dtype,
        table,
    )
    assert dispatch.launches == LAUNCHED


@pytest.mark.parametrize("shape, kernel, width", [SIZES[0], SIZES[1], SIZES[-1]])
def test_all_tokens(kernels, shape, kernel, width):
    check(pixels(shape, kernels), *parameters(kernel, width, kernels), None, torch.bfloat16)
    assert dispatch.launches == LAUNCHED


@pytest.mark.parametrize(
    "pixel_dtype, dtype",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_float_clips_are_taken_as_they_are(kernels, pixel_dtype, dtype):
    shape, kernel = (2, 4, 16, 24), (2, 8)
    clips = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1)).to(kernels, pixel_dtype)
    check(clips, *parameters(kernel, 20, kernels), rows_of(9, 24, kernels), dtype)
    assert dispatch.launches == LAUNCHED


def test_layouts(kernels):
    kernel, dtype = (2, 8), torch.bfloat16
    weight, bias = parameters(kernel, 20, kernels)
    shape = (2, 4, 16, 24)
    clips, rows = pixels(shape, kernels), rows_of(13, 24, kernels)
    channels_first = clips.movedim(-1, 1).contiguous().movedim(1, -1)
    # At an odd address, and pixels four bytes apart.
    crop = pixels((2, 6, 23, 33), kernels)[:, 1:5, 3:19, 5:29]
    with_alpha = torch.cat([clips, clips[..., :1]], -1)[..., :3]
    transposed = clips.permute(3, 1, 2, 0, 4).contiguous().permute(3, 1, 2, 0, 4)
    for some in (channels_first, crop, with_alpha, transposed):
        assert not some.is_contiguous()
        check(some, weight, bias, rows, dtype)
    check(pixels((2, 1, 16, 24), kernels).expand(2, 2, 16, 24, 3), weight, bias, None, dtype)


def test_strided_parameters_rows_and_gradient(kernels):
    weight, bias = parameters((2, 8), 20, kernels)
    clips, rows = pixels((2, 4, 16, 24), kernels), rows_of(26, 24, kernels)
    table = torch.randn(20, 12, device=kernels).t()
    check(
        clips, weight.transpose(3, 4), bias.repeat_interleave(2)[::2], rows[::2], torch.float32, table, spread_grad=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_ranges_of_tokens_and_the_same_bits_again(kernels, dtype):
    weight, bias = parameters((1, 4), 16, kernels)
    clips, rows = pixels((3, 2, 24, 20), kernels), rows_of(277, 180, kernels)
    check(clips, weight, bias, rows, dtype)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    first, second = (
        torch.autograd.grad(patch_embed(clips, *leaves, rows, dtype).float().square().sum(), leaves) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("far, tubelet", [(0, 1), (1, 1), (1, 3), (2, 1), (4, 1)])
def test_pixels_beyond_two_to_the_31_elements(kernels, far, tubelet):
    """One dimension of three has steps of FAR: clip, frame (token and tubelet), line of tokens, channel."""
    if not dispatch.interpreted():
        pytest.skip("needs host memory")
    shape = [3 if i == far else n for i, n in enumerate((1, 1, 2, 2, 3))]
    near = pixels(tuple(shape[:4]), kernels)
    strides = [FAR if i == far else stride for i, stride in enumerate(near.stride())]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    # In front lies what an offset that overflows reaches: zeros.
    memory = torch.frombuffer(mmap.mmap(-1, 2**31 + 2 * FAR + 4096, flags=flags), dtype=torch.uint8)
    clips = memory.as_strided(shape, strides, 2**31)
    clips.copy_(near)
    patch = 1 if far == 2 else 2
    check(clips, *parameters((tubelet, patch), 16, kernels), None, torch.float32)
    assert dispatch.launches == LAUNCHED


def test_empty(kernels):
    weight, bias = (x.requires_grad_() for x in parameters((2, 8), 20, kernels))
    clips = pixels((2, 4, 16, 24), kernels)
    for out in (
        patch_embed(clips, weight, bias, torch.empty(0, dtype=torch.int64, device=kernels), torch.bfloat16),
        patch_embed(clips[:0], weight, bias, None, torch.bfloat16),
    ):
        assert out.shape == (0, 20)
        for grad in torch.autograd.grad(out.sum(), (weight, bias)):
            assert torch.equal(grad, torch.zeros_like(grad))
    assert not dispatch.launches


def test_pixels_that_were_not_asked_for_do_not_matter(kernels):
    weight, bias = (x.requires_grad_() for x in parameters((2, 8), 20, kernels))
    clips = torch.randn(2, 4, 16, 24, 3, device=kernels)
    clips[0, :2, :8, :8] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        out = patch_embed(clips, weight, bias, torch.arange(1, 24, device=kernels), dtype)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (weight, bias)))


def test_pytorch_serves_what_the_kernels_do_not(kernels):
    weight, bias = parameters((2, 8), 20, kernels)
    clips = torch.randn(1, 2, 8, 16, 3, device=kernels, requires_grad=True)
    table = torch.randn(2, 20, device=kernels, requires_grad=True)
    patch_embed(clips, weight, bias, None, torch.float32).sum().backward()
    patch_embed(clips.detach(), weight, bias, None, torch.float32, table).sum().backward()
    patch_embed(clips.detach().double(), weight.double(), bias.double(), None, torch.float64)
    assert clips.grad is not None and table.grad is not None and not dispatch.launches
    with torch.no_grad():
        patch_embed(clips, weight, bias, None, torch.float32, table)
    assert dispatch.launches == {"_patch_embed_fold_kernel": 1, "_patch_embed_fwd_kernel": 1}


def test_opcheck(kernels):
    weight, bias = parameters((2, 8), 20, kernels)
    clips, rows = pixels((1, 4, 8, 16), kernels), rows_of(5, 4, kernels)
    table = torch.randn(4, 20, device=kernels)
    forward, backward = torch.ops.vjepa_fast.patch_embed_fwd.default, torch.ops.vjepa_fast.patch_embed_bwd.default
    channels_first = clips.movedim(-1, 1).contiguous().movedim(1, -1)
    torch.library.opcheck(forward, (channels_first, weight, bias, None, None, torch.bfloat16))
    arguments = clips, weight, bias, rows, table, torch.bfloat16
    torch.library.opcheck(forward, arguments)
    tokens, places = forward(*arguments)
    torch.library.opcheck(backward, (tokens.t().contiguous().t(), clips, places, 2, 8, torch.float32))


def test_compiles_whole(kernels):
    weight, bias = (x.requires_grad_() for x in parameters((2, 8), 20, kernels))
    clips, rows = pixels((2, 4, 16, 24), kernels), rows_of(13, 24, kernels)
    table = torch.randn(12, 20, device=kernels)

    def used(weight: Tensor, bias: Tensor) -> Tensor:
        return patch_embed(clips, weight.sin(), bias, rows, torch.bfloat16, table).float().square().sum()

    eager = torch.autograd.grad(used(weight, bias), (weight, bias))
    compiled = torch.autograd.grad(
        torch.compile(used, fullgraph=True, backend="aot_eager")(weight, bias), (weight, bias)
    )
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    assert dispatch.launches == {name: 2 for name in LAUNCHED}


def test_bits_of_pytorch_with_positions():
    """Positions are added as a table rounded to the dtype of the tokens, whichever way the rows are given."""
    weight, bias = parameters((2, 8), 20, torch.device("cpu"))
    clips, table = pixels((2, 4, 16, 24), torch.device("cpu")), torch.randn(12, 20)
    for dtype in DTYPES:
        plain = patch_embed_ref(clips, weight, bias, None, dtype, None) + table.to(dtype).repeat(2, 1)
        assert torch.equal(patch_embed_ref(clips, weight, bias, None, dtype, table), plain)
        rows = torch.tensor([23, 0, 7, 7, 12])
        assert torch.equal(
            patch_embed_ref(clips, weight, bias, rows, dtype, table),
            patch_embed_ref(clips, weight, bias, rows, dtype, None) + table.to(dtype)[rows % 12],
        )


def test_statistics_of_a_trace_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        normalise(torch.zeros(2, 3, dtype=torch.uint8), torch.float16)
    assert type(normalise(torch.zeros(2, 3, dtype=torch.uint8), torch.float16)) is Tensor


@pytest.mark.parametrize(
    "clips, table, message",
    [
        (torch.zeros(1, 2, 8, 8, 4), None, "clips have shape .*4\\]"),
        (torch.zeros(1, 2, 8, 9, 3), None, "8, 9"),
        (torch.zeros(1, 2, 8, 8, 3), torch.zeros(2, 5), "table has shape \\[2, 5\\]; expected \\[1, 5\\]"),
    ],
)
def test_bad_operands(clips, table, message):
    with pytest.raises(ValueError, match=message):
        patch_embed(clips, torch.zeros(5, 3, 2, 8, 8), torch.zeros(5), None, torch.float32, table)


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
    tokens, places = module._patch_embed_fwd(clips, weight, torch.zeros(width), rows, table, dtype)
    module._patch_embed_bwd(tokens, clips, places, *kernel[:2], torch.float32)


COMPILED = {
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
}
"""What tests/aot compiles."""
