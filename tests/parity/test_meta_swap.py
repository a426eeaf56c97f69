"""The references' own training scripts with vf.swap and without it: same losses, and checkpoints that go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vjepa_fast as vf
from vjepa_fast.bench.reference import normalise

from . import reference_v1, reference_v2, reference_v21
from .cases import Case, make_batch, relative_difference
from .cases_v21 import DenseCase
from .meta_swap_main import EPOCHS, IPE, VERSIONS
from .reference import ignore_sdp_warning


def run(name: str, *jobs: str) -> list[tuple[list[float], int]]:
    """For each job the loss of every step, and how often our attention ran."""
    folders = [Path(job.removeprefix("swap:")) for job in jobs]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.parity.meta_swap_main", name, *jobs]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=300)
    found = [json.loads((folder / "losses.json").read_text()) for folder in folders]
    return [(one["losses"], one["calls"]) for one in found]


@pytest.mark.parametrize("name", VERSIONS)
def test_training_script(name: str, tmp_path: Path) -> None:
    version = VERSIONS[name]
    if not os.environ.get(version.variable):
        pytest.skip(f"{version.variable} does not name a checkout")
    case = version.case
    (expected, none), (found, calls) = run(name, f"{tmp_path}/theirs", f"swap:{tmp_path}/ours")
    assert none == 0 and len(expected) == IPE * EPOCHS >= 5
    assert calls == IPE * EPOCHS * (2 * case.depth + case.pred_depth)
    assert found == pytest.approx(expected, rel=1e-5)
    if name == "v1 noised":
        # A script that is started again draws other noise.
        return
    # The checkpoint that was written in the middle, taken up by the script alone.
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "ours" / version.kept.format(EPOCHS - 2), tmp_path / "again" / version.latest)
    [(resumed, none)] = run(name, f"{tmp_path}/again")
    assert none == 0 and resumed == pytest.approx(expected[-IPE:], rel=1e-5)
    last = [torch.load(tmp_path / folder / version.latest, weights_only=True) for folder in ("theirs", "ours")]
    assert [list(part) for part in last[0]["opt"]["state"].values()] == [
        list(part) for part in last[1]["opt"]["state"].values()
    ]
    for part in ("encoder", "predictor", "target_encoder"):
        assert list(last[0][part]) == list(last[1][part])
        for key, value in last[0][part].items():
            difference = (last[1][part][key] - value).norm()
            assert difference <= 1e-3 * value.norm(), key


def _randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


SHAPES = {
    "as trained": ({}, (8, 32, 32)),
    "fewer frames": ({}, (4, 32, 32)),
    "more frames": ({}, (12, 32, 32)),
    "other sides": ({}, (8, 40, 24)),
    "trained on wide frames": ({"img_size": (32, 48)}, (8, 32, 48)),
    "counted on the trained grid": ({"handle_nonsquare_inputs": False}, (8, 32, 64)),
    "sides that leave a rest": ({}, (8, 35, 32)),
    "images": ({"num_frames": 1}, (1, 32, 32)),
    "larger images": ({"num_frames": 1}, (1, 48, 48)),
}


@reference_v2.needs_reference
@ignore_sdp_warning
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "sincos"])
@pytest.mark.parametrize("name", SHAPES)
def test_v2_at_other_sizes(name: str, rope: bool) -> None:
    """Encoder and predictor place tokens where the reference does, or leave it to the reference's own code."""
    options, (frames, height, width) = SHAPES[name]
    if not rope and name in ("trained on wide frames", "sides that leave a rest"):
        pytest.skip("the reference fails")
    case = Case("sizes", use_rope=rope)
    encoder = _randomised(reference_v2.build_encoder(case, **options))
    clips = torch.randn(2, 3, frames, height, width)
    clips = clips[:, :, 0] if options.get("num_frames") == 1 else clips
    with torch.no_grad():
        fast = vf.swap(encoder)[0]
        assert relative_difference(fast(clips), encoder(clips)) <= 1e-5
        ids = torch.stack([torch.randperm(9)[:5].sort().values for _ in range(2)])
        assert relative_difference(fast(clips, ids), encoder(clips, ids)) <= 1e-5


@reference_v2.needs_reference
@ignore_sdp_warning
def test_v2_predictor_of_wide_frames() -> None:
    """It counts positions in squares of the trained height."""
    case = Case("sizes")
    predictor = _randomised(
        reference_v2.modules().predictor.VisionTransformerPredictor(
            img_size=(32, 48),
            patch_size=8,
            num_frames=8,
            tubelet_size=2,
            embed_dim=case.embed_dim,
            predictor_embed_dim=32,
            depth=2,
            num_heads=2,
            use_rope=True,
            use_mask_tokens=True,
            num_mask_tokens=2,
            zero_init_mask_tokens=False,
        )
    )
    ids = torch.stack([torch.randperm(4 * 4 * 6) for _ in range(2)])
    context, target = ids[:, :20].sort().values, ids[:, 20:60].sort().values
    x = torch.randn(2, 20, case.embed_dim)
    with torch.no_grad():
        expected = predictor(x, context, target)
        assert relative_difference(vf.swap(None, predictor)[1](x, context, target), expected) <= 1e-5


@reference_v1.needs_reference
@pytest.mark.filterwarnings("ignore:.*sdp_kernel:FutureWarning")
@pytest.mark.parametrize("shape", [(8, 32, 32), (4, 32, 32), (8, 40, 24)], ids=str)
def test_v1_at_other_sizes(shape: tuple[int, int, int]) -> None:
    encoder = _randomised(
        reference_v1.modules().vit.VisionTransformer(
            img_size=32, patch_size=8, num_frames=8, tubelet_size=2, embed_dim=48, depth=2, num_heads=3
        )
    )
    clips = torch.randn(2, 3, *shape)
    with torch.no_grad():
        assert relative_difference(vf.swap(encoder)[0](clips), encoder(clips)) <= 1e-5


@pytest.mark.skipif(not os.environ.get("VJEPA21_REFERENCE"), reason="VJEPA21_REFERENCE does not name a checkout")
@pytest.mark.parametrize("frames", [8, 1], ids=["video", "image"])
def test_v21_modules(frames: int) -> None:
    """Features of all levels and of the last, both heads, and gradients; images have an embedding of their own."""
    case = DenseCase("swap_v21", frames=(frames,))
    torch.manual_seed(0)
    triple = reference_v21.build(case)
    for parameter in (*triple.encoder.parameters(), *triple.predictor.parameters()):
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    batch = make_batch(case, 0)
    clips = [normalise(clip, torch.float32) for clip in batch.clips]
    modules = triple.encoder, triple.predictor
    outputs = []
    for encoder, predictor, _ in ((*modules, None), vf.swap(*modules)):
        z = encoder(clips, batch.masks_enc, training_mode=True)
        mod = "image" if frames == 1 else "video"
        (pred,), (context,) = predictor(z, batch.masks_enc, batch.masks_pred, mod=mod)
        plain = encoder.backbone(clips[0])
        loss = torch.stack([out.square().mean() for out in (*pred, *context, plain)]).sum()
        names = [name for module in modules for name, _ in module.named_parameters()]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        outputs.append({str(i): out for i, out in enumerate((*z[0], *pred, *context, plain))} | found)
    assert outputs[0].keys() == outputs[1].keys()
    for name, value in outputs[0].items():
        assert relative_difference(outputs[1][name], value) <= 1e-5, name
