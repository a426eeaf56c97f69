"""Small files in the layouts of the reference, and what is read of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import yaml

from vjepa_fast.config import Config, load_config

# Every required key and no other, with values that are nobody's default.
SMALL = """
folder: /runs/small
meta:
  dtype: BFLOAT16
data:
  datasets: [/data/a.csv, /data/b.npy]
  dataset_fpcs: [16, 8]
  batch_size: 6
  tubelet_size: 2
  fps: 5
  patch_size: 14
data_aug: {}
loss:
  loss_exp: 2.0
mask:
- {spatial_scale: [0.2, 0.3], temporal_scale: [0.5, 1.0], aspect_ratio: [0.5, 2.0], num_blocks: 3}
model:
  model_name: vit_base
  pred_depth: 5
  pred_embed_dim: 96
  use_mask_tokens: true
optimization:
  weight_decay: 0.01
  final_weight_decay: 0.02
  epochs: 7
  warmup: 2
  start_lr: 1e-5
  lr: 2e-4
  final_lr: 3e-6
  ema: [0.99, 1.0]
"""


def changed(text: str, **changes: Any) -> dict[str, Any]:
    """A file with `section__key=value` changed, or taken out with the value `...`."""
    raw: dict[str, Any] = yaml.safe_load(text)
    for name, value in changes.items():
        *sections, key = name.split("__")
        node = raw
        for section in sections:
            node = node[int(section) if section.isdecimal() else section]
        if value is ...:
            del node[key]
        else:
            node[key] = value
    return raw


def load(tmp_path: Path, raw: dict[str, Any], *overrides: str) -> Config:
    """The config of tmp_path/meta.yaml, written with these contents; a warning is an error."""
    file = tmp_path / "meta.yaml"
    file.write_text(yaml.safe_dump(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_config(file, overrides)
