"""Probes the demo's encoder for position, velocity and shape of the main object, with linear probes.

Train and test clips come from different files. A probe sees the mean of all tokens of a clip. Beside it stand the same
probe on the encoder as it was before training, on the mean of the raw tubelets (what the encoder is given, pooled as
its tokens are), and, with no pooling at all, on every pixel of the shrunken clip: this last probe knows where in the
frame and when something was bright, which pooling hides from the others. Rotary positions are relative and the picture
wraps around, so the mean of the tokens cannot tell where an object is; that column is there to show it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vjepa_fast.config.schema import Config, DataConfig
from vjepa_fast.data.decode.index import load_index
from vjepa_fast.data.decode.pyav import decode_clip
from vjepa_fast.data.decode.request import ClipRequest, VideoSource
from vjepa_fast.data.generated.registry import SYNTHETIC
from vjepa_fast.data.generated.synthetic import SyntheticSet, load_labels
from vjepa_fast.data.manifest import read_manifest
from vjepa_fast.data.sampling import Box, clip_step
from vjepa_fast.distributed.parallel import whole_copy
from vjepa_fast.evaluation.linear_probe import accuracy, r2
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.train.pretraining import Pretraining

if TYPE_CHECKING:
    from vjepa_fast.train.trainer import Trainer

PIXEL_SIDE = 16
"""Height and width to which clips are shrunk for the probe on pixels."""


@dataclass
class LabelledClips:
    """Clips of a split with what is true of their main object."""

    clips: Tensor
    """uint8 [N, T, H, W, 3]: whole frames around the middle of each video."""
    position: Tensor
    """float64 [N, 4]: cosine and sine of 2 pi (x, y) of the centre in the middle frame; the picture wraps around."""
    velocity: Tensor
    """float64 [N, 2]: mean velocity over the clip, fractions of the frame a frame."""
    class_id: Tensor
    """int64 [N]."""


def read_split(manifest: Path, cfg: DataConfig) -> LabelledClips:
    """The middle clip of each video of a manifest, without augmentation."""
    labels = load_labels(manifest)
    num_frames = cfg.dataset_fpcs[0]
    clips, positions, velocities, classes = [], [], [], []
    for path in read_manifest(str(manifest))[0]:
        index = load_index(path, cfg.cache_dir)
        step = clip_step(
            index.avg_fps,
            num_frames,
            fps=cfg.fps,
            duration=cfg.duration,
            frame_step=cfg.frame_step,
            round_fps=cfg.round_fps,
        )
        first = max(0, (index.num_frames - num_frames * step) // 2)
        frames = np.minimum(first + step * np.arange(num_frames), index.num_frames - 1)
        whole = Box(0, 0, index.height, index.width)
        clips.append(decode_clip(ClipRequest(VideoSource(path, index), frames, whole, cfg.crop_size, flip=False)))
        truth = labels[path]
        angle = 2 * np.pi * truth.position[frames[num_frames // 2]]
        positions.append(np.concatenate([np.cos(angle), np.sin(angle)]))
        velocities.append(truth.velocity[frames[0] : frames[-1] + 1].mean(0))
        classes.append(truth.class_id)
    position, velocity = torch.tensor(np.array(positions)), torch.tensor(np.array(velocities))
    return LabelledClips(torch.stack(clips), position, velocity, torch.tensor(classes))


@torch.no_grad()
def pooled_features(encoder: VisionTransformer, clips: Tensor, batch_size: int = 32) -> Tensor:
    """Mean over the tokens of each clip, fp32 [N, D] on the CPU."""
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = []
    for start in range(0, len(clips), batch_size):
        out = encoder(clips[start : start + batch_size].to(device))
        assert isinstance(out, Tensor)
        parts.append(out.float().mean(1).cpu())
    encoder.train()
    return torch.cat(parts)


def pooled_pixels(clips: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Mean over the raw tubelets of each clip, fp32 [N, tubelet_size * patch_size^2 * 3].

    Args:
        clips: uint8 [N, T, H, W, 3], T a multiple of tubelet_size, H and W of patch_size.
    """
    tubelets = rearrange(
        clips, "n (t a) (h b) (w c) rgb -> n (t h w) (a b c rgb)", a=tubelet_size, b=patch_size, c=patch_size
    )
    return tubelets.float().mean(1)


def pixel_features(clips: Tensor) -> Tensor:
    """Clips shrunk to PIXEL_SIDE and flattened, fp32 [N, T * PIXEL_SIDE^2 * 3]."""
    num_clips, num_frames = clips.shape[:2]
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).float()
    small = F.interpolate(frames, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
    return small.reshape(num_clips, num_frames, -1).flatten(1)


def probe(train: LabelledClips, test: LabelledClips, x: Tensor, x_test: Tensor) -> dict[str, float]:
    """Test scores of linear probes on one kind of features: R2 of position and velocity, accuracy of the shape."""
    return {
        "position_r2": r2(x, train.position, x_test, test.position),
        "velocity_r2": r2(x, train.velocity, x_test, test.velocity),
        "shape_accuracy": accuracy(x, train.class_id, x_test, test.class_id),
    }


def untrained_encoder(cfg: Config) -> VisionTransformer:
    """The encoder as the run began with it."""
    state = torch.get_rng_state()
    torch.manual_seed(cfg.train.seed)
    encoder = VJEPA.from_config(cfg).encoder
    torch.set_rng_state(state)
    return encoder


def probe_scores(cfg: Config, model: VJEPA, clips: SyntheticSet) -> dict[str, dict[str, float]]:
    """Scores of the trained encoder, the untrained one, and raw pixels with and without pooling."""
    train = read_split(clips.train_csv, cfg.data)
    test = read_split(clips.val_csv, cfg.data)
    encoders = {"trained encoder": copy.deepcopy(model.encoder), "untrained encoder": untrained_encoder(cfg)}
    scores = {
        name: probe(train, test, pooled_features(encoder, train.clips), pooled_features(encoder, test.clips))
        for name, encoder in encoders.items()
    }
    pooled = (pooled_pixels(split.clips, cfg.data.tubelet_size, cfg.data.patch_size) for split in (train, test))
    scores["raw tubelets, pooled"] = probe(train, test, *pooled)
    scores["raw pixels, unpooled"] = probe(train, test, pixel_features(train.clips), pixel_features(test.clips))
    return scores


def probe_run(trainer: Trainer) -> None:
    """Probe what a run on the demo's clips has learned, if train.probe asks for it; all processes call it."""
    cfg, task = trainer.cfg, trainer.task
    if not (cfg.train.probe and isinstance(task, Pretraining)):
        return
    model = whole_copy(task.model) if task.in_shards else task.model
    if trainer.processes.is_first and model is not None:
        probe_table(cfg, model.to(trainer.device), clips_of(task), trainer.folder, trainer.console)


def clips_of(task: Pretraining) -> SyntheticSet:
    """The demo's clips that a run is trained on."""
    train_csv = task.manifests[SYNTHETIC]
    return SyntheticSet(train_csv, train_csv.with_name("val.csv"))


def probe_table(cfg: Config, model: VJEPA, clips: SyntheticSet, folder: Path, console: Console) -> None:
    """Print the scores and write them to probe.json in the run folder."""
    scores = probe_scores(cfg, model, clips)
    (folder / "probe.json").write_text(json.dumps(scores, indent=2) + "\n")
    table = Table(title="Linear probes on held-out videos (1 is perfect)")
    for column in ("features", "position R2", "velocity R2", "shape accuracy"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    console.print(table)
