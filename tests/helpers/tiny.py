"""The smallest run that has every part."""

from __future__ import annotations

from pathlib import Path

import yaml

from vjepa_fast.config import Config
from vjepa_fast.config import overrides as override_file
from vjepa_fast.config.schema import MaskConfig

TINY = """
model: {model_name: vit_tiny, embed_dim: 32, depth: 2, num_heads: 2, pred_depth: 1, pred_embed_dim: 16,
        pred_num_heads: 2}
mask:
  masks:
  - {num_blocks: 2, spatial_scale: [0.3, 0.3], aspect_ratio: [0.75, 1.5]}
  - {num_blocks: 1, spatial_scale: [0.5, 0.5], aspect_ratio: [0.75, 1.5]}
data: {dataset_fpcs: [4], global_batch_size: 4, fps: 8, crop_size: 32, patch_size: 8, num_workers: 0}
optimization: {epochs: 10, ipe: 4, ipe_scale: 1.0, warmup: 1, lr: 1.0e-3, ema: [0.99, 1.0]}
train: {log_every: 2, checkpoint_every: 3, device: cpu}
"""


def tiny_config(csv_path: Path, cache: Path, *changes: str) -> Config:
    """Args: csv_path: manifest. cache: of keyframe indices. changes: overrides."""
    raw = yaml.safe_load(TINY)
    raw["data"] |= {"datasets": [str(csv_path)], "cache_dir": str(cache)}
    override_file.apply(raw, changes, MaskConfig().masks)
    return Config.model_validate(raw)
