"""The pixel operator: one integer definition on every path, and that it says what the formula in real numbers says."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor
from torch.nn import functional as F

from tests.csrc.building import load_emulator
from tests.masking.mask_cases import needs_extension
from tests.ops.pixel_cases import EXAMPLES, Case, cases, emulate
from vjepa_fast.ops.clip_pixels import CHROMA_444, MATRICES, Chroma, clip_pixels, clip_pixels_ref, colour_ints, operator

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}


def run(case: Case, device: torch.device = CPU) -> Tensor:
    made_by = operator(device)
    assert made_by is not None
    arguments = [value.to(device) if isinstance(value, Tensor) else value for value in case.arguments()]
    return made_by(*arguments).cpu()


@needs_extension
@settings(max_examples=300)
@given(cases())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
@example(EXAMPLES[4])
def test_cpu_operator_equals_the_definition_to_the_bit(case: Case) -> None:
    assert torch.equal(run(case), case.reference())


@needs_extension
def test_threads_change_nothing() -> None:
    case = Case((9, 60, 80), (3, 5, 50, 70), (64, 48), True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(case), case.reference())
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The threads of the CUDA kernel, run on the CPU, with checks of arithmetic and of misaligned stores."""
    return load_emulator("emulated_pixels.cpp", tmp_path_factory.mktemp("emulator"))


@settings(max_examples=150)
@given(case=cases())
@example(case=EXAMPLES[0])
@example(case=EXAMPLES[2])
@example(case=EXAMPLES[3])
def test_threads_of_the_kernel_equal_the_definition_to_the_bit(emulator: ctypes.CDLL, case: Case) -> None:
    assert torch.equal(emulate(emulator, case.arguments()), case.reference())


@pytest.mark.gpu
@needs_extension
@settings(max_examples=300)
@given(cases())
@example(EXAMPLES[0])
@example(EXAMPLES[3])
def test_cuda_operator_equals_the_definition_to_the_bit(case: Case) -> None:
    device = torch.device("cuda")
    if operator(device) is None:
        pytest.skip("the extension has no CUDA kernels for this device")
    assert torch.equal(run(case, device), case.reference())


def in_real_numbers(case: Case) -> np.ndarray:
    """The clip by the formulas of F.interpolate and of H.273, in float64, without rounding."""

    def bilinear(plane: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        y, x = np.clip(y, 0, plane.shape[1] - 1), np.clip(x, 0, plane.shape[2] - 1)
        top, left = np.floor(y).astype(int), np.floor(x).astype(int)
        bottom, right = np.minimum(top + 1, plane.shape[1] - 1), np.minimum(left + 1, plane.shape[2] - 1)
        down = plane[:, top] + (plane[:, bottom] - plane[:, top]) * (y - top)[:, None]
        return down[..., left] + (down[..., right] - down[..., left]) * (x - left)

    top, left, height, width = case.box
    y = top + np.clip((np.arange(case.size[0]) + 0.5) * height / case.size[0] - 0.5, 0, height - 1)
    x = left + np.clip((np.arange(case.size[1]) + 0.5) * width / case.size[1] - 0.5, 0, width - 1)
    x = x[::-1] if case.flip else x
    luma, cb, cr = (plane.numpy().astype(float) for plane in case.planes())
    step_y, step_x, site_y, site_x = case.chroma
    chroma_y, chroma_x = (y - site_y / 2) / step_y, (x - site_x / 2) / step_x
    unit, largest = 2 ** (case.depth - 8), 2**case.depth - 1
    luma, cb, cr = bilinear(luma, y, x), bilinear(cb, chroma_y, chroma_x), bilinear(cr, chroma_y, chroma_x)
    luma = luma / largest if case.full_range else (luma - 16 * unit) / (219 * unit)
    cb, cr = ((value - 128 * unit) / (largest if case.full_range else 224 * unit) for value in (cb, cr))
    weight_red, weight_blue = WEIGHTS[case.matrix]
    red, blue = luma + 2 * (1 - weight_red) * cr, luma + 2 * (1 - weight_blue) * cb
    green = (luma - weight_red * red - weight_blue * blue) / (1 - weight_red - weight_blue)
    return np.clip(255 * np.stack([red, green, blue], axis=-1), 0, 255)


@pytest.mark.parametrize("depth", [8, 10, 12])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", sorted(WEIGHTS))
def test_colours_are_those_of_the_formula(matrix: str, full_range: bool, depth: int) -> None:
    for chroma in ((2, 2, 1, 0), (2, 2, 1, 1), (1, 2, 0, 0), (1, 1, 0, 0)):
        case = Case((2, 71, 95), (5, 7, 60, 83), (48, 64), True, depth, chroma, matrix, full_range)
        error = case.reference().numpy() - in_real_numbers(case)
        assert np.abs(error).max() < 1 and abs(error.mean()) < 0.03


def test_colours_that_everybody_knows() -> None:
    """BT.601 bars of 75 % (ITU-R BT.801): black, white, red, green, blue in limited range; and JPEG's red."""

    def colour(y: int, u: int, v: int, **how: Any) -> list[int]:
        planes = (torch.tensor([[[value]]], dtype=torch.uint8) for value in (y, u, v))
        ints = colour_ints(**how)
        return clip_pixels(*planes, (0, 0, 1, 1), (1, 1), chroma=CHROMA_444, colour=ints).flatten().tolist()

    assert [colour(16, 128, 128), colour(235, 128, 128), colour(126, 128, 128)] == [[0] * 3, [255] * 3, [128] * 3]
    for found, wanted in (
        (colour(65, 100, 212), [191, 0, 0]),
        (colour(112, 72, 58), [0, 191, 0]),
        (colour(35, 212, 114), [0, 0, 191]),
        (colour(76, 85, 255, full_range=True), [254, 0, 0]),
        (colour(63, 102, 240, matrix="bt709"), [255, 0, 0]),
    ):
        assert np.abs(np.array(found) - wanted).max() <= 1
    for matrix in MATRICES:
        for depth in (8, 10, 14):
            for full_range in (False, True):
                ints = np.array(colour_ints(matrix, full_range, depth)).reshape(4, 3)
                # Gray stays gray, whatever the rounding of the coefficients.
                assert matrix == "rgb" or len(set((ints[:3] @ [9000, 16384, 16384] + ints[3]) >> 20)) == 1


@pytest.mark.parametrize("size", [(40, 56), (64, 64), (90, 31)])
@pytest.mark.parametrize("flip", [False, True])
def test_resize_is_the_rounded_interpolation_of_the_cut(size: tuple[int, int], flip: bool) -> None:
    rgb = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 50, 66, 3), dtype=np.uint8))
    found = clip_pixels(*rgb.unbind(-1), (4, 9, 41, 52), size, flip=flip, chroma=CHROMA_444, colour=colour_ints("rgb"))
    cut = rgb[:, 4:45, 9:61].permute(0, 3, 1, 2).double()
    exact = F.interpolate(cut, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    exact = exact.flip(2) if flip else exact
    assert (found - exact).abs().max() < 0.75 and (found.double() == exact.round()).double().mean() > 0.93


def test_what_is_not_resized_is_untouched() -> None:
    rgb = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    found = clip_pixels(*rgb.unbind(-1), (2, 3, 9, 11), (9, 11), chroma=CHROMA_444, colour=colour_ints("rgb"))
    assert torch.equal(found, rgb[:, 2:11, 3:14])
    gray = rgb[..., 0]
    found = clip_pixels(gray, gray, gray, (0, 0, 16, 16), (16, 16), chroma=CHROMA_444, colour=colour_ints("gray", True))
    assert torch.equal(found, gray[..., None].expand(-1, -1, -1, 3))


PLANES = tuple(torch.zeros(2, *shape, dtype=torch.uint8) for shape in ((8, 10), (4, 5), (4, 5)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"box": (0, 0, 9, 10)}, r"box is \(0, 0, 9, 10\); expected .* within a frame of 8 x 10"),
        ({"box": (-1, 0, 4, 4)}, "box is"),
        ({"box": (0, 7, 4, 4)}, "box is"),
        ({"box": (0, 0, 0, 4)}, "box is"),
        ({"size": (0, 4)}, r"size is \(0, 4\)"),
        ({"size": (4, 2**15 + 1)}, r"size is \(4, 32769\)"),
        ({"y": PLANES[0].new_zeros(2, 8, 2**15 + 1)}, "a side of 32769; expected 32768 at most"),
        ({"depth": 16}, "depth is 16; expected 8 to 14"),
        ({"depth": 10}, "expected torch.uint16 of 10 bits"),
        ({"y": PLANES[0].float()}, "dtypes torch.float32"),
        ({"u": PLANES[1][:, :3]}, "have shapes"),
        ({"y": PLANES[0][0]}, "have shapes"),
    ],
)
def test_what_users_get_wrong(changed: dict[str, Any], message: str) -> None:
    arguments = dict(zip("yuv", PLANES, strict=True), box=(0, 0, 8, 10), size=(4, 4))
    with pytest.raises(ValueError, match=message):
        clip_pixels(**{**arguments, **changed})


@needs_extension
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, PLANES[0].float(), "y has dtype Float; expected Byte or UInt16"),
        (1, PLANES[1].to(torch.uint16), "u has dtype UInt16, y has Byte"),
        (2, PLANES[2][:1], "v has 1 frames, y has 2"),
        (1, PLANES[1][:, :3], "u and v differ"),
        (0, PLANES[0][0], "y has 2 dimensions"),
        (0, PLANES[0][:, :, :0], "columns of a component is 0"),
        (3, [0, 0, 8], "box has 3 integers"),
        (3, [0, 0, 9, 10], "height of box is 9; expected 1 to 8"),
        (3, [8, 0, 1, 1], "top of box is 8"),
        (3, [0, -1, 1, 1], "left of box is -1"),
        (3, [0, 0, 2**62, 2**62], "height of box"),
        (4, [4, 2**15 + 1], "a side of size"),
        (4, [0, 4], "a side of size"),
        (6, 10, "depth is 10; expected 8 to 8"),
        (7, [0, 2, 1, 0], "a subsampling of chroma is 0"),
        (7, [2, 2, 1, -1], "a site of chroma"),
        (7, [2, 2], "chroma has 2 integers"),
        (8, [2**31] * 12, "an entry of colour"),
        (8, [2**20] * 12, "add up to"),
        (8, [1] * 11, "colour has 11 integers"),
    ],
)
def test_what_the_operator_refuses(place: int, value: Any, message: str) -> None:
    arguments: list[Any] = [*PLANES, [0, 0, 8, 10], [4, 4], False, 8, [2, 2, 1, 0], list(colour_ints())]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vjepa_fast.clip_pixels(*arguments)


@needs_extension
def test_operator_is_registered_as_torch_wants_it() -> None:
    made_by, (*planes, box, size, flip, depth, chroma, colour) = operator(CPU), EXAMPLES[2].arguments()
    assert made_by is not None
    torch.library.opcheck(made_by.default, (*planes, box, size, flip, depth, chroma, colour))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def make(*planes: Tensor) -> Tensor:
        return made_by(*planes, box, size, flip, depth, chroma, colour).float() * 2

    assert torch.equal(make(*planes), EXAMPLES[2].reference().float() * 2)


@pytest.mark.parametrize(
    ("environment", "num_warnings"), [({"VJEPA_FAST_EXT": "0"}, 0), ({"VJEPA_FAST_OPS": "ref"}, 0), ({}, 1)]
)
def test_without_the_extension_pytorch_makes_the_same_clips(
    environment: dict[str, str], num_warnings: int, tmp_path: Path
) -> None:
    """In a process of its own, whose library is missing."""
    script = (
        "import pathlib, warnings\n"
        "from vjepa_fast.common import extension\n"
        f"extension.LIBRARY = pathlib.Path({str(tmp_path / '_C.so')!r})\n"
        "from tests.ops.pixel_cases import EXAMPLES\n"
        "from vjepa_fast.ops.clip_pixels import clip_pixels\n"
        "case = EXAMPLES[0]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        made = clip_pixels(*case.planes(), case.box, case.size, flip=case.flip)\n"
        "assert made.equal(case.reference())\n"
        "print(sum('cropped and resized by PyTorch' in str(w.message) for w in caught), len(caught))\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VJEPA_FAST_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **environment},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout == f"{num_warnings} {num_warnings}\n"


def test_kernel_needs_no_stack(tmp_path: Path) -> None:
    """For all architectures that are shipped: registers within what its launch bounds allow, and no spills."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    # The kernel alone, without PyTorch's headers, which take half a minute.
    source = tmp_path / "kernel.cu"
    source.write_text(
        f'#include "{ROOT / "csrc/clip_pixels.h"}"\nusing namespace vjepa_fast;\n'
        "template <typename Sample> __global__ void __launch_bounds__(128, 4)\n"
        "kernel(const __grid_constant__ Job job) {\n"
        "  clip_pixels_thread<Sample>(job, int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int32_t(blockIdx.y));\n}\n"
        "template __global__ void kernel<uint8_t>(const __grid_constant__ Job);\n"
        "template __global__ void kernel<uint16_t>(const __grid_constant__ Job);\n"
    )
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ("80", "90", "100")]
    done = subprocess.run(
        [nvcc, "-c", "-std=c++20", "-O3", "-Xptxas", "-v", *codes, "-o", str(tmp_path / "kernel.o"), str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert frames == [("0", "0", "0")] * 6
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 6 and max(registers) <= 128


def test_default_chroma_is_that_of_most_codecs() -> None:
    case = EXAMPLES[0]
    found = clip_pixels(*case.planes(), case.box, case.size, flip=case.flip)
    assert torch.equal(found, clip_pixels_ref(*case.arguments()))
    assert not torch.equal(
        found, clip_pixels(*case.planes(), case.box, case.size, flip=case.flip, chroma=Chroma(2, 2, 1, 1))
    )
